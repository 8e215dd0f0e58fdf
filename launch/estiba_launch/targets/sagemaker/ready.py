"""Checks of `estiba doctor` for AWS: login, region and clock; `access` and `quotas` check what a job needs."""

from __future__ import annotations

import email.utils
import os
import time
from collections.abc import Callable, Iterator
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from estiba_launch.jobs.check import Check, Requirements
from estiba_launch.jobs.s3 import aws_errors
from estiba_launch.targets.sagemaker import access, quotas
from estiba_launch.targets.sagemaker.client import NOT_AWS

CLOCK_SKEW_S = 240
"""AWS refuses requests whose clock is off by more than five minutes."""
LOGIN_REMEDY = "run `aws configure` or `aws sso login` for --target sagemaker"


def checks(needs: Requirements, *, network: bool) -> Iterator[Check]:
    """Region and credentials; with `network` also the identity, the role, the addresses, the quotas and the clock."""
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    core = botocore.session.get_session()
    if not network:
        # The last source of credentials is the EC2 metadata service, over the network.
        core.get_component("credential_provider").remove("iam-role")
    else:
        core.set_config_variable("metadata_service_timeout", 2)
        core.set_config_variable("metadata_service_num_attempts", 1)
    region = needs.region or core.get_config_variable("region")
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
    refusals: tuple[type[Exception], ...] = (*aws_errors(), KeyError)
    try:
        identity = session.client("sts", config=config).get_caller_identity()["Arn"]
    except refusals as error:
        known = isinstance(error, ClientError)
        remedy = "log in again (`aws sso login`)" if known else "see whether this machine reaches AWS"
        if isinstance(error, KeyError | ResponseParserError):
            remedy = NOT_AWS
        status = "warn" if known else "unknown"
        seen = " ".join(str(error).split())[:160]
        yield Check(name="aws credentials", status=status, seen=seen, remedy=remedy)
        yield clock(endpoint(region or "us-east-1"))
        return
    yield Check(name="aws credentials", status="ok", seen=f"{identity} by {credentials.method}")
    iam, s3, limits = (session.client(name, config=config) for name in ("iam", "s3", "service-quotas"))
    yield from access.checks(needs, iam, s3, region)
    yield from quotas.checks(needs, limits)
    yield clock(endpoint(region or "us-east-1"))


def endpoint(region: str) -> str:
    """An address that answers with AWS's time."""
    import botocore.session

    sts = botocore.session.get_session().create_client("sts", region_name=region)
    return os.environ.get("AWS_ENDPOINT_URL_S3") or str(sts.meta.endpoint_url)


def clock(url: str, now: Callable[[], float] = time.time) -> Check:
    """Compare this machine's clock with the Date header of AWS, or of the endpoint that replaces it."""
    try:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=8) as answer:
                date = answer.headers["Date"]
        except HTTPError as refused:
            # A refusal carries the date too.
            date = refused.headers["Date"]
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except (URLError, OSError, TypeError, ValueError) as error:
        seen = f"cannot ask {url} ({str(error)[:80]})"
        return Check(name="clock", status="unknown", seen=seen, remedy="see the network; AWS refuses clocks 5 min off")
    skew_s = now() - theirs
    good = abs(skew_s) < CLOCK_SKEW_S
    remedy = "" if good else "set the clock (timedatectl set-ntp true): AWS refuses requests more than 5 min off"
    return Check(name="clock", status="ok" if good else "fail", seen=f"{skew_s:+.0f} s from {url}", remedy=remedy)
