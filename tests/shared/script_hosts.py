"""Hosts of a script job as real processes on this machine, and small scripts that need no torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
LAUNCHER = '''
"""Starts ranks as torchrun does: `launcher.py COUNT SCRIPT`. TERM and a failed rank end the others."""
import os, signal, subprocess, sys, time
count, nodes, node = int(sys.argv[1]), int(os.environ["SM_HOST_COUNT"]), int(os.environ["SM_CURRENT_HOST_RANK"])
ranks = [
    subprocess.Popen(
        [sys.executable, *sys.argv[2:]],
        env={**os.environ, "RANK": str(node * count + i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count * nodes)},
    )
    for i in range(count)
]
def end(*_):
    print("launcher heard TERM", flush=True)
    for rank in ranks:
        rank.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
while any(rank.poll() is None for rank in ranks):
    if any(rank.returncode for rank in ranks):
        for rank in ranks:
            if rank.poll() is None:
                rank.terminate()
                rank.wait()
    time.sleep(0.02)
sys.exit(1 if any(rank.returncode for rank in ranks) else 0)
'''


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Hosts:
    """N hosts that share a source folder; each has its own /opt/ml and address."""

    def __init__(self, folder: Path, bytecode: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = list(names)
        self.environ = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
            "PYTHONPATH": str(SHARED),
            "PYTHONPYCACHEPREFIX": str(bytecode),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ESTIBA_AGENT_PORT": str(free_port()),
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for name in self.names:
            for part in ("code", "input/config", "output", "model"):
                (self.root(name) / part).mkdir(parents=True)
        self.write("launcher.py", LAUNCHER)

    def root(self, name: str) -> Path:
        return self.folder / name.replace(":", "_")

    def write(self, path: str, text: str) -> None:
        """Put a file into every host's source folder."""
        for name in self.names:
            target = self.root(name) / "code" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text.lstrip("\n"))

    def write_on(self, name: str, path: str, text: str) -> None:
        (self.root(name) / "code" / path).write_text(text.lstrip("\n"))

    def copy(self, folder: Path) -> None:
        for name in self.names:
            shutil.copytree(folder, self.root(name) / "code", dirs_exist_ok=True)

    def start(
        self,
        program: str,
        *only: str,
        env: Mapping[str, str] | None = None,
        resources: Mapping[str, Any] | None = None,
        hyperparameters: Mapping[str, str] | None = None,
        arguments: Sequence[str] = ("train",),
    ) -> Hosts:
        """Start PID 1 on the hosts named in `only`, by default on all of them."""
        for name in only or self.names:
            config = self.root(name) / "input/config"
            described = {"current_host": name, "hosts": self.names, "network_interface_name": "ethwe"}
            (config / "resourceconfig.json").write_text(json.dumps({**described, **(resources or {})}))
            (config / "hyperparameters.json").write_text(json.dumps(hyperparameters or {}))
            (config / "inputdataconfig.json").write_text("{}")
            with open(self.folder / f"log-{name}", "wb") as log:
                self.running[name] = subprocess.Popen(
                    [sys.executable, "-m", "estiba.platform.entry", *arguments],
                    env={
                        **self.environ,
                        "ESTIBA_ROOT": str(self.root(name)),
                        **({"SAGEMAKER_PROGRAM": program} if program else {}),
                        **(env or {}),
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                )
        return self

    def log(self, name: str) -> str:
        return (self.folder / f"log-{name}").read_text(errors="replace")

    def wait_for(self, text: str, *names: str, count: int = 1, timeout_s: float = 60) -> None:
        """Wait until the hosts logged `text`."""
        deadline = time.monotonic() + timeout_s
        for name in names or self.names:
            while self.log(name).count(text) < count:
                assert self.running[name].poll() is None or self.log(name).count(text) >= count, self.log(name)
                assert time.monotonic() < deadline, f"{name} did not log {text!r}:\n{self.log(name)}"
                time.sleep(0.02)

    def term(self, *names: str) -> Hosts:
        for name in names or self.names:
            self.running[name].terminate()
        return self

    def processes(self, name: str) -> list[int]:
        mark = f"ESTIBA_ROOT={self.root(name)}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
                except OSError:
                    continue
        return found

    def signal_all(self, name: str, signum: signal.Signals) -> None:
        """Signal every process of a host, as `docker kill` (KILL) and `docker pause` (STOP) do to a container."""
        for pid in self.processes(name):
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                pass

    def end(self, *names: str, timeout_s: float = 60) -> list[int]:
        """Wait for the hosts' ends. Returns their exit statuses."""
        deadline = time.monotonic() + timeout_s
        codes = []
        for name in names or self.names:
            try:
                codes.append(self.running[name].wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} still runs:\n{self.log(name)}") from None
        return codes

    def failure(self, name: str) -> str:
        path = self.root(name) / "output/failure"
        return path.read_text() if path.exists() else "(none)"

    def model(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.root(name) / "model").iterdir())

    def gone(self, name: str) -> bool:
        return not [pid for pid in self.processes(name) if pid != self.running[name].pid]

    def close(self) -> None:
        for name in self.names:
            self.signal_all(name, signal.SIGKILL)
        for process in self.running.values():
            process.kill()
            process.wait()
