"""The `/opt/ml` tree of a SageMaker training job, read once into one frozen `Job`.

Source: "How Amazon SageMaker provides training information", docs.aws.amazon.com. The root can move (`ESTIBA_ROOT`),
so a process without a container sees the same tree. A file that is absent gets what the platform would assume for one
host with nothing configured; a file that is present and unreadable is an error, never a default.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estiba.errors import ConfigError

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
    """FullyReplicated (each host has everything) or ShardedByS3Key (each host has its own share)."""
    content_type: str | None = None

    @property
    def is_sharded(self) -> bool:
        return self.distribution == SHARDED


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where this process is, and what it was given."""

    root: Path
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, Channel] = field(default_factory=dict)
    hosts: tuple[str, ...] = ("algo-1",)
    """Sorted as numbers where names end in one, so that algo-2 comes before algo-10 and host 0 is algo-1."""
    current_host: str = "algo-1"
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
        """Archived once, at the end of the job; lost when a spot host is lost."""
        return self.root / "output/data"

    @property
    def failure_path(self) -> Path:
        return self.root / "output/failure"

    def channel_of(self, path: Path) -> Channel | None:
        """The channel that holds `path`, or None."""
        for channel in self.channels.values():
            if path == channel.path or channel.path in path.parents:
                return channel
        return None

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Job:
        """Read the tree. Raises ConfigError naming the file that is broken."""
        root = root_of(environ)
        config_dir = root / "input/config"
        resources = _read_object(config_dir / "resourceconfig.json")
        given = resources.get("hosts") or ["algo-1"]
        if not isinstance(given, list) or not all(isinstance(host, str) for host in given):
            raise ConfigError(
                f'{config_dir / "resourceconfig.json"}: hosts is {given!r}; it must be a list, such as ["algo-1"]'
            )
        hosts = tuple(sorted(given, key=_host_order))
        current_host = str(resources.get("current_host") or environ.get("CURRENT_HOST") or hosts[0])
        if current_host not in hosts:
            raise ConfigError(
                f"{config_dir / 'resourceconfig.json'}: current_host is {current_host!r}, which is not one of its "
                f"hosts {list(hosts)}; the two must agree"
            )
        return cls(
            root=root,
            hyperparameters={
                str(key): value if isinstance(value, str) else json.dumps(value)
                for key, value in _read_object(config_dir / "hyperparameters.json").items()
            },
            channels=_channels(root, _read_object(config_dir / "inputdataconfig.json")),
            hosts=hosts,
            current_host=current_host,
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
    """The directory that the platform keeps: LocalPath of CheckpointConfig, or <root>/checkpoints."""
    root = root_of(environ)
    given = _read_object(root / "input/config/checkpointconfig.json").get("LocalPath")
    return _moved(str(given or f"{DEFAULT_ROOT}/checkpoints"), root)


def _moved(path: str, root: Path) -> Path:
    """A path below /opt/ml, as it is below `root`."""
    inside = os.path.relpath(path, DEFAULT_ROOT)
    return Path(path) if inside.startswith("..") else root / inside


def _channels(root: Path, config: Mapping[str, Any]) -> dict[str, Channel]:
    data_dir = root / "input/data"
    channels = {}
    for name, given in config.items():
        if not isinstance(given, dict):
            raise ConfigError(
                f"{root / 'input/config/inputdataconfig.json'}: channel {name!r} is {given!r}; it must be an object, "
                'such as {"TrainingInputMode": "File"}'
            )
        channels[name] = Channel(
            name=name,
            path=data_dir / name,
            mode=given.get("TrainingInputMode") or "File",
            distribution=given.get("S3DistributionType") or FULL,
            content_type=given.get("ContentType"),
        )
    try:
        if data_dir.is_dir():  # a plain `docker run -v` brings channels without a config file
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
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); it must hold one object") from None
    if not isinstance(value, dict):
        raise ConfigError(f'{path}: holds {type(value).__name__}, not an object; write {{"name": "value"}}')
    return value


def _host_order(host: str) -> tuple[str, int, str]:
    stem = host.rstrip("0123456789")
    digits = host[len(stem) :]
    return (stem, int(digits) if digits else -1, host)
