"""Brings a job's image and data to a remote host that has an engine. Keeps what is already there."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from estiba_launch.errors import HostError
from estiba_launch.jobs import inputs
from estiba_launch.jobs.s3 import aws_errors
from estiba_launch.request import contract
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets.base import Report
from estiba_launch.targets.ssh.connection import UNREACHABLE, HostUnreachable, RemoteHost
from estiba_launch.targets.ssh.script import FOLDER, work_dir
from estiba_launch.targets.ssh.send import (
    COPY,
    ECR,
    SETTINGS,
    in_registry,
    kept_folder,
    link_command,
    lock_rsync,
    pull_command,
)

MB = 1_000_000
CHUNK_BYTES = 1 << 20
REPORT_EVERY_S = 5.0


def local_image(name: str) -> dict[str, Any] | None:
    """The image as this machine's engine knows it; None without the image or an engine."""
    if not shutil.which("docker"):
        return None
    done = subprocess.run(["docker", "image", "inspect", name], capture_output=True, text=True, check=False)
    return json.loads(done.stdout)[0] if done.returncode == 0 else None


def remote_image(host: RemoteHost, name: str) -> dict[str, Any] | None:
    done = host.run(f"docker image inspect {shlex.quote(name)}", check=False)
    return json.loads(done.stdout)[0] if done.returncode == 0 else None


def same_image(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same id, or the same layers and settings: engines with different stores give one image different ids."""
    if one["Id"] == other["Id"]:
        return True
    parts = [(i.get("RootFS", {}).get("Layers"), *(i.get("Config", {}).get(k) for k in SETTINGS)) for i in (one, other)]
    return parts[0] == parts[1] and bool(parts[0][0])


def image(host: RemoteHost, name: str, report: Report) -> None:
    """Bring the image to the host: it has it, pulls it, or receives the local one. Raises HostError."""
    here, there = local_image(name), remote_image(host, name)
    if there and (here is None or same_image(here, there)):
        report(f"{name}: on the host already")
        return
    reason = "it names no registry"
    if in_registry(name):
        report(f"{name}: the host pulls it")
        failure = pull(host, name)
        if failure is None:
            return
        reason = failure
    if here is None:
        raise HostError(
            f"image {name}: neither here nor available to the host ({reason}); build it (`make build`), give its "
            "registry (docker.io/...), or push it to one that the host reaches (`make push REGISTRY=...`)"
        )
    if in_registry(name):
        report(f"{name}: pulling failed ({reason}); sending the one from here")
    stream(host, name, int(here["Size"]), report)


def pull(host: RemoteHost, name: str) -> str | None:
    """`docker pull` on the host. Returns why it failed, or None. A login to ECR stays in the host's memory."""
    ecr = ECR.match(name)
    password = (ecr and ecr_password(ecr.group(2), ecr.group(1))) or ""
    command = pull_command(name, login=bool(password))
    done = host.run(command, input=password, check=False, timeout_s=3600)
    return None if done.returncode == 0 else done.stderr.strip()[-300:] or f"exit {done.returncode}"


def ecr_password(region: str, registry: str) -> str | None:
    """A password for ECR, valid for twelve hours; None without AWS credentials here."""
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 3})
    try:
        client = boto3.client("ecr", region_name=region, config=config)
        answer = client.get_authorization_token(registryIds=[registry.partition(".")[0]])
        token = answer["authorizationData"][0]["authorizationToken"]
    except aws_errors():
        return None
    return base64.b64decode(token).decode().partition(":")[2]


def stream(host: RemoteHost, name: str, size_bytes: int, report: Report) -> None:
    """`docker save` here, `docker load` there, compressed unless the host is this machine. Raises RemoteError."""
    report(f"{name}: sending {size_bytes / MB:.0f} MB to {host.target}")
    compress = ["cat"]
    if host.target.host not in ("localhost", "127.0.0.1", "::1"):
        compress = ["pigz", "-1"] if shutil.which("pigz") else ["gzip", "-1"]
    host.connect()
    with subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE) as save:
        with subprocess.Popen(compress, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as compressor:
            assert save.stdout and compressor.stdin and compressor.stdout
            load = host.open("docker load -q 2>&1", stdin=compressor.stdout.fileno())
            compressor.stdout.close()
            sent, started = 0, time.monotonic()
            reported = started
            try:
                while chunk := save.stdout.read(CHUNK_BYTES):
                    compressor.stdin.write(chunk)
                    sent += len(chunk)
                    now = time.monotonic()
                    if now - reported >= REPORT_EVERY_S:
                        reported = now
                        report(f"  {sent / MB:.0f} of {size_bytes / MB:.0f} MB, {sent / MB / (now - started):.0f} MB/s")
            except BrokenPipeError:
                save.kill()
            try:
                compressor.stdin.close()
            except BrokenPipeError:
                pass
            output = load.communicate()[0].decode("utf-8", "replace").strip()
        if load.returncode or save.wait():
            if load.returncode == UNREACHABLE:
                raise HostUnreachable(
                    f"{host.target}: the connection was lost after {sent / MB:.0f} MB of {name}; "
                    "run the same command again"
                )
            why = output[-300:] or f"docker save ended with {save.returncode}, ssh with {load.returncode}"
            raise host.failed(f"loading {name}", why)
    report(f"  sent {sent / MB:.0f} MB in {time.monotonic() - started:.0f} s")


def data(host: RemoteHost, job: JobFile, report: Report) -> None:
    """Bring every file:// channel, and file:// checkpoints to resume from, into the job's folder.

    The host keeps a copy of each folder, so the next job sends only differences. The job itself gets hard links to the
    copy, which later changes do not affect.
    """
    work = work_dir(job.name)
    for channel in contract.channels(job.request):
        if not channel.uri.startswith("file://"):
            continue
        source = contract.file_path(channel.uri)
        sizes = inputs.objects(channel)
        report(f"channel {channel.name}: {len(sizes)} files, {sum(sizes.values()) / MB:.1f} MB from {source}")
        place = f"{work}/data/{channel.name}"
        if source.is_dir():
            mirror(host, source, place)
        else:
            host.run(f"mkdir -p {shlex.quote(place)}")
            host.rsync([*COPY, f"{source.parent}/", f"{host.rsync_destination}:{place}/"], files_from=list(sizes))
    store = job.request.get("CheckpointConfig", {}).get("S3Uri", "")
    if store.startswith("file://"):
        checkpoints(host, job, contract.file_path(store), report)


def last_job_file(store: Path) -> str:
    """The file on the host that names the last job whose checkpoints belong in `store` on this machine."""
    return f"{FOLDER}/last-{hashlib.sha256(f'{platform.node()}:{store}'.encode()).hexdigest()[:12]}"


def checkpoints(host: RemoteHost, job: JobFile, store: Path, report: Report) -> None:
    """Fill the checkpoint directory from `store`, and from the last job here that used it unless that was fetched."""
    jobs, image = f"{FOLDER}/jobs", shlex.quote(job.request["AlgorithmSpecification"]["TrainingImage"])
    # Files that containers made belong to root, so a container links them.
    link = (
        f"cp -al /jobs/$last/checkpoints/. /jobs/{job.name}/checkpoints/ && chown -R $(id -u):$(id -g) /jobs/{job.name}"
    )
    last = host.run(
        f"mkdir -p {jobs}/{job.name}/checkpoints; last=$(cat {last_job_file(store)} 2>/dev/null) || :\n"
        f'[ -n "$last" ] && [ ! -e "{jobs}/$last/{FETCHED}" ] || exit 0\n'
        f'[ -n "$(ls -A "{jobs}/$last/checkpoints" 2>/dev/null)" ] || exit 0\n'
        '[ -z "$(docker ps --quiet --filter "name=$last")" ] || exit 0\n'
        f'docker run --rm --network none --user 0 -v "$HOME/{jobs}:/jobs" --entrypoint sh {image} -c "{link}" &&\n'
        "echo $last",
        timeout_s=600,
        what="linking the checkpoints of the last job",
    ).stdout.strip()
    if last:
        report(f"checkpoints: from {last} on this host, which was not fetched; another CHECKPOINT_URI starts afresh")
    if store.is_dir():
        report(f"checkpoints: from {store}")
        host.rsync([*COPY, "--update", f"{store}/", f"{host.rsync_destination}:{jobs}/{job.name}/checkpoints/"])


FETCHED = "fetched"
"""In the folder of a job whose checkpoints were brought to the machine that started it."""


def mirror(host: RemoteHost, source: Path, place: str) -> None:
    """Update the host's copy of a folder and link its files into `place`."""
    kept = kept_folder(source)
    host.run(f"mkdir -p {kept} {shlex.quote(place)}")
    host.rsync(
        [*COPY, "--delete", f"--rsync-path={lock_rsync(kept)}", f"{source}/", f"{host.rsync_destination}:{kept}/"]
    )
    host.run(link_command(kept, place), timeout_s=600)
