"""The role a job takes, by ARN or by name."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

from ..errors import LaunchError
from . import client
from .client import code_of, explained


def arn_of(role: str, region: str | None = None) -> str:
    """The ARN of a role given by ARN (returned as it is) or name. Raises LaunchError, AwsUnavailable."""
    if role.startswith("arn:"):
        return role
    found = get(role, client.connect(region or "us-east-1").iam)
    if not trusts_sagemaker(found):
        raise LaunchError(
            f"role {role}: SageMaker may not assume it; add sagemaker.amazonaws.com to its trust policy's Principal"
        )
    return str(found["Arn"])


def get(name: str, iam: Any) -> dict[str, Any]:
    """GetRole. Raises LaunchError when there is none of that name, AwsUnavailable when AWS refuses."""
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
