"""`finetune check DATA`: how the data would be trained, without a model.

finetune check survey.csv
finetune check folder --json --write records.jsonl
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from estiba.config import flag_of
from estiba.config import load as load_config
from estiba.errors import ConfigError, EstibaError
from finetune.data.files import find_files
from finetune.data.load import load
from finetune.data.records import Dataset
from finetune.data.settings import DataSettings

EXIT_UNUSABLE = 2


class CheckConfig(DataSettings):
    """Show how data would be trained: finetune check DATA... [--json] [--write FILE.jsonl] [settings]."""

    json_report: bool = False
    """Print the report as one JSON object; --json does the same."""
    write: str | None = None
    """Write the records, as they would be trained, to this file of JSON lines."""
    content_type: str | None = None
    """The content type of the channel, which the report compares with the content."""


def run(arguments: Sequence[str]) -> int:
    """Check the data, print the report, and return the exit status. Errors are one sentence on standard error."""
    try:
        locations, config = _parse(arguments)
        paths = [Path(location) for location in locations]
        _check_not_input(config.write, paths)
        dataset = load(paths, config, content_type=config.content_type)
        if config.write is not None:
            _write(Path(config.write), dataset)
        _print(dataset, as_json=config.json_report)
    except EstibaError as error:
        return _fail(str(error))
    except (MemoryError, RecursionError) as error:
        return _fail(f"{' '.join(arguments)[:200]}: too large to check here ({type(error).__name__}); split the data")
    except Exception as error:  # whatever the input, a person gets a sentence
        reason = " ".join(str(error).split())[:200]
        return _fail(
            f"{' '.join(arguments)[:200]}: cannot be checked ({type(error).__name__}: {reason}); "
            "please report this with the file"
        )
    return 0


def _parse(arguments: Sequence[str]) -> tuple[list[str], CheckConfig]:
    """Separate the locations from the flags."""
    locations: list[str] = []
    flags: list[str] = []
    rest = list(arguments)
    only_locations = False
    while rest:
        item = rest.pop(0)
        if only_locations or not item.startswith("-") or item == "-":
            locations.append(item)
        elif item == "--":
            only_locations = True
        elif item == "--json":
            flags.append("--json-report=true")
        else:
            flags.append(item)
            if "=" not in item and rest and item.replace("_", "-") in _FLAGS:
                flags.append(rest.pop(0))
    with contextlib.redirect_stdout(sys.stderr if "--json" in arguments else sys.stdout):
        config = load_config(CheckConfig, argv=flags, environ=None, hyperparameters=None, prog="finetune check")
    if not locations:
        raise ConfigError("no data is given; write: finetune check FILE_OR_FOLDER")
    return locations, config


_FLAGS = frozenset(flag_of(name) for name in CheckConfig.model_fields if name != "json_report")


def _check_not_input(write: str | None, locations: Sequence[Path]) -> None:
    """Raise ConfigError if the file to write is an input, or in their folder, where the next run would read it."""
    if write is None:
        return
    path = Path(os.path.realpath(write))
    if path.exists() and any(path.samefile(file.path) for file in find_files(locations).files if file.path.exists()):
        raise ConfigError(f"--write {write}: is an input file; give another file")
    folder = next((item for item in locations if item.is_dir() and path.is_relative_to(os.path.realpath(item))), None)
    if folder is not None:
        raise ConfigError(f"--write {write}: is in the folder of the data ({folder}); give a file outside of it")


def _write(path: Path, dataset: Dataset) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            for record in dataset:
                for line in record.as_json():
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--write {path}: cannot be written ({error.strerror}); give another file") from error


def _print(dataset: Dataset, *, as_json: bool) -> None:
    text = json.dumps(dataset.report.as_json()) if as_json else dataset.report.as_text()
    _safe(sys.stdout).write(text + "\n")
    sys.stdout.flush()


def _safe(stream: TextIO) -> TextIO:
    """A terminal that lacks a character shows its number instead of failing."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _fail(message: str) -> int:
    _safe(sys.stderr).write("error: " + "; ".join(message.splitlines()) + "\n")
    return EXIT_UNUSABLE
