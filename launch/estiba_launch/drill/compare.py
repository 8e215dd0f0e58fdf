"""The uninterrupted run that a drill is compared with, and the comparison, byte for byte."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException

from .. import contract, state
from ..errors import HostError, LaunchError
from ..localhost import channels, jobs
from ..localhost.control import LocalOptions

DEFAULT_IGNORE = ("results*.json", "metrics*")
"""What differs between any two runs: times and rates."""
IGNORE_VARIABLE = "ESTIBA_DRILL_IGNORE"
FORMAT = 1
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What an uninterrupted run left."""

    job: str
    files: dict[str, str]
    """`output/...` and `model/...` -> sha256."""
    running_s: float
    """Seconds its hosts were held."""
    working_s: float | None
    """Seconds from its first progress line, or from its start where it printed none, to its end."""
    unit: str | None
    total: float | None

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state.write_json(path, asdict(self))


def patterns(given: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    """What is left out of the comparison: the defaults, ESTIBA_DRILL_IGNORE (comma-separated), and `--ignore`."""
    named = [text.strip() for text in environ.get(IGNORE_VARIABLE, "").split(",")]
    return [*DEFAULT_IGNORE, *filter(None, named), *given]


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether a pattern matches the file's name, or its path below `output/` or `model/`, or with it."""
    forms = {name, name.partition("/")[2], name.rpartition("/")[2]}
    return any(fnmatch.fnmatchcase(form, pattern) for form in forms for pattern in ignore)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a finished job left."""

    files: dict[str, str]
    results: dict[str, Any] | None
    """Its results.json, if there is one that can be read."""


def left_by(name: str) -> Left:
    """Digests of model and output of a finished job. Raises LaunchError when they cannot be fetched."""
    with tempfile.TemporaryDirectory(prefix="estiba-drill-") as place:
        jobs.fetch(name, Path(place))
        try:
            results = json.loads((Path(place) / "output/results.json").read_text("utf-8"))
        except (OSError, ValueError):
            results = None
        return Left(files=digests(Path(place)), results=results if isinstance(results, dict) else None)


def differences(reference: Mapping[str, str], found: Mapping[str, str], ignore: Sequence[str]) -> list[str]:
    """Each file that is missing, extra or different, in words."""
    wanted = {name: digest for name, digest in reference.items() if not is_ignored(name, ignore)}
    have = {name: digest for name, digest in found.items() if not is_ignored(name, ignore)}
    return (
        [f"{name} is missing" for name in wanted if name not in have]
        + [f"{name} is new" for name in have if name not in wanted]
        + [f"{name} differs" for name in wanted if name in have and wanted[name] != have[name]]
    )


def key_of(request: Mapping[str, Any], options: LocalOptions, image: str) -> str:
    """Names the work: the same request on the same image (its id) and inputs gives the same key. Raises HostError.

    A file:// input is known by its names, sizes and times of change; an s3:// one by names and sizes.
    """
    same = copy.deepcopy(dict(request))
    for name in ("TrainingJobName", "OutputDataConfig", "CheckpointConfig", "StoppingCondition", "Tags"):
        same.pop(name, None)
    listing = {channel.name: _listing(channel) for channel in contract.channels(request)}
    what = {
        "format": FORMAT,
        "request": same,
        "checkpoint_dir": contract.checkpoint_dir(request),
        "image": image,
        "inputs": listing,
        "host": {"gpus": options.host.gpus, "encoding": options.host.encoding},
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _listing(channel: contract.ChannelSource) -> list[tuple[str, int, int]]:
    sizes = channels.objects(channel)
    times: dict[str, int] = {}
    if channel.uri.startswith("file://"):
        path = contract.file_path(channel.uri)
        base = path if path.is_dir() else path.parent
        times = {key: (base / key).stat().st_mtime_ns for key in sizes}
    return [(key, size, times.get(key, 0)) for key, size in sorted(sizes.items())]


def image_id(image: str) -> str:
    """The content an image's name stands for now. Raises HostError."""
    try:
        return str(docker.from_env(timeout=60).images.get(image).id)
    except DockerException as error:
        raise HostError(f"image {image}: not known to the engine ({error}); build or pull it") from error


def reference_path(key: str) -> Path:
    return state.state_root() / "drills" / "references" / f"{key}.json"


def known_reference(key: str) -> Reference | None:
    """An earlier drill's, if the job is still the same."""
    try:
        value = state.read_json(reference_path(key))
        return Reference(**value) if value else None
    except (LaunchError, TypeError):
        return None  # of another version, or broken: made again
