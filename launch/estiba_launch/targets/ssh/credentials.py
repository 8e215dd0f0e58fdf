"""Secrets of a job on a remote host: AWS credentials that expire by themselves, and the lines of --env-file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.s3 import aws_errors
from estiba_launch.request.contract import max_runtime_s
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.variables import read_container_env
from estiba_launch.targets.ssh.script import PASSED_ON, needs_s3

SPARE_S = 3600
STS_LONGEST_S = 129_600


def environment_of(
    job: JobFile, env_file: str | None, environ: Mapping[str, str] = os.environ
) -> tuple[str, list[str]]:
    """(NAME=VALUE lines for the containers, warnings). Holds credentials only when the job names S3.

    Raises LaunchError when it does and there are none, or when a value has several lines.
    """
    values: dict[str, str] = {}
    warnings: list[str] = []
    if needs_s3(job.request):
        values = {name: environ[name] for name in PASSED_ON if environ.get(name)}
        found, warnings = credentials(max_runtime_s(job.request))
        values.update(found)
    if env_file:
        values.update(read_container_env(Path(env_file)))
    for name, value in values.items():
        if "\n" in value:
            raise LaunchError(
                f"{name}: has several lines, and Docker accepts one line per variable; encode it (base64)"
            )
    return "".join(f"{name}={value}\n" for name, value in values.items()), warnings


def credentials(run_s: int) -> tuple[dict[str, str], list[str]]:
    """Credentials of this machine's own chain. Long-lived keys are exchanged for ones that expire after the job."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    known: tuple[type[Exception], ...] = (*aws_errors(), KeyError)
    session = boto3.Session()
    try:
        from_chain = session.get_credentials()
        frozen = from_chain.get_frozen_credentials() if from_chain else None
    except BotoCoreError as error:
        raise LaunchError(f"AWS credentials: {error}; log in again, or use file:// addresses") from None
    if frozen is None or not frozen.access_key or not frozen.secret_key:
        raise LaunchError(
            "the job names s3:// addresses, and this machine has no AWS credentials to give it; run `aws configure` or "
            "`aws sso login`, or use file:// addresses"
        )
    key, secret, token = frozen.access_key, frozen.secret_key, frozen.token
    warnings = []
    if token:
        warnings.append(
            "the job is given this session's temporary AWS credentials; it loses access to S3 when they expire"
        )
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
        except known as error:
            why = " ".join(str(error).split())[:200]
            warnings.append(f"the job is given long-lived AWS keys, because temporary ones are not available ({why})")
    values = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    if token:
        values["AWS_SESSION_TOKEN"] = token
    return values, warnings
