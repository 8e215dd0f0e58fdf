"""An `ssh` that runs commands on this machine in a home directory of its own, and notes each call."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

SCRIPT = """#!/bin/sh
while :; do
  case $1 in
    -O) exit 0 ;;
    -[opliF]) shift 2 ;;
    -*) shift ;;
    *) break ;;
  esac
done
shift
printf '%s\\n' "$*" >> {log}
cd {home}
export HOME={home} PATH={bin}:$PATH
exec sh -c "$*"
"""


class FakeSsh:
    """What `ESTIBA_SSH` points to while this exists."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.bin, self._log = folder / "home", folder / "bin", folder / "ssh.log"
        for made in (self.home, self.bin):
            made.mkdir(parents=True)
        self.tool("ssh", SCRIPT.format(log=self._log, home=self.home, bin=self.bin), folder=folder)
        monkeypatch.setenv("ESTIBA_SSH", shlex.quote(str(folder / "ssh")))

    def tool(self, name: str, text: str, *, folder: Path | None = None) -> None:
        """Put a program on the remote PATH."""
        path = (folder or self.bin) / name
        path.write_text(text)
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """First line of every command so far."""
        return self._log.read_text().splitlines() if self._log.exists() else []
