"""obstore's S3 client from the standard AWS settings.

Endpoint, region and certificates come from the standard variables (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION,
AWS_CA_BUNDLE), credentials from the standard AWS chain. Requests are retried with backoff for up to three minutes, so
an endpoint that is down for a minute costs a minute.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
from botocore import UNSIGNED
from botocore.config import Config
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import BaseError
from obstore.store import S3Store

from estiba.errors import ConfigError, StoreError
from estiba.storage.s3_errors import first_line

CREDENTIAL_TTL = timedelta(minutes=5)
"""boto3 renews temporary credentials ten minutes before they expire, so an answer is good for at least that long."""
RETRY_TIMEOUT = timedelta(seconds=180)
PROBE_TIMEOUT = timedelta(seconds=15)
"""For the first request of a job, so that a wrong endpoint is reported at once."""


def endpoint_url() -> str | None:
    """Return the endpoint that is set for S3, or else for all services; None means AWS's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def region_of(session: boto3.Session) -> str:
    return os.environ.get("AWS_REGION") or session.region_name or "us-east-1"


def is_anonymous() -> bool:
    """Return whether requests are sent unsigned, for public buckets."""
    return os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")


def boto_client() -> Any:
    """Return boto3's client, for what obstore has no method for. Thread-safe. Raises botocore's errors."""
    session = boto3.Session()
    endpoint = endpoint_url()
    return session.client(
        "s3",
        endpoint_url=endpoint,
        region_name=region_of(session),
        config=Config(
            signature_version=UNSIGNED if is_anonymous() else None,
            s3={"addressing_style": "path" if endpoint else "auto"},
            retries={"mode": "standard", "total_max_attempts": 10},  # about two minutes
            max_pool_connections=64,
        ),
    )


def requester_pays() -> bool:
    """Return whether this account pays for its requests: AWS_REQUEST_PAYER=requester, as obstore reads it."""
    return os.environ.get("AWS_REQUEST_PAYER", "").lower() in ("requester", "1", "true", "yes", "on")


def connect(url: str, bucket: str, prefix: str, *, retry_timeout: timedelta | None = None) -> S3Store:
    """Return obstore's client for the keys of `bucket` below `prefix`. Raises ConfigError, StoreError."""
    endpoint, retry_timeout = endpoint_url(), retry_timeout or RETRY_TIMEOUT
    if endpoint and not (urlsplit(endpoint).scheme in ("http", "https") and urlsplit(endpoint).hostname):
        raise ConfigError(f"the S3 endpoint {endpoint!r} (AWS_ENDPOINT_URL_S3) is not a URL; write http://HOST:PORT")
    try:
        session = boto3.Session()
    except botocore.exceptions.BotoCoreError as error:
        raise StoreError(f"{url}: {error}; correct AWS_PROFILE or the AWS configuration file") from None
    options: dict[str, Any] = {
        "region": region_of(session),
        "virtual_hosted_style_request": endpoint is None and "." not in bucket,
    }
    if endpoint:
        options["endpoint"] = endpoint
    if is_anonymous():
        options["skip_signature"] = True
    else:
        try:
            options["credential_provider"] = Boto3CredentialProvider(session, ttl=CREDENTIAL_TTL)
        except ValueError:
            raise StoreError(
                f"{url}: no AWS credentials found; give the job a role, set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_NO_SIGN_REQUEST=1 for a public bucket"
            ) from None
        except botocore.exceptions.BotoCoreError as error:
            raise StoreError(f"{url}: no usable AWS credentials ({error}); correct them or give a role") from None
        options["credential_provider"].config.pop("region", None)  # the region is the one above
    client: dict[str, Any] = {
        "allow_http": bool(endpoint and endpoint.startswith("http://")),
        "connect_timeout": timedelta(seconds=10),
        "timeout": min(timedelta(seconds=120), retry_timeout),
    }
    try:
        if os.environ.get("AWS_CA_BUNDLE"):
            client["root_certificate"] = Path(os.environ["AWS_CA_BUNDLE"]).read_bytes()
        return S3Store(
            bucket,
            prefix=prefix or None,
            client_options=cast(Any, client),
            # With jitter, obstore's ten default retries last two seconds. Here the time is the limit.
            retry_config={
                "max_retries": 1000,
                "retry_timeout": retry_timeout,
                "backoff": {
                    "init_backoff": timedelta(milliseconds=200),
                    "max_backoff": timedelta(seconds=8),
                    "base": 2,
                },
            },
            **options,
        )
    except (BaseError, OSError, ValueError) as error:
        raise ConfigError(
            f"{url}: {first_line(error)}; check the URL, AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE"
        ) from error
