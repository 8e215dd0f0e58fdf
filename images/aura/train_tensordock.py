"""The guide's program: `python train_tensordock.py --dataset_path ...` runs `python -m aura --dataset_path ...`.

It needs no PYTHONPATH. In a checkout it adds the job layer, and names the pip command for what is not installed.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent


def missing_packages(requirements: Path) -> list[str]:
    """Return the packages in a requirements file, and in those it includes, that are not installed."""
    missing = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            missing += missing_packages(requirements.parent / line[3:].strip())
        elif line:
            name = line.split(">")[0].split("=")[0].split("[")[0].strip()
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                missing.append(line)
    return sorted(set(missing))


def main() -> None:
    """Run aura's training."""
    shared = HERE.parents[1] / "shared" if len(HERE.parents) > 1 else HERE
    if (HERE / "requirements.in").exists() and (shared / "estiba").is_dir():  # a checkout; an image has everything
        if sys.version_info < (3, 11):  # noqa: UP036 - an Ubuntu 22.04 has 3.10
            sys.exit(
                f"error: Python 3.11 or later is needed, and this is {sys.version.split()[0]}; install a newer one"
            )
        if missing := missing_packages(HERE / "requirements.in"):
            quoted = " ".join(f"'{name}'" if ">" in name or "[" in name else name for name in missing)
            print(f"error: packages are missing; install them: pip install {quoted}", file=sys.stderr)
            sys.exit(2)
        paths = [str(HERE), str(shared)]
        sys.path[:0] = paths
        # for the processes that it starts
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    runpy.run_module("aura", run_name="__main__")


if __name__ == "__main__":
    main()
