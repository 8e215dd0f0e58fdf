"""The command and the environment of a user's script, as AWS's toolkit and version 3 of its SDK set them, and more.

What public scripts read besides: MASTER_ADDR and MASTER_PORT (with RANK and WORLD_SIZE unset, so that a plain gloo
script can set them), one network interface that exists, S3_ENDPOINT_URL for s5cmd. The request's own Environment wins.
Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.platform.contract import Job
from estiba.platform.hosts import RESOURCES
from estiba.platform.network import MASTER_PORT, interface_to, interfaces

logger = get_logger("estiba.platform.script_environment")
HOOKS = Path(__file__).parent / "hooks"
SOCKET_NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
TOOLKIT_LAUNCHERS = (
    "sagemaker_mpi_enabled",
    "sagemaker_distributed_dataparallel_enabled",
    "sagemaker_parameter_server_enabled",
)
"""Hyperparameters of the SDK's `distribution` that AWS's toolkit carries out, with mpirun and the like."""
TORCHRUN = ("sagemaker_torch_distributed_enabled", "sagemaker_pytorch_ddp_enabled")
TRUE = (True, "true", "True")
_FRAMEWORK_NAMES = ("sagemaker_program", "sagemaker_submit_directory", "sagemaker_region", "sagemaker_job_name",
                    "sagemaker_container_log_level", "sagemaker_enable_cloudwatch_metrics", "sagemaker_s3_output",
                    "default_user_module_name", "_tuning_objective_metric")  # fmt: skip
_STARTS_RANKS = re.compile(r"nproc[-_]per[-_]node|num[-_]processes|\bslots\b|\bnprocs\b|deepspeed\b.*num[-_]gpus")


@dataclass(frozen=True, kw_only=True)
class Script:
    """A user's script and the platform's files that describe its job."""

    root: Path
    program: str
    hyperparameters: Mapping[str, Any]
    """Decoded, as the script's flags and SM_HPS show them; names of the SDK included."""
    resources: Mapping[str, Any]
    inputs: Mapping[str, Any]
    main_address: str | None = None
    """Where another scheduler than SageMaker says that the first host is reached."""

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def hosts(self) -> list[str]:
        """In the file's order, which is that of the ranks."""
        return list(self.resources["hosts"])

    @property
    def current_host(self) -> str:
        return str(self.resources["current_host"])

    @property
    def master(self) -> str:
        """The host of rank 0: the first of the instance groups that the request distributes over, else of all hosts."""
        return self.main_address or (self._distribution_hosts() or self.hosts)[0]

    @property
    def own(self) -> dict[str, Any]:
        """The user's hyperparameters, without those that the SDK adds."""
        return {
            name: value
            for name, value in self.hyperparameters.items()
            if not name.startswith("sagemaker_") and name not in _FRAMEWORK_NAMES
        }

    @classmethod
    def read(cls, root: Path, environ: Mapping[str, str]) -> Script:
        """Read the files of input/config, which exist. Raises ConfigError."""
        config = root / "input/config"
        hyperparameters = {name: _decoded(value) for name, value in _read(config / "hyperparameters.json").items()}
        program = environ.get("SAGEMAKER_PROGRAM") or str(hyperparameters.get("sagemaker_program") or "")
        cluster = Job.read(environ).cluster
        return cls(
            main_address=None if cluster.source == RESOURCES else cluster.main_address,
            root=root,
            program=program,
            hyperparameters=hyperparameters,
            resources=_read(config / "resourceconfig.json"),
            inputs=_read(config / "inputdataconfig.json"),
        )

    def needs_toolkit(self) -> bool:
        return any(self.hyperparameters.get(name) in TRUE for name in TOOLKIT_LAUNCHERS)

    # --- the command -----------------------------------------------------------------------------------------------

    def command(self) -> tuple[str, ...]:
        """Return the command, for the code directory. Raises ConfigError if the script is not there."""
        path = (self.code / self.program).resolve()
        if not path.is_relative_to(self.code.resolve()):
            raise ConfigError(f"SAGEMAKER_PROGRAM={self.program}: outside the source folder; name a file in it")
        if not path.is_file():
            there = ", ".join(sorted(item.name for item in self.code.glob("*"))[:8]) or "no files"
            raise ConfigError(
                f"SAGEMAKER_PROGRAM={self.program}: not in {self.code}, which holds {there}; name one of them"
            )
        arguments = flags_of(self.own)
        if self.program.endswith(".py"):
            return (*self._torchrun(), self.program, *arguments)
        with path.open("rb") as file:
            first_line = file.readline(256)
        if first_line.endswith(b"\r\n"):
            raise ConfigError(f"{self.program}: has Windows line ends; run sed -i 's/\\r$//' {self.program}")
        with contextlib.suppress(OSError):  # a read-only or foreign folder
            path.chmod(0o777)  # as the toolkit does
        if first_line.startswith(b"#!") and os.access(path, os.X_OK):
            return (f"./{self.program}", *arguments)
        shell = shutil.which("bash") or "/bin/sh"
        return (shell, f"./{self.program}", *arguments)

    def _torchrun(self) -> tuple[str, ...]:
        """The SDK's `distribution={"torch_distributed": {"enabled": True}}` and `pytorchddp`."""
        if not any(self.hyperparameters.get(name) in TRUE for name in TORCHRUN):
            return (sys.executable,)
        return (
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(len(self.hosts)), "--node_rank", str(self.hosts.index(self.current_host))),
            *("--nproc_per_node", str(gpu_count() or 1), "--master_addr", self.master, "--master_port", MASTER_PORT),
        )

    # --- the environment -------------------------------------------------------------------------------------------

    def environment(self, environ: Mapping[str, str], *, stop_s: float) -> dict[str, str]:
        """Return the script's whole environment."""
        gpus = gpu_count()
        interface = self._interface()
        made = {
            **self._sagemaker(environ, gpus, interface),
            "CURRENT_HOST": self.current_host,
            "MASTER_ADDR": self.master,
            "MASTER_PORT": MASTER_PORT,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(stop_s)),
            "SAGEMAKER_REGION": environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "",
            "SAGEMAKER_JOB_NAME": environ.get("TRAINING_JOB_NAME") or "",
        }
        if endpoint := environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL"):
            made["S3_ENDPOINT_URL"] = endpoint  # the only name that s5cmd reads
        if len(self.hosts) > 1 and interface is not None:
            made |= dict.fromkeys(SOCKET_NAMES, interface)
        if any(Path("/sys/class/infiniband").glob("*")):
            made["FI_EFA_USE_HUGE_PAGE"] = "0"  # huge pages break a fork of data loaders
        given = {name: value for name, value in environ.items() if name not in RANK_NAMES}
        for name in SOCKET_NAMES:
            if name in given and name in made and not _names_interfaces(name, given[name]):
                logger.warning("%s=%s: no such interface on this host; using %s", name, given[name], made[name])
                del given[name]
        path = [str(HOOKS), str(self.code), *filter(None, [environ.get("PYTHONPATH")])]
        return {**made, **given, "PYTHONPATH": os.pathsep.join(path), "ESTIBA_GPU_COUNT": str(gpus)}

    def _interface(self) -> str | None:
        """The interface on the route to the other hosts. resourceconfig.json may name one that does not exist."""
        named = str(self.resources.get("network_interface_name") or "eth0")
        found = interface_to([host for host in self.hosts if host != self.current_host] or self.hosts)
        if len(self.hosts) > 1 and found is not None and found != named:
            logger.info("the other hosts are reached through %s, not through resourceconfig.json's %s", found, named)
            return found
        return named if named in interfaces() or found is None else found

    def _sagemaker(self, environ: Mapping[str, str], gpus: int, interface: str | None) -> dict[str, str]:
        root, resources = self.root, self.resources
        groups = {group["instance_group_name"]: group for group in resources.get("instance_groups") or []}
        group = resources.get("current_group_name") or "homogeneousCluster"
        channels = {name: str(root / "input/data" / name) for name in self.inputs}
        module_dir = str(self.hyperparameters.get("sagemaker_submit_directory") or self.code)
        framework = {
            name: value
            for name, value in self.hyperparameters.items()
            if name.startswith("sagemaker_") and name not in _FRAMEWORK_NAMES
        }
        shared: dict[str, Any] = {
            "hosts": self.hosts,
            "current_host": self.current_host,
            "current_instance_type": resources.get("current_instance_type") or "local",
            "current_instance_group": group,
            "current_instance_group_hosts": groups.get(group, {}).get("hosts", []),
            "instance_groups": list(groups),
            "instance_groups_dict": groups,
            "distribution_instance_groups": self._distribution_groups(),
            "is_hetero": len(groups) > 1,
            "network_interface_name": interface or "",
            "user_entry_point": self.program,
            "module_name": re.sub(r"\.py$", "", self.program),
            "module_dir": module_dir,
            "log_level": self.hyperparameters.get("sagemaker_container_log_level", 20),
            "framework_module": environ.get("SAGEMAKER_TRAINING_MODULE"),
            "resource_config": resources,
            "input_data_config": self.inputs,
            "input_dir": str(root / "input"),
            "input_config_dir": str(root / "input/config"),
            "output_dir": str(root / "output"),
            "output_data_dir": str(root / "output/data"),
            "output_intermediate_dir": str(root / "output/intermediate"),
            "model_dir": str(root / "model"),
            "num_cpus": len(os.sched_getaffinity(0)),
            "num_gpus": gpus,
            "num_neurons": _neuron_count(),
        }
        summary = {
            **shared,
            "additional_framework_parameters": framework,
            "channel_input_dirs": channels,
            "hyperparameters": self.own,
            "distribution_hosts": self._distribution_hosts(),
            "is_master": self.current_host == self.master,
            "is_modelparallel_enabled": None,
            "is_smddpmprun_installed": False,
            "is_smddprun_installed": False,
            "job_name": environ.get("TRAINING_JOB_NAME"),
            "master_hostname": self.master,
            "master_addr": self.master,
            "master_port": MASTER_PORT,
            "topology": resources.get("topology", []),
        }
        named = {
            **shared,
            "num_gpus": self._rank_count(gpus),
            "hps": self.own,
            "user_args": list(flags_of(self.own)),
            "framework_params": framework,
            "channels": sorted(channels),
            "training_env": summary,
            # Version 3 of the SDK:
            "master_addr": self.master,
            "master_port": MASTER_PORT,
            "host_count": len(self.hosts),
            "current_host_rank": self.hosts.index(self.current_host),
            "source_dir": str(self.code),
            "entry_script": self.program,
            "distributed_config": {},
            "input_data_dir": str(root / "input/data"),
            "output_failure": str(root / "output/failure"),
            **{f"channel_{name}": path for name, path in channels.items()},
            **{f"hp_{name}": value for name, value in self.own.items()},
        }
        return {f"SM_{name.upper()}": _text(value) for name, value in named.items()}

    def _distribution_groups(self) -> list[str]:
        if (named := self.hyperparameters.get("sagemaker_distribution_instance_groups")) is not None:
            return list(named)
        is_distributed = any(self.hyperparameters.get(name) in TRUE for name in (*TOOLKIT_LAUNCHERS, *TORCHRUN))
        return [self.resources.get("current_group_name") or "homogeneousCluster"] if is_distributed else []

    def _distribution_hosts(self) -> list[str]:
        groups = self.resources.get("instance_groups")
        if not groups:
            return self.hosts
        wanted = self._distribution_groups()
        return [host for group in groups if group["instance_group_name"] in wanted for host in group["hosts"]]

    def _rank_count(self, gpus: int) -> int:
        """SM_NUM_GPUS. Without a GPU 0, as the toolkit has it, since a script asks by it whether there is one.

        But 1 if a file of the source also starts that many ranks, such as `--nproc_per_node=$SM_NUM_GPUS`.
        """
        if gpus:
            return gpus
        for path in sorted(self.code.rglob("*")):
            if path.suffix in (".py", ".sh", ".bash", "") and path.is_file() and path.stat().st_size < 1_000_000:
                text = path.read_text(encoding="utf-8", errors="replace")
                if "SM_NUM_GPUS" in text and _STARTS_RANKS.search(text):
                    logger.info("SM_NUM_GPUS=1: this host has no GPU, and %s starts as many ranks", path.name)
                    return 1
        return 0


def flags_of(hyperparameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Return hyperparameters as flags, by name, as AWS's toolkit passes them."""
    words: list[str] = []
    for name, value in sorted(hyperparameters.items()):
        if isinstance(value, dict):
            value = ",".join(f"{key}={item}" for key, item in sorted(value.items()))
        words += [f"--{name}" if len(name) > 1 else f"-{name}", "" if value is None else str(value)]
    return tuple(words)


def gpu_count() -> int:
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def _neuron_count() -> int:
    if shutil.which("neuron-ls") is None:
        return 0
    try:
        done = subprocess.run(["neuron-ls", "-j"], capture_output=True, text=True, timeout=60, check=True)
        return sum(int(device["nc_count"]) for device in json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return 0


def _names_interfaces(name: str, value: str) -> bool:
    """Whether a setting that the user made can work. NCCL knows prefixes, lists, `=` and `^`; gloo takes names."""
    parts = [part for part in value.lstrip("^=").split(",") if part]
    if name == "NCCL_SOCKET_IFNAME":
        return value.startswith("^") or any(found.startswith(part) for part in parts for found in interfaces())
    return bool(parts) and all(part in interfaces() for part in value.split(","))


def _decoded(value: Any) -> Any:
    """Version 2 of AWS's SDK encodes values as JSON, version 3 does not."""
    try:
        return json.loads(value)
    except (ValueError, TypeError):
        return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); it must hold one JSON object") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, not an object")
    return value
