"""Debian packages as folders of files: fetched by apt, checked by apt's signatures, unpacked without installing.

Uses the machine's own apt (any user, its own mirrors and lists), or a container's apt if the host has none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

APT_IMAGE = "estiba/base:local"
"""Image whose apt is used on hosts without one. If ESTIBA_APT_IMAGE names another, that one is used on any host."""


class PackageError(Exception):
    """A package could not be fetched or unpacked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Package:
    name: str
    version: str
    root: Path
    """The unpacked file tree, as it would be under /."""


def get_packages(names: Sequence[str], cache: Path) -> list[Package]:
    """Fetch and unpack `names` into `cache`; returns those that exist in the suite, in the given order.

    Packages already in the cache are used as they are, without a network. Raises PackageError if none can be fetched.
    """
    cache = cache.resolve()
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    tools = _Tools(cache)
    missing = [name for name in names if _cached(debs, name) is None]
    if missing:
        tools.download(missing, debs)
    available = [(name, deb) for name in names if (deb := _cached(debs, name)) is not None]
    if not available:
        raise PackageError(
            f"none of these packages is in this machine's apt suite: {', '.join(names)}; "
            "set ESTIBA_APT_IMAGE to a Debian image that has them"
        )
    return [_unpack(name, deb, cache / "unpacked", tools) for name, deb in available]


def _cached(debs: Path, name: str) -> Path | None:
    debs_of_name = sorted(debs.glob(f"{name}_*.deb"))
    return debs_of_name[-1] if debs_of_name else None


def _unpack(name: str, deb: Path, into: Path, tools: _Tools) -> Package:
    version = unquote(deb.name.split("_")[1])
    root = into / deb.stem
    if not root.is_dir():
        partial = into / f".{deb.stem}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        done = tools.run("dpkg-deb", "--extract", str(deb), str(partial))
        if done.returncode:
            deb.unlink()  # the next run must not find the bad file again
            raise PackageError(f"{deb.name} does not unpack: {_last_line(done)}; run again to fetch it again")
        partial.replace(root)
    return Package(name=name, version=version, root=root)


class _Tools:
    """apt-get and dpkg-deb, of the host or of a container that sees `cache` at the same path."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.prefix: list[str] = []
        image = os.environ.get("ESTIBA_APT_IMAGE")
        self.own_apt = image is None and all(shutil.which(tool) for tool in ("apt-get", "apt-cache", "dpkg-deb"))
        if not self.own_apt:
            if not shutil.which("docker"):
                raise PackageError("no apt-get and no docker; run this on Debian or Ubuntu, or `make engine`")
            user = f"{os.getuid()}:{os.getgid()}"
            self.prefix = ["docker", "run", "--rm", "--user", user, "-v", f"{cache}:{cache}", "-w", str(cache)]
            for name in ("http_proxy", "https_proxy", "no_proxy"):
                self.prefix += ["--env", name] if name in os.environ else []
            self.prefix += ["--entrypoint", "", image or APT_IMAGE]

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run with captured output. The caller checks the exit status."""
        if self.prefix and cwd is not None:
            command = ("sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *command)
        locale = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        return subprocess.run(
            [*self.prefix, *command], cwd=cwd, env=locale, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    def download(self, names: Sequence[str], debs: Path) -> None:
        """Fetch `names` into `debs`. Tries the machine's package lists, then fresh lists in the cache."""
        if self.own_apt and self._download(names, debs, options=[], complete=True) is None:
            return
        lists, archives = self.cache / "apt" / "lists", self.cache / "apt" / "archives"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        # Lists in the cache need no root and do not change the machine's.
        options = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={self.cache / 'apt'}"]
        update = self.run("apt-get", "--quiet", *options, "-o", "APT::Update::Error-Mode=any", "update")
        if update.returncode == 0 and not any(self._candidate(name, options) for name in names):
            return  # fresh lists prove that the suite has none of them
        problem = self._download(names, debs, options=options, complete=False)
        if problem is not None:
            hint = f" (apt-get update: {_last_line(update)})" if update.returncode else ""
            raise PackageError(
                f"apt cannot fetch {', '.join(names)}: {problem}{hint}; check the network and the machine's apt sources"
            )

    def _download(self, names: Sequence[str], debs: Path, *, options: list[str], complete: bool) -> str | None:
        """None on success, else the reason. With `complete`, a package that the lists lack is a reason too."""
        known = [name for name in names if self._candidate(name, options)]
        if not known or (complete and len(known) < len(names)):
            return f"the package lists do not have {', '.join(sorted(set(names) - set(known)))}"
        done = self.run("apt-get", "--quiet", *options, "-o", "APT::Sandbox::User=root", "download", *known, cwd=debs)
        return _last_line(done) if done.returncode else None

    def _candidate(self, name: str, options: list[str]) -> bool:
        shown = self.run("apt-cache", *options, "show", "--no-all-versions", name)
        return shown.returncode == 0 and "Filename:" in shown.stdout


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"
