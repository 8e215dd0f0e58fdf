"""The uninterrupted run that a drill is compared with, byte for byte; stored for later drills of the same job."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.jobs import directory, inputs
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.paths import state_root
from estiba_launch.request import contract

DEFAULT_IGNORE = ("results*.json", "metrics*")
"""Files with times and rates, which differ between any two runs."""
IGNORE_VARIABLE = "ESTIBA_DRILL_IGNORE"
FORMAT = 2
UNRELATED_TO_THE_WORK = ("TrainingJobName", "OutputDataConfig", "CheckpointConfig", "StoppingCondition", "Tags")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The outcome of an uninterrupted run."""

    job: str
    files: dict[str, str]
    """`output/...` and `model/...` -> sha256."""
    running_s: float
    """Seconds during which its hosts were held."""
    working_s: float | None
    """Seconds from its first progress line, or from its start if it printed none, to its end."""
    unit: str | None
    total: float | None
    writes: int | None = None
    """Checkpoint files that it wrote, the progress of a job that prints none."""

    @classmethod
    def load(cls, key: str) -> Reference | None:
        """The reference that an earlier drill stored, if any."""
        try:
            return cls(**directory.read_json(_path(key), {}))
        except (LaunchError, TypeError):
            return None  # Missing, broken, or written by another version.

    def save(self, key: str) -> None:
        _path(key).parent.mkdir(parents=True, exist_ok=True)
        directory.write_json(_path(key), asdict(self))


def _path(key: str) -> Path:
    return state_root() / "drills" / "references" / f"{key}.json"


def reference_key(request: Mapping[str, Any], options: SubmitOptions, image: str) -> str:
    """A key that is equal for equal work: request, image content, inputs. Raises HostError.

    A file:// input is identified by names, sizes and modification times, an s3:// input by names and sizes.
    """
    identity = {
        "format": FORMAT,
        "request": {name: part for name, part in request.items() if name not in UNRELATED_TO_THE_WORK},
        "checkpoint_dir": contract.checkpoint_dir(request),
        "image": image,
        "inputs": {channel.name: _listing(channel) for channel in contract.channels(request)},
        "host": {"gpus": options.host.gpus, "encoding": options.host.encoding},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _listing(channel: contract.ChannelSource) -> list[tuple[str, int, int]]:
    sizes = inputs.objects(channel)
    times: dict[str, int] = {}
    if channel.uri.startswith("file://"):
        path = contract.file_path(channel.uri)
        base = path if path.is_dir() else path.parent
        times = {key: (base / key).stat().st_mtime_ns for key in sizes}
    return [(key, size, times.get(key, 0)) for key, size in sorted(sizes.items())]


def ignore_patterns(flags: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    """Patterns of files that are not compared: the defaults, ESTIBA_DRILL_IGNORE (comma-separated) and `--ignore`."""
    from_environment = [text.strip() for text in environ.get(IGNORE_VARIABLE, "").split(",")]
    return [*DEFAULT_IGNORE, *filter(None, from_environment), *flags]


def without_ignored(files: Mapping[str, str], ignore: Sequence[str]) -> dict[str, str]:
    """Drop files whose name matches a pattern, or whose path does, with or without `output/` or `model/`."""

    def ignored(path: str) -> bool:
        forms = {path, path.partition("/")[2], path.rpartition("/")[2]}
        return any(fnmatch.fnmatchcase(form, pattern) for form in forms for pattern in ignore)

    return {path: digest for path, digest in files.items() if not ignored(path)}


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> sha256, of every file below `folder`."""
    by_path = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                by_path[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return by_path


def differences(reference: Mapping[str, str], output: Mapping[str, str]) -> list[str]:
    """A sentence for each file that is missing, new or different."""
    return (
        [f"{path} is missing" for path in reference if path not in output]
        + [f"{path} is new" for path in output if path not in reference]
        + [f"{path} differs" for path in reference if path in output and reference[path] != output[path]]
    )
