"""The manifest of a job: a ConfigMap with its input files, a headless service, and an Indexed Job with a pod a host.

Sources: kubernetes.io, "Indexed Job for Parallel Processing", "Job with Pod-to-Pod Communication", "Pod failure
policy", "Sidecar Containers" (one with restartPolicy Always among the initContainers, since 1.29).
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import contract
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.variables import ENV_LINES
from estiba_launch.targets.docker_command import STOP_S
from estiba_launch.targets.k8s import copies
from estiba_launch.targets.k8s.text import Block, dump, literal
from estiba_launch.targets.printed import gpus_per_host, instance_type

LAST_COPY_S = 3600
"""Most seconds that results may take to S3 after the job has ended. The job's own grace period stays as it is."""
MAX_NAME_CHARS = 63
INTERRUPTED = (75, 143)
"""A host that lost another one, and one that was stopped, after it had saved what it could."""
INVALID = 2


def render(job: JobFile, options: SubmitOptions) -> str:
    """The manifest as text. Raises LaunchError for a request that it cannot express."""
    name = object_name(job.name, len(contract.hosts(job.request)))
    text = dump(documents(job, options))
    lines = [f"# {job.name} on Kubernetes: `kubectl apply -f` this, then `kubectl logs -f --prefix -l {_label(name)}`."]
    if options.host.env_file:
        lines += _secret(f"{name}-env", options.host.env_file)
    return "\n".join([*lines, text])


def documents(job: JobFile, options: SubmitOptions) -> list[dict[str, Any]]:
    request = job.request
    cluster = contract.hosts(request)
    name = object_name(job.name, len(cluster))
    files = contract.config_files(request, cluster[0], options.host.encoding)
    # Every pod finds its hosts in the Job's own variables; this file would be another one on each.
    del files["resourceconfig.json"]
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "estiba"}
    found = [
        _object("v1", "ConfigMap", name, labels, data={file: Block(text) for file, text in files.items()}),
    ]
    if len(cluster) > 1:
        service = {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": name},
        }
        found.append(_object("v1", "Service", name, labels, spec=service))
    found.append(_object("batch/v1", "Job", name, labels, spec=_job(name, job, options)))
    return found


def object_name(job: str, hosts: int) -> str:
    """The job's name as a name of a service, whose pods `NAME-INDEX` still are host names."""
    text = re.sub(r"[^a-z0-9]+", "-", job.lower()).strip("-")
    text = text if text[:1].isalpha() else f"job-{text}"
    room = MAX_NAME_CHARS - len(f"-{hosts - 1}")
    if len(text) > room:
        text = f"{text[: room - 9].rstrip('-')}-{hashlib.sha256(job.encode()).hexdigest()[:8]}"
    return text


def _object(version: str, kind: str, name: str, labels: Mapping[str, str], **content: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": dict(labels)}, **content}


def _label(name: str) -> str:
    return f"batch.kubernetes.io/job-name={name}"


def _secret(name: str, env_file: str) -> Iterator[str]:
    """Comments with the shell that makes the Secret. kubectl itself keeps quotes and comments in the values."""
    if not env_file.isprintable():
        raise LaunchError(f"--env-file {env_file!r}: a comment cannot show a line break in its name; rename the file")
    yield "# Its pods take their secrets from a Secret, which no manifest should hold. These lines make it, and"
    yield "# `sed -n 's/^#   //p' FILE | sh` runs them for a FILE with this manifest:"
    create = f"kubectl create secret generic {name} --from-env-file=/dev/stdin"
    for line in (*ENV_LINES.split("\n"), f"env_lines {shlex.quote(env_file)} | {create}"):
        yield f"#   {line}"


def _job(name: str, job: JobFile, options: SubmitOptions) -> dict[str, Any]:
    request = job.request
    count = len(contract.hosts(request))
    stopping = request.get("StoppingCondition", {})
    is_spot = bool(request.get("EnableManagedSpotTraining"))
    limit_s = stopping.get("MaxWaitTimeInSeconds") if is_spot else None
    retries = int(request.get("RetryStrategy", {}).get("MaximumRetryAttempts", 0))
    # What the user must change fails at once. A pod that was taken away costs no retry, and neither do the others,
    # which end with it.
    rules: list[dict[str, Any]] = [
        {"action": "FailJob", "onExitCodes": {"containerName": "job", "operator": "In", "values": [INVALID]}}
    ]
    if is_spot:
        rules += [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {
                "action": "Ignore",
                "onExitCodes": {"containerName": "job", "operator": "In", "values": list(INTERRUPTED)},
            },
        ]
    return {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        "backoffLimit": retries * count,
        "activeDeadlineSeconds": int(limit_s or contract.max_runtime_s(request)),
        "podFailurePolicy": {"rules": rules},
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "estiba"}},
            "spec": _pod(name, job, options),
        },
    }


def _pod(name: str, job: JobFile, options: SubmitOptions) -> dict[str, Any]:
    request = job.request
    image = request["AlgorithmSpecification"]["TrainingImage"]
    mounts = list(copies.mounts(request, name))
    entrypoint, arguments = contract.command(request)
    config = {
        "name": "config",
        "image": image,
        "command": ["sh", "-c", "mkdir -p /opt/ml/input/config && cp -L /config/* /opt/ml/input/config/"],
        "volumeMounts": [mounts[0], {"name": "config", "mountPath": "/config", "readOnly": True}],
    }
    container: dict[str, Any] = {
        "name": "job",
        "image": image,
        **({"command": [literal(entrypoint)]} if entrypoint else {}),
        "args": [literal(word) for word in arguments],
        "env": list(_environment(name, request, options)),
        "resources": _resources(request, options, str(job.target)),
        "volumeMounts": [*mounts, {"name": "shm", "mountPath": copies.SHM}],
    }
    if options.host.env_file:
        container["envFrom"] = [{"secretRef": {"name": f"{name}-env"}}]
    service = {"subdomain": name} if len(contract.hosts(request)) > 1 else {}
    shm = {"medium": "Memory", "sizeLimit": quantity(options.host.shm_size)}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": STOP_S + (LAST_COPY_S if copies.uploads(request) else 0),
        **service,
        "initContainers": [config, *copies.containers(job)],
        "containers": [container],
        "volumes": [
            {"name": "ml", "emptyDir": {}},
            {"name": "shm", "emptyDir": shm},
            {"name": "config", "configMap": {"name": name}},
            *copies.volumes(request),
        ],
    }


def _environment(name: str, request: Mapping[str, Any], options: SubmitOptions) -> Iterator[dict[str, Any]]:
    cluster = contract.hosts(request)
    own = {"ESTIBA_HOST_COUNT": str(len(cluster)), "ESTIBA_INSTANCE_TYPE": cluster[0].instance_type}
    if len(cluster) > 1:
        own["ESTIBA_HOST_SERVICE"] = name
    for variable, value in {**own, **options.environment, **contract.environment(request)}.items():
        yield {"name": variable, "value": literal(value)}


def _resources(request: Mapping[str, Any], options: SubmitOptions, target: str) -> dict[str, Any]:
    host = options.host
    limits: dict[str, Any] = {}
    if gpus := gpus_per_host(host, instance_type(request, target)):
        limits["nvidia.com/gpu"] = gpus
    if host.memory:
        limits["memory"] = quantity(host.memory)
    if host.cpus:
        limits["cpu"] = f"{math.ceil(host.cpus * 1000)}m"
    disk_gib = request["ResourceConfig"].get("VolumeSizeInGB")
    requests = {"ephemeral-storage": f"{disk_gib}Gi"} if disk_gib else {}
    return {kind: values for kind, values in (("limits", limits), ("requests", requests)) if values}


def quantity(size: str) -> str:
    """A size of Docker (8g) as a quantity of Kubernetes (8Gi)."""
    number, unit = re.fullmatch(r"(\d+)([bkmg]?)", size.lower()).groups()  # type: ignore[union-attr]
    return number + {"k": "Ki", "m": "Mi", "g": "Gi"}.get(unit, "")
