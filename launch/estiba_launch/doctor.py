"""Is this machine ready? Each check says what it saw and, when it is not good, what to do."""

from __future__ import annotations

import email.utils
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from .state import state_root

GIB = 1 << 30
DISK_WANTED_GIB = 40
CLOCK_SKEW_S = 240
"""AWS refuses requests signed more than five minutes off."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at."""

    name: str
    status: str
    """`ok`, `warning` (some targets will not work) or `error` (no target will)."""
    seen: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(*, network: bool = True) -> Iterator[Check]:
    """Every check in turn; those that ask another machine only with `network`."""
    yield python()
    yield from docker()
    yield gpu()
    yield disk()
    yield tool("ssh", "ssh targets")
    yield tool("rsync", "ssh targets with data on this machine")
    yield from aws(network=network)


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Check(
        name="python", status="ok" if good else "error", seen=version, remedy="" if good else "use 3.11 or later"
    )


def docker() -> Iterator[Check]:
    """The engine, and whether it can give containers a GPU."""
    import docker as sdk

    try:
        client = sdk.from_env(timeout=10)
        info = client.info()
    except (sdk.errors.DockerException, OSError) as error:
        where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        yield Check(
            name="docker",
            status="error",
            seen=f"no engine at {where} ({str(error)[:120]})",
            remedy="run `make engine`, or start docker; a local run needs nothing else",
        )
        return
    yield Check(name="docker", status="ok", seen=f"{info['ServerVersion']}, {info['Driver']}, {info['NCPU']} CPUs")
    runtimes = sorted(info.get("Runtimes", {}))
    if shutil.which("nvidia-smi") and "nvidia" not in runtimes and not info.get("CDISpecDirs"):
        yield Check(
            name="gpu in docker",
            status="warning",
            seen=f"runtimes {', '.join(runtimes)}",
            remedy="install nvidia-container-toolkit, then `nvidia-ctk runtime configure --runtime=docker`",
        )


def gpu() -> Check:
    """The driver, as nvidia-smi sees it."""
    if not shutil.which("nvidia-smi"):
        return Check(name="gpu", status="ok", seen="none here: local jobs run on the CPU")
    words = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    if result.returncode:
        seen = (result.stderr or result.stdout).strip()[:120]
        return Check(name="gpu", status="warning", seen=seen, remedy="reinstall or reload the NVIDIA driver, or reboot")
    return Check(name="gpu", status="ok", seen="; ".join(result.stdout.strip().splitlines()))


def disk() -> Check:
    """Room where jobs keep their files."""
    root = state_root()
    place = next(parent for parent in [root, *root.parents] if parent.exists())
    free_gib = shutil.disk_usage(place).free / GIB
    good = free_gib >= DISK_WANTED_GIB
    return Check(
        name="disk",
        status="ok" if good else "warning",
        seen=f"{free_gib:.0f} GiB free for {root}",
        remedy=""
        if good
        else f"GPU images take 25-28 GB; free some, or point ESTIBA_STATE elsewhere (want {DISK_WANTED_GIB})",
    )


def tool(name: str, what_for: str) -> Check:
    path = shutil.which(name)
    if path:
        return Check(name=name, status="ok", seen=path)
    return Check(name=name, status="warning", seen="not found", remedy=f"install it for {what_for}")


def aws(*, network: bool) -> Iterator[Check]:
    """Credentials and region; with `network`, who we are and whether the clock agrees with AWS's."""
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    session = botocore.session.get_session()
    if not network:
        # The last place credentials are looked for is the EC2 metadata service, over the network.
        session.get_component("credential_provider").remove("iam-role")
    region = session.get_config_variable("region")
    yield Check(
        name="aws region",
        status="ok" if region else "warning",
        seen=region or "none set",
        remedy="" if region else "set AWS_REGION for --target sagemaker",
    )
    try:
        credentials = session.get_credentials()
    except BotoCoreError as error:
        credentials, reason = None, str(error)
    else:
        reason = "none found"
    if credentials is None:
        remedy = "run `aws configure` or `aws sso login` for --target sagemaker"
        yield Check(name="aws credentials", status="warning", seen=reason, remedy=remedy)
        return
    if not network:
        yield Check(name="aws credentials", status="ok", seen=f"by {credentials.method}, not tried")
        return
    config = Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2})
    try:
        sts: Any = session.create_client("sts", region_name=region or "us-east-1", config=config)
        identity = sts.get_caller_identity()
        yield Check(name="aws credentials", status="ok", seen=f"{identity['Arn']} by {credentials.method}")
    except (BotoCoreError, ClientError) as error:
        remedy = "log in again (`aws sso login`), or see whether this machine reaches AWS"
        yield Check(name="aws credentials", status="warning", seen=str(error)[:160], remedy=remedy)
        return
    yield clock()


def clock(url: str = "https://sts.amazonaws.com/", now: Callable[[], float] = time.time) -> Check:
    """This machine's clock against AWS's Date header."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=10) as answer:
            theirs = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (URLError, OSError, TypeError, ValueError) as error:
        return Check(
            name="clock", status="warning", seen=f"cannot ask AWS ({str(error)[:80]})", remedy="check the network"
        )
    skew_s = now() - theirs
    good = abs(skew_s) < CLOCK_SKEW_S
    remedy = "" if good else "set the clock (timedatectl set-ntp true): AWS refuses requests more than 5 min off"
    return Check(name="clock", status="ok" if good else "error", seen=f"{skew_s:+.0f} s from AWS", remedy=remedy)


def worst(checks: list[Check]) -> str:
    order = ("ok", "warning", "error")
    return max((check.status for check in checks), key=order.index, default="ok")
