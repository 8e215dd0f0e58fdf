"""What brings a job's image and data to a remote host: the commands that `estiba run` and the printed script share, and
the half of that script that runs on this machine.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from estiba_launch.request import contract
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.options import HostOptions
from estiba_launch.request.variables import ENV_LINES
from estiba_launch.targets.ssh.script import FOLDER, PASSED_ON, START, container_names, needs_s3, work_dir

ECR = re.compile(r"(\d{12}\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?)/")
COPY = ("-rt", "--copy-links", "--perms", "--chmod=u+rwX", "--partial")
SETTINGS = ("Entrypoint", "Cmd", "Env", "WorkingDir", "Labels")
"""With the layers, what makes two images the same: engines with different stores give one image different ids."""


def in_registry(image: str) -> bool:
    first, slash, _ = image.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


def pull_command(image: str, *, login: bool) -> str:
    """Shell for the host. With `login`, stdin is a password for ECR, which stays in the host's memory."""
    pull = f"docker pull -q {shlex.quote(image)}"
    ecr = ECR.match(image)
    if not ecr or not login:
        return pull
    return (
        'd=$(mktemp -d /dev/shm/estiba.XXXXXX) && trap \'rm -rf "$d"\' EXIT && export DOCKER_CONFIG="$d" && '
        f"docker login --username AWS --password-stdin {ecr.group(1)} >/dev/null 2>&1; {pull}"
    )


def kept_folder(source: Path) -> str:
    """The host's own copy of a folder, which later jobs update."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.name)[:40]
    return f"{FOLDER}/data/{hashlib.sha256(str(source).encode()).hexdigest()[:12]}-{name}"


def lock_rsync(kept: str) -> str:
    """rsync on the host, once no other job is sending the same folder."""
    return f"flock {kept}.lock rsync"


def link_command(kept: str, place: str) -> str:
    return f"flock {kept}.lock cp -al {kept}/. {shlex.quote(place)}/"


def send_lines(job: JobFile, options: HostOptions) -> Iterator[str]:
    """The half of the script that runs here."""
    target, work = job.target, work_dir(job.name)
    at = f"{target.user}@{target.host}" if target.user else str(target.host)
    yield f'ssh="${{ESTIBA_SSH:-ssh}}{f" -p {target.port}" if target.port != 22 else ""}"'
    yield f'on_host() {{ $ssh {at} "$@"; }}'
    yield "on_host 'docker info >/dev/null 2>&1' || on_host 'bash -s engine' < scripts/engine.sh"
    yield from _image(job.request["AlgorithmSpecification"]["TrainingImage"])
    yield f"on_host 'mkdir -p {FOLDER}/data {FOLDER}/jobs && mkdir {work} {work}/data'"
    yield from _data(job, f"{target.user}@{_bare(target.host)}" if target.user else _bare(target.host))
    yield f"on_host 'cat > {work}/start.sh' < \"$0\""
    secrets = f"env_lines {shlex.quote(options.env_file)}" if options.env_file else ":"
    if options.env_file:
        yield ENV_LINES
        yield f": <{shlex.quote(options.env_file)}"
    if needs_s3(job.request):
        secrets = f"env | grep -E '^({'|'.join(PASSED_ON)})=' || :; {secrets}"
    yield f"{{ {secrets}; }} | on_host sh {work}/start.sh {START}"
    yield f"echo 'estiba status {job.name} --target {target} knows this job' >&2"
    yield f"on_host docker logs --follow {container_names(job.name, job.request)[0]}"


def _bare(host: str | None) -> str:
    return f"[{host}]" if host and ":" in host else str(host)


def _image(image: str) -> Iterator[str]:
    """Bring the image unless the host has the same one. Only a name with a registry is pulled."""
    look = " ".join(["{{json .RootFS.Layers}}", *(f"{{{{json .Config.{name}}}}}" for name in SETTINGS)])
    inspect = f"docker image inspect --format '{look}' {shlex.quote(image)}"
    yield f"here=$({inspect} 2>/dev/null) || here="
    yield f"there=$(on_host {shlex.quote(inspect)} 2>/dev/null) || there="
    send = f"docker save {shlex.quote(image)} | gzip -1 | on_host docker load -q"
    if not in_registry(image):
        yield 'if [ -z "$there" ] || { [ -n "$here" ] && [ "$here" != "$there" ]; }; then'
        yield (
            f'  [ -n "$here" ] || {{ echo "image {image}: neither here nor on the host, and it names no registry; '
            'build it (make build), or give its registry (docker.io/...)" >&2; exit 1; }'
        )
        yield f"  {send}"
        yield "fi"
        return
    ecr = ECR.match(image)
    password = f"aws ecr get-login-password --region {ecr.group(2)} | " if ecr else ""
    pull = f"{password}on_host {shlex.quote(pull_command(image, login=bool(ecr)))}"
    yield 'if [ -z "$there" ] || { [ -n "$here" ] && [ "$here" != "$there" ]; }; then'
    yield f"  {pull} || {send}"
    yield "fi"


def _data(job: JobFile, at: str) -> Iterator[str]:
    """Copy what is on this machine as `provision.data` does."""
    work = work_dir(job.name)
    local = [one for one in contract.channels(job.request) if one.uri.startswith("file://")]
    store = job.request.get("CheckpointConfig", {}).get("S3Uri", "")
    if local or store.startswith("file://"):
        yield "on_host 'command -v rsync >/dev/null' || on_host 'bash -s rsync' < scripts/engine.sh"
    rsync = f'rsync {" ".join(COPY)} --protect-args -e "$ssh"'
    for channel in local:
        source, place = contract.file_path(channel.uri), f"{work}/data/{channel.name}"
        here, kept = shlex.quote(str(source)), kept_folder(source)
        if source.is_file():
            yield f"{rsync} {here} {at}:{place}/"
        elif not source.exists() and any(one.name.startswith(source.name) for one in source.parent.glob("*")):
            yield f"{rsync} {here}* {at}:{place}/"
        else:
            yield f"on_host 'mkdir -p {kept} {place}'"
            yield f"{rsync} --delete --rsync-path='{lock_rsync(kept)}' {here}/ {at}:{kept}/"
            yield f"on_host '{link_command(kept, place)}'"
    if store.startswith("file://"):
        folder = shlex.quote(str(contract.file_path(store)))
        yield f"[ ! -d {folder} ] || {rsync} {folder}/ {at}:{work}/checkpoints/"
