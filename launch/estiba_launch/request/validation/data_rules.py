"""Channels, checkpoints and addresses that CreateTrainingJob or Estiba's own hosts refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.contract import SUBMIT_DIRECTORY, file_path, path_inside
from estiba_launch.request.validation.view import Finding, View, uris

BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?|s3://arn:aws.*")
RESERVED_DIRS = ("/opt/ml/input", "/opt/ml/model", "/opt/ml/output", "/opt/ml/code")
S3_TYPE, S3_ATTRIBUTES = "DataSource.S3DataSource.S3DataType", "DataSource.S3DataSource.AttributeNames"
S3_GROUPS, DIRECTORY = "DataSource.S3DataSource.InstanceGroupNames", "DataSource.FileSystemDataSource.DirectoryPath"


def find(request: View, target: TargetAddress) -> Iterator[Finding]:
    groups = {group("InstanceGroupName") for group in request.each("ResourceConfig.InstanceGroups")}
    for channel in request.each("InputDataConfig"):
        mode = channel("InputMode") or request("AlgorithmSpecification.TrainingInputMode")
        for path, value, rule, remedy in _channel(channel, str(mode), groups):
            yield channel.field(path), value, rule, remedy
        if not target.on_aws:
            for path, value, rule, remedy in _off_aws(channel, mode):
                yield channel.field(path), value, f"{rule} on target {target.kind}", remedy
        elif channel("DataSource.FileSystemDataSource") and not request("VpcConfig"):
            rule = f"required by {channel.field('DataSource.FileSystemDataSource')}"
            yield "VpcConfig", None, rule, "add the file system's VPC"
    yield from _groups(request)
    yield from _checkpoints(request)
    yield from _addresses(request, target)
    yield from _code(request, target)
    yield from _nul(request)


def _channel(channel: View, mode: str, groups: set[Any]) -> Iterator[Finding]:
    sources, kind = channel("DataSource"), channel(S3_TYPE)
    augmented, attributes = kind == "AugmentedManifestFile", channel(S3_ATTRIBUTES)
    if channel("ChannelName") in (".", ".."):
        yield "ChannelName", channel("ChannelName"), "not a folder name", "use letters, digits, - and _"
    if sources is not None and len(sources) != 1:
        yield "DataSource", sorted(sources) or None, "exactly one source", "keep one"
    if mode == "FastFile" and channel("DataSource.S3DataSource") and kind != "S3Prefix":
        yield S3_TYPE, kind, "FastFile reads whole prefixes", "use S3Prefix, or InputMode File"
    if mode != "Pipe":
        for member in ("CompressionType", "RecordWrapperType"):
            if channel(member) not in (None, "None"):
                rule, remedy = f"only in Pipe mode, not {mode}", "remove it, or use InputMode Pipe"
                yield member, channel(member), rule, remedy
        if augmented:
            yield S3_TYPE, kind, f"only in Pipe mode, not {mode}", "use S3Prefix or ManifestFile, or InputMode Pipe"
    if augmented and not attributes:
        yield S3_ATTRIBUTES, None, "required with AugmentedManifestFile", "list the attributes to read"
    if attributes and not augmented:
        yield S3_ATTRIBUTES, None, "only with AugmentedManifestFile", "remove it"
    for name in channel(S3_GROUPS) or []:
        if name not in groups:
            yield S3_GROUPS, name, "no such group in ResourceConfig.InstanceGroups", "name one that exists"
    if channel("DataSource.FileSystemDataSource"):
        directory = channel(DIRECTORY) or "/"
        if mode != "File":
            yield "InputMode", mode, "a file system needs File", "set InputMode: File"
        if not directory.startswith("/"):
            yield DIRECTORY, directory, "must start with /", f"write /{directory}"


def _groups(request: View) -> Iterator[Finding]:
    """SageMaker requires groups on every S3 channel or on none."""
    channels = [channel for channel in request.each("InputDataConfig") if channel("DataSource.S3DataSource")]
    grouped = [channel("ChannelName") for channel in channels if channel(S3_GROUPS)]
    for channel in channels if grouped else ():
        if not channel(S3_GROUPS):
            rule = f"required, since channel {grouped[0]!r} names its groups"
            yield channel.field(S3_GROUPS), None, rule, "name the groups of every channel, or of none"


def _off_aws(channel: View, mode: str | None) -> Iterator[Finding]:
    kind = channel(S3_TYPE)
    if mode == "Pipe":
        yield "InputMode", mode, "no Pipe mode", "use FastFile, which streams too, as files"
    if kind not in (None, "S3Prefix"):
        yield S3_TYPE, kind, "only S3Prefix is read", "use the folder or prefix of the files"
    for other in sorted(set(channel("DataSource") or ()) - {"S3DataSource"}):
        remedy = "use S3DataSource with a file:// or s3:// address"
        yield f"DataSource.{other}", None, "only S3DataSource is read", remedy


def _checkpoints(request: View) -> Iterator[Finding]:
    path = request("CheckpointConfig.LocalPath")
    if path is not None:
        # PurePosixPath, because the path is in the container, not on this machine.
        # It keeps two slashes at the start, which are one on Linux.
        pure = PurePosixPath(re.sub("^//+", "/", path))
        remedy = "write /opt/ml/checkpoints"
        if not path.startswith("/") or ".." in pure.parts:
            yield "CheckpointConfig.LocalPath", path, "must be an absolute path in the container", remedy
        elif str(pure) in ("/", "/opt", "/opt/ml") or any(pure.is_relative_to(one) for one in RESERVED_DIRS):
            yield "CheckpointConfig.LocalPath", path, "reserved by SageMaker", remedy
    store = str(request("CheckpointConfig.S3Uri") or "").rstrip("/")
    for channel in request.each("InputDataConfig"):
        source = str(channel("DataSource.S3DataSource.S3Uri") or "").rstrip("/")
        if store and source and (f"{store}/".startswith(f"{source}/") or f"{source}/".startswith(f"{store}/")):
            rule = (
                f"overlaps channel {channel('ChannelName')!r} ({source}), and a file deleted from the checkpoint "
                "directory is deleted there too"
            )
            yield "CheckpointConfig.S3Uri", store, rule, "give checkpoints their own prefix"


def _code(request: View, target: TargetAddress) -> Iterator[Finding]:
    """The user's code must be where its container can read it."""
    for field in (f"Environment.{SUBMIT_DIRECTORY}", f"HyperParameters.{SUBMIT_DIRECTORY.lower()}"):
        location = str(request(field) or "").strip('"')
        if not location.startswith("file://"):
            continue
        sources = [str(channel("DataSource.S3DataSource.S3Uri")) for channel in request.each("InputDataConfig")]
        if target.on_aws:
            yield field, location, "not on S3", "upload the code and use its s3:// address"
        elif all(path_inside(location, uri) is None for uri in sources):
            yield field, location, "no channel brings it into the container", "add a channel with this address"


def _nul(request: View) -> Iterator[Finding]:
    """No variable, argument or path can hold the character NUL."""
    texts = [("CheckpointConfig.LocalPath", request("CheckpointConfig.LocalPath")), *uris(request)]
    for path in ("Environment", "HyperParameters"):
        texts += [(f"{path}.{name}", text) for name, text in (request(path) or {}).items()]
    for path in ("AlgorithmSpecification.ContainerEntrypoint", "AlgorithmSpecification.ContainerArguments"):
        texts += [(f"{path}[{number}]", text) for number, text in enumerate(request(path) or [])]
    for field, text in dict(texts).items():
        if "\0" in str(text):
            yield field, text, "holds the character NUL, which no variable, argument or path can", "remove it"


def _addresses(request: View, target: TargetAddress) -> Iterator[Finding]:
    for field, uri in uris(request):
        if uri.startswith("s3://") and not BUCKET.fullmatch(uri):
            yield field, uri, "not a bucket name (3-63 of a-z 0-9 . -)", "write s3://BUCKET/PREFIX"
        elif uri.startswith("https://") and not target.on_aws:
            yield field, uri, f"target {target.kind} reads s3:// and file://", "use one of them"
        elif uri == "file://":
            yield field, uri, "no path", "write file://PATH"
        elif uri.startswith("file://"):
            try:
                file_path(uri)
            except LaunchError as error:
                rule, _, remedy = str(error).removeprefix(f"{uri}: ").partition("; ")
                yield field, uri, rule, remedy
