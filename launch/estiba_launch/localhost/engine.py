"""The Docker engine, as far as a job needs it: one network, N containers, their ends and their logs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest
from docker.types import Mount as BindMount

from ..contract import Host
from ..errors import HostError
from ..scripts import HostOptions
from ..variables import read_env_file
from .channels import Mount

JOB_LABEL = "estiba.job"
ATTEMPT_LABEL = "estiba.attempt"
HOST_LABEL = "estiba.host"


class EngineGone(HostError):
    """The engine does not answer; it may come back."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a container ended."""

    exit_code: int
    out_of_memory: bool


class Engine:
    """A connection that is made when it is first needed and again after it broke."""

    def __init__(self) -> None:
        self._client: docker.DockerClient | None = None

    @property
    def client(self) -> docker.DockerClient:
        if self._client is None:
            self._client = docker.from_env(timeout=60)
        return self._client

    def _ask(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except APIError as error:
            if isinstance(error, NotFound):
                raise
            raise HostError(f"{what}: docker refused ({error.explanation or error})") from error
        except (DockerException, requests.RequestException, OSError) as error:
            self._client = None
            raise EngineGone(f"{what}: no docker engine ({str(error)[:200]}); start it (`make engine`)") from error

    def ping(self) -> None:
        """Raise EngineGone when the engine does not answer."""
        self._ask("docker", lambda: self.client.ping())

    def ensure_image(self, image: str, say: Callable[[str], None] = lambda _: None) -> None:
        """Have the image here, pulling it when it is not. Raises HostError naming both ways to get it."""
        try:
            self._ask(image, lambda: self.client.images.get(image))
            return
        except (ImageNotFound, NotFound):
            say(f"{image}: not here, pulling")
        try:
            self._ask(image, lambda: self.client.images.pull(image))
        except EngineGone:
            raise
        except (HostError, NotFound) as error:
            reason = getattr(error, "explanation", None) or str(error)
            raise HostError(
                f"image {image}: not on this machine, and pulling it failed ({str(reason)[:200]}); "
                "build it (`make build`) or log in to its registry (`docker login`)"
            ) from error

    def network(self, job: str, *, isolated: bool) -> str:
        """The job's own network: hosts find each other by name, and with `isolated` nothing else."""
        name = f"estiba-{job}"
        found = self._ask(name, lambda: self.client.networks.list(names=[name]))
        if not any(network.name == name for network in found):
            labels = {JOB_LABEL: job}
            self._ask(
                name, lambda: self.client.networks.create(name, driver="bridge", internal=isolated, labels=labels)
            )
        return name

    def start(
        self,
        *,
        job: str,
        attempt: int,
        host: Host,
        image: str,
        entrypoint: str | None,
        arguments: list[str],
        environment: dict[str, str],
        mounts: list[Mount],
        network: str,
        options: HostOptions,
    ) -> str:
        """Start one host's container and return its id. Raises HostError."""
        for mount in mounts:
            mount.source.mkdir(parents=True, exist_ok=True)
        if options.env_file:
            environment = {**environment, **read_env_file(Path(options.env_file))}
        settings: dict[str, Any] = {
            "name": f"estiba-{job}-{host.name}-{attempt}",
            "hostname": host.name,
            "detach": True,
            "environment": environment,
            "labels": {JOB_LABEL: job, ATTEMPT_LABEL: str(attempt), HOST_LABEL: host.name},
            "mounts": [BindMount(m.target, str(m.source), type="bind", read_only=m.read_only) for m in mounts],
            "shm_size": options.shm_size,
        }
        if entrypoint:
            settings["entrypoint"] = [entrypoint]
        if options.memory:
            # The same for memory and swap: a host has no swap to hide in.
            settings.update(mem_limit=options.memory, memswap_limit=options.memory)
        if options.cpus:
            settings["nano_cpus"] = int(options.cpus * 1e9)
        if options.gpus:
            count = -1 if options.gpus == "all" else int(options.gpus)
            settings["device_requests"] = [DeviceRequest(count=count, capabilities=[["gpu"]])]
        what = f"host {host.name}"

        def create() -> str:
            endpoint = self.client.api.create_endpoint_config(aliases=[host.name])
            container = self.client.containers.create(
                image, arguments, network=network, networking_config={network: endpoint}, **settings
            )
            try:
                container.start()
            except APIError:
                container.remove(force=True)
                raise
            return str(container.id)

        try:
            return str(self._ask(what, create))
        except NotFound as error:
            raise HostError(f"{what}: {error.explanation or error}") from error

    def containers(self, job: str, attempt: int) -> dict[str, str]:
        """Host name to container id of an attempt, running or not."""
        labels = [f"{JOB_LABEL}={job}", f"{ATTEMPT_LABEL}={attempt}"]
        found = self._ask(job, lambda: self.client.containers.list(all=True, filters={"label": labels}))
        return {container.labels[HOST_LABEL]: str(container.id) for container in found}

    def end(self, container_id: str) -> End | None:
        """How a container ended, or None while it runs. One that is gone ended with 137."""
        try:
            state = self._ask(container_id[:12], lambda: self.client.api.inspect_container(container_id))["State"]
        except NotFound:
            return End(exit_code=137, out_of_memory=False)
        if state["Status"] not in ("exited", "dead"):
            return None
        return End(exit_code=int(state["ExitCode"]), out_of_memory=bool(state.get("OOMKilled")))

    def pid(self, container_id: str) -> int | None:
        """Process id of the container's first process if this process may signal it; None where it is not here."""
        try:
            state = self._ask(container_id[:12], lambda: self.client.api.inspect_container(container_id))["State"]
            pid = int(state["Pid"])
            # Docker Desktop's numbers are of another machine: one of the same number here is somebody else.
            mine = pid > 1 and container_id in Path(f"/proc/{pid}/cgroup").read_text("utf-8")
            if mine:
                os.kill(pid, 0)
        except (NotFound, OSError):
            return None
        return pid if mine else None

    def stop(self, container_ids: list[str], grace_s: int) -> None:
        """TERM to all at once, KILL to what is left after `grace_s`."""

        def one(container_id: str) -> None:
            try:
                self._ask(container_id[:12], lambda: self._get(container_id).stop(timeout=grace_s))
            except NotFound:
                # It ended and was removed meanwhile, which is what was wanted.
                return

        if container_ids:
            with ThreadPoolExecutor(len(container_ids)) as pool:
                list(pool.map(one, container_ids))

    def kill(self, container_ids: list[str]) -> None:
        """KILL without notice."""
        for container_id in container_ids:
            try:
                self._ask(container_id[:12], lambda one=container_id: self._get(one).kill())  # type: ignore[misc]
            except (NotFound, HostError) as error:
                # "is not running": it was faster.
                if isinstance(error, EngineGone):
                    raise

    def logs(self, container_id: str, since: float | None) -> Iterator[bytes]:
        """Output with timestamps, as it comes, until the container ends."""
        return self._ask(  # type: ignore[no-any-return]
            container_id[:12],
            lambda: self._get(container_id).logs(stream=True, follow=True, timestamps=True, since=since),
        )

    def remove(self, container_ids: list[str]) -> None:
        """Remove containers with their writable layers: what was not in a mount is gone."""
        for container_id in container_ids:
            try:
                self._ask(container_id[:12], lambda one=container_id: self._get(one).remove(force=True, v=True))  # type: ignore[misc]
            except NotFound:
                continue

    def remove_network(self, job: str) -> None:
        try:
            self._ask(job, lambda: self.client.networks.get(f"estiba-{job}").remove())
        except (NotFound, HostError):
            # Left behind with something still on it; the name is the job's own and harms nobody.
            return

    def own_files(self, folder: Path, image: str) -> None:
        """Hand the files that containers made as root to this user, so that they can be read and removed."""
        if os.geteuid() == 0:
            return
        self.change_owner(folder, image, f"{os.geteuid()}:{os.getegid()}")

    def change_owner(self, folder: Path, image: str, owner: str) -> None:
        """`chown -R owner folder`, done as root in a container of `image`."""
        mount = BindMount("/estiba-files", str(folder), type="bind")
        self._ask(
            str(folder),
            lambda: self.client.containers.run(
                image,
                ["-R", owner, "/estiba-files"],
                entrypoint=["chown"],
                mounts=[mount],
                network_mode="none",
                user="0",
                remove=True,
            ),
        )

    def _get(self, container_id: str) -> Container:
        return self.client.containers.get(container_id)
