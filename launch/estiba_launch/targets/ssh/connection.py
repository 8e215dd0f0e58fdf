"""One remote host through the system's `ssh` and `rsync`: keys, names, jumps and host key checks are the user's own.

`$ESTIBA_SSH` replaces the command, such as `ssh -F FILE -i KEY`, as GIT_SSH_COMMAND does for git.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from estiba_launch.errors import HostError, LaunchError
from estiba_launch.request.address import TargetAddress

CONNECT_S = 15
KEEP_S = 120
"""Seconds that the shared connection stays open without a command."""
UNREACHABLE = 255
"""Exit code of ssh itself. Any other is the remote command's."""


class HostUnreachable(HostError):
    """The host cannot be reached, or refuses the login. Its containers may be running."""

    transient = True


class RemoteError(HostError):
    """A command on the host failed."""


def command_words() -> list[str]:
    """The ssh command to use. Raises LaunchError when it is not installed."""
    words = shlex.split(os.environ.get("ESTIBA_SSH") or "ssh")
    if not words or not shutil.which(words[0]):
        raise LaunchError(f"{words[0] if words else 'ESTIBA_SSH'}: not found; install the OpenSSH client")
    return words


def control_dir() -> Path | None:
    """A directory for connection sockets that only this user can read; None where none can be trusted."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base if base and Path(base).is_dir() else tempfile.gettempdir()) / f"estiba-ssh-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return None
    is_private = status.st_uid == os.getuid() and status.st_mode & 0o077 == 0 and not path.is_symlink()
    # A socket's path has 108 bytes, of which ssh needs 17 for a temporary name.
    return path if is_private and len(str(path)) < 36 else None


class RemoteHost:
    """Commands and files on one host. The first use opens a connection that later ones share."""

    def __init__(self, target: TargetAddress) -> None:
        self.target = target
        host = str(target.host)
        self.destination = f"{target.user}@{host}" if target.user else host
        bare = f"[{host}]" if ":" in host else host
        self.rsync_destination = f"{target.user}@{bare}" if target.user else bare
        self._connected = False

    def words(self) -> list[str]:
        """`ssh` and its options, without the destination."""
        words = [*command_words(), "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"]
        words += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
        # Port 22 is left to the user's own configuration of the host.
        if self.target.port != 22:
            words += ["-p", str(self.target.port)]
        folder = control_dir()
        if folder:
            tag = hashlib.sha256(" ".join(command_words()).encode()).hexdigest()[:8]
            words += ["-o", f"ControlPath={folder}/{tag}-%C"]
        return words

    def connect(self) -> None:
        """Open the shared connection unless it is open. Raises HostUnreachable with ssh's own message."""
        if self._connected:
            return
        if control_dir() is None:
            self._connected = True
            return
        words = self.words()
        check = subprocess.run([*words, "-O", "check", self.destination], capture_output=True, check=False)
        if check.returncode:
            # Into a file, not a pipe: older clients keep stderr open in the background.
            with tempfile.TemporaryFile() as errors:
                opened = subprocess.run(
                    [*words, "-o", "ControlMaster=auto", "-o", f"ControlPersist={KEEP_S}", "-fN", self.destination],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    check=False,
                )
                errors.seek(0)
                if opened.returncode:
                    raise self.unreachable(errors.read().decode("utf-8", "replace"))
        self._connected = True

    def disconnect(self) -> None:
        """Close the shared connection, so that the next command logs in again."""
        subprocess.run([*self.words(), "-O", "exit", self.destination], capture_output=True, check=False)
        self._connected = False

    def failed(self, what: str, message: str) -> RemoteError:
        """The error of a command on the host, with a remedy where its disk is full."""
        remedy = ""
        if "o space left on device" in message or "isk quota exceeded" in message:
            remedy = "; make room there (`df -h`, old jobs in ~/estiba/jobs, `docker image prune`), then run this again"
        return RemoteError(f"{self.target}: {what} failed: {' '.join(message.split())}{remedy}")

    def unreachable(self, error: str) -> HostUnreachable:
        lines = [line for line in error.strip().splitlines() if line.strip()]
        why = "; ".join(lines[-2:]) or "no answer"
        remedy = f"see whether `{' '.join(self.plain_words())}` connects without a question"
        if "Host key verification failed" in error:
            remedy = f"connect once by hand (`{' '.join(self.plain_words())}`) and compare the host key"
        return HostUnreachable(f"{self.target}: cannot be reached ({why}); {remedy}")

    def plain_words(self) -> list[str]:
        """What a user types to connect."""
        port = ["-p", str(self.target.port)] if self.target.port != 22 else []
        return [*command_words(), *port, self.destination]

    def run(
        self, command: str, *, input: str = "", check: bool = True, timeout_s: float | None = 120, what: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command on the host. `input` is its stdin.

        Raises HostUnreachable when the host does not answer in time, RemoteError when `check` is set and it failed.
        """
        self.connect()
        try:
            done = subprocess.run(
                [*self.words(), self.destination, command],
                input=input,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise HostUnreachable(
                f"{self.target}: no answer within {timeout_s:g} s; see whether the host is up"
            ) from None
        if done.returncode == UNREACHABLE:
            self._connected = False
            raise self.unreachable(done.stderr)
        if check and done.returncode:
            message = done.stderr.strip()[-800:] or f"exit {done.returncode}"
            raise self.failed(what or command.splitlines()[0][:80], message)
        return done

    def open(self, command: str, *, stdin: int | None = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start a command on the host whose stdout is read as it arrives. Add 2>&1 to see its stderr."""
        self.connect()
        return subprocess.Popen(
            [*self.words(), self.destination, command], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def stream(self, command: str) -> Iterator[bytes]:
        """Yield the stdout of a command as it arrives. Raises HostUnreachable when the connection breaks."""
        with self.open(command) as process:
            try:
                assert process.stdout
                while chunk := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
                    yield chunk
            except GeneratorExit:
                process.terminate()
                raise
        if process.returncode == UNREACHABLE:
            raise HostUnreachable(f"{self.target}: connection lost; see whether the host is up")

    def rsync(self, words: Iterable[str], *, files_from: Iterable[str] | None = None) -> None:
        """Run rsync over the same connection. `words` are options, sources and destination.

        Raises RemoteError, HostUnreachable.
        """
        if not shutil.which("rsync"):
            raise LaunchError("rsync: not found here; install it (apt install rsync)")
        self.connect()
        listed = None
        call = ["rsync", "-e", shlex.join(self.words()), "--protect-args"]
        if files_from is not None:
            listed = b"\0".join(os.fsencode(name) for name in files_from)
            call += ["--from0", "--files-from=-"]
        done = subprocess.run(
            [*call, *words],
            input=listed,
            stdin=subprocess.DEVNULL if listed is None else None,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            error = done.stderr.decode("utf-8", "replace")
            if done.returncode in (12, 30, 35, UNREACHABLE) and "rsync: command not found" not in error:
                self._connected = False
                raise self.unreachable(error)
            raise self.failed("rsync", error.strip()[-600:])
