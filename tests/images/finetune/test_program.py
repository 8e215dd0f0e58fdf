"""finetune.py where AWS's toolkit puts it: in a directory that is first on Python's path, and the current one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = [
    path / "finetune.py" for path in (Path("/opt/estiba"), Path(__file__).parents[3] / "images/finetune")
]  # in the image, and in a checkout
MAIN = """
import subprocess, sys
words = ["-c", "import finetune.part"] if "alone" in sys.argv else ["-m", "finetune.part"]
sys.exit(subprocess.run([sys.executable, *words]).returncode or print(*sys.argv[1:]))
"""


@pytest.mark.parametrize("way", ["alone", "as a module"])
@pytest.mark.parametrize("relative", [False, True])
def test_neither_the_program_nor_its_processes_import_the_script_for_the_package(
    relative: bool, way: str, tmp_path: Path
) -> None:
    code, package = tmp_path / "code", tmp_path / "lib/finetune"
    for folder in (code, package):
        folder.mkdir(parents=True)
    shutil.copy(next(path for path in PROGRAMS if path.is_file()), code / "finetune.py")
    for name, text in {"__init__": "", "part": "", "__main__": MAIN}.items():
        (package / f"{name}.py").write_text(text)
    path = os.pathsep.join([str(code), "", str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = "finetune.py" if relative else str(code / "finetune.py")
    done = subprocess.run(
        [sys.executable, "--", program, "--epochs", "1", way],
        cwd=code, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["--epochs", "1", *way.split()]
