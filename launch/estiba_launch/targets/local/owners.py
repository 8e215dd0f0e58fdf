"""Who root of a container is on this machine. It decides whose files must become whose before and after a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Owners:
    rootless: bool
    """The engine runs as an ordinary user, who is root in its containers."""
    container_root: str | None
    """UID:GID of root in containers under userns-remap. None where it is root here or, rootless, that user."""

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Owners:
        """From the answer of `docker info`."""
        names = {option.split(",")[0] for option in info.get("SecurityOptions") or ()}
        # Such an engine keeps its data in a folder of that name: /var/lib/docker/231072.231072.
        root = re.search(r"/(\d+)\.(\d+)/?$", info.get("DockerRootDir") or "")
        remapped = f"{root[1]}:{root[2]}" if "name=userns" in names and root else None
        return cls(rootless="name=rootless" in names, container_root=remapped)

    def user(self, uid: int, gid: int) -> str:
        """How a container names a user of this machine when it gives him files."""
        return "0:0" if self.rootless else f"{uid}:{gid}"
