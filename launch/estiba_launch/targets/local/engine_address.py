"""Which Docker engine runs local jobs: the one that the `docker` command of the same shell uses."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estiba_launch.errors import LaunchError

if TYPE_CHECKING:
    import docker

DEFAULT_URL = "unix:///var/run/docker.sock"
VARIABLES = ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")
"""What selects the engine. A job records them, so that all its supervisors use the same one."""


@dataclass(frozen=True, kw_only=True)
class EngineAddress:
    url: str
    chosen_by: str
    """DOCKER_HOST, or the context."""
    tls_folder: Path | None = None
    """Certificates of a context."""
    verify: bool = True

    def __str__(self) -> str:
        return f"{self.url} ({self.chosen_by})"

    def connect(self, timeout_s: int) -> docker.DockerClient:
        """A client of this engine. Raises DockerException when it does not answer."""
        import docker
        from docker.tls import TLSConfig

        if self.tls_folder is not None:
            ca, certificate, key = (str(self.tls_folder / f"{name}.pem") for name in ("ca", "cert", "key"))
            tls = TLSConfig(client_cert=(certificate, key), ca_cert=ca, verify=self.verify)
            return docker.DockerClient(base_url=self.url, tls=tls, timeout=timeout_s)
        # With DOCKER_HOST the library reads its TLS variables too.
        return docker.from_env(timeout=timeout_s, environment={**os.environ, "DOCKER_HOST": self.url})


def current(environ: Mapping[str, str] = os.environ) -> EngineAddress:
    """The engine that `docker` uses: DOCKER_HOST, else DOCKER_CONTEXT, else the current context.

    Raises LaunchError for a context that does not exist, and for an engine that is reached over ssh.
    """
    if host := environ.get("DOCKER_HOST"):
        return _refuse_remote(EngineAddress(url=host, chosen_by="DOCKER_HOST"))
    folder = Path(environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    name = environ.get("DOCKER_CONTEXT") or str(_read(folder / "config.json").get("currentContext") or "default")
    if name == "default":
        return EngineAddress(url=DEFAULT_URL, chosen_by="context default")
    tag = hashlib.sha256(name.encode()).hexdigest()
    endpoint = _read(folder / "contexts/meta" / tag / "meta.json").get("Endpoints", {}).get("docker")
    if endpoint is None:
        remedy = "`docker context ls` lists all; unset DOCKER_CONTEXT, or run `docker context use default`"
        raise LaunchError(f"docker context {name!r}: not found below {folder}; {remedy}")
    tls = folder / "contexts/tls" / tag / "docker"
    found = EngineAddress(
        url=endpoint.get("Host") or DEFAULT_URL,
        chosen_by=f"context {name}",
        tls_folder=tls if tls.is_dir() else None,
        verify=not endpoint.get("SkipTLSVerify", False),
    )
    return _refuse_remote(found)


def _refuse_remote(found: EngineAddress) -> EngineAddress:
    if found.url.startswith("ssh://"):
        raise LaunchError(
            f"docker engine {found}: on another machine, where this one's folders cannot be mounted; "
            f"use --target {found.url}, or `docker context use default` (and unset DOCKER_HOST)"
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    """A Docker configuration file. As for `docker`, a missing or broken one counts as empty."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def pinned(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that select the current engine in any later process, whatever its context."""
    found = current(environ)
    kept = {name: environ[name] for name in VARIABLES if name in environ}
    if found.tls_folder is not None:
        return {**kept, "DOCKER_CONTEXT": found.chosen_by.removeprefix("context ")}
    return {**kept, "DOCKER_HOST": found.url}
