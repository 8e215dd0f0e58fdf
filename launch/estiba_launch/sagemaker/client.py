"""AWS clients with retries, and AWS's refusals in words: what, why, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import AwsUnavailable, HostError, LaunchError

PERMISSIONS = {
    "start": ("sagemaker:CreateTrainingJob", "iam:PassRole on the job's role", "iam:GetRole (roles given by name)"),
    "look": ("sagemaker:DescribeTrainingJob", "sagemaker:ListTrainingJobs"),
    "stop": ("sagemaker:StopTrainingJob",),
    "logs": ("logs:DescribeLogStreams", "logs:GetLogEvents on /aws/sagemaker/TrainingJobs"),
    "fetch": ("s3:GetObject", "s3:ListBucket on the output bucket"),
}
"""What the person's own login needs; the job's role needs its data, its image and CloudWatch."""
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError", "403"}
UNKNOWN_LOGIN = {
    "UnrecognizedClientException",
    "InvalidClientTokenId",
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "InvalidSignatureException",
    "MissingAuthenticationToken",
    "InvalidAccessKeyId",
    "TokenRefreshRequired",
}
THROTTLED = {"ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown"}
QUOTA = {"ResourceLimitExceeded", "ServiceQuotaExceededException"}


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The services a job needs."""

    region: str
    sagemaker: Any
    logs: Any
    s3: Any
    iam: Any


def connect(region: str | None = None) -> Clients:
    """Clients of one region; nothing is asked yet. Raises AwsUnavailable without a region."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    with explained("AWS settings"):
        session = boto3.Session(region_name=region)
    if not session.region_name:
        raise AwsUnavailable("AWS: no region is set; pass --region, set AWS_REGION, or run `aws configure`")
    # Adaptive slows down when throttled, which matters to followers that ask for hours.
    config = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "adaptive", "total_max_attempts": 8},
        user_agent_extra="estiba",
    )
    try:
        made = {name: session.client(name, config=config) for name in ("sagemaker", "logs", "s3", "iam")}
    except (BotoCoreError, ValueError) as error:
        raise AwsUnavailable(f"AWS: {error}; correct the AWS settings of this machine") from error
    return Clients(region=session.region_name, **made)


def code_of(error: Exception) -> str:
    """The service's error code, or an empty text for what is not a service's answer."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


@contextmanager
def explained(what: str, need: str | None = None) -> Iterator[None]:
    """Turn botocore's errors into LaunchErrors; `need` is a key of PERMISSIONS."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise explain(what, error, need) from error


def explain(what: str, error: Exception, need: str | None = None) -> LaunchError:
    """One error of botocore's as what a person needs to know."""
    from botocore import exceptions as known

    code = code_of(error)
    told = getattr(error, "response", {}).get("Error", {}).get("Message") or str(error)
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError | known.CredentialRetrievalError):
        return AwsUnavailable(f"{what}: no AWS credentials ({told}); run `aws configure` or `aws sso login`")
    if isinstance(error, known.TokenRetrievalError | known.SSOError | known.ProfileNotFound):
        return AwsUnavailable(f"{what}: the AWS login does not work ({told}); run `aws sso login`, or set AWS_PROFILE")
    if isinstance(error, known.HTTPClientError | known.ConnectionError):
        return AwsUnavailable(f"{what}: AWS cannot be reached ({told}); see the network, the region and the proxy")
    if code in UNKNOWN_LOGIN:
        return AwsUnavailable(
            f"{what}: AWS does not take this login ({code}: {told}); log in again (`aws sso login`), and see the clock "
            "(`estiba doctor`)"
        )
    if code in DENIED:
        wanted = "\n".join(f"    {name}" for name in PERMISSIONS.get(need or "", ()))
        listed = f"; your login needs:\n{wanted}" if wanted else "; ask for the permission it names"
        return AwsUnavailable(f"{what}: AWS refuses ({told}){listed}")
    if code in QUOTA:
        return AwsUnavailable(
            f"{what}: over the account's quota ({told}); ask for more under Service Quotas > Amazon SageMaker > 'for "
            "(spot) training job usage', or take another instance type"
        )
    if code in THROTTLED:
        return AwsUnavailable(f"{what}: AWS is throttling this account ({told}); try again in a minute")
    if code == "ResourceInUse":
        return LaunchError(f"{what}: {told}; leave the time in TrainingJobName (${{ESTIBA_TIMESTAMP}}) or pick another")
    if code in ("ValidationException", "ResourceNotFound"):
        return LaunchError(f"{what}: {told}; correct the job file")
    return HostError(
        f"{what}: {code + ': ' if code else ''}{told}; try again, and see health.aws.amazon.com if it stays"
    )
