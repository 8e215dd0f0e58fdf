"""The folder that made-up data goes to: whose files are in it, and how new ones take their place.

It may be there already, empty or not, and may be a mount point: files are made in a folder inside it, are renamed one
by one, and `generated.json` is written last. Without that file nothing there counts as made.
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

from brain_to_text.indexing.index import FOLDER, forget
from brain_to_text.indexing.schema import session_of
from estiba.errors import ConfigError
from estiba.places import writable
from estiba.store import TEMPORARY_SUFFIX

ABOUT = "generated.json"
PARTIAL = ".generate-partial"
"""All in it is ours."""
BEGUN = "begun.json"
"""In PARTIAL: of how many sessions files may be ours, whatever a killed run left of them."""
SPLITS = ("train", "val", "test")
FIRST_DAY = date(2023, 8, 11)
SHOWN = 3


def session_names(count: int) -> list[str]:
    """'t15.2023.08.11', and so on, a few days apart; fewer are the first of more."""
    gaps = (0, 2, 5, 7, 12, 16)
    days = (gaps[at % len(gaps)] + 21 * (at // len(gaps)) for at in range(count))
    return [f"t15.{FIRST_DAY + timedelta(days=day):%Y.%m.%d}" for day in days]


def files_of(sessions: int) -> list[str]:
    return [f"{session}/data_{split}.hdf5" for session in session_names(sessions) for split in SPLITS]


class Destination:
    """A folder, and the recipe of what shall be in it. Raises ConfigError where it may not be read."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        self.folder, self.recipe = folder, dict(recipe)
        self._partial = folder / PARTIAL
        self._noted = _sessions_and(folder / ABOUT, "recipe")
        noted, begun = self._noted or {}, _sessions_and(self._partial / BEGUN, "begun") or {}
        self._own = max(noted.get("sessions", 0), begun.get("sessions", 0))
        self._files = files_of(self.recipe["sessions"])

    def is_finished(self) -> bool:
        """This very recipe made all that is there."""
        return self._noted == self.recipe and all((self.folder / name).is_file() for name in self._files)

    def begin(self, *, overwrite: bool) -> None:
        """Find out what stands against it, and make room for partial files. Raises ConfigError."""
        self._refuse(overwrite=overwrite)
        for folder in (self.folder, *(self.folder / name for name in session_names(self._own))):
            if folder == self.folder or folder.is_dir():
                writable(folder, "--out")
        writable(self._partial, "--out")
        for left in self._partial.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != BEGUN:
                left.unlink()
        self._own = max(self._own, self.recipe["sessions"])
        self._put(self._partial / BEGUN, {"begun": {"sessions": self._own}})

    def path_of(self, session: str, split: str) -> Path:
        """Where a file is made. Nothing takes it for data there."""
        path = self._partial / session / f"data_{split}.hdf5{TEMPORARY_SUFFIX}"
        path.parent.mkdir(exist_ok=True)
        return path

    def publish(self, **notes: object) -> None:
        """Give the files their names, in place of those that were generated before."""
        (self.folder / ABOUT).unlink(missing_ok=True)
        for name in set(files_of(self._own)) - set(self._files):
            (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not there, or not empty
                (self.folder / name).parent.rmdir()
        for name in self._files:
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self._partial / f"{name}{TEMPORARY_SUFFIX}").replace(self.folder / name)
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)
        forget(self.folder)
        self._put(self.folder / ABOUT, {"recipe": self.recipe, **notes})
        shutil.rmtree(self._partial, ignore_errors=True)

    def _put(self, path: Path, content: Mapping[str, Any]) -> None:
        partial = self._partial / f"{path.name}{TEMPORARY_SUFFIX}"
        partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        partial.replace(path)

    def _refuse(self, *, overwrite: bool) -> None:
        others = list(self._others())
        taken = {ABOUT, PARTIAL, *session_names(self.recipe["sessions"])}
        if in_the_way := [name for name in others if name in taken or session_of(name)]:
            raise ConfigError(
                f"{self.folder}: holds data that was not generated ({_some(in_the_way)}), which is never replaced; "
                "name another folder with --out"
            )
        found = []
        if self._noted is not None and self._noted != self.recipe:
            found.append(f"data of another recipe ({_difference(self._noted, self.recipe)})")
        if others:
            found.append(f"other files ({_some(others)})")
        if found and not overwrite:
            raise ConfigError(
                f"{self.folder}: holds {' and '.join(found)}; name another folder with --out, or pass --overwrite, "
                "which replaces what was generated and leaves other files alone"
            )

    def _others(self) -> Iterator[str]:
        """Paths of what was not generated; of a folder that is a link, its own."""
        own = {*files_of(self._own), *([ABOUT] if self._noted is not None else [])}
        for place, folders, names in os.walk(self.folder):
            if Path(place) == self.folder:
                folders[:] = [
                    name for name in folders if name not in (PARTIAL, FOLDER) or os.path.islink(f"{place}/{name}")
                ]
            for name in (*names, *(name for name in folders if os.path.islink(f"{place}/{name}"))):
                path = os.path.relpath(f"{place}/{name}", self.folder)
                if path not in own:
                    yield path


def _sessions_and(path: Path, key: str) -> dict[str, Any] | None:
    """What stands under `key`, with `sessions` in it; None where nothing of ours does."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}) by user {os.getuid()}; name another folder with --out"
        ) from None
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, dict) and isinstance(found.get("sessions"), int) else None


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {here.get(name)} asked for" for name in names)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more
