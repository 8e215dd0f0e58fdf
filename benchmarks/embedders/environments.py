"""Python environments in .build/peers: the peers' own, each from its lock, and one with what the image has."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = Path(__file__).parent / "locks"
TORCH = ROOT / "images/base/torch.txt"
WITHOUT_TORCH = {"fastembed"}
IMAGE = "embed"
"""With the libraries of the image and no others: transformers imports peft and bitsandbytes wherever they are."""


class NotInstalled(Exception):
    """Why a peer's environment is not there."""


def python_of(name: str, *, install: bool) -> Path:
    """The environment's Python; `install` makes it if it is missing or older than its lock. Raises NotInstalled."""
    if name == "bench":
        return Path(sys.executable)
    folder, lock = ROOT / ".build/peers" / name, LOCKS / f"{name}.txt"
    stamp = folder / "made-of"
    lists = [lock] if name in WITHOUT_TORCH else [TORCH, lock]
    if name == IMAGE:
        lists.append(ROOT / "images/embed/requirements.txt")
    made_of = hashlib.sha256(b"".join(path.read_bytes() for path in lists)).hexdigest()
    python = folder / "bin/python"
    if stamp.is_file() and stamp.read_text() == made_of:
        return python
    if not install:
        raise NotInstalled(f"its environment, .build/peers/{name}, is not installed")
    print(f"installing {name} into .build/peers/{name}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    for path in lists:
        _run(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "-r",
                str(path),
            ]
        )
    stamp.write_text(made_of)
    return python


def python_of_image(*, install: bool) -> Path:
    """The Python with the image's libraries, or this one if those are not to be installed."""
    try:
        return python_of(IMAGE, install=install)
    except NotInstalled:
        if install:
            raise
        return Path(sys.executable)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotInstalled(f"pip: {lines[0] if lines else done.returncode}"[:300])
