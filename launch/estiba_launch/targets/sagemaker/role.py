"""The role that a job assumes, by ARN or by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from estiba_launch.errors import LaunchError
from estiba_launch.targets.sagemaker import client
from estiba_launch.targets.sagemaker.client import code_of, explained

NOTEBOOK_METADATA = Path("/opt/ml/metadata/resource-metadata.json")


def arn_of(role: str, region: str | None = None) -> str:
    """The ARN of a role that is given by ARN (returned as it is) or name. Raises LaunchError, AwsUnavailable."""
    if role.startswith("arn:"):
        return role
    import boto3

    # Roles belong to the account, but the region decides the partition (aws, aws-cn, ...).
    found = get(role, client.connect(region or boto3.Session().region_name or "us-east-1").iam)
    if not trusts_sagemaker(found):
        raise LaunchError(
            f"role {role}: SageMaker may not assume it; add sagemaker.amazonaws.com to its trust policy's Principal"
        )
    return str(found["Arn"])


def of_notebook(region: str | None = None) -> str | None:
    """The execution role of the SageMaker notebook or Studio space that this runs in; None elsewhere.

    Raises LaunchError, AwsUnavailable. Source: `get_execution_role` of the SageMaker SDK.
    """
    try:
        metadata = json.loads(NOTEBOOK_METADATA.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if found := metadata.get("ExecutionRoleArn"):
        return str(found)
    clients = client.connect(region)
    with explained("the notebook's execution role"):
        if "DomainId" not in metadata and "ResourceName" in metadata:
            described = clients.sagemaker.describe_notebook_instance(NotebookInstanceName=metadata["ResourceName"])
            return str(described["RoleArn"])
        import boto3

        # arn:aws:sts::ACCOUNT:assumed-role/ROLE/SESSION
        caller = str(boto3.client("sts", region_name=clients.region).get_caller_identity()["Arn"]).split("/")
    return str(get(caller[1], clients.iam)["Arn"]) if caller[0].endswith(":assumed-role") else None


def get(name: str, iam: Any) -> dict[str, Any]:
    """GetRole. Raises LaunchError when no role has this name, AwsUnavailable when AWS refuses."""
    with explained(f"role {name}", "start"):
        try:
            role: dict[str, Any] = iam.get_role(RoleName=name)["Role"]
            return role
        except Exception as error:
            if code_of(error) == "NoSuchEntity":
                raise LaunchError(
                    f"role {name}: no such role in this account; `aws iam list-roles` shows them"
                ) from None
            raise


def trusts_sagemaker(role: dict[str, Any]) -> bool:
    """Whether the trust policy lets SageMaker assume the role; True where it cannot be read."""
    policy = role.get("AssumeRolePolicyDocument")
    if isinstance(policy, str):
        try:
            policy = json.loads(unquote(policy))
        except ValueError:
            return True
    if not isinstance(policy, dict):
        return True
    statements = policy.get("Statement", [])
    for statement in statements if isinstance(statements, list) else [statements]:
        principal = statement.get("Principal", {})
        services = principal.get("Service", []) if isinstance(principal, dict) else principal
        if statement.get("Effect") == "Allow" and any(
            word in ("*", "sagemaker.amazonaws.com") for word in ([services] if isinstance(services, str) else services)
        ):
            return True
    return False
