"""Containers of one image, and the `/opt/ml` tree of a job on this host."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import docker.errors
from docker.models.containers import Container

WAIT_S = 300.0
"""No container of these tests runs longer, even on a busy machine."""
AT_ONCE = 2
"""Containers that do real work at the same time."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
"""With tiny tensors, more threads only wait for each other."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """One job's `/opt/ml`, as it is mounted into its container. Any user can read it."""

    root: Path
    channels: Mapping[str, Path] = field(default_factory=dict)
    """Input folders by channel name, mounted read-only."""

    @property
    def config(self) -> Path:
        return self.root / "config"

    @property
    def output(self) -> Path:
        return self.root / "output"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def code(self) -> Path:
        """For script mode; mounted, writable as on SageMaker, only if it exists."""
        return self.root / "code"

    def make(self) -> Tree:
        for folder in (self.config, self.output, self.model, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    def write_config(
        self,
        *,
        hyperparameters: Mapping[str, str] | str | None = None,
        resources: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Tree:
        """Write the files of `input/config`; a string is written unchanged."""
        for name, value in (
            ("hyperparameters", hyperparameters),
            ("resourceconfig", resources),
            ("inputdataconfig", inputs),
        ):
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value)
                (self.config / f"{name}.json").write_text(text, encoding="utf-8")
        return self

    def binds(self) -> dict[str, dict[str, str]]:
        mounts = {
            self.config: ("/opt/ml/input/config", "ro"),
            self.output: ("/opt/ml/output", "rw"),
            self.model: ("/opt/ml/model", "rw"),
            self.checkpoints: ("/opt/ml/checkpoints", "rw"),
        }
        if self.code.is_dir():
            mounts[self.code] = ("/opt/ml/code", "rw")
        mounts |= {path: (f"/opt/ml/input/data/{name}", "ro") for name, path in self.channels.items()}
        return {str(path.resolve()): {"bind": bind, "mode": mode} for path, (bind, mode) in mounts.items()}

    @property
    def failure(self) -> str | None:
        """The failure file, which SageMaker shows, or None if there is none."""
        path = self.output / "failure"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def results(self, ignore: Sequence[str] = ()) -> dict[str, bytes]:
        """Every file that the job wrote, by its path. `ignore` holds name patterns of files that contain times."""
        contents = {}
        for folder in (self.output / "data", self.model):
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not any(path.match(pattern) for pattern in ignore):
                    contents[path.relative_to(self.root).as_posix()] = path.read_bytes()
        return contents

    def on_a_new_host(self, root: Path) -> Tree:
        """The tree after a spot interruption on SageMaker: only the checkpoints are restored."""
        tree = Tree(root=root, channels=self.channels).make()
        shutil.copytree(self.config, tree.config, dirs_exist_ok=True)
        shutil.copytree(self.checkpoints, tree.checkpoints, dirs_exist_ok=True, copy_function=shutil.copy)
        return tree


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A container that has ended."""

    code: int
    out: str
    err: str
    seconds: float
    """From start to end, as the engine reports it."""
    tree: Tree | None
    settings: Mapping[str, Any]
    """The engine's HostConfig."""

    @property
    def log(self) -> str:
        return self.out + self.err


class Running:
    """A started container."""

    def __init__(self, container: Container, tree: Tree | None) -> None:
        self.container = container
        self.tree = tree

    @property
    def is_running(self) -> bool:
        self.container.reload()
        return bool(self.container.status == "running")

    def log(self) -> str:
        text: bytes = self.container.logs()
        return text.decode("utf-8", "replace")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
        """Wait for `condition`. Fails if the container ends first."""
        started = checked = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now - checked > 1.0:
                checked = now
                assert self.is_running or condition(), f"ended before {what}; its log:\n{self.log()}"
                assert now - started < timeout_s, f"not {what} within {timeout_s:.0f} s; its log:\n{self.log()}"
            time.sleep(0.02)

    def wait_for_line(self, text: str) -> None:
        self.wait_until(lambda: text in self.log(), f"logging {text!r}")

    def signal(self, name: str) -> None:
        """`docker kill -s NAME`."""
        self.container.kill(signal=name)

    def stop(self, timeout_s: int = 30) -> float:
        """`docker stop -t`, as SageMaker does with 120. Returns the seconds it took."""
        started = time.monotonic()
        self.container.stop(timeout=timeout_s)
        return time.monotonic() - started

    def end(self, timeout_s: float = WAIT_S) -> Ended:
        """Wait for the end, then read the logs and the state."""
        code = int(self.container.wait(timeout=timeout_s)["StatusCode"])
        self.container.reload()
        state = self.container.attrs["State"]
        out: bytes = self.container.logs(stdout=True, stderr=False)
        err: bytes = self.container.logs(stdout=False, stderr=True)
        return Ended(
            code=code,
            out=out.decode("utf-8", "replace"),
            err=err.decode("utf-8", "replace"),
            seconds=_seconds_of(state["FinishedAt"]) - _seconds_of(state["StartedAt"]),
            tree=self.tree,
            settings={**self.container.attrs["HostConfig"]},
        )


class Image:
    """Starts containers of one image. They are removed when the session ends."""

    def __init__(self, client: docker.DockerClient, name: str, tag: str, label: str) -> None:
        self.client = client
        self.name = name
        self.reference = f"estiba/{name}:{tag}"
        self._label = label

    def start(
        self,
        command: Sequence[str] | None = None,
        *,
        tree: Tree | None = None,
        environment: Mapping[str, str] | None = None,
        volumes: Mapping[str, Mapping[str, str]] | None = None,
        network: str = "none",
        **options: Any,
    ) -> Running:
        """`docker run -d IMAGE [COMMAND]`. None sends no command, so that the image's own CMD is used."""
        run: Any = self.client.containers.run  # its types list every option of the engine
        container = run(
            self.reference,
            list(command) if command is not None else None,
            detach=True,
            environment={**ENVIRONMENT, **(environment or {})},
            labels={self._label: self.name},
            network_mode=network,
            volumes={**(tree.binds() if tree else {}), **(volumes or {})},
            **options,
        )
        return Running(container, tree)

    def run(self, command: Sequence[str] | None = None, **options: Any) -> Ended:
        """`docker run IMAGE [COMMAND]`, to the end."""
        return self.start(command, **options).end()

    def output_of(self, command: Sequence[str], **options: Any) -> str:
        """The output of a command in this image. It must succeed."""
        ended = self.run(command, **options)
        assert ended.code == 0, ended.log
        return ended.out


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make the calls, two at a time: a small job mostly loads libraries in one thread."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@contextmanager
def client_of_session(label: str) -> Iterator[docker.DockerClient]:
    """A connection to the engine; containers that carry `label` are removed at the end."""
    client = docker.from_env(timeout=int(WAIT_S) + 60)
    try:
        client.ping()
        yield client
    finally:
        for container in client.containers.list(all=True, filters={"label": label}, ignore_removed=True):
            try:
                container.remove(force=True)
            except docker.errors.NotFound:
                pass
        client.close()


def _seconds_of(stamp: str) -> float:
    """Parse the engine's time format, RFC 3339 with nanoseconds."""
    whole, _, fraction = stamp.removesuffix("Z").partition(".")
    return time.mktime(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{fraction or 0}")
