"""What the contract's checks need to know about an image's job.

Each image provides `prepare(image, folder)` in tests/images/<name>/contract.py. An image without that file fails every
check that runs its job.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from contract.containers import Image

TESTS = Path(__file__).resolve().parents[1]

Setting = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A user's mistake, which ends with this exit status and this message."""

    what: str
    settings: Mapping[str, Setting]
    """Added to the settings of the quick job, or replacing them."""
    says: Sequence[str]
    """Parts of the message: the value seen, and the remedy."""
    without_channels: Sequence[str] = ()
    code: int = 2
    """Exit status: 2 for the configuration, 1 for the data."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job: its channels, and its settings by their hyperparameter names."""

    channels: Mapping[str, Path]
    settings: Mapping[str, Setting]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A small job, a slow one, and the mistakes that must be refused."""

    quick: Job
    """Takes seconds. Its settings differ from the defaults wherever a difference shows in the results' bytes."""
    slow: Job
    """Commits early and often, and continues for some seconds after the first commit."""
    commits: Callable[[Path], int]
    """The progress in a checkpoint directory; grows while the job runs."""
    commits_before_a_signal: int
    ignore: Sequence[str]
    """Name patterns of results that contain times and so differ between runs."""
    resumed: re.Pattern[str]
    """Matches the log of a job that resumed."""
    misspelt: tuple[str, str]
    """A setting that does not exist, and the one it resembles."""
    ill_typed: tuple[str, str]
    """A setting of the quick job, and a value that it cannot have."""
    refusals: Sequence[Refusal] = field(default_factory=tuple)
    writes: str = "output"
    """The folder below /opt/ml that holds its results."""
    imports_torch: bool = True
    """False for a job that loads within a second, too fast for two signals in a row."""
    commands: Sequence[str] = ()
    """What the image's command offers besides the job, such as `tokenizer train`."""
    large: Job | None = None
    """A job whose steps take much of `memory_limit`; None is the quick one."""
    memory_limit: str = "2g"
    splits_files_by_host: bool = False
    """Hosts that have the whole input divide its files among them and work independently."""
    trains_across_hosts: bool = False
    """All hosts train one model, and the first one leaves it."""


NO_INPUT = Refusal(
    what="no input",
    settings={},
    says=("/opt/ml/input/data/dataset", "-v DIR:/opt/ml/input/data/dataset"),
    without_channels=("dataset",),
)


def newest_step(checkpoints: Path) -> int:
    """The step of the newest verified checkpoint; retention limits their number, but steps keep growing."""
    steps = (path.parent.name.split("-")[1] for path in checkpoints.glob("step-*/manifest.json"))
    return max(map(int, steps), default=0)


def prepare(image: Image, folder: Path) -> Prepared:
    """The image's jobs, with their input in `folder`. Raises FileNotFoundError if the image describes none."""
    path = TESTS / "images" / image.name / "contract.py"
    spec = importlib.util.spec_from_file_location(f"contract_of_{image.name.replace('-', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prepared: Prepared = module.prepare(image, folder)
    return prepared


# --- one setting, three ways ---------------------------------------------------------------------------------------


def as_json_strings(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Hyperparameters as version 2 of AWS's SDK sends them: each value in JSON, so strings have quotes."""
    return {name: json.dumps(value) for name, value in settings.items()}


def as_plain_strings(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Hyperparameters as version 3 of AWS's SDK sends them, with underscores in their names."""
    return {name.replace("-", "_"): str(value) for name, value in settings.items()}


def as_flags(settings: Mapping[str, Setting]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def as_environment(settings: Mapping[str, Setting]) -> dict[str, str]:
    return {f"ESTIBA_{name.upper().replace('-', '_')}": str(value) for name, value in settings.items()}
