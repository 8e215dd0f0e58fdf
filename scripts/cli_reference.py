"""Write the part of docs/cli.md below `## Commands`, made from the commands themselves.

python scripts/cli_reference.py        # after a command or an option changed; a test holds the page current
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from typer.testing import CliRunner

from estiba_launch.cli.app import app

PAGE = Path(__file__).resolve().parent.parent / "docs/cli.md"
# One width and no colours, wherever this runs.
PLAIN = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}


def text() -> str:
    """The page: what is written by hand, then every command's --help."""
    head, heading, _ = PAGE.read_text("utf-8").partition("## Commands\n")
    return "\n".join([head + heading, *_help_of(typer.main.get_command(app), ())])


def _help_of(command: Any, path: tuple[str, ...]) -> Iterator[str]:
    shown = CliRunner().invoke(app, [*path, "--help"], prog_name="estiba", env=PLAIN)
    yield f"### `{' '.join(('estiba', *path))}`\n\n```text\n{shown.stdout.strip()}\n```\n"
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _help_of(inner, (*path, name))


if __name__ == "__main__":
    PAGE.write_text(text(), "utf-8")
