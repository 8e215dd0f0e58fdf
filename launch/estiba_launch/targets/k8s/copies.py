"""What comes to a pod and what leaves it: file:// as folders of the nodes, s3:// by copies of the AWS command line.

A folder of the nodes must be the same on all of them, such as a mount of NFS or FSx.
"""

from __future__ import annotations

import glob
import os.path
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.request import contract
from estiba_launch.request.contract import ChannelSource
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets.docker_command import copy_from_s3, quote
from estiba_launch.targets.k8s.text import shell

AWS_IMAGE = "public.ecr.aws/aws-cli/aws-cli:2.22.0"
SYNC_EVERY_S = 30
SHM = "/dev/shm"  # noqa: S108
OWN_FOLDER = "$(JOB_COMPLETION_INDEX)"
"""Kubernetes fills it in for each pod."""


def mounts(request: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Where /opt/ml is in the pod, the same for its own container and those that copy."""
    yield {"name": "ml", "mountPath": "/opt/ml/input", "subPath": "input"}
    output = _output(request)
    for folder in ("model", "output"):
        if output.startswith("s3://"):
            yield {"name": "ml", "mountPath": f"/opt/ml/{folder}", "subPath": folder}
        else:
            yield {"name": "results", "mountPath": f"/opt/ml/{folder}", "subPathExpr": f"{name}/{OWN_FOLDER}/{folder}"}
    if place := contract.checkpoint_dir(request):
        is_local = _checkpoints(request).startswith("file://")
        part = {} if is_local else {"subPath": "checkpoints"}
        if ":" in place or os.path.normpath(place) == SHM:
            rule = "a mount of Kubernetes cannot have a colon" if ":" in place else "the pod's shared memory is there"
            raise LaunchError(f"CheckpointConfig.LocalPath = {place!r}: {rule}; use /opt/ml/checkpoints")
        yield {"name": "checkpoints" if is_local else "ml", "mountPath": place, **part}
    for number, channel in enumerate(contract.channels(request)):
        if channel.uri.startswith("file://"):
            place = f"/opt/ml/input/data/{channel.name}"
            if os.path.isfile(path := _channel_path(request, number, channel)):
                place += f"/{path.name}"
            yield {"name": f"channel-{number}", "mountPath": place, "readOnly": True}


def volumes(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if not _output(request).startswith("s3://"):
        yield _on_node("results", _file_path(_output(request)), "DirectoryOrCreate")
    if contract.checkpoint_dir(request) and _checkpoints(request).startswith("file://"):
        yield _on_node("checkpoints", _file_path(_checkpoints(request)), "DirectoryOrCreate")
    for number, channel in enumerate(contract.channels(request)):
        if channel.uri.startswith("file://"):
            path = _channel_path(request, number, channel)
            yield _on_node(f"channel-{number}", path, "File" if os.path.isfile(path) else "Directory")


def _channel_path(request: Mapping[str, Any], number: int, channel: ChannelSource) -> Path:
    """The folder or the file of a channel on the nodes. Raises LaunchError for what no mount can give to a pod."""
    field = f"InputDataConfig[{number}].DataSource.S3DataSource"
    path = _file_path(channel.uri)
    if channel.sharded and len(contract.hosts(request)) > 1:
        rule = f"target k8s gives every pod all of {channel.uri}"
        remedy = "put the data on S3, or use FullyReplicated"
        raise LaunchError(f"{field}.S3DataDistributionType = 'ShardedByS3Key': {rule}; {remedy}")
    if not os.path.exists(path) and glob.glob(f"{glob.escape(str(path))}*"):
        rule, remedy = "target k8s mounts a folder or one file, no name prefix", "move the files into their own folder"
        raise LaunchError(f"{field}.S3Uri = {channel.uri!r}: {rule}; {remedy}")
    if os.path.isfile(path) and ":" in path.name:
        rule, remedy = "a mount of Kubernetes cannot have a colon", "rename the file, or give its folder"
        raise LaunchError(f"{field}.S3Uri = {channel.uri!r}: {rule}; {remedy}")
    return path


def _on_node(name: str, path: Path, kind: str) -> dict[str, Any]:
    return {"name": name, "hostPath": {"path": str(path), "type": kind}}


def _file_path(uri: str) -> Path:
    """Without `..`, which Kubernetes refuses."""
    return Path(os.path.normpath(contract.file_path(uri)))


def containers(job: JobFile) -> Iterator[dict[str, Any]]:
    """The init container that brings channels and checkpoints, and the sidecar that takes checkpoints and results."""
    request = job.request
    name = job.name
    shared = [one for one in mounts(request, name) if one["name"] in ("ml", "checkpoints")]
    if script := "\n".join(_bring(request)):
        yield _copier("inputs", script, shared)
    if script := "\n".join(_take(request, name)):
        yield {**_copier("uploads", script, shared), "restartPolicy": "Always"}


def _copier(name: str, script: str, shared: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "image": AWS_IMAGE,
        "command": ["bash", "-c", shell(f"set -euo pipefail\n{script}\n")],
        "volumeMounts": shared,
    }


def _bring(request: Mapping[str, Any]) -> Iterator[str]:
    count = len(contract.hosts(request))
    for channel in contract.channels(request):
        if channel.uri.startswith("s3://"):
            place = f"/opt/ml/input/data/{channel.name}"
            yield from _share(channel, place, count) if channel.sharded else copy_from_s3(channel.uri, quote(place))
    store, folder = _checkpoints(request), contract.checkpoint_dir(request)
    if folder and store.startswith("s3://"):
        yield f"aws s3 sync --only-show-errors {shlex.quote(store)} {shlex.quote(folder)}"


def _share(channel: ChannelSource, place: str, hosts: int) -> Iterator[str]:
    """Shell that brings every n-th object (ShardedByS3Key)."""
    bucket, _, prefix = channel.uri.removeprefix("s3://").partition("/")
    folder = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
    parent = folder.rstrip("/").rpartition("/")[0]
    into = shlex.quote(place)
    yield "list() {"
    yield f'  aws s3api list-objects-v2 --bucket {shlex.quote(bucket)} --prefix "$1" \\'
    yield "    --query 'Contents[].[Key]' --output text"
    yield "}"
    yield f"base={shlex.quote(folder)}"
    yield 'keys=$(list "$base")'
    # One object, or a name prefix.
    yield f'[ "$keys" != None ] || {{ keys=$(list "${{base%/}}"); base={shlex.quote(parent and parent + "/")}; }}'
    yield f"mkdir -p {into}"
    yield "number=0"
    yield "while IFS= read -r key; do"
    yield '  case "$key" in */ | None) continue ;; esac'
    yield f'  if [ $((number % {hosts})) = "$JOB_COMPLETION_INDEX" ]; then'
    yield f'    aws s3 cp --only-show-errors s3://{shlex.quote(bucket)}/"$key" {into}/"${{key#"$base"}}"'
    yield "  fi"
    yield "  number=$((number + 1))"
    yield 'done <<< "$keys"'


def _take(request: Mapping[str, Any], name: str) -> Iterator[str]:
    if not uploads(request):
        return
    store, place = _checkpoints(request), contract.checkpoint_dir(request)
    output = _output(request)
    saves = f"aws s3 sync --only-show-errors {shlex.quote(place or '')} {shlex.quote(store)}"
    has_store = store.startswith("s3://")
    yield "ended="
    yield "trap 'ended=yes' TERM"
    yield 'while [ -z "$ended" ]; do'
    yield f"  sleep {SYNC_EVERY_S} & wait $! || :"
    if has_store:
        yield f"  {saves} || :"
    yield "done"
    if has_store:
        yield f"until {saves}; do sleep 5; done"
    if output.startswith("s3://"):
        into = shlex.quote(f"{output.rstrip('/')}/{name}")
        for folder in ("model", "output"):
            there = f'{into}/"$JOB_COMPLETION_INDEX"/{folder}'
            yield f"until aws s3 sync --only-show-errors /opt/ml/{folder} {there}; do sleep 5; done"


def uploads(request: Mapping[str, Any]) -> bool:
    """Whether something of the pod must reach S3."""
    return _output(request).startswith("s3://") or _checkpoints(request).startswith("s3://")


def _output(request: Mapping[str, Any]) -> str:
    return str(request["OutputDataConfig"]["S3OutputPath"])


def _checkpoints(request: Mapping[str, Any]) -> str:
    return str(request.get("CheckpointConfig", {}).get("S3Uri", ""))
