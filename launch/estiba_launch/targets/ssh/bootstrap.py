"""Installs what every job needs on a bare remote host: an engine and rsync. Keeps what is already there."""

from __future__ import annotations

import getpass
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from estiba_launch.errors import LaunchError
from estiba_launch.targets.base import Report
from estiba_launch.targets.ssh.connection import UNREACHABLE, HostUnreachable, RemoteError, RemoteHost
from estiba_launch.targets.ssh.script import GPU_WORKS


@dataclass(frozen=True, kw_only=True)
class Equipment:
    docker: bool
    gpu: bool
    """nvidia-smi works."""
    gpu_in_docker: bool
    rsync: bool


PROBE = f"""
docker info >/dev/null 2>&1 && echo yes || echo no
nvidia-smi -L >/dev/null 2>&1 && echo yes || echo no
{GPU_WORKS} && echo yes || echo no
command -v rsync >/dev/null 2>&1 && echo yes || echo no
"""
AS_ROOT = '[ "$(id -u)" = 0 ] || LC_ALL=C sudo -n true'
WITH_PASSWORD = "LC_ALL=C sudo -S -k -p ''"  # noqa: S105 - a command


def probe(host: RemoteHost) -> Equipment:
    """Ask a host what it has. Raises HostUnreachable."""
    words = host.run(PROBE, what="probing the host").stdout.split()
    docker, gpu, gpu_in_docker, rsync = (word == "yes" for word in words[:4])
    return Equipment(docker=docker, gpu=gpu, gpu_in_docker=gpu_in_docker, rsync=rsync)


def engine_script() -> str:
    """scripts/engine.sh, which travels with the installed package too."""
    packed = resources.files("estiba_launch") / "data" / "engine.sh"
    here = Path(__file__).resolve().parents[4] / "scripts" / "engine.sh"
    source = packed if packed.is_file() else here
    if not source.is_file():
        raise LaunchError(
            "engine.sh: not in this installation; install Docker on the host by hand, or reinstall Estiba"
        )
    return source.read_text("utf-8")


def bootstrap(host: RemoteHost, report: Report, *, needs_rsync: bool) -> Equipment:
    """Install an engine (with GPU support where there is a GPU) and rsync where missing.

    Raises LaunchError when the user may not install there, RemoteError when the installation failed.
    """
    found = probe(host)
    missing = []
    if found.docker and (not found.gpu or found.gpu_in_docker):
        report(f"{host.target}: docker answers{', with GPUs' if found.gpu else ''}")
    else:
        missing.append("engine")
    if needs_rsync and not found.rsync:
        missing.append("rsync")
    if not missing:
        return found
    why = "gives containers no GPU" if found.docker else "does not answer"
    what = f"docker {why}" if "engine" in missing else "no rsync"
    password = sudo_password(host)
    report(f"{host.target}: {what}; installing (minutes)")
    command, script = f"bash -s {' '.join(missing)}", engine_script()
    if password is not None:
        # If sudo needs no password for bash after all, the password line is dropped, not run.
        first_line = script.partition("\n")[0]
        skip = f'while IFS= read -r line && [ "$line" != "{first_line}" ]; do :; done; exec {command}'
        command, script = f"{WITH_PASSWORD} bash -c '{skip}'", f"{password}\n{script}"
    _pipe(host, f"{command} 2>&1", script, report)
    # Membership of the docker group begins with the next login.
    host.disconnect()
    return probe(host)


def sudo_password(host: RemoteHost, ask: Callable[[str], str] = getpass.getpass) -> str | None:
    """The sudo password, asked for once on this terminal; None when sudo needs none.

    Raises LaunchError with sudo's own words where the user cannot become root.
    """
    tried = host.run(AS_ROOT, check=False)
    if tried.returncode == 0:
        return None
    message = _last_line(tried.stderr)
    login = host.run("id -un").stdout.strip()
    allow = f"let an administrator run `echo '{login} ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/estiba` there"
    by_hand = "install Docker and rsync there by hand, or log in as root"
    if "password is required" not in message:
        remedy = by_hand if tried.returncode == 127 else f"{allow}, or {by_hand}"
        raise LaunchError(f"{host.target}: installing needs root, and {message or 'sudo failed'}; {remedy}")
    if not sys.stdin.isatty():
        raise LaunchError(
            f"{host.target}: installing needs root, and sudo asks for {login}'s password; run this in a terminal, "
            f"where it can be typed, or {allow}"
        )
    password = ask(f"[sudo] password for {login} on {host.target.host}: ")
    checked = host.run(f"{WITH_PASSWORD} true", input=f"{password}\n", check=False)
    if checked.returncode:
        lines = checked.stderr.strip().splitlines()
        if any("incorrect password" in line or "try again" in line for line in lines):
            raise LaunchError(f"{host.target}: sudo did not accept the password of {login}; run the same command again")
        raise LaunchError(f"{host.target}: installing needs root, and {_last_line(checked.stderr)}; {allow}")
    return password


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _pipe(host: RemoteHost, command: str, text: str, report: Report) -> None:
    """Run `command` with `text` on stdin and report its output line by line."""
    process = host.open(command, stdin=subprocess.PIPE)
    assert process.stdin and process.stdout
    try:
        process.stdin.write(text.encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # its exit code says why
    last = ""
    for raw in process.stdout:
        line = raw.decode("utf-8", "replace").rstrip()
        report(f"  {line}")
        # A message of several lines begins with the script's name.
        last = line if line.startswith("engine: ") or not last else f"{last} {line}"
    last = last.removeprefix("engine: ")
    if process.wait() == UNREACHABLE:
        raise HostUnreachable(
            f"{host.target}: the connection was lost while packages were installed (last: {last or 'nothing'}); "
            "run the same command again, which finishes the installation"
        )
    if process.returncode:
        raise RemoteError(f"{host.target}: the installation failed (exit {process.returncode}): {last}")
