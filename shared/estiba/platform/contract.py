"""The `/opt/ml` tree of a SageMaker training job, read once into one frozen `Job`.

Source: "How Amazon SageMaker provides training information", docs.aws.amazon.com. `ESTIBA_ROOT` moves the root,
so a process outside a container sees the same tree. A missing file means nothing configured, and the hosts that another
scheduler names, or one. A file that exists and cannot be read is an error, never a default.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estiba.errors import ConfigError
from estiba.platform.hosts import RESOURCES, Hosts, find_hosts, host_order

DEFAULT_ROOT = "/opt/ml"
SHARDED = "ShardedByS3Key"
FULL = "FullyReplicated"


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One input of the job, under `<root>/input/data/<name>`."""

    name: str
    path: Path
    mode: str = "File"
    """File, FastFile (read-only, streamed) or Pipe."""
    distribution: str = FULL
    """FullyReplicated (each host has all objects) or ShardedByS3Key (each host has its own part)."""
    content_type: str | None = None

    @property
    def is_sharded(self) -> bool:
        return self.distribution == SHARDED


@dataclass(frozen=True, kw_only=True)
class Job:
    """The job that this process runs: its directories, hyperparameters, channels and hosts."""

    root: Path
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, Channel] = field(default_factory=dict)
    hosts: tuple[str, ...] = ("algo-1",)
    """SageMaker's are sorted by the number at the end of the name: algo-2 before algo-10, host 0 is algo-1. Those of
    other schedulers (`platform/hosts.py`) are in the order of their ranks."""
    current_host: str = "algo-1"
    cluster: Hosts = field(default_factory=Hosts)
    """The same hosts in the order of their ranks, which on SageMaker is the file's order, and who named them."""
    network_interface: str = "eth0"
    instance_type: str | None = None
    name: str | None = None
    """The training job's name on SageMaker or the local host; None for a plain `docker run`."""
    checkpoint_dir: Path

    @property
    def host_count(self) -> int:
        return len(self.hosts)

    @property
    def host_index(self) -> int:
        return self.hosts.index(self.current_host)

    @property
    def input_dir(self) -> Path:
        return self.root / "input/data"

    @property
    def model_dir(self) -> Path:
        return self.root / "model"

    @property
    def output_dir(self) -> Path:
        """Archived once, at the end of the job. Lost with a spot host."""
        return self.root / "output/data"

    @property
    def failure_path(self) -> Path:
        return self.root / "output/failure"

    def channel_of(self, path: Path) -> Channel | None:
        """Return the channel that contains `path`, or None."""
        for channel in self.channels.values():
            if path == channel.path or channel.path in path.parents:
                return channel
        return None

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Job:
        """Read the tree. Raises ConfigError, which names the broken file."""
        root = root_of(environ)
        config_dir = root / "input/config"
        resources = _read_object(config_dir / "resourceconfig.json")
        cluster = find_hosts(environ, resources, config_dir / "resourceconfig.json")
        # Other schedulers number their hosts themselves.
        by_number = cluster.source == RESOURCES
        return cls(
            root=root,
            hyperparameters={
                str(key): value if isinstance(value, str) else json.dumps(value)
                for key, value in _read_object(config_dir / "hyperparameters.json").items()
            },
            channels=_channels(root, _read_object(config_dir / "inputdataconfig.json")),
            hosts=tuple(sorted(cluster.names, key=host_order)) if by_number else cluster.names,
            current_host=cluster.current,
            cluster=cluster,
            network_interface=str(resources.get("network_interface_name") or "eth0"),
            instance_type=(
                resources.get("current_instance_type")
                or environ.get("ESTIBA_INSTANCE_TYPE")
                or environ.get("SM_CURRENT_INSTANCE_TYPE")
            ),
            name=environ.get("TRAINING_JOB_NAME") or None,
            checkpoint_dir=checkpoint_dir(environ),
        )


def root_of(environ: Mapping[str, str] = os.environ) -> Path:
    return Path(environ.get("ESTIBA_ROOT") or DEFAULT_ROOT)


def checkpoint_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory that the platform preserves: LocalPath of CheckpointConfig, or <root>/checkpoints."""
    root = root_of(environ)
    local_path = _read_object(root / "input/config/checkpointconfig.json").get("LocalPath")
    return _below_root(str(local_path or f"{DEFAULT_ROOT}/checkpoints"), root)


def _below_root(path: str, root: Path) -> Path:
    """Map a path below /opt/ml to the same path below `root`."""
    inside = os.path.relpath(path, DEFAULT_ROOT)
    return Path(path) if inside.startswith("..") else root / inside


def _channels(root: Path, config: Mapping[str, Any]) -> dict[str, Channel]:
    data_dir = root / "input/data"
    channels = {}
    for name, settings in config.items():
        if not isinstance(settings, dict):
            raise ConfigError(
                f"{root / 'input/config/inputdataconfig.json'}: channel {name!r} is {settings!r}; it must be an "
                'object, such as {"TrainingInputMode": "File"}'
            )
        channels[name] = Channel(
            name=name,
            path=data_dir / name,
            mode=settings.get("TrainingInputMode") or "File",
            distribution=settings.get("S3DistributionType") or FULL,
            content_type=settings.get("ContentType"),
        )
    try:
        if data_dir.is_dir():  # a plain `docker run -v` mounts channels without a config file
            for child in sorted(data_dir.iterdir()):
                if child.is_dir() and child.name not in channels:
                    channels[child.name] = Channel(name=child.name, path=child)
    except OSError as error:
        raise ConfigError(
            f"{data_dir}: cannot be read ({error.strerror}) by user {os.getuid()}; make it readable or change --user"
        ) from None
    return channels


def _read_object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); mount a readable UTF-8 file or leave it out") from None
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON ({error}); it must hold one object") from None
    if not isinstance(value, dict):
        raise ConfigError(f'{path}: holds {type(value).__name__}, not an object; write {{"name": "value"}}')
    return value
