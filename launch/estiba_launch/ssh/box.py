"""One box, through the system's `ssh` and `rsync`: keys, host names, jumps and host key checks are the user's own.

`$ESTIBA_SSH` replaces the command, such as `ssh -F FILE -i KEY`, as GIT_SSH_COMMAND does for git.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import HostError, LaunchError
from ..target import Target

CONNECT_S = 15
KEEP_S = 120
"""How long the shared connection waits for the next command."""
UNREACHABLE = 255
"""What ssh itself exits with; any other code is the remote command's."""


class BoxGone(HostError):
    """The box cannot be reached, or does not let us in; its containers may be running."""


class BoxError(HostError):
    """A command on the box failed."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished command."""

    code: int
    out: str
    error: str


def command_words() -> list[str]:
    """The ssh to use. Raises LaunchError when it is not there."""
    words = shlex.split(os.environ.get("ESTIBA_SSH") or "ssh")
    if not words or not shutil.which(words[0]):
        raise LaunchError(f"{words[0] if words else 'ESTIBA_SSH'}: not found; install the OpenSSH client")
    return words


def control_dir() -> Path | None:
    """A directory of this user's alone for connection sockets; None where there is none to trust."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base if base and Path(base).is_dir() else tempfile.gettempdir()) / f"estiba-ssh-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return None
    mine = status.st_uid == os.getuid() and status.st_mode & 0o077 == 0 and not path.is_symlink()
    # A socket's path has 108 bytes, of which ssh wants 17 for a temporary name.
    return path if mine and len(str(path)) < 36 else None


class Box:
    """Commands and files on one box; the first use opens a connection that the next ones share."""

    def __init__(self, target: Target) -> None:
        self.target = target
        host = str(target.host)
        self.at = f"{target.user}@{host}" if target.user else host
        bare = f"[{host}]" if ":" in host else host
        self.rsync_at = f"{target.user}@{bare}" if target.user else bare
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
        """Open the shared connection, or find it open. Raises BoxGone with ssh's own words."""
        if self._connected:
            return
        if control_dir() is None:
            self._connected = True
            return
        words = self.words()
        check = subprocess.run([*words, "-O", "check", self.at], capture_output=True, check=False)
        if check.returncode:
            # Into a file, not a pipe: older clients keep stderr open in the background.
            with tempfile.TemporaryFile() as errors:
                opened = subprocess.run(
                    [*words, "-o", "ControlMaster=auto", "-o", f"ControlPersist={KEEP_S}", "-fN", self.at],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    check=False,
                )
                errors.seek(0)
                if opened.returncode:
                    raise self.gone(errors.read().decode("utf-8", "replace"))
        self._connected = True

    def gone(self, error: str) -> BoxGone:
        lines = [line for line in error.strip().splitlines() if line.strip()]
        why = "; ".join(lines[-2:]) or "no answer"
        remedy = f"see whether `{' '.join(self.plain_words())}` gets in without a question"
        if "Host key verification failed" in error:
            remedy = f"connect once by hand (`{' '.join(self.plain_words())}`) and compare the host key"
        return BoxGone(f"{self.target}: cannot be reached ({why}); {remedy}")

    def plain_words(self) -> list[str]:
        """What a person types to get in."""
        port = ["-p", str(self.target.port)] if self.target.port != 22 else []
        return [*command_words(), *port, self.at]

    def run(
        self, command: str, *, input: str = "", check: bool = True, timeout_s: float | None = 120, what: str = ""
    ) -> Done:
        """Run a shell command there. `input` is its stdin.

        Raises BoxGone when the box cannot be reached or does not answer in time, BoxError when `check` and it failed.
        """
        self.connect()
        try:
            done = subprocess.run(
                [*self.words(), self.at, command],
                input=input.encode(),
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BoxGone(f"{self.target}: no answer within {timeout_s:g} s; see whether the box is up") from None
        error = done.stderr.decode("utf-8", "replace")
        if done.returncode == UNREACHABLE:
            self._connected = False
            raise self.gone(error)
        if check and done.returncode:
            told = error.strip()[-800:] or f"exit {done.returncode}"
            raise BoxError(f"{self.target}: {what or command.splitlines()[0][:80]} failed: {told}")
        return Done(code=done.returncode, out=done.stdout.decode("utf-8", "replace"), error=error)

    def open(self, command: str, *, stdin: int | None = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start a command there whose stdout is read as it comes; stderr is mixed in by the caller with 2>&1."""
        self.connect()
        return subprocess.Popen(
            [*self.words(), self.at, command], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def rsync(
        self, words: Iterable[str], *, files_from: Iterable[str] | None = None, progress: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        """Run rsync over the same connection; `words`: options, sources, destination. Raises BoxError, BoxGone."""
        if not shutil.which("rsync"):
            raise LaunchError("rsync: not found here; install it (apt install rsync)")
        self.connect()
        listed = None
        call = ["rsync", "-e", shlex.join(self.words()), "--protect-args"]
        if files_from is not None:
            listed = b"\0".join(os.fsencode(name) for name in files_from)
            call += ["--from0", "--files-from=-"]
        if progress:
            call.append("--info=progress2")
        done = subprocess.run(
            [*call, *words],
            input=listed,
            stdin=subprocess.DEVNULL if listed is None else None,
            stdout=2 if progress else subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode:
            error = done.stderr.decode("utf-8", "replace")
            if done.returncode in (12, 30, 35, UNREACHABLE) and "rsync: command not found" not in error:
                self._connected = False
                raise self.gone(error)
            raise BoxError(f"{self.target}: rsync failed: {error.strip()[-600:]}")
        return done
