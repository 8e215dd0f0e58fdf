"""A rented machine: a Debian container with sshd, sudo, and once it is installed an engine of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "remote-host"
ROOT = FOLDER.parents[1]
CLIENT_TOOLS = ("ssh", "rsync")


def docker(*words: str, **more: object) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"docker {shlex.join(words)}: {done.stderr[-2000:]}"
    return str(done.stdout)


def build(stage: str) -> str:
    """Build one stage of the Dockerfile. Returns the image's name."""
    subprocess.run(["bash", str(ROOT / "images/base/rootfs.sh")], check=True)
    name = f"estiba/remote-{stage}-test:local"
    docker("build", "--quiet", "--network", "host", "--target", stage, "--tag", name, str(FOLDER))
    return name


class RemoteMachine:
    """The container, and how to get in."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.folder = folder
        self.name = f"estiba-machine-{os.getpid()}"
        self.bootstrap_log: list[str] = []
        """What the user was told while the engine was installed."""

    def start(self) -> None:
        docker("network", "create", self.name)
        words = ["run", "--detach", "--init", "--privileged", "--cgroupns", "private", "--name", self.name]
        words += [
            "--network",
            self.name,
            "--hostname",
            "rented",
            "--publish",
            f"127.0.0.1:{self.port}:22",
            "--tmpfs",
            "/run:exec",
        ]
        # An engine cannot lay an overlay on an overlay, so its files are on a volume.
        docker(*words, "--volume", "/var/lib/docker", build("machine"))
        self.wait_for_sshd()
        key = "ssh-keygen -q -t ed25519 -N '' -f /root/key && cat /root/key"
        (self.folder / "key").write_text(self.sh(key))
        (self.folder / "key").chmod(0o600)
        self.sh(
            "for user in root user typist guest; do home=$(getent passwd $user | cut -d: -f6); mkdir -p $home/.ssh\n"
            "install -m 600 -o $user /root/key.pub $home/.ssh/authorized_keys; chown $user $home/.ssh; done"
        )
        host_key = self.sh("cat /etc/ssh/ssh_host_ed25519_key.pub")
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}")

    @property
    def target(self) -> str:
        return self.target_of("user")

    def target_of(self, user: str) -> str:
        return f"ssh://{user}@127.0.0.1:{self.port}"

    @property
    def ssh(self) -> str:
        """A value for ESTIBA_SSH."""
        options = [f"UserKnownHostsFile={self.folder}/known_hosts", "StrictHostKeyChecking=yes", "IdentitiesOnly=yes"]
        words = ["ssh", "-F", "none", "-i", f"{self.folder}/key"]
        return shlex.join([*words, *(word for option in options for word in ("-o", option))])

    @property
    def gateway(self) -> str:
        """Address of the tester's machine, as the machine and its containers see it."""
        return docker("network", "inspect", self.name, "--format", "{{(index .IPAM.Config 0).Gateway}}").strip()

    def sh(self, command: str, *, user: str = "root", check: bool = True) -> str:
        """Run a command on the machine, not through ssh."""
        words = ["docker", "exec", "--user", user, "--workdir", "/", self.name, "sh", "-c", command]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        return done.stdout

    def hold_package_lock(self) -> subprocess.Popen[bytes]:
        """What unattended upgrades do after boot. Ends with the returned process."""
        hold = "import fcntl, sys; file = open('/var/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
        hold += "; print('held', flush=True); sys.stdin.read()"
        words = ["docker", "exec", "--interactive", self.name, "python3", "-c", hold]
        holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        return holder

    def containers(self, name: str) -> list[str]:
        return self.sh(f"docker ps --all --quiet --filter name={name}").split()

    def job_folder(self, name: str) -> str:
        return self.sh(f"echo ~user/estiba/jobs/{name}").strip()

    def wait_for_sshd(self) -> None:
        self.sh("until [ -s /run/sshd.pid ]; do sleep 0.1; done")

    def disconnect(self) -> None:
        """Every connection breaks, and no new one is taken."""
        self.sh("pkill -KILL sshd; rm -f /run/sshd.pid")

    def connect(self) -> None:
        self.sh("/usr/sbin/sshd")
        self.wait_for_sshd()

    def cut_power(self) -> None:
        docker("kill", self.name)

    def boot(self) -> None:
        docker("start", self.name)
        self.wait_for_sshd()
        self.sh("[ ! -x /usr/sbin/dockerd ] || until docker info >/dev/null 2>&1; do sleep 0.1; done")

    def restart_engine(self) -> None:
        """What an upgrade of its package does."""
        self.sh("pid=$(cat /run/docker.pid); kill $pid; while [ -d /proc/$pid ]; do sleep 0.1; done")
        docker("exec", "--detach", self.name, "dockerd")
        self.sh("until docker info >/dev/null 2>&1; do sleep 0.1; done")

    def remove(self) -> None:
        subprocess.run(["docker", "rm", "--force", "--volumes", self.name], capture_output=True, check=False)
        subprocess.run(["docker", "network", "rm", self.name], capture_output=True, check=False)


class ClientTools:
    """`ssh` and `rsync` out of a container, for a machine that lacks them."""

    def __init__(self, folder: Path) -> None:
        self.name = f"estiba-ssh-client-{os.getpid()}"
        me, shared = f"{os.getuid()}:{os.getgid()}", ("/tmp", str(ROOT), os.environ.get("XDG_RUNTIME_DIR", "/tmp"))
        words = ["run", "--detach", "--init", "--name", self.name, "--network", "host", "--user", me]
        words += [
            "--volume",
            "/etc/passwd:/etc/passwd:ro",
            *(w for p in {*shared, str(folder)} for w in ("-v", f"{p}:{p}")),
        ]
        docker(*words, build("client"))
        for tool in CLIENT_TOOLS:
            script = folder / tool
            script.write_text(f'#!/bin/sh\nexec {shutil.which("docker")} exec -i -w "$PWD" {self.name} {tool} "$@"\n')
            script.chmod(0o755)

    def remove(self) -> None:
        docker("rm", "--force", self.name)


def lacks_client_tools() -> bool:
    return not all(shutil.which(tool) for tool in CLIENT_TOOLS)


def skip_without_engine() -> None:
    done = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no docker engine ({done.stderr.strip()[-200:]}); run `make engine`")
