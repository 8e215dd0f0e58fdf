"""The output folder of synthetic data: which files in it are generated, and how new files replace them.

The folder may exist, may contain files, and may be a mount point. Files are written to a folder inside it and renamed
one by one, and `generated.json` is written last. Without that file, nothing in the folder counts as generated.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from brain_to_text.data.indexing.index import FOLDER, forget
from brain_to_text.data.name_list import first_few
from brain_to_text.data.schema import parse_path
from estiba.errors import ConfigError
from estiba.paths import writable
from estiba.storage import TEMPORARY_SUFFIX

ABOUT = "generated.json"
PARTIAL = ".generate-partial"
"""Everything in this folder is generated."""
BEGUN = "begun.json"
"""In PARTIAL: how many sessions a run started to generate. If it was killed, their files may exist."""
SPLITS = ("train", "val", "test")
FIRST_DAY = date(2023, 8, 11)
NOTHING = {"sessions": 0}


def session_names(count: int) -> list[str]:
    """Return names like 't15.2023.08.11', a few days apart. The names for a smaller count are a prefix of these."""
    offsets = (0, 2, 5, 7, 12, 16)
    days = (offsets[index % len(offsets)] + 21 * (index // len(offsets)) for index in range(count))
    return [f"t15.{FIRST_DAY + timedelta(days=day):%Y.%m.%d}" for day in days]


def file_names(sessions: int) -> list[str]:
    return [f"{session}/data_{split}.hdf5" for session in session_names(sessions) for split in SPLITS]


class Destination:
    """A folder, and the recipe for the data that it should contain."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Raises ConfigError if the folder cannot be read."""
        self.folder, self.recipe = folder, dict(recipe)
        self._partial = folder / PARTIAL
        self._existing_recipe = _read_object(folder / ABOUT, "recipe")
        begun = _read_object(self._partial / BEGUN, "begun")
        self._generated_sessions = max(about["sessions"] for about in (self._existing_recipe, begun, NOTHING) if about)
        self._files = file_names(self.recipe["sessions"])

    def is_complete(self) -> bool:
        """Return whether the folder contains all files of this recipe."""
        return self._existing_recipe == self.recipe and all((self.folder / name).is_file() for name in self._files)

    def begin(self, *, overwrite: bool) -> None:
        """Check for other data, and create an empty folder for partial files. Raises ConfigError."""
        self._refuse_other_data(overwrite=overwrite)
        for folder in (self.folder, *(self.folder / name for name in session_names(self._generated_sessions))):
            if folder == self.folder or folder.is_dir():
                writable(folder, "--out")
        writable(self._partial, "--out")
        for leftover in self._partial.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != BEGUN:
                leftover.unlink()
        self._generated_sessions = max(self._generated_sessions, self.recipe["sessions"])
        self._write_json(self._partial / BEGUN, {"begun": {"sessions": self._generated_sessions}})

    def path_of(self, session: str, split: str) -> Path:
        """Return where to write a file. Under this name, it is not mistaken for data."""
        path = self._partial / session / f"data_{split}.hdf5{TEMPORARY_SUFFIX}"
        path.parent.mkdir(exist_ok=True)
        return path

    def publish(self, **notes: object) -> None:
        """Move the files to their final names, replacing files that were generated before."""
        (self.folder / ABOUT).unlink(missing_ok=True)
        for name in set(file_names(self._generated_sessions)) - set(self._files):
            (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # missing, or not empty
                (self.folder / name).parent.rmdir()
        for name in self._files:
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self._partial / f"{name}{TEMPORARY_SUFFIX}").replace(self.folder / name)
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)
        forget(self.folder)
        self._write_json(self.folder / ABOUT, {"recipe": self.recipe, **notes})
        shutil.rmtree(self._partial, ignore_errors=True)

    def _write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        partial = self._partial / f"{path.name}{TEMPORARY_SUFFIX}"
        partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        partial.replace(path)

    def _refuse_other_data(self, *, overwrite: bool) -> None:
        others = sorted(self._other_files())
        reserved = {ABOUT, PARTIAL, *session_names(self.recipe["sessions"])}
        if data := [name for name in others if name in reserved or parse_path(name)]:
            raise ConfigError(
                f"{self.folder}: contains data that was not generated ({first_few(data)}), which is never replaced; "
                "give another folder with --out"
            )
        contents = []
        existing = self._existing_recipe
        if existing is not None and existing != self.recipe:
            contents.append(f"data of another recipe ({_differences(existing, self.recipe)})")
        if others:
            contents.append(f"other files ({first_few(others)})")
        if contents and not overwrite:
            raise ConfigError(
                f"{self.folder}: contains {' and '.join(contents)}; give another folder with --out, or pass "
                "--overwrite, which replaces generated data and leaves other files alone"
            )

    def _other_files(self) -> Iterator[str]:
        """Yield the relative paths of files that were not generated, and of folders that are links."""
        generated = {*file_names(self._generated_sessions), *([] if self._existing_recipe is None else [ABOUT])}
        for parent, folders, names in os.walk(self.folder):
            links = [name for name in folders if os.path.islink(f"{parent}/{name}")]
            if Path(parent) == self.folder:
                folders[:] = [name for name in folders if name not in (PARTIAL, FOLDER) or name in links]
            for name in (*names, *links):
                path = os.path.relpath(f"{parent}/{name}", self.folder)
                if path not in generated:
                    yield path


def _read_object(path: Path, key: str) -> dict[str, Any] | None:
    """Return the object under `key`, which has a number of `sessions`; None if the file was written by others."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}) by user {os.getuid()}; give another folder with --out"
        ) from None
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, dict) and isinstance(value.get("sessions"), int) else None


def _differences(existing: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    names = [name for name in {**requested, **existing} if existing.get(name) != requested.get(name)]
    return ", ".join(f"{name} is {existing.get(name)}, {requested.get(name)} requested" for name in names)
