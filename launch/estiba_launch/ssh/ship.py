"""What a box needs before a job can start on it: engine, image, data. Each is left alone where it is there."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .. import contract
from ..errors import HostError, LaunchError
from ..jobfile import JobFile
from ..localhost import channels
from .box import Box, BoxError
from .script import FOLDER, work_dir

Say = Callable[[str], None]
ECR = re.compile(r"(\d{12}\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?)/")
MB = 1_000_000
CHUNK_BYTES = 1 << 20
REPORT_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a box has."""

    docker: bool
    gpu: bool
    """nvidia-smi works there."""
    gpu_in_docker: bool
    rsync: bool
    user_id: str
    """uid:gid"""
    free_bytes: int


LOOK = r"""
docker info --format '{{json .Runtimes}}' 2>/dev/null || echo no
nvidia-smi -L >/dev/null 2>&1 && echo yes || echo no
command -v nvidia-container-runtime-hook >/dev/null 2>&1 && echo yes || echo no
command -v rsync >/dev/null 2>&1 && echo yes || echo no
echo "$(id -u):$(id -g)"
df -Pk "$HOME" | awk 'NR == 2 {print $4}'
"""


def look(box: Box) -> Found:
    """Raises BoxGone."""
    lines = box.run(LOOK, what="a look around").out.split("\n")
    runtimes, gpu, hook, rsync, user, free = (line.strip() for line in lines[:6])
    return Found(
        docker=runtimes != "no",
        gpu=gpu == "yes",
        gpu_in_docker="nvidia" in runtimes or hook == "yes",
        rsync=rsync == "yes",
        user_id=user,
        free_bytes=int(free) * 1024,
    )


def engine_script() -> str:
    """scripts/engine.sh, which travels with the installed package too."""
    packed = resources.files("estiba_launch") / "data" / "engine.sh"
    here = Path(__file__).resolve().parents[3] / "scripts" / "engine.sh"
    source = packed if packed.is_file() else here
    if not source.is_file():
        raise LaunchError("engine.sh: not in this installation; install Docker on the box by hand, or reinstall Estiba")
    return source.read_text("utf-8")


def bootstrap(box: Box, say: Say, *, needs_rsync: bool) -> Found:
    """Have an engine that answers (with GPUs where there are any), and rsync. Raises BoxError with apt's words."""
    found = look(box)
    if found.docker and (not found.gpu or found.gpu_in_docker):
        say(f"{box.target}: docker answers{', with GPUs' if found.gpu else ''}")
    else:
        say(f"{box.target}: no docker{' that gives containers the GPU' if found.docker else ''}; installing (minutes)")
        _pipe(box, "bash -s engine 2>&1", engine_script(), say)
        found = look(box)
    if needs_rsync and not found.rsync:
        say(f"{box.target}: installing rsync")
        get = "apt-get -o DPkg::Lock::Timeout=900 -qq install -y --no-install-recommends rsync"
        box.run(f'if [ "$(id -u)" = 0 ]; then {get}; else sudo -n {get}; fi', timeout_s=1200, what="installing rsync")
        found = look(box)
    return found


def _pipe(box: Box, command: str, text: str, say: Say) -> None:
    """Run `command` with `text` on stdin and tell its output line by line."""
    process = box.open(command, stdin=subprocess.PIPE)
    assert process.stdin and process.stdout
    process.stdin.write(text.encode())
    process.stdin.close()
    last = ""
    for line in process.stdout:
        last = line.decode("utf-8", "replace").rstrip() or last
        say(f"  {last}")
    if process.wait():
        raise BoxError(f"{box.target}: `{command.split(' 2>')[0]}` failed (exit {process.returncode}): {last}")


def local_image(name: str) -> dict[str, Any] | None:
    """The image as this machine's engine knows it, or None; no engine here is no error."""
    if not shutil.which("docker"):
        return None
    done = subprocess.run(["docker", "image", "inspect", name], capture_output=True, text=True, check=False)
    return json.loads(done.stdout)[0] if done.returncode == 0 else None


def remote_image(box: Box, name: str) -> dict[str, Any] | None:
    done = box.run(f"docker image inspect {shlex.quote(name)}", check=False)
    return json.loads(done.out)[0] if done.code == 0 else None


def same_image(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same id; or the same layers and settings, as engines with different stores call one image differently."""
    if one["Id"] == other["Id"]:
        return True
    parts = [(i.get("RootFS", {}).get("Layers"), *(i.get("Config", {}).get(k) for k in SETTINGS)) for i in (one, other)]
    return parts[0] == parts[1] and bool(parts[0][0])


SETTINGS = ("Entrypoint", "Cmd", "Env", "WorkingDir", "Labels")


def in_registry(name: str) -> bool:
    """Whether the name says which registry it comes from."""
    first, slash, _ = name.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


def image(box: Box, name: str, say: Say) -> None:
    """Have the image on the box: there already, pulled from its registry, or streamed from here. Raises HostError."""
    here, there = local_image(name), remote_image(box, name)
    if there and (here is None or same_image(here, there)):
        say(f"{name}: on the box already")
        return
    reason = "it names no registry"
    if in_registry(name) or here is None:
        say(f"{name}: the box pulls it")
        done = pull(box, name)
        if done is None:
            return
        reason = done
    if here is None:
        raise HostError(
            f"image {name}: neither here nor to be had for the box ({reason}); build it (`make build`), or push it to "
            "a registry that the box reaches (`make push REGISTRY=...`)"
        )
    if in_registry(name):
        say(f"{name}: pulling failed ({reason}); sending the one from here")
    stream(box, name, int(here["Size"]), say)


def pull(box: Box, name: str) -> str | None:
    """`docker pull` on the box; None when it worked, else why not. A login to ECR stays in the box's memory."""
    ecr = ECR.match(name)
    command, password = f"docker pull -q {shlex.quote(name)}", ""
    if ecr:
        password = ecr_password(ecr.group(2), ecr.group(1)) or ""
    if ecr and password:
        command = (
            'd=$(mktemp -d /dev/shm/estiba.XXXXXX) && trap \'rm -rf "$d"\' EXIT && export DOCKER_CONFIG="$d" && '
            f"docker login --username AWS --password-stdin {ecr.group(1)} >/dev/null 2>&1; {command}"
        )
    done = box.run(command, input=password, check=False, timeout_s=3600)
    return None if done.code == 0 else done.error.strip()[-300:] or f"exit {done.code}"


def ecr_password(region: str, registry: str) -> str | None:
    """A password for ECR, good for twelve hours; None without AWS credentials here."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 3})
    try:
        client = boto3.client("ecr", region_name=region, config=config)
        answer = client.get_authorization_token(registryIds=[registry.partition(".")[0]])
        token = answer["authorizationData"][0]["authorizationToken"]
    except (BotoCoreError, ClientError):
        return None
    return base64.b64decode(token).decode().partition(":")[2]


def stream(box: Box, name: str, size_bytes: int, say: Say) -> None:
    """`docker save` here, `docker load` there, compressed between unless the box is this machine. Raises BoxError."""
    say(f"{name}: sending {size_bytes / MB:.0f} MB to {box.target}")
    squeeze = ["cat"]
    if box.target.host not in ("localhost", "127.0.0.1", "::1"):
        squeeze = ["pigz", "-1"] if shutil.which("pigz") else ["gzip", "-1"]
    box.connect()
    with subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE) as save:
        with subprocess.Popen(squeeze, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as squeezed:
            assert save.stdout and squeezed.stdin and squeezed.stdout
            load = box.open("docker load -q 2>&1", stdin=squeezed.stdout.fileno())
            squeezed.stdout.close()
            sent, started = 0, time.monotonic()
            told = started
            try:
                while chunk := save.stdout.read(CHUNK_BYTES):
                    squeezed.stdin.write(chunk)
                    sent += len(chunk)
                    now = time.monotonic()
                    if now - told >= REPORT_EVERY_S:
                        told = now
                        say(f"  {sent / MB:.0f} of {size_bytes / MB:.0f} MB, {sent / MB / (now - started):.0f} MB/s")
            except BrokenPipeError:
                save.kill()
            try:
                squeezed.stdin.close()
            except BrokenPipeError:
                pass
            output = load.communicate()[0].decode("utf-8", "replace").strip()
        if load.returncode or save.wait():
            why = output[-300:] or f"docker save ended with {save.returncode}, ssh with {load.returncode}"
            raise BoxError(f"{box.target}: {name} was not taken over ({why}); see the disk of the box, then try again")
    say(f"  sent {sent / MB:.0f} MB in {time.monotonic() - started:.0f} s")


def data(box: Box, job: JobFile, say: Say) -> None:
    """Bring every file:// channel, and file:// checkpoints to go on from, into the job's folder.

    A folder is kept on the box by its path here, so the next job sends only differences; the job itself gets hard links
    to it, which later changes do not touch.
    """
    work = work_dir(job.name)
    for channel in contract.channels(job.request):
        if not channel.uri.startswith("file://"):
            continue
        source = contract.file_path(channel.uri)
        sizes = channels.objects(channel)
        say(f"channel {channel.name}: {len(sizes)} files, {sum(sizes.values()) / MB:.1f} MB from {source}")
        place = f"{work}/data/{channel.name}"
        if source.is_dir():
            mirror(box, source, place)
        else:
            box.run(f"mkdir -p {shlex.quote(place)}")
            box.rsync([*COPY, f"{source.parent}/", f"{box.rsync_at}:{place}/"], files_from=list(sizes))
    store = job.request.get("CheckpointConfig", {}).get("S3Uri", "")
    if store.startswith("file://") and contract.file_path(store).is_dir():
        say(f"checkpoints: from {contract.file_path(store)}")
        box.rsync([*COPY, f"{contract.file_path(store)}/", f"{box.rsync_at}:{work}/checkpoints/"])


COPY = ("-rt", "--copy-links", "--perms", "--chmod=u+rwX", "--partial")


def mirror(box: Box, source: Path, place: str) -> None:
    """Update the box's copy of a folder and link it to `place`."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.name)[:40]
    kept = f"{FOLDER}/data/{hashlib.sha256(str(source).encode()).hexdigest()[:12]}-{name}"
    box.run(f"mkdir -p {kept} {shlex.quote(place)}")
    # Under a lock, as another job may be bringing the same folder.
    locked = f"flock {kept}.lock rsync"
    box.rsync([*COPY, "--delete", f"--rsync-path={locked}", f"{source}/", f"{box.rsync_at}:{kept}/"])
    box.run(f"flock {kept}.lock cp -al {kept}/. {shlex.quote(place)}/", timeout_s=600)
