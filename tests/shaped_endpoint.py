"""The slow, counting S3 endpoint of benchmarks/endpoint/shaped_s3.py, for what measures what leaves S3."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "benchmarks/endpoint/shaped_s3.py"


@dataclass(frozen=True)
class ShapedEndpoint:
    folder: Path
    """Holds BUCKET/KEY."""
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "S3_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "estiba-local",
            "AWS_SECRET_ACCESS_KEY": "estiba-local-not-a-secret",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def sent_bytes(self) -> int:
        """Return the bytes of objects that were sent so far."""
        return sum(int(line.rsplit(" ", 1)[1]) for line in self.log.read_text().splitlines() if line.startswith('"GET'))


@contextmanager
def shaped_endpoint(folder: Path, log: Path, *options: str) -> Iterator[ShapedEndpoint]:
    """Serve `folder` for the length of the block. `options` are those of the program, such as --mb-per-s 5."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, PROGRAM, folder, "--port", str(port), *options], stdout=output)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield ShapedEndpoint(folder, port, log)
    finally:
        process.kill()
        process.wait()
