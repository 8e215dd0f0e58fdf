"""scripts/engine.sh on distributions and in situations that no test machine has: every tool that it calls is a stub."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = (
    "awk bash cat chmod date env grep head id mkdir mktemp mv nohup rm sed seq setsid sh sort stat tail touch tr true"
)
UBUNTU = ("docker.io", "docker-buildx", "docker-compose-v2")
BUSY = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 812 (unattended-upgr)"

APT_GET = """#!/bin/bash
case " $* " in
  *" indextargets "*) echo 'bookworm|http://mirror.example/debian|/usr/share/keyrings/debian.gpg'; exit ;;
esac
[ "$LC_ALL" = C ] || { echo 'apt in another language'; exit 100; }
if [ -s "$STATE/busy" ]; then cat "$STATE/busy"; exit 100; fi
echo "$*" >>"$STATE/apt"
case " $* " in *" install "*docker*) mv "$STATE/docker" "$STATE/bin/docker" ;; esac
"""
APT_CACHE = """#!/bin/bash
grep -A1 "^$2 " "$STATE/packages" >/dev/null && echo "  Candidate: $(sed -n "s/^$2 //p" "$STATE/packages")" ||
  echo '  Candidate: (none)'
"""
DOCKER = """#!/bin/bash
case "$*" in
  info*) [ -e "$STATE/running" ] && echo overlay2 ;;
  version*) echo 'Docker 28 answers' ;;
esac
"""
SLEEP = """#!/bin/bash
[ -e "$STATE/stays" ] || : >"$STATE/busy"
"""


class Machine:
    """A PATH of stubs, and what they were asked."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.state, self.bin, self.script = folder, folder / "bin", root / "scripts/engine.sh"
        self.bin.mkdir()
        for name in TOOLS.split():
            found = shutil.which(name)
            assert found, name
            (self.bin / name).symlink_to(found)
        started = '#!/bin/bash\ntouch "$STATE/running"\n'
        self.tool("systemctl", started)
        self.tool("dockerd", started)
        self.tool("sudo", '#!/bin/bash\n[ "$1" != -n ] || shift\nexec "$@"\n')
        for name, text in (("apt-get", APT_GET), ("apt-cache", APT_CACHE), ("sleep", SLEEP)):
            self.tool(name, text)
        self.tool("docker", DOCKER)
        (self.bin / "docker").rename(folder / "docker")
        self.has(*UBUNTU)
        self.is_a("ID=ubuntu", "VERSION_CODENAME=noble", 'PRETTY_NAME="Ubuntu 24.04"')

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def has(self, *packages: str) -> None:
        """What apt offers, each with its version."""
        (self.state / "packages").write_text(
            "".join(f"{one.replace('=', ' ') if '=' in one else f'{one} 1'}\n" for one in packages)
        )

    def is_a(self, *lines: str) -> None:
        (self.state / "os-release").write_text("\n".join(lines) + "\n")

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        # Through stdin, as ssh sends it.
        values = {"PATH": str(self.bin), "STATE": str(self.state), "HOME": os.environ["HOME"], "LANG": "es_ES.UTF-8"}
        values |= {"ESTIBA_OS_RELEASE": f"{self.state}/os-release", "ESTIBA_DAEMON_LOG": f"{self.state}/log"}
        return subprocess.run(
            [str(self.bin / "bash"), "-s", *words],
            input=self.script.read_text(),
            env={
                **values,
                "HOME": os.environ["HOME"],
                "LANG": "es_ES.UTF-8",
                "ESTIBA_DAEMON_LOG": str(self.state / "log"),
                **environ,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def installed(self) -> list[str]:
        lines = (self.state / "apt").read_text().splitlines() if (self.state / "apt").exists() else []
        return [word for line in lines if " install " in line for word in line.split() if word.startswith("docker")]


@pytest.fixture
def machine(tmp_path: Path, root: Path) -> Machine:
    return Machine(tmp_path, root)


JAMMY = ("ID=ubuntu", "VERSION_CODENAME=jammy", 'PRETTY_NAME="Ubuntu 22.04"')
MINT = ("ID=linuxmint", "ID_LIKE='ubuntu debian'", "VERSION_CODENAME=wilma", 'PRETTY_NAME="Linux Mint 22"')
BOOKWORM = ("ID=debian", "VERSION_CODENAME=bookworm", 'PRETTY_NAME="Debian 12"')
TRIXIE = ("ID=debian", "VERSION_CODENAME=trixie", 'PRETTY_NAME="Debian 13"')
DEBIAN = ["docker.io", "docker-cli", "docker-buildx", "docker-compose"]


@pytest.mark.parametrize(
    ("release", "offered", "expected"),
    [
        pytest.param(JAMMY, UBUNTU, list(UBUNTU), id="ubuntu 22.04"),
        pytest.param(MINT, UBUNTU, list(UBUNTU), id="a derivative of ubuntu"),
        pytest.param(TRIXIE, (*DEBIAN[:3], "docker-compose=2.26"), DEBIAN, id="debian 13"),
        pytest.param(BOOKWORM, ("docker.io", "docker-compose=1.29"), DEBIAN, id="debian 12, from debian 13"),
    ],
)
def test_each_distribution_gets_its_own_packages(
    machine: Machine, release: tuple[str, ...], offered: tuple[str, ...], expected: list[str]
) -> None:
    machine.is_a(*release)
    machine.has(*offered)
    done = machine.run("engine")
    assert done.returncode == 0, done.stderr
    assert machine.installed == expected
    assert "answers, with buildx and compose v2" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("offered", "lacks"),
    [(("docker.io",), "docker-buildx"), (("docker.io", "docker-buildx", "docker-compose=1.29"), "compose v2")],
)
def test_a_release_without_the_packages_is_named_and_nothing_is_installed(
    machine: Machine, offered: tuple[str, ...], lacks: str
) -> None:
    machine.has(*offered)
    done = machine.run("engine")
    assert done.returncode == 1
    assert f"Ubuntu 24.04 has no {lacks} package; install Docker Engine >= 24" in done.stderr
    assert machine.installed == []


def test_a_distribution_without_apt_is_told_what_to_install(machine: Machine) -> None:
    (machine.bin / "apt-get").unlink()
    done = machine.run("engine")
    assert done.returncode == 1
    assert "not Debian or Ubuntu, so nothing was installed; install Docker Engine >= 24" in done.stderr


def test_a_held_lock_is_waited_for_and_its_holder_named_once(machine: Machine) -> None:
    (machine.state / "busy").write_text(BUSY + "\n")
    done = machine.run("engine")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("812 (unattended-upgr) holds the package lock") == 1
    assert machine.installed == list(UBUNTU)


def test_a_lock_that_is_never_released_ends_the_wait_with_its_holder(machine: Machine) -> None:
    (machine.state / "busy").write_text(BUSY + "\n")
    (machine.state / "stays").touch()
    done = machine.run("engine", ESTIBA_LOCK_WAIT_S="0")
    assert done.returncode == 1
    assert "still held after 0 s" in done.stderr and "process 812 (unattended-upgr)" in done.stderr


def test_a_tool_is_installed_after_the_package_lists_were_read(machine: Machine) -> None:
    assert machine.run("rsync").returncode == 0
    assert [line.split()[1] for line in (machine.state / "apt").read_text().splitlines()] == ["update", "install"]
