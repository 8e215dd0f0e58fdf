"""One process for each GPU of this box, as torchrun would start them, under the job's own signal care.

torchrun gives its workers 30 seconds after a TERM and starts them again after a failure; here they have the whole
grace period, and a failure ends the job, which goes on from its checkpoint when it is run again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from estiba.stop import say

PR_SET_PDEATHSIG = 1
PATIENCE_S = 10.0
"""After one process failed, the others wait for it in vain; so long they have to write what they were writing."""
POLL_S = 0.2


def wanted(processes: int, environ: Mapping[str, str] = os.environ) -> int:
    """How many to start here: what was asked for, or one a GPU; 1 inside a process that was started as one of many."""
    if "WORLD_SIZE" in environ:
        return 1
    return processes or max(1, torch.cuda.device_count())


def run_each(module: str, arguments: Sequence[str], count: int) -> NoReturn:
    """Run `python -m module` so many times and end with their exit status. Never returns.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are what torchrun sets. TERM and INT go to all of them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, _frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, forward)
    for rank in range(count):
        environ = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environ,
                preexec_fn=_die_with_parent,
                start_new_session=True,  # Ctrl-C reaches them once, through `forward`
            )
        )
    say(f"{count} processes, one for each device")
    os._exit(_wait(processes))


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """The first failure's exit status, or that of all."""
    failed: int | None = None
    kill_at: float | None = None
    while any(process.poll() is None for process in processes):
        for process in processes:
            code = process.poll()
            if code not in (None, 0) and failed is None:
                failed = code
                kill_at = time.monotonic() + PATIENCE_S
        if kill_at is not None and time.monotonic() > kill_at and failed not in _STOPPED:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(POLL_S)
    codes = [process.returncode for process in processes]
    code = failed if failed is not None else next((code for code in codes if code), 0)
    return 128 - code if code < 0 else code


_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
