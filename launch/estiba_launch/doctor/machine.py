"""Checks of this machine: Python, Docker and its plugins, disk space, the image of a job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.check import Check
from estiba_launch.paths import state_root
from estiba_launch.targets.local.engine_address import current

GIB = 1 << 30
RECOMMENDED_DISK_GIB = 40
CHARS_SHOWN = 160
REFUSED = ("unauthorized", "denied", "no basic auth", "authentication")
MISSING = ("no such manifest", "not found", "unknown")
"""In the errors of `docker manifest inspect`."""


def call(*words: str, timeout_s: float = 20) -> tuple[int | None, str]:
    """Run a program. Returns (exit code, output); the code is None if it did not start or did not end in time."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)[:CHARS_SHOWN]
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()


def graded(name: str, good: bool, seen: str, remedy: str, otherwise: str = "warn") -> Check:
    """`ok` when `good`, else the status `otherwise` with the remedy."""
    return Check(name=name, status="ok" if good else otherwise, seen=seen, remedy="" if good else remedy)


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return graded("python", sys.version_info >= (3, 11), version, "use 3.11 or newer", otherwise="fail")


def docker() -> Iterator[Check]:
    """The engine, and whether it can give containers a GPU."""
    from docker.errors import DockerException

    remedy = "run `make engine`, or start docker; a local run needs nothing else"
    try:
        engine = current()
    except LaunchError as error:
        problem, _, remedy = str(error).partition("; ")
        yield Check(name="docker", status="fail", seen=problem, remedy=remedy)
        return
    try:
        info: dict[str, Any] = engine.connect(timeout_s=10).info()
    except (DockerException, OSError) as error:
        seen = f"no engine at {engine}: {str(error)[:120]}"
        yield Check(name="docker", status="fail", seen=seen, remedy=remedy)
        return
    seen = f"{info['ServerVersion']}, {info['Driver']}, {info['NCPU']} CPUs, at {engine}"
    yield Check(name="docker", status="ok", seen=seen)
    if shutil.which("nvidia-smi"):
        runtimes = sorted(info.get("Runtimes", {}))
        good = "nvidia" in runtimes or bool(shutil.which("nvidia-container-runtime-hook"))
        configure = "install nvidia-container-toolkit and run `nvidia-ctk runtime configure --runtime=docker`"
        seen = f"runtimes {', '.join(runtimes)}"
        yield graded("nvidia toolkit", good, seen, f"run `make engine`, or {configure}")


def plugin(name: str, purpose: str) -> Check:
    code, output = call("docker", name, "version")
    version = output.partition("\n")[0] or "installed"
    seen = {0: version, None: output}.get(code, "not installed")
    return graded(name, code == 0, seen, f"run `make engine`, or install docker-{name}; needed for {purpose}")


def disk() -> Check:
    """Free space where jobs keep their files."""
    root = state_root()
    existing = next(parent for parent in [root, *root.parents] if parent.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    remedy = (
        f"GPU images take 25-28 GB; free some space, or point ESTIBA_STATE elsewhere ({RECOMMENDED_DISK_GIB} GiB "
        "recommended)"
    )
    return graded("disk", free_gib >= RECOMMENDED_DISK_GIB, f"{free_gib:.0f} GiB free for {root}", remedy)


def inspect(image: str) -> dict[str, Any] | None:
    """The image in this machine's engine, or None."""
    code, output = call("docker", "image", "inspect", image)
    try:
        return dict(json.loads(output)[0]) if code == 0 else None
    except (ValueError, IndexError):
        return None


def image(name: str, *, network: bool) -> Check:
    """Whether the image is on this machine, or can be pulled."""
    first, slash, _ = name.partition("/")
    host = first if slash and ("." in first or ":" in first or first == "localhost") else None
    present = inspect(name) is not None
    if present and host is None:
        return Check(name="image", status="ok", seen=f"{name} is on this machine; it names no registry")
    login = f"docker login {host or ''}".strip()
    if host and ".dkr.ecr." in host:
        region = host.split(".")[3]
        login = f"aws ecr get-login-password --region {region} | docker login --username AWS --password-stdin {host}"
    if not network:
        logged_in = host in _logins()
        where = f"{name}: {'on' if present else 'not on'} this machine"
        seen = f"{where}; {'a' if logged_in else 'no'} login to {host or 'Docker Hub'}"
        return graded("image", present or logged_in, seen, login)
    code, output = call("docker", "manifest", "inspect", name, timeout_s=30)
    if code == 0:
        return Check(name="image", status="ok", seen=f"{name}: can be pulled")
    error = (output or "no answer").partition("\n")[0][:CHARS_SHOWN]
    status, remedy = "unknown", "check the network: the registry cannot be reached"
    for words, known_remedy in ((REFUSED, login), (MISSING, "push it: `make push REGISTRY=...`")):
        if status == "unknown" and code is not None and any(word in error.lower() for word in words):
            status, remedy = "warn", known_remedy
    return Check(name="image", status=status, seen=f"{name}: {error}", remedy=remedy)


def _logins() -> set[str]:
    """Registries for which docker has credentials or a credential helper; they may have expired."""
    folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return set()
    names = [*config.get("auths", {}), *config.get("credHelpers", {})]
    return {name.removeprefix("https://").rstrip("/") for name in names}
