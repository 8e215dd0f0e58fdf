"""PID 1 of every image: start the right process, pass signals on, keep the deadline, the exit code and the reason.

    docker run IMAGE                         the workload, as SageMaker would start it
    docker run IMAGE train                   the same
    docker run IMAGE --flag value …          the workload with flags
    docker run IMAGE python other.py …       any command
    SAGEMAKER_PROGRAM=x.py, and `train`      the user's script, through the sagemaker-training toolkit

TERM and INT reach the programs that can act on them: see `_receivers`. At the end of the grace period whatever is left
is killed, while there is still time to write the failure file. Only the standard library is used here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from estiba.contract import root_of
from estiba.errors import ConfigError, EstibaError
from estiba.failure import cause_of, read_failure, remove_failure, toolkit_exit_code, write_failure
from estiba.stop import GRACE_S, say, seconds

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
RESERVE_S = 4.0
"""Kept of the grace period for killing what is left and writing why."""
SHELLS = frozenset({"sh", "bash", "dash", "ash", "zsh", "ksh", "busybox"})
TAIL_BYTES = 16_384
_TOOLKIT = """
import os
from sagemaker_training import environment, files
place = os.environ.get("SAGEMAKER_SUBMIT_DIRECTORY")
if place:
    files.download_and_extract(place, environment.code_dir)
from sagemaker_training.cli.train import main
main()
"""
# The toolkit reads the code's place from the hyperparameters alone, where one of AWS's SDKs puts it; the other one sets
# the variable. It fetches only into an empty folder, so that nothing is fetched twice.
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Command:
    argv: tuple[str, ...]
    is_toolkit: bool = False


def main(argv: Sequence[str] | None = None) -> NoReturn:
    failure_path = root_of() / "output/failure"
    remove_failure(failure_path)
    try:
        command = command_for(sys.argv[1:] if argv is None else list(argv), os.environ)
        code = Supervisor(command, failure_path, seconds(os.environ, "ESTIBA_STOP_GRACE_S") or GRACE_S).run()
    except EstibaError as error:
        say(f"error: {error}")
        write_failure(failure_path, str(error))
        code = error.exit_code
    sys.exit(code)


def command_for(argv: Sequence[str], environ: Mapping[str, str]) -> Command:
    """What the container's arguments mean. Raises ConfigError."""
    if argv and argv[0] == "serve":
        raise ConfigError("this image trains and embeds; it does not serve. Start it with `train`")
    if argv and argv[0] != "train" and not argv[0].startswith("-"):
        return Command(tuple(argv))
    flags = list(argv[1:] if argv[:1] == ["train"] else argv)
    if argv[:1] in ([], ["train"]) and (program := _script_of(environ)):
        if flags:
            raise ConfigError(
                f"flags {flags} were given together with the script {program!r} (SAGEMAKER_PROGRAM); "
                "pass the script's settings as hyperparameters"
            )
        complete_tree(root_of(environ) / "input/config")
        return Command((sys.executable, "-c", _TOOLKIT), is_toolkit=True)
    workload = environ.get("ESTIBA_WORKLOAD")
    if not workload:
        raise ConfigError(
            "ESTIBA_WORKLOAD is not set: this image names no workload; give a command or SAGEMAKER_PROGRAM"
        )
    return Command((sys.executable, "-m", workload, *flags))


def complete_tree(config_dir: Path) -> None:
    """Write the files that the toolkit will not do without and a plain `docker run` does not bring: one host, no input.

    Raises ConfigError where they are missing and cannot be written.
    """
    try:
        socket.gethostbyname(host := socket.gethostname())
    except OSError:  # no network: the toolkit would look the name up for fifteen minutes
        host = "localhost"
    defaults = {
        "resourceconfig.json": {"current_host": host, "hosts": [host], "network_interface_name": "eth0"},
        "hyperparameters.json": {},
        "inputdataconfig.json": {},
    }
    for name, content in defaults.items():
        path = config_dir / name
        if path.exists():
            continue
        try:
            config_dir.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        except OSError as error:
            raise ConfigError(
                f"{path} is missing and cannot be written ({error.strerror}); script mode needs it: "
                f"mount one that holds {json.dumps(content)}"
            ) from None


def _script_of(environ: Mapping[str, str]) -> str | None:
    """The user's script: by environment, or by hyperparameter as the SDKs send it."""
    if environ.get("SAGEMAKER_PROGRAM"):
        return environ["SAGEMAKER_PROGRAM"]
    try:
        value = json.loads((root_of(environ) / "input/config/hyperparameters.json").read_text())["sagemaker_program"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the workload reads the same file and explains what is wrong with it
    return str(value).strip('"') or None


class Supervisor:
    """One child, its process group, and what becomes of them."""

    def __init__(self, command: Command, failure_path: Path, grace_s: float) -> None:
        self.command = command
        self.failure_path = failure_path
        self.stop_s = max(1.0, grace_s - RESERVE_S)
        self._stopping: signal.Signals | None = None
        self._deadline = float("inf")
        self._killed = False
        self._tail = bytearray()
        self._is_writing = False
        self._oom_kills_before = _oom_kills()

    def run(self) -> int:
        """Start, supervise to the end, explain. Returns the exit status. Raises ConfigError if it cannot start."""
        with contextlib.suppress(
            OSError, AttributeError
        ):  # outside a container we are not PID 1; orphans come to us still
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        handled = {*FORWARDED, signal.SIGCHLD}
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, it would hide every exit status
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        child, pump = self._start()
        status: int | None = None
        while status is None or (self._stopping and not self._killed and _has_children()):
            wait_s = max(0.0, min(60.0, self._deadline - time.monotonic()))
            info = signal.sigtimedwait(handled, wait_s)
            if info is not None and info.si_signo != signal.SIGCHLD:
                self._forward(child.pid, signal.Signals(info.si_signo))
            elif time.monotonic() >= self._deadline and not self._killed:
                self._kill()
            for pid, ended in _reap():
                if pid == child.pid:
                    status = ended
        if pump is not None:
            self._drain(pump)
        return self._explain(os.waitstatus_to_exitcode(status))

    def _start(self) -> tuple[subprocess.Popen[bytes], threading.Thread | None]:
        terminal = 0 if os.isatty(0) else None

        def prepare() -> None:
            os.setpgid(0, 0)
            if terminal is not None:  # Ctrl-C is then the terminal's business and reaches the child's group directly
                with contextlib.suppress(OSError):
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
                    os.tcsetpgrp(terminal, os.getpid())
            signal.pthread_sigmask(signal.SIG_SETMASK, set())

        # A terminal is left to the child; otherwise its stderr passes through here, so that its last words are known.
        keeps_tail = not os.isatty(2)
        try:
            child = subprocess.Popen(
                self.command.argv, stderr=subprocess.PIPE if keeps_tail else None, preexec_fn=prepare
            )
        except FileNotFoundError:
            raise CommandError(
                f"command {self.command.argv[0]!r} is not in this image; check its spelling", 127
            ) from None
        except (PermissionError, OSError) as error:
            raise CommandError(f"command {self.command.argv[0]!r} cannot be started: {error}", 126) from None
        if child.stderr is None:
            return child, None
        pump = threading.Thread(target=self._pump, args=(child.stderr.fileno(),), name="estiba-stderr", daemon=True)
        pump.start()
        return child, pump

    def _pump(self, source: int) -> None:
        while chunk := os.read(source, 65536):
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]
            self._is_writing = True
            with contextlib.suppress(OSError):
                while chunk:
                    chunk = chunk[os.write(2, chunk) :]
            self._is_writing = False

    def _drain(self, pump: threading.Thread) -> None:
        """Let the last words out. A slow reader is waited for, as the child would have; a stop is not kept waiting."""
        pump.join(timeout=1.0)
        while pump.is_alive() and self._is_writing and not self._stopping and not signal.sigpending() & {*STOPPING}:
            pump.join(timeout=0.2)

    def _forward(self, child: int, signum: signal.Signals) -> None:
        if signum in STOPPING and self._stopping is None:
            self._stopping = signum
            self._deadline = time.monotonic() + self.stop_s
        for pid in _receivers(child, self.command.is_toolkit):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def _kill(self) -> None:
        self._killed = True
        self._deadline = float("inf")  # what does not die of this (a stuck driver) is waited for, not spun on
        say(f"{self.stop_s:.0f} s after the signal something is still running: killed")
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _explain(self, code: int) -> int:
        """The exit status for a child's code, with the failure file filled."""
        written = read_failure(self.failure_path)
        if self.command.is_toolkit and code != 0 and written is not None:
            script_code = toolkit_exit_code(written)
            code = script_code if script_code else code
        if code < 0:
            code = 128 - code
        if code == 0:
            return 0
        if written is not None and not self.command.is_toolkit:
            return code  # the workload explained itself
        parts = [self._cause(code), (written or "").strip()]
        write_failure(self.failure_path, "\n\n".join(part for part in parts if part))
        return code

    def _cause(self, code: int) -> str:
        what = "the script" if self.command.is_toolkit else " ".join(self.command.argv[:3])
        last_words = cause_of(self._tail.decode("utf-8", "replace"))
        if code == 128 + signal.SIGKILL and _oom_kills() > self._oom_kills_before:
            return (
                f"out of memory: {what} was killed at the container's limit of {_memory_limit()}; give it more memory"
            )
        if self._killed:
            return f"{what} did not stop within {self.stop_s:.0f} s of {self._stopping.name}: killed"  # type: ignore[union-attr]
        if self._stopping is not None:
            return f"stopped by {self._stopping.name}: {what} ended with {code}"
        if code > 128:
            with contextlib.suppress(ValueError):
                return f"{what} was killed by {signal.Signals(code - 128).name}" + (
                    f": {last_words}" if last_words else ""
                )
        return (
            f"{last_words}\n({what} ended with exit code {code})"
            if last_words
            else f"{what} ended with exit code {code}"
        )


class CommandError(ConfigError):
    """A command that could not be started; 126 and 127 as a shell gives them."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# --- processes -----------------------------------------------------------------------------------------------------


def _receivers(child: int, is_toolkit: bool) -> list[int]:
    """Who gets the signal: the program itself, below the wrappers that would swallow it, and nothing below a program.

    A shell dies of TERM and leaves its child without a word, so both get it. The sagemaker-training toolkit dies
    likewise and takes the script's exit code along, and so does the `sh -c` that it starts a .sh script with: only what
    they run gets it. A program passes signals on to its
    own helpers as it sees fit: a data loader's workers must go on while their parent saves.
    """
    parents = _parents()
    found: list[int] = []
    waiting = [child]
    while waiting:
        pid = waiting.pop()
        below = [other for other, parent in parents.items() if parent == pid]
        if is_toolkit and below and (pid == child or _is_shell_line(pid)):
            waiting += below
            continue
        found.append(pid)
        if _name_of(pid) in SHELLS:
            waiting += below
    return found


def _is_shell_line(pid: int) -> bool:
    words = _read(f"/proc/{pid}/cmdline").split("\0")
    return _name_of(pid) in SHELLS and words[1:2] == ["-c"]


def _descendants(pid: int) -> list[int]:
    parents = _parents()
    found = [pid]
    for item in found:
        found += [other for other, parent in parents.items() if parent == item]
    return found[1:]


def _parents() -> dict[int, int]:
    """Every process's parent."""
    found = {}
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{folder}/stat").read_text(errors="replace")
                state, parent = text.rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(folder)] = int(parent)
    return found


def _name_of(pid: int) -> str:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return ""


def _reap() -> list[tuple[int, int]]:
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended.append((pid, status))
    return ended


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _oom_kills() -> int:
    for line in _read("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control").splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def _memory_limit() -> str:
    text = _read("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes").strip()
    return f"{int(text) / 2**20:.0f} MiB" if text.isdigit() else "this machine's memory"


def _read(*paths: str) -> str:
    for path in paths:
        with contextlib.suppress(OSError):
            return Path(path).read_text()
    return ""


if __name__ == "__main__":
    main()
