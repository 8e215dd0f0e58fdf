"""AWS clients with retries, and AWS's errors with a remedy for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from estiba_launch.errors import AwsUnavailable, HostError, LaunchError
from estiba_launch.jobs.s3 import aws_errors

PERMISSIONS = {
    "start": ("sagemaker:CreateTrainingJob", "iam:PassRole on the job's role", "iam:GetRole (roles given by name)"),
    "look": ("sagemaker:DescribeTrainingJob", "sagemaker:ListTrainingJobs"),
    "stop": ("sagemaker:StopTrainingJob",),
    "fetch": ("s3:GetObject", "s3:ListBucket on the output bucket"),
    "logs": ("logs:DescribeLogStreams", "logs:GetLogEvents on /aws/sagemaker/TrainingJobs"),
}
"""What the user's own login needs. The job's role needs its data, its image and CloudWatch."""
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
NOT_AWS = "something answers in place of AWS; see the proxy, a login page of the network, and AWS_ENDPOINT_URL"
QUOTA = {"ResourceLimitExceeded", "ServiceQuotaExceededException"}


@dataclass(frozen=True, kw_only=True)
class Clients:
    region: str
    sagemaker: Any
    logs: Any
    iam: Any


def connect(region: str | None = None) -> Clients:
    """Clients of one region. Sends no request yet. Raises AwsUnavailable without a region."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    with explained("AWS settings"):
        session = boto3.Session(region_name=region)
    if not session.region_name:
        raise AwsUnavailable("AWS: no region is set; pass --region, set AWS_REGION, or run `aws configure`")
    # Adaptive slows down when throttled, which matters to followers that poll for hours.
    config = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "adaptive", "total_max_attempts": 8},
        user_agent_extra="estiba",
    )
    try:
        clients = {name: session.client(name, config=config) for name in ("sagemaker", "logs", "iam")}
    except (BotoCoreError, ValueError) as error:
        raise AwsUnavailable(f"AWS: {error}; correct the AWS settings of this machine") from error
    return Clients(region=session.region_name, **clients)


def code_of(error: BaseException) -> str:
    """The service's error code; empty for an error that no service returned."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


@contextmanager
def explained(what: str, need: str | None = None) -> Iterator[None]:
    """Turn botocore's errors, and answers that lack a member, into LaunchErrors; `need` is a key of PERMISSIONS."""
    known: tuple[type[Exception], ...] = (*aws_errors(), KeyError)
    try:
        yield
    except known as error:
        raise explain(what, error, need) from error


def explain(what: str, error: BaseException, need: str | None = None) -> LaunchError:
    """A botocore error as a LaunchError that says what to do.

    A network that is down, throttling, and failures of AWS itself are transient. A refused login or request is not.
    """
    from botocore import exceptions as known
    from botocore.parsers import ResponseParserError

    code = code_of(error)
    text = getattr(error, "response", {}).get("Error", {}).get("Message") or str(error)
    away = isinstance(error, known.HTTPClientError | known.ConnectionError | ResponseParserError | KeyError)
    kind: type[LaunchError] = AwsUnavailable
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError | known.CredentialRetrievalError):
        message = f"no AWS credentials ({text}); run `aws configure` or `aws sso login`"
    elif isinstance(error, known.TokenRetrievalError | known.SSOError | known.ProfileNotFound):
        message = f"the AWS login does not work ({text}); run `aws sso login`, or set AWS_PROFILE"
    elif isinstance(error, ResponseParserError | KeyError):
        message = f"the answer cannot be read ({' '.join(text.split())[:120]}); {NOT_AWS}"
    elif away:
        message = f"AWS cannot be reached ({text}); see the network, the region and the proxy"
    elif code in UNKNOWN_LOGIN:
        again = "log in again (`aws sso login`), and see the clock (`estiba doctor`)"
        message = f"AWS rejects this login ({code}: {text}); {again}"
    elif code in DENIED:
        needed = "\n".join(f"    {name}" for name in PERMISSIONS.get(need or "", ()))
        listed = f"your login needs:\n{needed}" if needed else "ask for the permission it names"
        message = f"AWS refuses ({text}); {listed}"
    elif code in QUOTA:
        more = "ask for more under Service Quotas > Amazon SageMaker > 'for (spot) training job usage'"
        message = f"over the account's quota ({text}); {more}, or use another instance type"
    elif code in THROTTLED:
        message = f"AWS is throttling this account ({text}); try again in a minute"
    elif code == "ResourceInUse":
        kind, message = (
            LaunchError,
            f"{text}; leave the time in TrainingJobName (${{ESTIBA_TIMESTAMP}}) or pick another",
        )
    elif code in ("ValidationException", "ResourceNotFound"):
        kind, message = LaunchError, f"{text}; correct the job file"
    else:
        seen = f"{code}: {text}" if code else text
        kind, message = HostError, f"{seen}; try again, and see health.aws.amazon.com if it persists"
    found = kind(f"{what}: {message}")
    found.transient = away or code in THROTTLED or kind is HostError
    return found
