"""Is this machine ready? Each check says what it saw and, when it is not good, what to do. Every one is bounded."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cuda
from .check import Check, worst
from .errors import LaunchError
from .state import state_root

GIB = 1 << 30
DISK_WANTED_GIB = 40
CHECK_S = 45.0
"""The longest a check may take, whatever hangs behind it."""

__all__ = ["Check", "Subject", "run", "worst"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the machine is to be ready for; None where nothing was named."""

    image: str | None = None
    role: str | None = None
    instances: tuple[tuple[str, int], ...] = ()
    """(instance type, count)"""
    spot: bool = True
    region: str | None = None


def run(subject: Subject | None = None, *, network: bool = True) -> Iterator[Check]:
    """Every check, in one order; those that ask another machine only with `network`. Ends within CHECK_S of each."""
    about = subject or Subject()
    wanted: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("python", lambda: [python()]),
        ("docker", docker),
        ("buildx", lambda: [plugin("buildx", "building images")]),
        ("compose", lambda: [plugin("compose", "the stand-ins of compose/ and AWS's own local mode")]),
        ("gpu", lambda: gpu(about.image)),
        ("disk", lambda: [disk()]),
        ("ssh", lambda: [tool("ssh", "ssh targets")]),
        ("rsync", lambda: [tool("rsync", "ssh targets with data on this machine")]),
    ]
    if about.image:
        image = about.image
        wanted.append(("image", lambda: [registry(image, network=network)]))

    def aws() -> Iterator[Check]:
        from .sagemaker import ready

        yield from ready.checks(about, network=network)

    wanted.append(("aws", aws))
    waiting = [(name, _begin(name, look)) for name, look in wanted]
    for name, found in waiting:
        yield from _collect(name, found)


Answers = queue.Queue[Check | None]


def _begin(name: str, look: Callable[[], Iterable[Check]]) -> Answers:
    """Run one check beside the others. A thread that hangs is left behind: nothing waits for it at exit."""
    found: Answers = queue.Queue()

    def work() -> None:
        try:
            for check in look():
                found.put(check)
        except Exception as error:
            found.put(Check(name=name, status="unknown", seen=f"{type(error).__name__}: {str(error)[:160]}"))
        found.put(None)

    threading.Thread(target=work, name=f"doctor {name}", daemon=True).start()
    return found


def _collect(name: str, found: Answers) -> Iterator[Check]:
    while True:
        try:
            check = found.get(timeout=CHECK_S)
        except queue.Empty:
            remedy = "something it asks does not answer; see whether it hangs by hand too"
            yield Check(name=name, status="unknown", seen=f"no answer within {CHECK_S:g} s", remedy=remedy)
            return
        if check is None:
            return
        yield check


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Check(
        name="python", status="ok" if good else "fail", seen=version, remedy="" if good else "use 3.11 or later"
    )


def docker() -> Iterator[Check]:
    """The engine, and whether it can give containers a GPU."""
    import docker as sdk

    try:
        info: dict[str, Any] = sdk.from_env(timeout=10).info()
    except (sdk.errors.DockerException, OSError) as error:
        where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        remedy = "run `make engine`, or start docker; a local run needs nothing else"
        yield Check(name="docker", status="fail", seen=f"no engine at {where} ({str(error)[:120]})", remedy=remedy)
        return
    yield Check(name="docker", status="ok", seen=f"{info['ServerVersion']}, {info['Driver']}, {info['NCPU']} CPUs")
    if not shutil.which("nvidia-smi"):
        return
    runtimes = sorted(info.get("Runtimes", {}))
    if "nvidia" in runtimes or shutil.which("nvidia-container-runtime-hook"):
        yield Check(name="nvidia toolkit", status="ok", seen=f"runtimes {', '.join(runtimes)}")
        return
    remedy = (
        "run `make engine`, or install nvidia-container-toolkit and `nvidia-ctk runtime configure --runtime=docker`"
    )
    yield Check(name="nvidia toolkit", status="warn", seen=f"runtimes {', '.join(runtimes)}", remedy=remedy)


def plugin(name: str, what_for: str) -> Check:
    """One of docker's plugins."""
    remedy = f"run `make engine`, or install docker-{name}; needed for {what_for}"
    try:
        done = subprocess.run(["docker", name, "version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name=name, status="warn", seen=str(error)[:160], remedy=remedy)
    if done.returncode:
        return Check(name=name, status="warn", seen="not there", remedy=remedy)
    return Check(name=name, status="ok", seen=done.stdout.strip().splitlines()[0] if done.stdout.strip() else "there")


def inspect(image: str) -> dict[str, Any] | None:
    """The image as this machine's engine knows it, or None."""
    try:
        words = ["docker", "image", "inspect", image]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
        found: dict[str, Any] = json.loads(done.stdout)[0]
        return found
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def gpu(image: str | None) -> Iterator[Check]:
    """The driver, and whether it carries the image's CUDA."""
    found = cuda.driver()
    if isinstance(found, Check):
        yield found
        return
    seen = f"{found.version}, CUDA {found.cuda}, {len(found.gpus)} x {found.gpus[0] if found.gpus else 'no GPU'}"
    yield Check(name="gpu driver", status="ok" if found.gpus else "warn", seen=seen)
    if image:
        inspected = inspect(image)
        if inspected is None:
            yield Check(name="image's CUDA", status="unknown", seen=f"{image} is not on this machine", remedy="pull it")
        else:
            yield cuda.verdict(image, cuda.settings_of(inspected), found)


def disk() -> Check:
    """Room where jobs keep their files."""
    root = state_root()
    place = next(parent for parent in [root, *root.parents] if parent.exists())
    free_gib = shutil.disk_usage(place).free / GIB
    good = free_gib >= DISK_WANTED_GIB
    remedy = f"GPU images take 25-28 GB; free some, or point ESTIBA_STATE elsewhere (want {DISK_WANTED_GIB})"
    seen = f"{free_gib:.0f} GiB free for {root}"
    return Check(name="disk", status="ok" if good else "warn", seen=seen, remedy="" if good else remedy)


def tool(name: str, what_for: str) -> Check:
    path = shutil.which(name)
    if path:
        return Check(name=name, status="ok", seen=path)
    return Check(name=name, status="warn", seen="not found", remedy=f"install it for {what_for}")


def registry(image: str, *, network: bool) -> Check:
    """Whether the image is here or its registry gives it to us."""
    first, slash, _ = image.partition("/")
    host = first if slash and ("." in first or ":" in first or first == "localhost") else None
    here = inspect(image) is not None
    if here and host is None:
        return Check(name="image", status="ok", seen=f"{image} is here; it names no registry")
    login = f"docker login {host or ''}".strip()
    if host and ".dkr.ecr." in host:
        region = host.split(".")[3]
        login = f"aws ecr get-login-password --region {region} | docker login --username AWS --password-stdin {host}"
    if not network:
        known = _logins()
        seen = f"{image}: {'here' if here else 'not here'}; {'a' if host in known else 'no'} login to {host or 'a hub'}"
        status = "ok" if here or host in known else "warn"
        return Check(name="image", status=status, seen=seen, remedy="" if status == "ok" else login)
    try:
        words = ["docker", "manifest", "inspect", image]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name="image", status="unknown", seen=f"{image}: {str(error)[:120]}", remedy="see the network")
    if done.returncode == 0:
        return Check(name="image", status="ok", seen=f"{image}: its registry gives it to us")
    told = (done.stderr.strip().splitlines() or ["no answer"])[-1][:160]
    if any(word in told.lower() for word in ("unauthorized", "denied", "no basic auth", "authentication")):
        return Check(name="image", status="warn", seen=f"{image}: {told}", remedy=login)
    if "no such manifest" in told.lower() or "not found" in told.lower() or "unknown" in told.lower():
        return Check(name="image", status="warn", seen=f"{image}: {told}", remedy="push it: `make push REGISTRY=...`")
    return Check(
        name="image", status="unknown", seen=f"{image}: {told}", remedy="the registry cannot be reached from here"
    )


def _logins() -> set[str]:
    """Registries that docker has a login or a helper for; whether it still holds is not known."""
    folder = os.environ.get("DOCKER_CONFIG") or str(Path.home() / ".docker")
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return set()
    return {
        name.removeprefix("https://").rstrip("/") for part in ("auths", "credHelpers") for name in config.get(part, {})
    }


def subject_of(job: Path, settings: dict[str, str], role: str | None, region: str | None) -> Subject:
    """What a job file asks of the machine; what it lacks for SageMaker is no error here. Raises LaunchError."""
    from . import jobfile, prices
    from .target import Target

    try:
        loaded = jobfile.load(job, Target.parse("sagemaker"), settings)
    except LaunchError:
        loaded = jobfile.load(job, Target.parse("local"), settings)
    request = loaded.request
    return Subject(
        image=request["AlgorithmSpecification"].get("TrainingImage"),
        role=role or request.get("RoleArn") or settings.get("ROLE_ARN") or os.environ.get("ROLE_ARN"),
        instances=tuple(prices.hosts_of(request)),
        spot=bool(request.get("EnableManagedSpotTraining")),
        region=region,
    )
