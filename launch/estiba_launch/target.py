"""Where a job runs: `local`, `sagemaker`, or `ssh://user@host[:port]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from .errors import LaunchError

# Members of the request that only SageMaker reads: other targets neither need them nor expand their variables.
SAGEMAKER_ONLY = ("RoleArn", "VpcConfig", "Tags", "ExperimentConfig", "MlflowConfig", "ModelPackageConfig")


@dataclass(frozen=True)
class Target:
    """One parsed `--target`."""

    kind: str
    """`local`, `sagemaker` or `ssh`."""
    user: str | None = None
    host: str | None = None
    port: int = 22

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `--target`. Raises LaunchError when it is none of the three forms."""
        if text in ("local", "sagemaker"):
            return cls(text)
        try:
            parts = urlsplit(text)
            port = parts.port or 22
        except ValueError:
            parts, port = urlsplit(""), 0
        name = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
        # Anchored, because both reach a shell: `ssh -oProxyCommand=...` must not be a host name.
        good_host = re.fullmatch(rf"{name}|[0-9a-fA-F:]+", parts.hostname or "")
        good_user = parts.username is None or re.fullmatch(name, parts.username)
        if parts.scheme != "ssh" or not good_host or not good_user or parts.password or parts.path.strip("/"):
            raise LaunchError(f"--target {text!r}: unknown; use local, sagemaker or ssh://user@host[:port]")
        return cls("ssh", parts.username, parts.hostname, port)

    @property
    def is_sagemaker(self) -> bool:
        return self.kind == "sagemaker"

    def __str__(self) -> str:
        if self.kind != "ssh":
            return self.kind
        return f"ssh://{self.user + '@' if self.user else ''}{self.host}{f':{self.port}' if self.port != 22 else ''}"
