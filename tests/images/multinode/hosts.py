"""Hosts as processes of this machine: each has its own /opt/ml tree, and they find each other on 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 240
Scheduler = Callable[[int, str], tuple[list[str], dict[str, str]]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Hosts:
    """A job on several hosts that has been started."""

    def __init__(
        self,
        root: Path,
        count: int,
        arguments: Sequence[str],
        *,
        environ: Mapping[str, str] | None = None,
        is_watched: bool = False,
        scheduler: Scheduler | None = None,
    ) -> None:
        """`is_watched` puts PID 1 above each host's processes, whose agents find each other on 127.0.0.N.

        `scheduler` returns the command and the variables of a host, by its index and the main port, in place of
        SageMaker's file.
        """
        name = "127.0.0.{}" if is_watched else "algo-{}"
        self.roots = [root / name.format(number) for number in range(1, count + 1)]
        port, agent_port = str(free_port()), str(free_port())
        module = "estiba.platform.entry" if is_watched else "multinode"
        self.processes = []
        for index, folder in enumerate(self.roots):
            config = folder / "input/config"
            config.mkdir(parents=True, exist_ok=True)
            names = [one.name for one in self.roots]
            command, own = [sys.executable, "-m", module], dict[str, str]()
            if scheduler is None:
                (config / "resourceconfig.json").write_text(json.dumps({"hosts": names, "current_host": folder.name}))
            else:
                command, own = scheduler(index, port)
            with open(folder / "log", "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *arguments],
                        stdout=log,
                        stderr=log,
                        env={
                            **os.environ,
                            "PYTHONPATH": os.pathsep.join(sys.path),
                            "ESTIBA_ROOT": str(folder),
                            "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": port,
                            "OMP_NUM_THREADS": "1",
                            "HF_HUB_OFFLINE": "1",
                            "ESTIBA_WORKLOAD": "multinode",
                            "ESTIBA_HOST_AGENT": "1",
                            "ESTIBA_AGENT_PORT": agent_port,
                            **own,
                            **(environ or {}),
                        },
                    )
                )

    def log(self, host: int = 0) -> str:
        return (self.roots[host] / "log").read_text(errors="replace")

    def logs(self) -> str:
        """The ends of all hosts' logs, for a test that fails."""
        return "\n".join(f"{root.name}: {self.log(host)[-2000:]}" for host, root in enumerate(self.roots))

    def wait(self) -> list[int]:
        """Return the exit statuses of all hosts."""
        try:
            return [process.wait(TIMEOUT_S) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(self.logs()) from None

    def wait_for(self, text: str, host: int = 0) -> None:
        """Return once a host's log contains the text."""
        end = time.monotonic() + TIMEOUT_S
        while text not in self.log(host):
            assert self.processes[host].poll() is None, self.logs()
            assert time.monotonic() < end, self.logs()
            time.sleep(0.05)

    def signal(self, signum: signal.Signals, hosts: Sequence[int] | None = None) -> None:
        for host in range(len(self.roots)) if hosts is None else hosts:
            self.processes[host].send_signal(signum)

    def signal_all(self, signum: signal.Signals, host: int) -> None:
        """Signal every process of a host, as `docker pause` (STOP) and the loss of a machine (KILL) do."""
        mark = f"ESTIBA_ROOT={self.roots[host]}".encode()
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signum)

    def failure(self, host: int = 0) -> str:
        return (self.roots[host] / "output/failure").read_text()

    def kill(self) -> None:
        """Take all hosts away at once; ranks and writers die with their parents."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        path = self.roots[0] / "model/metrics/metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows() if row.get(name) is not None]


def run(root: Path, count: int, arguments: Sequence[str], **options: Any) -> Hosts:
    """Run a job to its end, which must be a good one."""
    hosts = Hosts(root, count, arguments, **options)
    codes = hosts.wait()
    assert codes == [0] * count, hosts.logs()
    return hosts


def of_torchrun(index: int, port: str) -> tuple[list[str], dict[str, str]]:
    words = f"torch.distributed.run --nnodes 2 --node_rank {index} --nproc_per_node 1 --master_addr 127.0.0.1"
    return [sys.executable, "-m", *words.split(), "--master_port", port, "-m", "multinode"], {}


def of_batch(index: int, port: str) -> tuple[list[str], dict[str, str]]:
    """An AWS Batch node under PID 1. Only the nodes that are not the main one have its address."""
    variables = {
        "AWS_BATCH_JOB_NODE_INDEX": str(index),
        "AWS_BATCH_JOB_NUM_NODES": "2",
        "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0",
        "MASTER_PORT": port,
    }
    if index:
        variables["AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"] = "127.0.0.1"
    return [sys.executable, "-m", "estiba.platform.entry"], variables
