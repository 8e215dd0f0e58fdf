"""The submission of an ssh job: one shell script in two halves, which `estiba plan` prints and `estiba run` sends.

Run here without arguments, it brings engine, image, data and itself to the remote host. Run there as `start.sh start`,
it starts the job. `estiba run` does the first half in Python (with progress, retries and a login to ECR) and sends the
same text. Whatever is only known on the host, such as its GPUs, the script finds out when it runs. Secrets come in
through stdin, as NAME=VALUE lines, and reach Docker through pipes: they are in no file and no argument.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from estiba_launch.request import contract
from estiba_launch.request.contract import max_runtime_s
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.options import HostOptions
from estiba_launch.targets.docker_command import (
    STOP_S,
    WORK,
    Mount,
    container_of,
    create_network,
    docker_run,
    here_document,
    host_mounts,
    mount_word,
    network_of,
    quote,
    render,
    script_addresses,
    share,
    work_path,
    write_config,
)

FOLDER = "estiba"
"""In the home directory of the remote user. Everything of Estiba's is below it."""
PASSED_ON = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ALLOW_HTTP",
)
"""Variables of this environment that are passed to a job that uses S3."""
AGENT = {
    "targets/ssh/agent.py": "agent.py",
    "errors.py": "estiba_launch/errors.py",
    **{
        f"jobs/{name}.py": f"estiba_launch/jobs/{name}.py"
        for name in ("keys", "ledger", "links", "mirror", "s3", "sync")
    },
}
"""Files of this package that the S3 agent needs, and where it finds them."""
START = "start"
"""Argument of the half that runs on the host."""
REQUEST = "request.json"
"""In the job's folder: lets another machine find the job."""
INSPECT = (
    "{{.Name}} {{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}} {{.State.StartedAt}} {{.State.FinishedAt}}"
)
GPU_WORKS = (
    "nvidia-smi -L >/dev/null 2>&1 && { docker info --format '{{json .Runtimes}}' | grep -q nvidia || "
    "command -v nvidia-container-runtime-hook >/dev/null 2>&1; }"
)


def work_dir(name: str) -> str:
    """The job's folder, relative to the home directory."""
    return f"{FOLDER}/jobs/{name}"


def container_names(job: str, request: Mapping[str, Any]) -> list[str]:
    """Container of each host: the job's name, followed by the host's when there are several."""
    cluster = contract.hosts(request)
    return [job] if len(cluster) == 1 else [f"{job}-{host.name}" for host in cluster]


def sync_name(job: str) -> str:
    """The container that syncs checkpoints."""
    return f"{job}-sync"


def needs_s3(request: Mapping[str, Any]) -> bool:
    """Whether the job may read or write S3, so must be given credentials.

    The output address does not count: results stay on the host until they are downloaded.
    """
    return "s3://" in json.dumps({name: part for name, part in request.items() if name != "OutputDataConfig"})


def ssh_script(job: JobFile, options: HostOptions, send: Iterable[str], watch: str) -> str:
    """`send` is the half that runs here, `watch` the text of watch.sh."""
    return "\n".join(
        [
            "#!/bin/sh",
            f"# {job.name} on {job.target}: engine, image, data, then detached containers.",
            "# By hand, from this machine: sh FILE. The host stores no secret.",
            "set -eu",
            f'if [ "${{1-}}" != {START} ]; then',
            *(f"  {line}" for line in send),
            "  exit",
            "fi",
            *_start(job, options, watch),
            "",
        ]
    )


def _start(job: JobFile, options: HostOptions, watch: str) -> Iterator[str]:
    """The half that runs on the host. Data and image are there already."""
    request = job.request
    cluster = contract.hosts(request)
    network = network_of(job.name)
    names = container_names(job.name, request)
    checkpoints = contract.checkpoint_dir(request)
    store = request.get("CheckpointConfig", {}).get("S3Uri", "") if checkpoints else ""
    s3_channels = [channel for channel in contract.channels(request) if channel.uri.startswith("s3://")]
    yield f'work="$HOME/{work_dir(job.name)}"'
    yield here_document(work_path(f"{WORK}/{REQUEST}"), json.dumps(request) + "\n")
    yield "env=$(cat)"
    # Distinguishes a start that is under way from one that a lost connection or a restart ended.
    yield 'exec 8>"$work/start.lock" && flock 8'
    yield '[ -z "$env" ] || : >"$work/had-secrets"'
    hosts = [host.name for host in cluster]
    yield from create_network(network, ["--internal"] if request.get("EnableNetworkIsolation") else [], hosts)
    # Docker keeps a container's environment, so a start that fails leaves no container.
    yield "undo() {"
    yield "  code=$?"
    yield f"  if [ $code != 0 ]; then docker rm --force {' '.join([*names, sync_name(job.name)])} >/dev/null 2>&1 || :"
    yield f"  docker network rm {network} >/dev/null 2>&1 || :; fi"
    yield '  [ -z "${guard-}" ] || kill "$guard" 2>/dev/null || :'
    yield "  exit $code"
    yield "}"
    yield "trap undo EXIT"
    yield "trap 'exit 1' HUP INT TERM PIPE"
    if options.gpus and not options.gpus_if_any:
        problem = (
            f"--gpus {options.gpus}: this host has no GPU that docker can use; see nvidia-smi, or pass --gpus none"
        )
        yield f"{{ {GPU_WORKS}; }} || {{ echo {shlex.quote(problem)} >&2; exit 1; }}"
    if options.gpus and options.gpus_if_any:
        yield f"gpus=; if {GPU_WORKS}; then gpus='--gpus {options.gpus}'; else echo 'no GPU: on the CPU' >&2; fi"
    yield GUARD.format(max_runtime_s=max_runtime_s(request))
    if s3_channels or store.startswith("s3://"):
        yield 'mkdir -p "$work/agent/estiba_launch/jobs"'
        package = resources.files("estiba_launch")
        for source, place in AGENT.items():
            yield here_document(work_path(f"{WORK}/agent/{place}"), package.joinpath(source).read_text("utf-8"))
    for channel in s3_channels:
        yield _agent(request, f"data/{channel.name}", "get", channel.uri)
    yield USERS
    give = f'[ -z "$root" ] || own {shlex.quote(request["AlgorithmSpecification"]["TrainingImage"])} -R "$root"'
    if checkpoints:
        yield 'mkdir -p "$work/checkpoints" "$work/sync"'
        yield f"{give} /host/checkpoints /host/sync"
    if checkpoints and store.startswith("s3://"):
        # Ready before the hosts start, so that the files it finds then are those that were restored.
        sync = sync_name(job.name)
        yield _agent(request, "checkpoints", "sync", store, checkpoints, detached=sync)
        yield (
            f"until docker logs {sync} 2>&1 | grep -q ready; do\n"
            f"  [ \"$(docker inspect --format '{{{{.State.Running}}}}' {sync})\" = true ] || "
            f"{{ docker logs {sync} >&2; exit 1; }}\n"
            "  sleep 0.5\ndone"
        )
    # Before the containers, which may fill the disk.
    yield here_document(work_path(f"{WORK}/watch.sh"), watch)
    yield "if must_end; then exit 1; fi"
    for host, name in zip(cluster, names, strict=True):
        root = Path(WORK, host.name)
        yield from write_config(request, host, options.encoding)
        mounts = host_mounts(root)
        for channel in contract.channels(request):
            if channel.groups and host.group not in channel.groups:
                continue
            shared = Path(WORK, "data", channel.name)
            if channel.sharded and len(cluster) > 1:
                shared = root / f"share-{channel.name}"
                yield share(channel, host, cluster, Path(WORK, "data", channel.name), shared)
            mounts.append(Mount(source=shared, target=f"/opt/ml/input/data/{channel.name}", read_only=True))
        if checkpoints:
            mounts.append(Mount(source=Path(WORK, "checkpoints"), target=checkpoints))
        yield f"{give} /host/{host.name}"
        container = container_of(request, host, options, mounts, name=name, addresses=script_addresses(hosts))
        gpus = "$gpus" if options.gpus_if_any and options.gpus else None
        yield f"printf '%s\\n' \"$env\" | {render(docker_run(container, env_file='/dev/stdin', gpus=gpus))} >/dev/null"
    yield ': >"$work/watch.lock"'
    yield WATCH
    # Stopped before they started.
    yield f"if must_end; then setsid nohup docker stop --time {STOP_S} {' '.join(names)} >/dev/null 2>&1 8>&- & fi"


GUARD = """\
[ -s "$work/deadline" ] || echo $(( $(date +%s) + {max_runtime_s} )) >"$work/deadline"
must_end() {{
  [ -e "$work/stopped" ] && return
  [ "$(date +%s)" -ge "$(cat "$work/deadline")" ] && echo MaxRuntimeExceeded >"$work/stopped"
}}
(
  until must_end; do sleep 2; done
  docker ps --quiet --filter "volume=$work/agent" | xargs -r docker kill
) >/dev/null 2>&1 8>&- &
guard=$!"""
"""Shell that ends the download of data when the job is stopped or its time is up."""
USERS = """\
users=$(docker info --format '{{.SecurityOptions}} {{.DockerRootDir}}')
root='' userns=''
case $users in *name=userns*) root=$(echo "${users##*/}" | tr . :) userns='--userns host' ;; esac
own() { docker run --rm --network none $userns --user 0 --mount "type=bind,source=$work,target=/host" \\
  --entrypoint chown "$@" >/dev/null; }"""
"""Shell that learns who root of a container is on the host, as targets/local/owners.py says. `own IMAGE -R OWNER PATHS`
changes the owner of files; an empty `root` needs none before the start."""
ME = "case $users in *name=rootless*) me=0:0 ;; *) me=$(id -u):$(id -g) ;; esac"
"""Shell that learns how a container names the remote user."""

WATCH = 'setsid nohup sh "$work/watch.sh" >>"$work/watch.log" 2>&1 </dev/null 8>&- &'
"""Starts the watcher in a session of its own, which outlives the connection. A second one exits at once."""


def _agent(request: Mapping[str, Any], folder: str, *task: str, detached: str | None = None) -> str:
    """Shell that runs the S3 agent on one folder of the job."""
    words = ["docker", "run", *(["--detach", "--name", detached, "--stop-timeout", "600"] if detached else ["--rm"])]
    words += ["--env-file", "/dev/stdin", "--entrypoint", "python"]
    words += ["--mount", mount_word(Mount(source=Path(WORK, "agent"), target="/estiba", read_only=True))]
    words += ["--mount", mount_word(Mount(source=Path(WORK, folder), target="/data"))]
    if detached:
        words += ["--restart", "on-failure:5"]
        words += ["--mount", mount_word(Mount(source=Path(WORK, "sync"), target="/state"))]
    words += [request["AlgorithmSpecification"]["TrainingImage"], "/estiba/agent.py", *task]
    line = " ".join(quote(word) for word in words)
    return (
        f"mkdir -p {work_path(f'{WORK}/{folder}')}\nprintf '%s\\n' \"$env\" | {line}{' >/dev/null' if detached else ''}"
    )
