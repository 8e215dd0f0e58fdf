"""The merged model as one GGUF file, for llama.cpp and Ollama, by llama.cpp's own converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from estiba.errors import ConfigError, StoreError

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""The program's name in llama.cpp's repository, and as a package installs it."""
FILE = "model.gguf"


def find_converter(named: str | None) -> list[str]:
    """Return the words that start the converter: the one that is named, else the first on the PATH.

    Raises ConfigError.
    """
    for name in (named,) if named else CONVERTERS:
        found = name if Path(name).is_file() else shutil.which(name)
        if found:
            return [sys.executable, found] if not os.access(found, os.X_OK) or found.endswith(".py") else [found]
    raise ConfigError(
        f"--gguf: no converter ({named or ' or '.join(CONVERTERS)}); mount llama.cpp's repository (-v "
        "DIR:/llama.cpp:ro) and pass --gguf-converter /llama.cpp/convert_hf_to_gguf.py, or leave out --gguf"
    )


def write_gguf(folder: Path, converter: list[str], dtype: str) -> None:
    """Write FILE beside the model in `folder`. Raises StoreError with the converter's last line."""
    target = folder / FILE
    done = subprocess.run(
        [*converter, str(folder), "--outfile", str(target), "--outtype", dtype],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        check=False,
    )
    if done.returncode or not _is_gguf(target):
        target.unlink(missing_ok=True)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        last = lines[-1][-300:] if lines else "it printed nothing"
        raise StoreError(
            f"{FILE} was not written: {Path(converter[-1]).name} ended with {done.returncode} ({last}). The model "
            "itself is complete: convert it elsewhere, or use a converter that knows its architecture"
        )


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
