"""Is this machine ready for AWS? Login, region, role, quota and clock, for `estiba doctor`."""

from __future__ import annotations

import email.utils
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ..check import Check
from ..errors import LaunchError
from .client import DENIED, code_of
from .role import get, trusts_sagemaker

if TYPE_CHECKING:
    from ..doctor import Subject

CLOCK_SKEW_S = 240
"""AWS refuses requests signed more than five minutes off."""
LOGIN_REMEDY = "run `aws configure` or `aws sso login` for --target sagemaker"


def checks(subject: Subject, *, network: bool) -> Iterator[Check]:
    """Region and credentials; with `network` also who we are, the role, the quota and the clock."""
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    core = botocore.session.get_session()
    if not network:
        # The last place credentials are looked for is the EC2 metadata service, over the network.
        core.get_component("credential_provider").remove("iam-role")
    else:
        core.set_config_variable("metadata_service_timeout", 2)
        core.set_config_variable("metadata_service_num_attempts", 1)
    region = subject.region or core.get_config_variable("region")
    remedy = "" if region else "set AWS_REGION, or pass --region, for --target sagemaker"
    yield Check(name="aws region", status="ok" if region else "warn", seen=region or "none set", remedy=remedy)
    try:
        credentials = core.get_credentials()
        reason = "none found"
    except BotoCoreError as error:
        credentials, reason = None, str(error)
    if credentials is None:
        yield Check(name="aws credentials", status="warn", seen=reason, remedy=LOGIN_REMEDY)
        if network:
            yield clock(endpoint(region or "us-east-1"))
        return
    if not network:
        yield Check(name="aws credentials", status="ok", seen=f"by {credentials.method}, not tried")
        return
    config = Config(connect_timeout=4, read_timeout=8, retries={"mode": "standard", "total_max_attempts": 2})
    session = boto3.Session(botocore_session=core, region_name=region or "us-east-1")
    try:
        identity = session.client("sts", config=config).get_caller_identity()
    except (BotoCoreError, ClientError) as error:
        known = isinstance(error, ClientError)
        remedy = "log in again (`aws sso login`)" if known else "see whether this machine reaches AWS"
        status = "warn" if known else "unknown"
        yield Check(name="aws credentials", status=status, seen=str(error)[:160], remedy=remedy)
        yield clock(endpoint(region or "us-east-1"))
        return
    yield Check(name="aws credentials", status="ok", seen=f"{identity['Arn']} by {credentials.method}")
    if subject.role:
        yield role(subject.role, session.client("iam", config=config))
    for kind, count in subject.instances:
        yield quota(kind, count, subject.spot, session.client("service-quotas", config=config))
    yield clock(endpoint(region or "us-east-1"))


def role(name: str, iam: Any) -> Check:
    """Whether the role is there and SageMaker may take it."""
    short = name.rpartition("/")[2]
    try:
        found = get(short, iam)
    except LaunchError as error:
        status = "unknown" if "refuses" in str(error) or "reached" in str(error) else "fail"
        return Check(
            name="aws role", status=status, seen=str(error).splitlines()[0][:200], remedy="see the role's name"
        )
    if not trusts_sagemaker(found):
        remedy = "add sagemaker.amazonaws.com to the Principal of its trust policy"
        return Check(name="aws role", status="fail", seen=f"{found['Arn']}: SageMaker may not assume it", remedy=remedy)
    return Check(name="aws role", status="ok", seen=str(found["Arn"]))


def quota(kind: str, count: int, spot: bool, quotas: Any) -> Check:
    """How many hosts of a type the account may train on at once."""
    from botocore.exceptions import BotoCoreError, ClientError

    wanted = f"{kind} for {'spot ' if spot else ''}training job usage"
    try:
        pages = quotas.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
        value = next((q["Value"] for page in pages for q in page["Quotas"] if q["QuotaName"] == wanted), None)
    except (BotoCoreError, ClientError) as error:
        why = "your login needs servicequotas:ListServiceQuotas" if code_of(error) in DENIED else "AWS did not answer"
        return Check(name="aws quota", status="unknown", seen=f"{wanted}: {str(error)[:120]}", remedy=why)
    if value is None:
        seen = f"{wanted}: AWS lists no such quota in this region"
        return Check(name="aws quota", status="unknown", seen=seen, remedy="see whether the region has this type")
    seen = f"{wanted}: {value:g}, the job takes {count}"
    if value < count:
        remedy = f"ask for more: Service Quotas > Amazon SageMaker > '{wanted}'"
        return Check(name="aws quota", status="fail", seen=seen, remedy=remedy)
    return Check(name="aws quota", status="ok", seen=seen)


def endpoint(region: str) -> str:
    """Something that answers with AWS's time."""
    return (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or f"https://sts.{region}.amazonaws.com/"
    )


def clock(url: str, now: Callable[[], float] = time.time) -> Check:
    """This machine's clock against the Date header of AWS (or its stand-in)."""
    try:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=8) as answer:
                date = answer.headers["Date"]
        except HTTPError as refused:
            # A refusal has the time on it as well.
            date = refused.headers["Date"]
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except (URLError, OSError, TypeError, ValueError) as error:
        seen = f"cannot ask {url} ({str(error)[:80]})"
        return Check(name="clock", status="unknown", seen=seen, remedy="see the network; AWS refuses clocks 5 min off")
    skew_s = now() - theirs
    good = abs(skew_s) < CLOCK_SKEW_S
    remedy = "" if good else "set the clock (timedatectl set-ntp true): AWS refuses requests more than 5 min off"
    return Check(name="clock", status="ok" if good else "fail", seen=f"{skew_s:+.0f} s from {url}", remedy=remedy)
