"""Make an image from the template: its folder in images/, its tests in tests/images/, its name in docker-bake.hcl.

    make new/my-image               # an image that trains
    make new/my-image KIND=job      # a plain job that works in chunks

The template (scripts/template) is a working image named new-image. A new image passes the contract unchanged.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).resolve().parent / "template"
KINDS = sorted(path.name for path in TEMPLATE.iterdir() if path.name != "common")
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
RESERVED = {
    "base",
    "common",
    "image",
    "tests",
    "test",
    "estiba",
    "contract",
    "tensors",
    "fast",
    "slow",
    "shared",
    "launch",
    "repo",
}


class NewImageError(Exception):
    """The image cannot be written; the message says why."""


def make(name: str, kind: str, root: Path = ROOT) -> list[Path]:
    """Write the image's files below `root` and register it. Returns the paths. Raises NewImageError."""
    package = name.replace("-", "_")
    if not NAME.fullmatch(name) or name in RESERVED or name.endswith(("-test", "-common")):
        raise NewImageError(f"{name!r} cannot be an image's name; use lower-case words with dashes, such as my-image")
    if package in sys.stdlib_module_names:
        raise NewImageError(
            f"{name!r} is a module of Python's standard library, which the image would hide; choose another name"
        )
    for folder in (root / "images" / name, root / "tests/images" / name):
        if folder.exists():
            raise NewImageError(f"{folder.relative_to(root)} exists; choose another name or remove it")

    def renamed(text: str) -> str:
        return text.replace("new-image", name).replace("new_image", package)

    written = []
    for source in [*files_of("common"), *files_of(kind)]:
        target = root / renamed(source.relative_to(TEMPLATE).as_posix().partition("/")[2])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(source.read_text()))
        written.append(target)
    register(name, root / "docker-bake.hcl")
    return written


def files_of(folder: str) -> list[Path]:
    return sorted(path for path in (TEMPLATE / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")


def register(name: str, bake_file: Path) -> None:
    """Add the name to the default of IMAGES, the list that a bare `docker buildx bake` builds."""

    def add(match: re.Match[str]) -> str:
        return f"{match[1]}{','.join(sorted({*match[2].split(','), name}))}{match[3]}"

    bake_file.write_text(re.sub(r'(variable "IMAGES" { default = ")([^"]*)(")', add, bake_file.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="the image's name, lower-case words with dashes")
    parser.add_argument("--kind", choices=KINDS, default="training")
    arguments = parser.parse_args()
    try:
        written = make(arguments.name, arguments.kind)
    except NewImageError as error:
        print(f"new: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
