"""The Docker engine, as far as a job needs it: one network, N containers, how they ended, and their logs."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import requests
from docker.errors import APIError, ContainerError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container as EngineContainer
from docker.types import DeviceRequest, IPAMConfig, IPAMPool
from docker.types import Mount as BindMount

from estiba_launch.errors import HostError, LaunchError
from estiba_launch.jobs.mirror import KeyRefused
from estiba_launch.request.options import HostOptions, gpus_here
from estiba_launch.request.variables import read_container_env
from estiba_launch.targets.docker_command import STOP_S, Container, network_of
from estiba_launch.targets.local.engine_address import current
from estiba_launch.targets.local.owners import Owners
from estiba_launch.targets.local.script import ATTEMPT_LABEL, HOST_LABEL, JOB_LABEL


class EngineGone(HostError):
    """The engine does not answer. It may come back."""

    transient = True


@dataclass(frozen=True, kw_only=True)
class End:
    """How a container ended."""

    exit_code: int
    out_of_memory: bool


class Engine:
    """A connection that opens on first use and reopens after a failure."""

    def __init__(self) -> None:
        self._client: docker.DockerClient | None = None
        self._addresses: dict[str, str] = {}
        """Container id to its fixed address, for a container that lost its network."""

    @property
    def client(self) -> docker.DockerClient:
        if self._client is None:
            self._client = current().connect(timeout_s=60)
        return self._client

    def _ask(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except APIError as error:
            if isinstance(error, NotFound):
                raise
            raise HostError(f"{what}: docker refused ({error.explanation or error})") from error
        except ContainerError as error:
            raise HostError(f"{what}: {str(error)[-300:]}") from error
        except (DockerException, requests.RequestException, OSError) as error:
            self._client = None
            raise EngineGone(
                f"{what}: no docker engine at {current()} ({str(error)[:200]}); start it (`make engine`)"
            ) from error

    def ping(self) -> None:
        """Raise EngineGone when the engine does not answer."""
        self._ask("docker", lambda: self.client.ping())

    def check_gpus(self, options: HostOptions) -> None:
        """Raise LaunchError when GPUs were asked for and containers cannot have them."""
        if not options.gpus:
            return
        here = gpus_here() if current().url.startswith("unix:") else None
        if here == 0:
            problem, remedy = (
                "this machine has no GPU (`nvidia-smi -L` lists none)",
                "leave the flag out to run on CPUs",
            )
        elif here and options.gpus != "all" and int(options.gpus) > here:
            problem, remedy = f"this machine has {here}", f"pass --gpus {here} or less"
        elif not self._supports_gpus():
            problem = "docker cannot give containers the GPU"
            remedy = "run `make engine` (it installs the NVIDIA container toolkit), or pass --gpus none"
        else:
            return
        raise LaunchError(f"--gpus {options.gpus}: {problem}; {remedy}, see `estiba doctor`")

    def _supports_gpus(self) -> bool:
        info = self._ask("docker", lambda: self.client.info())
        devices = [str(one.get("ID", "")) for one in info.get("DiscoveredDevices") or ()]
        return (
            "nvidia" in info.get("Runtimes", {})
            or any(one.startswith("nvidia.com/gpu") for one in devices)
            or bool(shutil.which("nvidia-container-runtime-hook"))
        )

    def ensure_image(self, image: str, report: Callable[[str], None] = lambda _: None) -> None:
        """Pull the image unless it is here. Raises HostError naming both ways to get it."""
        try:
            self._ask(image, lambda: self.client.images.get(image))
            return
        except (ImageNotFound, NotFound):
            report(f"{image}: not here, pulling")
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

    def image_id(self, image: str) -> str:
        """The content that the image's name stands for now. Raises HostError."""
        return str(self._ask(image, lambda: self.client.images.get(image)).id)

    def network(self, job: str, *, isolated: bool, hosts: Sequence[str]) -> dict[str, str]:
        """Make the job's own network: hosts find each other by name, and with `isolated` reach nothing else.

        Returns the fixed address of each host of a cluster.
        """
        name = network_of(job)
        self.remove_network(job)

        def make(**more: Any) -> Any:
            labels = {JOB_LABEL: job}
            return self.client.networks.create(name, driver="bridge", internal=isolated, labels=labels, **more)

        if not self._ask(name, lambda: self.client.networks.list(names=[name])):
            self._ask(name, make)
        if len(hosts) == 1:
            return {}
        network = self._ask(name, lambda: self.client.networks.get(name))
        config = network.attrs["IPAM"]["Config"][0]
        # Docker fixes addresses only in an explicit subnet, so request the one that it chose.
        self._ask(name, network.remove)
        pool = IPAMConfig(pool_configs=[IPAMPool(subnet=config["Subnet"])])
        self._ask(name, lambda: make(ipam=pool))
        first = ipaddress.ip_network(config["Subnet"]).network_address
        return {host: str(first + number) for number, host in enumerate(hosts, 2)}

    def start(self, container: Container) -> str:
        """Start one host's container and return its id. Raises HostError."""
        for mount in container.mounts:
            mount.source.mkdir(parents=True, exist_ok=True)
        options, what = container.options, f"host {container.host.name}"
        environment = container.environment
        if options.env_file:
            try:
                environment = {**read_container_env(Path(options.env_file)), **environment}
            except LaunchError as error:
                raise HostError(str(error)) from None
        limits: dict[str, Any] = {}
        if options.memory:
            # The same limit for memory and swap: a host has no swap.
            limits.update(mem_limit=options.memory, memswap_limit=options.memory)
        if options.cpus:
            limits["nano_cpus"] = int(options.cpus * 1e9)
        if options.gpus:
            count = -1 if options.gpus == "all" else int(options.gpus)
            limits["device_requests"] = [DeviceRequest(count=count, capabilities=[["gpu"]])]

        def create() -> str:
            api = self.client.api
            own = container.addresses.get(container.host.name)
            peers = {name: address for name, address in container.addresses.items() if name != container.host.name}
            endpoint = api.create_endpoint_config(aliases=[container.host.name], ipv4_address=own)
            created = api.create_container(
                container.image,
                container.arguments,
                name=container.name,
                hostname=container.host.name,
                entrypoint=[container.entrypoint] if container.entrypoint else None,
                environment=environment,
                labels=container.labels,
                stop_timeout=STOP_S,
                detach=True,
                networking_config=api.create_networking_config({container.network: endpoint}),  # type: ignore[arg-type]
                host_config=api.create_host_config(
                    network_mode=container.network,
                    extra_hosts=peers,
                    shm_size=options.shm_size,
                    mounts=[BindMount(m.target, str(m.source), "bind", m.read_only) for m in container.mounts],
                    **limits,
                ),
            )
            try:
                api.start(created["Id"])
            except APIError:
                api.remove_container(created["Id"], v=True, force=True)
                raise
            if own:
                self._addresses[created["Id"]] = own
            return str(created["Id"])

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
        """How a container ended, or None while it runs. A container that no longer exists ended with 137."""
        try:
            state = self._state(container_id)
        except NotFound:
            return End(exit_code=137, out_of_memory=False)
        if state["Status"] not in ("exited", "dead"):
            return None
        return End(exit_code=int(state["ExitCode"]), out_of_memory=bool(state.get("OOMKilled")))

    def pause(self, container_id: str) -> None:
        """Hold all processes of a container where they are. Raises HostError where the engine cannot."""
        self._ask(container_id[:12], lambda: self.client.api.pause(container_id))

    def unpause(self, container_id: str) -> None:
        # Refused for a container that ended before it was paused.
        with contextlib.suppress(NotFound, HostError):
            self._ask(container_id[:12], lambda: self.client.api.unpause(container_id))

    def disconnect(self, container_id: str, job: str) -> None:
        """Take a container's network away. Raises HostError."""
        name = network_of(job)
        self._ask(name, lambda: self.client.networks.get(name).disconnect(container_id))

    def connect(self, container_id: str, job: str, host: str) -> None:
        """Give it back, with the same address and name."""
        name = network_of(job)
        address = self._addresses.get(container_id)
        self._ask(
            name, lambda: self.client.networks.get(name).connect(container_id, aliases=[host], ipv4_address=address)
        )

    def stop(self, container_ids: list[str], grace_s: int) -> None:
        """TERM to all at once, KILL to those left after `grace_s`."""

        def stop_one(container_id: str) -> None:
            # Not found: it ended and was removed meanwhile.
            with contextlib.suppress(NotFound):
                self._with(container_id, lambda container: container.stop(timeout=grace_s))

        if container_ids:
            with ThreadPoolExecutor(len(container_ids)) as pool:
                list(pool.map(stop_one, container_ids))

    def kill(self, container_ids: list[str]) -> None:
        """KILL without notice."""
        for container_id in container_ids:
            try:
                self._with(container_id, lambda container: container.kill())
            except (NotFound, HostError) as error:
                # "is not running": it ended by itself.
                if isinstance(error, EngineGone):
                    raise

    def logs(self, container_id: str, since: float | None) -> Iterator[bytes]:
        """Follow the output, with timestamps, until the container ends."""
        return self._with(  # type: ignore[no-any-return]
            container_id, lambda container: container.logs(stream=True, follow=True, timestamps=True, since=since)
        )

    def attach(self, container_id: str) -> Iterator[bytes]:
        """Follow the output from now on as it is written, unfinished lines too, until the container ends."""
        return self._with(container_id, lambda container: container.attach(stream=True))  # type: ignore[no-any-return]

    def remove(self, container_ids: list[str]) -> None:
        """Remove containers with their writable layers: files outside the mounts are lost."""
        for container_id in container_ids:
            with contextlib.suppress(NotFound):
                self._with(container_id, lambda container: container.remove(force=True, v=True))

    def remove_network(self, job: str) -> None:
        # Refused while a container is attached. The name is the job's own, so nothing else is affected.
        with contextlib.suppress(NotFound, HostError):
            self._ask(job, lambda: self.client.networks.get(network_of(job)).remove())

    def own_files(self, folder: Path, image: str) -> None:
        """Give this user the files that containers made as root, so that it can read and remove them."""
        if os.geteuid() != 0:
            self.change_owner(folder, image, self._owners().user(os.geteuid(), os.getegid()))

    def give_files(self, folder: Path, image: str) -> None:
        """Let containers write to a folder that this user made, where their root is not the machine's."""
        owner = self._owners().container_root
        if owner:
            self.change_owner(folder, image, owner)

    def change_owner(self, folder: Path, image: str, owner: str) -> None:
        """`chown -R owner folder`, done as root in a container of `image`."""
        mount = BindMount("/estiba-files", str(folder), type="bind")
        # Root of a remapped container may give nothing to others, so this one is not remapped.
        userns = "host" if self._owners().container_root else ""
        self._ask(
            str(folder),
            lambda: self.client.containers.run(
                image,
                ["-R", owner, "/estiba-files"],
                entrypoint=["chown"],
                mounts=[mount],
                network_mode="none",
                user="0",
                userns_mode=userns,
                remove=True,
            ),
        )

    def _owners(self) -> Owners:
        return Owners.of(self._ask("docker", lambda: self.client.info()))

    def execute(self, container_id: str, words: list[str]) -> bytes:
        """What a command prints that runs as root in a running container. Raises HostError unless it ends with 0."""
        code, output = self._files(
            container_id, lambda container: container.exec_run(words, user="0", demux=True, workdir="/")
        )
        if code:
            raise KeyRefused(
                f"{' '.join(words[:2])}: {(output[1] or output[0] or b'').decode('utf-8', 'replace')[:200]}"
            )
        return output[0] or b""

    def archive(self, container_id: str, path: str) -> Iterator[bytes]:
        """A tar stream of one path of a container, running or not."""
        return self._files(container_id, lambda container: container.get_archive(path))[0]  # type: ignore[no-any-return]

    def _files(self, container_id: str, call: Callable[[EngineContainer], Any]) -> Any:
        try:
            return self._with(container_id, call)
        except EngineGone:
            raise
        except (NotFound, HostError) as error:
            raise KeyRefused(f"not read through the container ({error})") from error

    def _state(self, container_id: str) -> dict[str, Any]:
        found = self._ask(container_id[:12], lambda: self.client.api.inspect_container(container_id))
        return found["State"]  # type: ignore[no-any-return]

    def _with(self, container_id: str, call: Callable[[EngineContainer], Any]) -> Any:
        """Call a method of the container. Raises NotFound when it no longer exists."""
        return self._ask(container_id[:12], lambda: call(self.client.containers.get(container_id)))
