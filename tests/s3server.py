"""A real S3 API server for tests: MiniStack in a subprocess on a free port.

    with s3_server() as s3:
        s3.make_bucket("estiba")
        subprocess.run([...], env={**os.environ, **s3.environ})

It answers ranges, multipart uploads, paginated listings and conditional writes (412 on If-None-Match and If-Match)
over HTTP, as S3 does. Where it is laxer than S3: signatures are not checked, and parts below 5 MiB are accepted.
With `persist` every ranged read loads the whole object from disk (about 0.6 ms a MiB), so large objects that are
read in ranges want `persist=False`, which keeps all bytes in memory and loses them at `stop`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REGION = "us-east-1"
START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 5.0

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(kw_only=True)
class S3Server:
    """One server process and where to reach it. Made by `s3_server`, which also ends it."""

    directory: Path
    """Holds the data (when persisted), the log and the server's temporary files."""
    host: str
    """Address the server listens on, and the one in `endpoint_url` unless that is a wildcard."""
    persist: bool
    """Objects are files under `directory` and survive `stop` and even SIGKILL."""
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def endpoint_url(self) -> str:
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://{host}:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """The standard variables that send boto3 and obstore here and keep any real credentials out."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": "estiba-local",
            "AWS_SECRET_ACCESS_KEY": "estiba-local-not-a-secret",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ALLOW_HTTP": "true",  # obstore refuses a plain http endpoint without it
            "NO_PROXY": "127.0.0.1,localhost",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self, *, attempts: int = 3) -> Any:
        """A boto3 S3 client for this server, whatever endpoint, credentials or proxy the environment names."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.environ["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environ["AWS_SECRET_ACCESS_KEY"],
            region_name=REGION,
            config=Config(proxies={}, retries={"total_max_attempts": attempts}),
        )

    def make_bucket(self, name: str) -> str:
        """Create the bucket if needed; return its URL, `s3://name`."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def start(self) -> None:
        """Start on `port` (0: a free one) and wait until it answers. RuntimeError with the log when it does not."""
        if self.process is not None and self.process.poll() is None:
            raise RuntimeError(f"the S3 server on port {self.port} is already running")
        fixed_port = self.port
        for _ in range(1 if fixed_port else 3):  # another process may take a free port before the server does
            self.port = fixed_port or _free_port(self.host)
            if self._start_once():
                return
        log = (self.directory / "server.log").read_text(errors="replace")[-2000:]
        self.kill()
        raise RuntimeError(f"the S3 server did not answer at {self.endpoint_url} in {START_DEADLINE_S:.0f} s:\n{log}")

    def _start_once(self) -> bool:
        environ = {
            **os.environ,
            "SERVICES": "s3",
            "BIND_HOST": self.host,
            "GATEWAY_PORT": str(self.port),
            "S3_PERSIST": "1" if self.persist else "0",
            "S3_DATA_DIR": str(self.directory / "data"),
            "TMPDIR": str(self.directory),
            "LOG_LEVEL": "WARNING",
            "MINISTACK_REGION": REGION,
            # At start and stop it sweeps containers of its own from any Docker it finds: let it find none.
            "DOCKER_HOST": f"unix://{self.directory}/no-docker.sock",
        }
        environ.pop("USE_SSL", None)
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ministack"], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._answers():
                return self.process.poll() is None
            time.sleep(0.03)
        return False

    def _answers(self) -> bool:
        try:
            with _direct.open(f"{self.endpoint_url}/_ministack/health", timeout=2) as reply:
                return bool(json.load(reply)["services"].get("s3") == "available")
        except (OSError, urllib.error.URLError, ValueError, KeyError):
            return False

    def stop(self) -> None:
        """End the server politely (TERM, then KILL): connections are refused from here on. Does nothing twice."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server with SIGKILL, as a machine that goes away."""
        self._end(signal.SIGKILL)

    def _end(self, signum: signal.Signals) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def restart(self) -> None:
        """Stop and start on the same port. Objects are kept with `persist`; unfinished multipart uploads never are."""
        self.stop()
        self.start()


@contextmanager
def s3_server(*, host: str = "127.0.0.1", persist: bool = True, directory: Path | None = None) -> Iterator[S3Server]:
    """Run an S3 server for the length of the block; `directory` (default: a temporary one) is kept if given.

    `host="0.0.0.0"` lets containers on a bridge network reach it at the host's address.
    """
    home = Path(tempfile.mkdtemp(prefix="estiba-s3-")) if directory is None else directory
    home.mkdir(parents=True, exist_ok=True)
    server = S3Server(directory=home, host=host, persist=persist)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        if directory is None:
            shutil.rmtree(home, ignore_errors=True)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
