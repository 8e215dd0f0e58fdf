"""The ssh target as shell: what runs on the box to start a job and to look after it, and the script a person can paste.

`estiba run` sends exactly the text that `estiba plan` prints. Secrets come in through stdin, as NAME=VALUE lines, and
go on to Docker through pipes: they are in no file and no argument.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from .. import contract, scripts
from ..contract import ChannelSource
from ..jobfile import JobFile
from ..plan import max_runtime_s
from ..scripts import HostOptions, quote

FOLDER = "estiba"
"""Below the home directory of the box's user; everything of ours is in there."""
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
"""What of the environment here a job on the box is given."""


def work_dir(name: str) -> str:
    """The job's folder, relative to the home directory."""
    return f"{FOLDER}/jobs/{name}"


def containers(job_name: str, request: Mapping[str, Any]) -> list[str]:
    """Container of each host: the job's name, with the host's behind it when there are several."""
    cluster = contract.hosts(request)
    return [job_name] if len(cluster) == 1 else [f"{job_name}-{host.name}" for host in cluster]


def uses_s3(job: JobFile) -> bool:
    """Whether the box itself reads or writes S3 for the job."""
    checkpoint = job.request.get("CheckpointConfig", {}).get("S3Uri", "")
    return checkpoint.startswith("s3://") or any(c.uri.startswith("s3://") for c in contract.channels(job.request))


def needs_s3(request: Mapping[str, Any]) -> bool:
    """Whether the job or the box may read or write S3, so must be given credentials.

    Where results go does not count: on a box they wait to be fetched.
    """
    return _names_s3({name: part for name, part in request.items() if name != "OutputDataConfig"})


def _names_s3(node: Any) -> bool:
    if isinstance(node, Mapping):
        return any(_names_s3(value) for value in node.values())
    if isinstance(node, list):
        return any(_names_s3(value) for value in node)
    return isinstance(node, str) and "s3://" in node


def s3_tool() -> str:
    """The program that moves objects on the box, inside the job's own image."""
    return (resources.files(__package__) / "s3_on_box.py").read_text("utf-8")


def start_script(job: JobFile, options: HostOptions) -> str:
    """start.sh: run on the box with the environment on stdin; data and image are there already."""
    return "\n".join(
        [
            "set -eu",
            f'work="$HOME/{work_dir(job.name)}"',
            "env=$(cat)",
            '[ -z "$env" ] || : >"$work/had-secrets"',
            *_start(job, options),
            "",
        ]
    )


def _start(job: JobFile, options: HostOptions) -> Iterator[str]:
    request = job.request
    cluster = contract.hosts(request)
    image = request["AlgorithmSpecification"]["TrainingImage"]
    internal = " --internal" if request.get("EnableNetworkIsolation") else ""
    network = f"estiba-{job.name}"
    checkpoints = contract.checkpoint_dir(request)
    store = request.get("CheckpointConfig", {}).get("S3Uri", "")
    in_s3 = checkpoints is not None and store.startswith("s3://")
    yield f"docker network create{internal} {shlex.quote(network)} >/dev/null"
    if uses_s3(job):
        yield f"cat > \"$work/s3.py\" <<'ESTIBA_FILE'\n{s3_tool()}ESTIBA_FILE"
    for channel in contract.channels(request):
        if channel.uri.startswith("s3://"):
            yield _s3_words(image, f"data/{channel.name}", ["get", channel.uri])
    if checkpoints:
        yield 'mkdir -p "$work/checkpoints"'
    if in_s3:
        yield _s3_words(image, "checkpoints", ["get", store])
        # Ready before the hosts start, so that what it finds then is what was restored.
        words = ["docker", "run", "--detach", "--name", f"{job.name}-sync", "--restart", "no", "--stop-timeout", "600"]
        yield "printf '%s\\n' \"$env\" | " + " ".join(
            [shlex.join(words), _s3_mounts("checkpoints"), shlex.join([image, "/s3.py", "sync", store]), ">/dev/null"]
        )
        yield (
            f"until docker logs {job.name}-sync 2>&1 | grep -q ready; do\n"
            f"  [ \"$(docker inspect --format '{{{{.State.Running}}}}' {job.name}-sync)\" = true ] || "
            f"{{ docker logs {job.name}-sync >&2; exit 1; }}\n"
            "  sleep 0.5\ndone"
        )
    for host in cluster:
        root = f"$work/{host.name}"
        yield f"mkdir -p {quote(root + '/input/config')} {quote(root + '/model')} {quote(root + '/output/data')}"
        for name, text in contract.config_files(request, host, options.encoding).items():
            yield f"cat > {quote(f'{root}/input/config/{name}')} <<'ESTIBA_FILE'\n{text}ESTIBA_FILE"
        mounts = [f"{root}/input:/opt/ml/input", f"{root}/model:/opt/ml/model", f"{root}/output:/opt/ml/output"]
        for channel in contract.channels(request):
            if channel.groups and host.group not in channel.groups:
                continue
            place = f"$work/data/{channel.name}"
            if channel.sharded and len(cluster) > 1:
                place = f"{root}/share-{channel.name}"
                yield _share(channel, host, cluster, place)
            mounts.append(f"{place}:/opt/ml/input/data/{channel.name}:ro")
        if checkpoints:
            mounts.append(f"$work/checkpoints:{checkpoints}")
        words = scripts.docker_run(job, host, options, mounts, detach=True, env_from_stdin=True)
        yield "printf '%s\\n' \"$env\" | " + scripts.wrap(words, len(words) - len(contract.command(request)[1]) - 1)
    yield f"cat > \"$work/watch.sh\" <<'ESTIBA_FILE'\n{watch_script(job)}ESTIBA_FILE"
    # In a session of its own: it outlives this connection.
    yield 'setsid nohup sh "$work/watch.sh" >"$work/watch.log" 2>&1 </dev/null &'


def _s3_mounts(folder: str) -> str:
    return (
        f'--env-file /dev/stdin --volume "$work/s3.py:/s3.py:ro" --volume {quote(f"$work/{folder}")}:/data '
        "--entrypoint python"
    )


def _s3_words(image: str, folder: str, words: list[str]) -> str:
    run = f"docker run --rm {_s3_mounts(folder)} {shlex.join([image, '/s3.py', *words])}"
    return f"mkdir -p {quote(f'$work/{folder}')}\nprintf '%s\\n' \"$env\" | {run}"


def _share(channel: ChannelSource, host: contract.Host, cluster: list[contract.Host], place: str) -> str:
    """Hard links to every n-th file of a channel (ShardedByS3Key)."""
    peers = [peer for peer in cluster if not channel.groups or peer.group in channel.groups]
    pick = f"NR % {len(peers)} == {(peers.index(host) + 1) % len(peers)}"
    return (
        f"mkdir -p {quote(place)}\n"
        f"(cd {quote(f'$work/data/{channel.name}')} && find . -type f | LC_ALL=C sort | awk '{pick}' |\n"
        "  while IFS= read -r file; do\n"
        f'    mkdir -p {quote(place)}/"${{file%/*}}"; ln -f "$file" {quote(place)}/"$file"\n  done)'
    )


def watch_script(job: JobFile) -> str:
    """watch.sh: keeps MaxRuntimeInSeconds, ends a cluster of which one host failed, keeps log and exit codes.

    Only one runs at a time, so it may be started again whenever somebody looks at the job.
    """
    names = containers(job.name, job.request)
    return f"""\
names='{" ".join(names)}'
cd "$HOME/{work_dir(job.name)}" || exit 1
exec 9>watch.lock
flock -n 9 || exit 0
[ -e deadline ] || echo $(( $(date +%s) + {max_runtime_s(job.request)} )) > deadline
deadline=$(cat deadline)
while sleep 2; do
  docker info >/dev/null 2>&1 || continue
  running= failed=
  for name in $names; do
    state=$(docker inspect --format '{{{{.State.Status}}}} {{{{.State.ExitCode}}}}' "$name") || continue
    case $state in
      exited\\ 0 | dead\\ 0) ;;
      exited* | dead*) failed=1 ;;
      *) running="$running $name" ;;
    esac
  done
  [ -n "$running" ] || break
  if [ -n "$failed" ]; then docker stop --time {scripts.DOCKER_STOP_S} $running; continue; fi
  if [ "$(date +%s)" -ge $deadline ]; then
    [ -e stopped ] || echo MaxRuntimeExceeded > stopped
    docker stop --time {scripts.DOCKER_STOP_S} $running
  fi
done
docker stop --time 600 {job.name}-sync 2>/dev/null && docker rm {job.name}-sync
for name in $names; do docker logs --timestamps "$name" > "$name.log" 2>&1; done
docker inspect --format '{INSPECT}' $names > end.part
mv end.part end
# Docker keeps a container's environment, so containers that were given secrets do not outlive their job.
if [ -e had-secrets ]; then docker rm $names; fi
docker network rm estiba-{job.name}
"""


INSPECT = (
    "{{.Name}} {{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}} {{.State.StartedAt}} {{.State.FinishedAt}}"
)


def ssh_script(job: JobFile, options: HostOptions) -> str:
    """A shell script, run here, that starts the job on the box as `estiba run` does."""
    target = job.target
    at = f"{target.user}@{target.host}" if target.user else str(target.host)
    ssh = f"ssh -p {target.port} {at}" if target.port != 22 else f"ssh {at}"
    image = shlex.quote(job.request["AlgorithmSpecification"]["TrainingImage"])
    work = work_dir(job.name)
    lines = [
        "#!/bin/sh",
        f"# {job.name} on {target}: engine, image, data, then a detached container. The box stores no secret.",
        "set -eu",
        f"{ssh} 'docker info >/dev/null 2>&1' || {ssh} 'bash -s engine' < scripts/engine.sh",
        f"{ssh} docker pull -q {image} || docker save {image} | gzip -1 | {ssh} docker load -q",
        f"{ssh} 'mkdir -p {FOLDER}/data {FOLDER}/jobs && mkdir {work} {work}/data'",
    ]
    pull = f"rsync -rt --copy-links --delete -e '{ssh.removesuffix(' ' + at)}'"
    for channel in contract.channels(job.request):
        if channel.uri.startswith("file://"):
            source = contract.file_path(channel.uri)
            tail = "/" if not source.suffix else ""
            into = f"{at}:{work}/data/{channel.name}/"
            lines.append(f"{pull} {shlex.quote(str(source) + tail)} {shlex.quote(into)}")
    checkpoint = job.request.get("CheckpointConfig", {}).get("S3Uri", "")
    if checkpoint.startswith("file://"):
        source = contract.file_path(checkpoint)
        shown = shlex.quote(str(source))
        lines.append(f"[ ! -d {shown} ] || {pull} {shlex.quote(str(source) + '/')} {at}:{work}/checkpoints/")
    secrets = f"cat {shlex.quote(options.env_file)}" if options.env_file else ":"
    if needs_s3(job.request):
        secrets = f"env | grep -E '^({'|'.join(PASSED_ON)})=' || :; {secrets}"
    lines += [
        f"{ssh} 'cat > {work}/start.sh' <<'ESTIBA_SSH'",
        start_script(job, options) + "ESTIBA_SSH",
        f"{{ {secrets}; }} | {ssh} sh {work}/start.sh",
        f"{ssh} docker logs --follow {containers(job.name, job.request)[0]}",
        "",
    ]
    return "\n".join(lines)
