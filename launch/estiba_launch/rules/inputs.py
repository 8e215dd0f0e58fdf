"""Rules about channels, checkpoints and where data lives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from .. import forecast
from ..errors import Problem
from ..target import Target
from .parts import Request, part, parts, s3_uris, twice

DEFAULT_MAX_RUNTIME_S = 86_400
BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?|s3://arn:aws.*")
RESERVED_CHECKPOINT_DIRS = ("/opt/ml/input", "/opt/ml/model", "/opt/ml/output", "/opt/ml/code")


def channels(request: Request, target: Target) -> Iterator[Problem]:
    mode_of_job = part(request, "AlgorithmSpecification").get("TrainingInputMode")
    all_channels = parts(request, "InputDataConfig")
    for name in twice([c.get("ChannelName") for c in all_channels]):
        yield Problem(field="InputDataConfig", value=name, rule="each ChannelName once", remedy="rename one of them")
    for index, channel in enumerate(all_channels):
        at = f"InputDataConfig[{index}]"
        mode = channel.get("InputMode") or mode_of_job
        sources = part(channel, "DataSource")
        s3 = part(sources, "S3DataSource")
        if "DataSource" in channel and len(sources) != 1:
            yield Problem(
                field=f"{at}.DataSource", value=sorted(sources) or None, rule="exactly one source", remedy="keep one"
            )
        kind = s3.get("S3DataType")
        if mode == "FastFile" and s3 and kind != "S3Prefix":
            yield Problem(
                field=f"{at}.DataSource.S3DataSource.S3DataType",
                value=kind,
                rule="FastFile takes whole prefixes",
                remedy="use S3Prefix, or InputMode File",
            )
        if mode != "Pipe":
            yield from _pipe_only(channel, s3, at, str(mode))
        if kind == "AugmentedManifestFile" and not s3.get("AttributeNames"):
            yield Problem(
                field=f"{at}.DataSource.S3DataSource.AttributeNames",
                rule="required with AugmentedManifestFile",
                remedy="list the attributes to read",
            )
        if s3.get("AttributeNames") and kind != "AugmentedManifestFile":
            yield Problem(
                field=f"{at}.DataSource.S3DataSource.AttributeNames",
                rule="only with AugmentedManifestFile",
                remedy="remove it",
            )
        yield from _file_system(request, sources, at, str(mode), target)
        if not target.is_sagemaker:
            yield from _not_here(mode, kind, sources, at, target)


def _pipe_only(channel: dict[str, Any], s3: dict[str, Any], at: str, mode: str) -> Iterator[Problem]:
    remedy = "remove it, or use InputMode Pipe"
    for member, off in (("CompressionType", "None"), ("RecordWrapperType", "None")):
        if channel.get(member, off) != off:
            yield Problem(
                field=f"{at}.{member}", value=channel[member], rule=f"only in Pipe mode, this is {mode}", remedy=remedy
            )
    if s3.get("S3DataType") == "AugmentedManifestFile":
        yield Problem(
            field=f"{at}.DataSource.S3DataSource.S3DataType",
            value="AugmentedManifestFile",
            rule=f"only in Pipe mode, this is {mode}",
            remedy="use S3Prefix or ManifestFile, or InputMode Pipe",
        )


def _file_system(request: Request, sources: dict[str, Any], at: str, mode: str, target: Target) -> Iterator[Problem]:
    system = part(sources, "FileSystemDataSource")
    if not system:
        return
    if target.is_sagemaker and not request.get("VpcConfig"):
        yield Problem(
            field="VpcConfig",
            rule=f"required by {at}.DataSource.FileSystemDataSource",
            remedy="add the file system's VPC",
        )
    if mode != "File":
        yield Problem(
            field=f"{at}.InputMode", value=mode, rule="a file system needs File", remedy="set InputMode: File"
        )
    directory = system.get("DirectoryPath", "/")
    if not directory.startswith("/"):
        yield Problem(
            field=f"{at}.DataSource.FileSystemDataSource.DirectoryPath",
            value=directory,
            rule="must start with /",
            remedy=f"write /{directory}",
        )


def _not_here(
    mode: str | None, kind: str | None, sources: dict[str, Any], at: str, target: Target
) -> Iterator[Problem]:
    if mode == "Pipe":
        yield Problem(
            field=f"{at}.InputMode",
            value=mode,
            rule=f"target {target.kind} has no Pipe mode",
            remedy="use FastFile, which streams as well and reads like files",
        )
    if kind in ("ManifestFile", "AugmentedManifestFile", "Converse"):
        yield Problem(
            field=f"{at}.DataSource.S3DataSource.S3DataType",
            value=kind,
            rule=f"target {target.kind} takes S3Prefix",
            remedy="give the folder or prefix that holds the files",
        )
    for other in sorted(set(sources) - {"S3DataSource"}):
        yield Problem(
            field=f"{at}.DataSource.{other}",
            rule=f"target {target.kind} takes S3DataSource",
            remedy="use S3DataSource with a file:// or s3:// address",
        )


def checkpoints(request: Request, _target: Target) -> Iterator[Problem]:
    config = part(request, "CheckpointConfig")
    if request.get("EnableManagedSpotTraining") and not config:
        run = part(request, "StoppingCondition").get("MaxRuntimeInSeconds", DEFAULT_MAX_RUNTIME_S)
        if isinstance(run, int):
            yield Problem(
                field="CheckpointConfig",
                rule="spot without a checkpoint location: " + forecast.loss_without_saving(run),
                remedy="add CheckpointConfig with an S3Uri (checkpoints are restored from it) or turn spot off",
            )
    path = config.get("LocalPath")
    if path is not None:
        # Normalised without touching this machine's disk: the path is the container's.
        pure = PurePosixPath(path)
        if not path.startswith("/") or ".." in pure.parts:
            yield Problem(
                field="CheckpointConfig.LocalPath",
                value=path,
                rule="must be an absolute path in the container",
                remedy="write /opt/ml/checkpoints",
            )
        elif str(pure) in ("/", "/opt", "/opt/ml") or any(
            str(pure) == taken or str(pure).startswith(taken + "/") for taken in RESERVED_CHECKPOINT_DIRS
        ):
            yield Problem(
                field="CheckpointConfig.LocalPath",
                value=path,
                rule="belongs to SageMaker",
                remedy="/opt/ml/checkpoints",
            )
    uri = str(config.get("S3Uri", "")).rstrip("/")
    for channel in parts(request, "InputDataConfig"):
        source = str(part(part(channel, "DataSource"), "S3DataSource").get("S3Uri", "")).rstrip("/")
        if uri and source and (uri == source or uri.startswith(source + "/") or source.startswith(uri + "/")):
            yield Problem(
                field="CheckpointConfig.S3Uri",
                value=uri,
                rule=f"overlaps channel {channel.get('ChannelName')!r} ({source}), and deletes in the checkpoint "
                "directory are carried out there too",
                remedy="give checkpoints a prefix of their own",
            )


def addresses(request: Request, target: Target) -> Iterator[Problem]:
    for field, uri in s3_uris(request):
        if uri.startswith("s3://") and not BUCKET.fullmatch(uri):
            yield Problem(
                field=field,
                value=uri,
                rule="not a bucket name (3-63 of a-z 0-9 . -)",
                remedy="write s3://BUCKET/PREFIX",
            )
        if uri.startswith("https://") and not target.is_sagemaker:
            yield Problem(
                field=field, value=uri, rule=f"target {target.kind} reads s3:// and file://", remedy="use those"
            )
        if uri.startswith("file://") and len(uri) <= len("file://"):
            yield Problem(field=field, value=uri, rule="no path", remedy="write file://PATH")
