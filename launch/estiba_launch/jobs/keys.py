"""The one place that turns object keys into local paths. A key is untrusted: whoever fills the store chooses it.

Standard library only: the ssh target copies this file to remote hosts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from estiba_launch.errors import HostError


def path_below(root: Path, key: str, uri: str) -> Path:
    """Where an object of the store at `uri` belongs. Raises HostError for a key that names no file below `root`."""
    path, why = root / key, None
    if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        why = "an empty part, `.`, `..` or a NUL in its name"
    elif not is_below(path, root):
        why = "a link on the way"
    if why:
        raise HostError(f"{uri}/{shown(key)}: leads out of {root} ({why}); rename or remove the object")
    return path


def paths_below(root: Path, keys: Iterable[str], uri: str) -> dict[str, Path]:
    """`path_below` of every key. Raises HostError also where one key is a file and the folder of another."""
    paths = {key: path_below(root, key, uri) for key in keys}
    for key in paths:
        slash = key.rfind("/")
        while slash > 0:
            if key[:slash] in paths:
                conflict = f"{uri}/{shown(key[:slash])}: a file, and the folder of {shown(key)}"
                raise HostError(f"{conflict}; no disk holds both, so rename or remove one of them")
            slash = key.rfind("/", 0, slash)
    return paths


def shown(key: str) -> str:
    """A key as text for a message: one line, whatever it holds."""
    return key if key.isprintable() else ascii(key)


def is_below(path: Path, root: Path) -> bool:
    real_root = os.path.realpath(root)
    return os.path.commonpath([real_root, os.path.realpath(path)]) == real_root
