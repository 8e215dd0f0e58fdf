"""What a job on a box may know: AWS credentials that end by themselves, and the lines of --env-file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import LaunchError
from ..jobfile import JobFile
from ..plan import max_runtime_s
from ..variables import read_env_file
from .script import PASSED_ON, needs_s3

SPARE_S = 3600
STS_LONGEST_S = 129_600


def given(job: JobFile, env_file: str | None, environ: Mapping[str, str] = os.environ) -> tuple[str, list[str]]:
    """(NAME=VALUE lines for the containers, warnings). Credentials are in it only when the job names S3.

    Raises LaunchError when it does and there are none, or a value cannot be a line.
    """
    values: dict[str, str] = {}
    warnings: list[str] = []
    if needs_s3(job.request):
        values = {name: environ[name] for name in PASSED_ON if environ.get(name)}
        found, warnings = credentials(max_runtime_s(job.request))
        values.update(found)
    if env_file:
        values.update(read_env_file(Path(env_file)))
    for name, value in values.items():
        if "\n" in value:
            raise LaunchError(f"{name}: has several lines, and Docker takes one a variable; encode it (base64)")
    return "".join(f"{name}={value}\n" for name, value in values.items()), warnings


def credentials(run_s: int) -> tuple[dict[str, str], list[str]]:
    """Credentials of this machine's own chain; long-lived keys are exchanged for some that end after the job."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    session = boto3.Session()
    try:
        held = session.get_credentials()
        frozen = held.get_frozen_credentials() if held else None
    except BotoCoreError as error:
        raise LaunchError(f"AWS credentials: {error}; log in again, or use file:// addresses") from None
    if frozen is None or not frozen.access_key or not frozen.secret_key:
        raise LaunchError(
            "the job names s3:// addresses, and there are no AWS credentials here to give it; run `aws configure` or "
            "`aws sso login`, or use file:// addresses"
        )
    key, secret, token = frozen.access_key, frozen.secret_key, frozen.token
    warnings = []
    if token:
        warnings.append("the job is given this session's temporary AWS credentials; it loses S3 when they end")
    else:
        config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 2})
        region = session.region_name or "us-east-1"
        seconds = min(max(run_s + SPARE_S, 900), STS_LONGEST_S)
        try:
            answer = session.client("sts", region_name=region, config=config).get_session_token(DurationSeconds=seconds)
            fresh = answer["Credentials"]
            key, secret, token = fresh["AccessKeyId"], fresh["SecretAccessKey"], fresh["SessionToken"]
            if run_s > STS_LONGEST_S:
                warnings.append("the job may run longer than its AWS credentials last (36 h)")
        except (BotoCoreError, ClientError) as error:
            warnings.append(f"the job is given long-lived AWS keys, as temporary ones could not be had ({error})")
    values = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    if token:
        values["AWS_SESSION_TOKEN"] = token
    return values, warnings
