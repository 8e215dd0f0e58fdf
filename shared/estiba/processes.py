"""Processes that die with their parent: workers that answer tasks, and one rank for each GPU.

    worker = Worker("my_image.parsing:make_parser", dialect)     # runs make_parser(dialect) in its own process
    rows = worker.ask(path)                                      # make_parser(dialect)(path), in that process
    for path, rows in WorkerPool(target, dialect, size=4).map_unordered(paths, should_stop): ...

Other kinds of child process use `die_with_parent`, `ignore_stop_signals` and `exit_report` themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any, NoReturn, TypeVar, cast

from estiba.errors import EstibaError, RanksLost
from estiba.log import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_EXIT_WAIT_S = 5.0
_POLL_S = 0.2
_FAILED_RANK_GRACE_S = 10.0
"""After one rank fails, the others wait for it in vain. They have this long to finish their writes."""
_LOST_RANKS_GRACE_S = 120.0
"""The same after a rank lost those of another host: the others of its replica are saving theirs."""


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    With `parent`, the expected parent's process id, this process exits now if that parent is already gone.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(0)


def ignore_stop_signals() -> None:
    """Leave SIGINT, SIGTERM and SIGHUP to the parent, which decides what its workers finish."""
    for signum in _STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def exit_report(name: str, returncode: int, *, workers_flag: str | None = None) -> str:
    """Describe why a process ended too early. `workers_flag` is the flag that sets the number of workers."""
    if returncode == -signal.SIGKILL:
        fewer = "" if workers_flag is None else f" or use fewer {workers_flag}"
        return f"{name} was killed, likely out of memory; give the container more{fewer}"
    if returncode < 0:
        return f"{name} was killed by {signal.Signals(-returncode).name}; its last lines are in the log"
    return f"{name} ended with code {returncode}; its last lines are in the log"


# --- workers -------------------------------------------------------------------------------------------------------


class WorkerDied(EstibaError):
    """A worker process died while it ran a task."""

    def __init__(self, message: str, returncode: int, task: Any) -> None:
        super().__init__(message)
        self.returncode, self.task = returncode, task


class Worker:
    """A fresh Python process that answers tasks, one at a time.

    It is not forked, since threads, CUDA, obstore and s3fs do not survive a fork, and it does not run the caller's main
    module again, as multiprocessing would. The thread that creates a worker has to outlive it.
    """

    def __init__(
        self, target: str, *args: Any, name: str | None = None, environ: Mapping[str, str] | None = None
    ) -> None:
        """`target` is "module:function". `function(*args)` runs in the worker and returns the function that answers.

        Tasks, arguments and answers are pickled. `environ` is added to this process's environment.
        """
        self.name = name or f"worker {target}"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        # The worker inherits this mask, so Ctrl-C cannot end it before it ignores the signals.
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "estiba.processes", target, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path, **(environ or {})},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        with contextlib.suppress(OSError):  # it died; the first `ask` reports it
            self._send(args)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when an answer arrives."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def ask(self, task: Any) -> Any:
        """Return the answer. Raises the EstibaError that the task raised, and WorkerDied."""
        self.send(task)
        return self.receive(task)

    def send(self, task: Any) -> None:
        """Start a task. The previous one must have been answered."""
        with contextlib.suppress(OSError):  # it died; `receive` reports it
            self._send(task)

    def receive(self, task: Any = None) -> Any:
        """Wait for the answer to `send`. Raises the EstibaError that the task raised, and WorkerDied with `task`."""
        assert self._process.stdout is not None
        try:
            is_answer, value = pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
            raise self._died(task) from error
        if not is_answer:
            raise value
        return value

    def kill(self) -> None:
        """End the worker at once, from any thread. An `ask` that waits raises WorkerDied."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # unsent bytes are lost
                pipe.close()

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def _died(self, task: Any) -> WorkerDied:
        try:
            returncode = self._process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return WorkerDied(f"{self.name} sent an answer that cannot be read", 0, task)
        return WorkerDied(exit_report(self.name, returncode), returncode, task)


class WorkerPool:
    """Workers that share a stream of tasks. Killed at the end of its `with` block."""

    def __init__(
        self, target: str, *args: Any, size: int, name: str = "worker", environ: Mapping[str, str] | None = None
    ) -> None:
        """`target`, `args` and `environ` are those of `Worker`; workers are named `name-0`, `name-1`, …"""
        self.workers: list[Worker] = []
        try:
            for index in range(size):
                self.workers.append(Worker(target, *args, name=f"{name}-{index}", environ=environ))
        except BaseException:
            self.close()
            raise

    def map_unordered(
        self, tasks: Iterable[T], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[T, Any]]:
        """Yield each task and its answer as they come. Ends early once `should_stop()` is true.

        Reads at most one task ahead of the workers. Raises the EstibaError that a task raised, and WorkerDied with the
        task of a worker that died.
        """
        remaining = iter(tasks)
        idle = list(self.workers)
        busy: dict[Worker, T] = {}
        end = object()
        upcoming: Any = next(remaining, end)
        while upcoming is not end or busy:
            if should_stop():
                return
            while idle and upcoming is not end:
                worker = idle.pop()
                worker.send(upcoming)
                busy[worker] = upcoming
                upcoming = next(remaining, end)
            ready: list[Any] = connection.wait(cast(Any, list(busy)), timeout=_POLL_S)
            for worker in ready:
                task = busy.pop(worker)
                try:
                    answer = worker.receive(task)
                except WorkerDied:
                    if should_stop():  # the signal reached all of them
                        return
                    raise
                idle.append(worker)
                yield task, answer

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(target: str, parent: int) -> None:
    """Answer tasks from standard input on standard output, until the parent closes it."""
    ignore_stop_signals()
    die_with_parent(parent)
    # Output of libraries goes to standard error, so that the pipe carries answers only.
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answer: Callable[[Any], Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        args = pickle.load(tasks)
        while True:
            task = pickle.load(tasks)
            try:
                if answer is None:
                    module, _, function = target.partition(":")
                    answer = getattr(importlib.import_module(module), function)(*args)
                reply = (True, answer(task))
            except EstibaError as error:
                reply = (False, error)
            except Exception as error:
                reply = (False, EstibaError(f"{type(error).__name__}: {error}"))
            pickle.dump(reply, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


# --- ranks ---------------------------------------------------------------------------------------------------------


def run_ranks(
    module: str,
    argv: Sequence[str],
    count: int,
    *,
    host_count: int = 1,
    host_index: int = 0,
    master: str = "127.0.0.1",
    port: str | None = None,
) -> NoReturn:
    """Run `python -m module` in `count` processes and exit with their status. Never returns.

    On several hosts each calls this with its own `host_index`, which numbers the ranks, and with the first one's name
    and port. Without a port a free one is taken.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them. All ranks get SIGTERM,
    SIGINT and SIGHUP. Unlike under torchrun, they have the whole grace period of a stop, and a failed rank ends the
    job; the next run resumes from its checkpoint.
    """
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
    processes: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, _frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    for signum in _STOP_SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signum, forward)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    for local_rank in range(count):
        environ = {
            **os.environ,
            "RANK": str(host_index * count + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(host_count * count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": master,
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": threads,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                env=environ,
                preexec_fn=die_with_parent,
                start_new_session=True,  # Ctrl-C in a terminal reaches a rank once, through `forward`
            )
        )
    where = "" if host_count == 1 else f" on each of {host_count} hosts; host {host_index}, first host {master}"
    logger.info(f"{count} {'process' if count == 1 else 'processes'}, one for each device{where}")
    os._exit(_wait_for_ranks(processes))


def _wait_for_ranks(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return the exit status of the first rank that failed, if possible not of one that only lost others; or 0."""
    failed: int | None = None
    kill_at = float("inf")
    killed: set[int] = set()  # their status says nothing
    stopped = {128 + signum for signum in _STOP_SIGNALS}
    while any(process.poll() is None for process in processes):
        for process in processes:
            if process.pid in killed:
                continue
            if failed in (None, RanksLost.exit_code) and process.poll() and process.returncode != failed:
                failed = process.returncode  # one that only lost the others is not the reason
                grace_s = _LOST_RANKS_GRACE_S if failed == RanksLost.exit_code else _FAILED_RANK_GRACE_S
                kill_at = time.monotonic() + grace_s
        if time.monotonic() > kill_at and failed not in stopped:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    killed.add(process.pid)
        time.sleep(_POLL_S)
    ended = [failed, *(process.returncode for process in processes if process.pid not in killed)]
    code = min(filter(None, ended), key=lambda code: code == RanksLost.exit_code, default=0)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
