"""Script mode's preparation: the user's code comes into /opt/ml/code anew for every run, with its requirements.

PID 1 runs this as a process of its own (`python -m estiba.platform.script_mode`) and starts the script afterwards. With
the argument `toolkit`, AWS's toolkit runs the script, for launchers that only it has, such as mpirun.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from estiba.errors import EstibaError
from estiba.platform.contract import root_of
from estiba.platform.failure import write_failure
from estiba.platform.requirements import install
from estiba.platform.script_environment import Script
from estiba.platform.submit_directory import NAME, fetch

FETCHED = ".estiba-fetched"
"""In the code directory: the files that a run fetched there, one name a line."""


def main() -> None:
    script = Script.read(root_of(), os.environ)
    try:
        bring_code(script)
        script.command()  # raises if the program is not there
        if "toolkit" not in sys.argv[1:]:
            install(script.code, script.root / "input/data", {**os.environ, "SAGEMAKER_PROGRAM": script.program})
    except EstibaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        write_failure(script.root / "output/failure", str(error))
        sys.exit(error.exit_code)
    if "toolkit" in sys.argv[1:]:
        from sagemaker_training.cli.train import main as train

        train()


def bring_code(script: Script) -> None:
    """Fetch what the request names, unless the user filled the code directory. Raises ConfigError."""
    # One AWS SDK names the location in hyperparameters, the other one in the environment.
    location = os.environ.get(NAME) or script.hyperparameters.get(NAME.lower())
    if location and Path(location) != script.code and forget_fetched(script.code):
        with tempfile.TemporaryDirectory() as folder:
            fetch(location, Path(folder), script.program)
            keep_fetched(Path(folder), script.code)


def forget_fetched(code: Path) -> bool:
    """Remove what an earlier run fetched. Returns False for a directory that the user filled, as the toolkit keeps it.

    What a script wrote beside its code stays.
    """
    code.mkdir(parents=True, exist_ok=True)
    try:
        names = (code / FETCHED).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return not any(code.iterdir())
    for name in names:
        (code / name).unlink(missing_ok=True)
    return True


def keep_fetched(fetched: Path, code: Path) -> None:
    """Copy the fetched files into the code directory. Their names are noted first, so that the next run knows them."""
    names = [path.relative_to(fetched).as_posix() for path in fetched.rglob("*") if not path.is_dir()]
    (code / FETCHED).write_text("".join(f"{name}\n" for name in sorted(names)), "utf-8")
    shutil.copytree(fetched, code, symlinks=True, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
