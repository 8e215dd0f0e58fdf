"""The hosts of a job, wherever it runs: SageMaker, torchrun, Slurm, Kubernetes, AWS Batch.

The first of these that applies counts:

    SageMaker     resourceconfig.json, unless PID 1 wrote it itself because the platform had not
    torchrun      GROUP_RANK and GROUP_WORLD_SIZE of a worker, or PET_NODE_RANK and PET_NNODES (Kubeflow)
    Slurm         a process that `srun` started: SLURM_NODEID in SLURM_STEP_NODELIST
    Kubernetes    an Indexed Job or JobSet: JOB_COMPLETION_INDEX, and ESTIBA_HOST_COUNT from the manifest
    AWS Batch     a multi-node parallel job: AWS_BATCH_JOB_NODE_INDEX and AWS_BATCH_JOB_NUM_NODES

Nothing of these is one host. torchrun stands before Slurm because it may run on one node of a larger allocation. A
batch script of Slurm that does not use `srun` runs on one node only, so it counts as one host. Standard library only.
"""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from estiba.errors import ConfigError

RESOURCES = "resourceconfig.json"
WRITTEN_BY_US = "estiba"
"""`written_by` in a resourceconfig.json that PID 1 wrote for a container that had none. The next container in the same
directory must not read it."""
JOB_NAMES = ("ESTIBA_JOB_TOKEN", "TRAINING_JOB_ARN", "TRAINING_JOB_NAME", "AWS_BATCH_JOB_ID", "PET_RDZV_ID")
"""Variables of which one tells this job from others on its network."""
MAX_HOSTS = 65_536
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """All hosts of a job in the order of their ranks, and which one this is."""

    names: tuple[str, ...] = ("algo-1",)
    index: int = 0
    main_address: str | None = None
    """Name or address at which the others reach the first host; None where that is not known or nobody asks."""
    are_names_reachable: bool = True
    """False where a scheduler tells only the main host's address, and the other names are made up."""
    source: str = "one host"
    """Who named the hosts, for messages."""

    @property
    def current(self) -> str:
        return self.names[self.index]

    @property
    def resolvable(self) -> tuple[str, ...]:
        """What the name service must know before the hosts can talk."""
        if self.main_address is None:
            return ()
        return self.names if self.are_names_reachable else (self.main_address,)


def find_hosts(environ: Mapping[str, str], resources: Mapping[str, Any], path: object) -> Hosts:
    """Return the job's hosts. `resources` is the content of the resourceconfig.json at `path`.

    Raises ConfigError with the contradiction.
    """
    if resources.get("hosts") and resources.get("written_by") != WRITTEN_BY_US:
        return _of_sagemaker(environ, resources, path)
    for find in (_of_torchrun, _of_slurm, _of_kubernetes, _of_batch):
        if (found := find(environ)) is not None:
            return found
    return Hosts()


def _of_sagemaker(environ: Mapping[str, str], resources: Mapping[str, Any], path: object) -> Hosts:
    names = resources["hosts"]
    if not isinstance(names, list) or not all(isinstance(host, str) for host in names):
        raise ConfigError(f'{path}: hosts is {names!r}; it must be a list, such as ["algo-1"]')
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: hosts is {names!r}, which names a host twice; list each host once")
    first = min(names, key=host_order)
    current = str(resources.get("current_host") or environ.get("CURRENT_HOST") or first)
    if current not in names:
        raise ConfigError(
            f"{path}: current_host is {current!r}, which is not one of its hosts {sorted(names, key=host_order)}; "
            "the two must agree"
        )
    # The toolkit resolves the name of a host that is alone, too.
    return Hosts(names=tuple(names), index=names.index(current), main_address=names[0], source=RESOURCES)


def _of_torchrun(environ: Mapping[str, str]) -> Hosts | None:
    names = ("GROUP_RANK", "GROUP_WORLD_SIZE")
    if not all(map(environ.get, names)):
        names = ("PET_NODE_RANK", "PET_NNODES")
        # MIN:MAX is an elastic job, whose workers have the first two variables.
        if not all(map(environ.get, names)) or ":" in environ["PET_NNODES"]:
            return None
    index, count = (_number(environ, name) for name in names)
    if count == 1:
        return Hosts(source="torchrun")
    endpoint = environ.get("PET_RDZV_ENDPOINT", "").rpartition(":")[0].strip("[]")
    main = environ.get("MASTER_ADDR") or environ.get("PET_MASTER_ADDR") or endpoint or None
    return _numbered(index, count, main=main, source="torchrun", wrong=names)


def _of_slurm(environ: Mapping[str, str]) -> Hosts | None:
    nodes = environ.get("SLURM_STEP_NODELIST")
    if nodes is None and "SLURM_TASK_PID" not in environ:
        # Handed into the container by name. With SLURM_TASK_PID it is the whole environment of a batch script.
        nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not nodes or not environ.get("SLURM_NODEID"):
        return None
    names = expand_nodes(nodes)
    index = _number(environ, "SLURM_NODEID")
    if index >= len(names):
        raise ConfigError(
            f"SLURM_NODEID is {index}, and the node list {nodes!r} has {len(names)}; pass SLURM_STEP_NODELIST of the "
            "same job step into the container"
        )
    return _hosts(names, index, source="Slurm")


def _of_kubernetes(environ: Mapping[str, str]) -> Hosts | None:
    if not environ.get("JOB_COMPLETION_INDEX"):
        return None
    index = _number(environ, "JOB_COMPLETION_INDEX")
    if not environ.get("ESTIBA_HOST_COUNT"):
        raise ConfigError(
            f"JOB_COMPLETION_INDEX is {index}, and Kubernetes tells no pod how many there are; set ESTIBA_HOST_COUNT "
            "to the Job's completions in the pod's env (1 if each pod does a whole job of its own)"
        )
    count = _number(environ, "ESTIBA_HOST_COUNT")
    if count == 1:
        return Hosts(source="Kubernetes")
    host, _, domain = (environ.get("HOSTNAME") or socket.gethostname()).partition(".")
    domain = environ.get("ESTIBA_HOST_SERVICE") or domain or socket.getfqdn(host).partition(".")[2]
    stem, dash, number = host.rpartition("-")
    if not dash or number != str(index):
        raise ConfigError(
            f"this pod's host name is {host!r}; in an Indexed Job it ends with -{index}, from JOB_COMPLETION_INDEX. "
            "Set completionMode: Indexed, and no hostname or hostNetwork in the pod"
        )
    suffix = f".{domain}" if domain else ""
    if index >= count:
        _outside(("JOB_COMPLETION_INDEX", "ESTIBA_HOST_COUNT"), index, count)
    return _hosts([f"{stem}-{one}{suffix}" for one in range(count)], index, source="Kubernetes")


def _of_batch(environ: Mapping[str, str]) -> Hosts | None:
    names = ("AWS_BATCH_JOB_NODE_INDEX", "AWS_BATCH_JOB_NUM_NODES")
    if not all(map(environ.get, names)):
        return None
    index, count = (_number(environ, name) for name in names)
    if count == 1:
        return Hosts(source="AWS Batch")
    main_index = _number(environ, "AWS_BATCH_JOB_MAIN_NODE_INDEX") if "AWS_BATCH_JOB_MAIN_NODE_INDEX" in environ else 0
    if main_index >= count:
        _outside(("AWS_BATCH_JOB_MAIN_NODE_INDEX", names[1]), main_index, count)
    # The main node is told nothing of the others. They are told its address, which it finds itself.
    main = environ.get("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS")
    main = main or (_own_address() if index == main_index else None)
    # Swapped, so that the main node has rank 0 and each rank stays one node's.
    rank = {main_index: 0, 0: main_index}.get(index, index)
    return _numbered(rank, count, main=main, source="AWS Batch", wrong=names)


def token_of(environ: Mapping[str, str], hosts: Sequence[str]) -> str:
    """Return what tells this job from others on its network: the same on all of its hosts.

    A static torchrun has no name. Two of them on the same hosts have different ports.
    """
    variable = next(filter(environ.get, JOB_NAMES), "")
    name = environ.get(variable, "")
    if variable == "AWS_BATCH_JOB_ID":
        name = name.partition("#")[0]  # `#` and the node
    elif not variable:
        name = environ.get("MASTER_PORT") or environ.get("PET_MASTER_PORT", "")
    return hashlib.sha256("\n".join([name, *sorted(hosts)]).encode()).hexdigest()


def expand_nodes(text: str) -> list[str]:
    """Return the names in a node list of Slurm: `gpu[01-03,07],login1` is gpu01, gpu02, gpu03, gpu07, login1.

    Raises ConfigError for what Slurm would not write.
    """
    names: list[str] = []
    for part in re.split(r",(?![^\[]*\])", text.strip()):
        expanded = [""]
        for piece in re.split(r"(\[[^\[\]]*\])", part.strip()):
            choices = _numbers(piece[1:-1], text) if piece.startswith("[") else [piece]
            expanded = [before + choice for before in expanded for choice in choices]
            if len(names) + len(expanded) > MAX_HOSTS:
                _not_a_list(text)
        names += expanded
    if not all(re.fullmatch(r"[^\s\[\],]+", name) for name in names) or len(set(names)) < len(names):
        _not_a_list(text)
    return names


def _numbers(text: str, whole: str) -> list[str]:
    """`01-03,07` -> 01, 02, 03, 07. The first number of a range gives the width."""
    found: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            _not_a_list(whole)
        first, last = match[1], match[2] or match[1]
        if not int(first) <= int(last) < int(first) + MAX_HOSTS:
            _not_a_list(whole)
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def _not_a_list(text: str) -> NoReturn:
    raise ConfigError(f"{text[:200]!r} is not a node list of Slurm; it must look like gpu[01-03,07]")


def host_order(host: str) -> tuple[str, int, str]:
    """Key that sorts names by the number at their end: algo-2 before algo-10."""
    stem = host.rstrip("0123456789")
    digits = host[len(stem) :]
    return (stem, int(digits) if digits else -1, host)


def _hosts(names: Sequence[str], index: int, *, source: str) -> Hosts:
    main = names[0] if len(names) > 1 else None
    return Hosts(names=tuple(names), index=index, main_address=main, source=source)


def _numbered(index: int, count: int, *, main: str | None, source: str, wrong: tuple[str, str]) -> Hosts:
    if index >= count:
        _outside(wrong, index, count)
    names = tuple(f"node-{number}" for number in range(count))
    return Hosts(names=names, index=index, main_address=main, are_names_reachable=False, source=source)


def _outside(names: tuple[str, str], index: int, count: int) -> NoReturn:
    raise ConfigError(f"{names[0]} is {index} and {names[1]} is {count}; the first must be from 0 to {count - 1}")


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name].strip()
    if not text.isascii() or not text.isdigit() or (name.endswith(("COUNT", "NODES", "SIZE")) and int(text) < 1):
        raise ConfigError(f"{name} is {text!r}; it must be a whole number, as the scheduler sets it")
    return int(text)


def _own_address() -> str | None:
    """The address of this host on the network that it has."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
