"""The trainer's side of the writer process (`writer`): commands and replies as JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from estiba.processes import exit_report

Reply = dict[str, Any]


class WriterProcess:
    """A running writer. It dies with the thread that starts it."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        descriptor: int,
        on_reply: Callable[[Reply], None],
        on_exit: Callable[[WriterProcess], None],
        module: str = "estiba.checkpoint.writer",
    ) -> None:
        """`descriptor` is the staging buffer's. A thread calls `on_reply`, and `on_exit` after the last reply."""
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[descriptor],
            start_new_session=True,  # Ctrl-C in a terminal is for the trainer
            env=environ,
        )
        self.send(settings)
        threading.Thread(target=self._listen, args=(on_reply, on_exit), name="estiba-checkpoints", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def exit_report(self) -> str:
        """Describe how the process ended. Waits for the end."""
        return exit_report("the checkpoint writer", self._process.wait())

    def send(self, command: Mapping[str, Any]) -> None:
        """Send a command. A writer that has ended does not raise here; `on_exit` reports it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def close(self, timeout_s: float | None) -> bool:
        """Let the writer finish, including uploads. Returns False if it had to be killed after `timeout_s`."""
        assert self._process.stdin is not None
        self.send({"do": "close"})
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False

    def _listen(self, on_reply: Callable[[Reply], None], on_exit: Callable[[WriterProcess], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                reply = json.loads(line)
            except ValueError:  # it was killed in the middle of a line
                continue
            on_reply(reply)
        self._process.wait()  # its pipe closes just before it ends, and the next save must not see it as running
        on_exit(self)
