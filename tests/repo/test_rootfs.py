"""images/base/rootfs.sh: the local base has Debian's security updates, and is made again when it is old."""

from __future__ import annotations

import hashlib
import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

# Answers for images of a given recipe and date; writes every command to $CALLS; pulls only if $PULLS.
DOCKER = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
    *estiba.recipe*) echo "$RECIPE" ;;
    *.Created*) echo "$CREATED" ;;
    *.Size*) echo 1000000 ;;
    pull*) [ -n "$PULLS" ] ;;
    import*) cat >/dev/null ;;
esac
"""


class RootFs:
    """rootfs.sh with a Docker that only answers."""

    def __init__(self, root: Path, place: Path) -> None:
        self.script = root / "images/base/rootfs.sh"
        self.calls_file = place / "calls"
        for name, text in {"docker": DOCKER, "debootstrap": "#!/bin/sh\nexit 1\n"}.items():
            (place / name).write_text(text)
            (place / name).chmod(0o755)
        self.environ = os.environ | {
            "PATH": f"{place}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "RECIPE": hashlib.sha256(self.script.read_bytes()).hexdigest()[:16],
            "PULLS": "",
            "ESTIBA_DEBIAN_MIRROR": "http://127.0.0.1:9/debian",
            "REFRESH": "",
        }

    def run(self, age_days: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        created = (datetime.now(UTC) - timedelta(days=age_days)).strftime("%Y-%m-%dT%H:%M:%S.123456789Z")
        return subprocess.run(
            ["bash", self.script], env=self.environ | {"CREATED": created} | environ, capture_output=True, text=True
        )

    def calls(self, word: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if line.startswith(word)]


@pytest.fixture
def rootfs(root: Path, tmp_path: Path) -> RootFs:
    return RootFs(root, tmp_path)


def test_a_recent_root_file_system_is_kept(rootfs: RootFs) -> None:
    done = rootfs.run(age_days=29)
    assert (done.returncode, done.stderr, rootfs.calls("pull")) == (0, "", [])


def test_an_old_one_is_made_again(rootfs: RootFs) -> None:
    done = rootfs.run(age_days=31, PULLS="yes")
    assert done.returncode == 0, done.stderr
    assert "31 days old" in done.stderr
    assert len(rootfs.calls("import")) == 2


def test_an_old_one_that_cannot_be_made_again_stays_in_use_with_a_warning(rootfs: RootFs) -> None:
    done = rootfs.run(age_days=45)
    assert done.returncode == 0
    assert "stays as it was 45 days ago, without later security updates" in done.stderr
    assert rootfs.calls("import") == []


def test_a_refresh_is_made_at_once_and_fails_if_it_cannot(rootfs: RootFs) -> None:
    assert rootfs.run(REFRESH="1", PULLS="yes").returncode == 0
    assert len(rootfs.calls("import")) == 2
    assert rootfs.run(REFRESH="1").returncode == 1


def test_a_pulled_image_gets_the_security_updates_too(rootfs: RootFs) -> None:
    rootfs.run(RECIPE="another", PULLS="yes")
    runs = rootfs.calls("run")
    assert len(runs) == 2
    assert all("apt-get -q upgrade -y" in line for line in runs)


def test_a_mirror_without_security_updates_is_not_taken_in_silence(rootfs: RootFs) -> None:
    assert "lacks security updates" in rootfs.run(RECIPE="another").stderr


@pytest.mark.docker
def test_the_local_base_is_made_from_all_three_suites() -> None:
    sources = subprocess.run(
        ["docker", "run", "--rm", "--network=none", "--entrypoint=sh", "estiba/base:local", "-c",
         "cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null; true"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert {"bookworm", "bookworm-updates", "bookworm-security"} <= set(sources)
