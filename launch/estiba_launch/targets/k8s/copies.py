"""What comes to a pod and what leaves it: file:// as folders of the nodes, s3:// by copies of the AWS command line.

A folder of the nodes must be the same on all of them, such as a mount of NFS or FSx.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from estiba_launch.request import contract
from estiba_launch.request.contract import ChannelSource
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets.docker_command import copy_from_s3, quote
from estiba_launch.targets.k8s.text import shell

AWS_IMAGE = "public.ecr.aws/aws-cli/aws-cli:2.22.0"
SYNC_EVERY_S = 30
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
        yield {"name": "checkpoints" if is_local else "ml", "mountPath": place, **part}
    for number, channel in enumerate(contract.channels(request)):
        if channel.uri.startswith("file://"):
            place = f"/opt/ml/input/data/{channel.name}"
            yield {"name": f"channel-{number}", "mountPath": place, "readOnly": True}


def volumes(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if not _output(request).startswith("s3://"):
        yield _folder("results", _output(request), create=True)
    if contract.checkpoint_dir(request) and _checkpoints(request).startswith("file://"):
        yield _folder("checkpoints", _checkpoints(request), create=True)
    for number, channel in enumerate(contract.channels(request)):
        if channel.uri.startswith("file://"):
            yield _folder(f"channel-{number}", channel.uri, create=False)


def _folder(name: str, uri: str, *, create: bool) -> dict[str, Any]:
    kind = "DirectoryOrCreate" if create else "Directory"
    return {"name": name, "hostPath": {"path": str(contract.file_path(uri)), "type": kind}}


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
