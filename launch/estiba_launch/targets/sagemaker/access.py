"""Checks of a job's role and of the S3 addresses in its request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.check import Check, Requirements
from estiba_launch.jobs.s3 import aws_errors
from estiba_launch.targets.sagemaker.client import DENIED, code_of
from estiba_launch.targets.sagemaker.role import get, trusts_sagemaker

READ = ("s3:GetObject", "s3:ListBucket")
CHANGE = (*READ, "s3:PutObject", "s3:DeleteObject")
ACTIONS = {"InputDataConfig": READ, "CheckpointConfig": CHANGE}
"""What SageMaker does with the role at an address of the request; at every other one it writes."""
WRITE = ("s3:PutObject",)


def checks(needs: Requirements, iam: Any, s3: Any, region: str | None) -> Iterator[Check]:
    """The role, its rights on every address, and the region of each bucket."""
    addresses = [(field, uri) for field, uri in needs.addresses if uri.startswith("s3://")]
    if needs.role:
        found, arn = role(needs.role, iam)
        yield found
        for field, uri in addresses if arn else ():
            yield rights(str(arn), field, uri, iam)
    names = (uri.removeprefix("s3://").partition("/")[0] for _, uri in addresses if "s3://arn:" not in uri)
    for name in dict.fromkeys(names):
        yield bucket(name, region, s3)


def role(name: str, iam: Any) -> tuple[Check, str | None]:
    """Whether the role exists and SageMaker may assume it, and its ARN where it exists."""
    try:
        found = get(name.rpartition("/")[2], iam)
    except LaunchError as error:
        status = "unknown" if "refuses" in str(error) or "reached" in str(error) else "fail"
        seen = str(error).splitlines()[0][:200]
        return Check(name="aws role", status=status, seen=seen, remedy="see the role's name"), None
    arn = str(found["Arn"])
    if not trusts_sagemaker(found):
        remedy = "add sagemaker.amazonaws.com to the Principal of its trust policy"
        return Check(name="aws role", status="fail", seen=f"{arn}: SageMaker may not assume it", remedy=remedy), arn
    return Check(name="aws role", status="ok", seen=arn), arn


def rights(arn: str, field: str, uri: str, iam: Any) -> Check:
    """What the role's own policies say about one address. AWS simulates it, nothing is read or written."""
    actions = ACTIONS.get(field.partition("[")[0].partition(".")[0], WRITE)
    whole, _, key = uri.removeprefix("s3://").partition("/")
    place, objects = f"arn:{arn.split(':')[1]}:s3:::{whole}", "/"
    if whole.startswith("arn:"):
        place, objects, key = uri.removeprefix("s3://"), "/object/", ""
    # An address may be an object or a folder of objects.
    inside = [f"{place}{objects}{one}" for one in ({key, f"{key.rstrip('/')}/object"} if key else {"object"})]
    try:
        pages = iam.get_paginator("simulate_principal_policy").paginate(
            PolicySourceArn=arn,
            ActionNames=list(actions),
            ResourceArns=[place, *sorted(inside)],
            ContextEntries=[
                {"ContextKeyName": "s3:prefix", "ContextKeyValues": [key], "ContextKeyType": "string"},
            ],
        )
        allowed = {
            (one["EvalActionName"], one.get("EvalResourceName") == place)
            for page in pages
            for one in page["EvaluationResults"]
            if one["EvalDecision"] == "allowed"
        }
    except aws_errors() as error:
        denied = code_of(error) in DENIED
        remedy = "your login needs iam:SimulatePrincipalPolicy" if denied else "AWS did not answer; try again"
        return Check(name="aws s3 access", status="unknown", seen=f"{uri}: {str(error)[:120]}", remedy=remedy)
    missing = [action for action in actions if (action, action == "s3:ListBucket") not in allowed]
    if missing:
        seen = f"{field} {uri}: the role may not {', '.join(missing)}"
        remedy = "add it to the role's policy, unless the bucket's own policy allows it"
        return Check(name="aws s3 access", status="fail", seen=seen, remedy=remedy)
    return Check(name="aws s3 access", status="ok", seen=f"{field} {uri}: the role may {', '.join(actions)}")


def bucket(name: str, region: str | None, s3: Any) -> Check:
    """Whether a bucket is in the region of the job."""
    try:
        answer = s3.head_bucket(Bucket=name)
    except aws_errors() as error:
        answer = getattr(error, "response", {})
        if code_of(error) in ("404", "NoSuchBucket"):
            seen, remedy = f"s3://{name}: no such bucket", "create it, or correct the job file"
            return Check(name="aws bucket", status="fail", seen=seen, remedy=remedy)
    # A refusal names the region as well.
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    found = answer.get("BucketRegion") or headers.get("x-amz-bucket-region")
    if not found or not region:
        seen = f"s3://{name}: in {found or 'an unknown region'}, the job in {region or 'none'}"
        return Check(name="aws bucket", status="unknown", seen=seen, remedy="your login needs s3:ListBucket on it")
    if found != region:
        seen = f"s3://{name}: in {found}, the job in {region}"
        remedy = f"run the job in {found} (--region {found}), or use a bucket in {region}"
        return Check(name="aws bucket", status="fail", seen=seen, remedy=remedy)
    return Check(name="aws bucket", status="ok", seen=f"s3://{name}: in {found}")
