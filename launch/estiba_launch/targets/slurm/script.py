"""The batch file of a job: one task a node in a container, by Pyxis and Enroot or by Apptainer.

Sources: slurm.schedmd.com, sbatch(1) and srun(1); the options of Pyxis in its args.c, where a mount becomes three words
of a line of fstab, so names with a space, a colon or a comma need a link with a plain name; apptainer.org, "Environment
and Metadata": APPTAINERENV_NAME is NAME in the container.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import contract
from estiba_launch.request.contract import ChannelSource
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.variables import ENV_LINES, NAME, read_container_env
from estiba_launch.targets.docker_command import (
    STOP_S,
    WORK,
    Quoted,
    copy_from_s3,
    here_document,
    quote,
    render,
    share,
    work_path,
)
from estiba_launch.targets.printed import gpus_per_host, instance_type

ENTRY = ("python", "-m", "estiba.platform.entry")
"""The entry point of Estiba's images, which neither runtime makes the parent of the job."""
SYNC_EVERY_S = 30
OF_THE_SHELL = frozenset("BASHOPTS BASH_VERSINFO EUID GROUPS PPID RANDOM SHELLOPTS UID".split())
"""Variables that bash lets nobody set, or gives another value; it is /bin/sh on some clusters."""
PLAIN = re.compile(r"/[A-Za-z0-9/._+@=-]*")


def batch_file(job: JobFile, options: SubmitOptions) -> str:
    """The text for `sbatch`. Raises LaunchError for a request that it cannot express."""
    return "\n".join([*_header(job, options), *_body(job, options), ""])


def _header(job: JobFile, options: SubmitOptions) -> Iterator[str]:
    request, host = job.request, options.host
    minutes = -(-(contract.max_runtime_s(request) + STOP_S) // 60)
    yield "#!/bin/sh"
    yield f"#SBATCH --job-name={job.name}"
    yield f"#SBATCH --nodes={len(contract.hosts(request))}"
    yield "#SBATCH --ntasks-per-node=1"
    if gpus := gpus_per_host(host, instance_type(request, str(job.target))):
        yield f"#SBATCH --gpus-per-node={gpus}"
    if host.cpus:
        yield f"#SBATCH --cpus-per-task={max(1, round(host.cpus))}"
    if host.memory:
        yield f"#SBATCH --mem={_memory(host.memory)}"
    yield f"#SBATCH --time={minutes}"
    yield f"#SBATCH --signal=TERM@{STOP_S}"
    yield f"#SBATCH --{'' if request.get('EnableManagedSpotTraining') else 'no-'}requeue"
    yield f"#SBATCH --output={job.name}-%j.log"
    yield "#SBATCH --open-mode=append"
    yield f"# {job.name} on Slurm: `sbatch` this, with what your cluster wants besides (--partition, --account)."
    yield "# WORK     absolute path of a folder that all nodes share; default: the job's name where sbatch was called"
    yield "# RUNTIME  pyxis or apptainer; default: pyxis if srun has it"
    yield "# IMAGE    another image, or a file with one (.sqsh for pyxis, .sif for apptainer)"
    yield "set -eu"
    yield "trap : TERM  # the copies at the end still run"


def _memory(size: str) -> str:
    """Docker's 16g is Slurm's 16G. Without a unit Docker counts bytes and Slurm mebibytes."""
    if size[-1].lower() in "kmg":
        return size.upper()
    return f"{-(-int(size.rstrip('bB')) // 1024)}K"


def _body(job: JobFile, options: SubmitOptions) -> Iterator[str]:
    request = job.request
    yield f"work=${{WORK:-${{SLURM_SUBMIT_DIR:-$PWD}}/{job.name}}}"
    yield "case $work in *[!A-Za-z0-9/._+@=-]* | [!/]*)"
    yield '  echo "WORK=$work: not an absolute path of letters, digits and ._+@=-; set WORK to one" >&2; exit 2 ;;'
    yield "esac"
    yield from _inputs(request)
    yield from _folders(request, options)
    # A mount is the same word for all tasks, so each node has a link of one name to its own folder.
    yield "here=/tmp/estiba-$SLURM_JOB_ID"
    yield 'srun sh -c \'ln -sfnT "$1/hosts/$SLURM_NODEID" "$2"\' link "$work" "$here"'
    yield from _keep_checkpoints(request)
    # `( ... ) || code=$?` would switch off -e inside.
    yield "set +e"
    yield "("
    yield "set -e"
    yield from _start(request, options)
    yield ")"
    yield "code=$?"
    yield "set -e"
    yield 'srun rm -f "$here" || :'
    yield from _save(request, job.name)
    yield 'exit "$code"'


def _inputs(request: Mapping[str, Any]) -> Iterator[str]:
    cluster = contract.hosts(request)
    for channel in contract.channels(request):
        if channel.uri.startswith("s3://"):
            yield from copy_from_s3(channel.uri, work_path(_all(channel)))
        else:
            yield from _gather(channel)
        if channel.sharded:
            for node, host in enumerate(cluster):
                yield share(channel, host, cluster, _all(channel), Path(WORK, "inputs", str(node), channel.name))


def _all(channel: ChannelSource) -> Path:
    """The folder with all files of a channel, which every node sees."""
    # Apart, as what is copied from S3 must not follow the link of an earlier job into the user's own folder.
    return Path(WORK, "inputs", "all" if channel.uri.startswith("s3://") else "links", channel.name)


def _gather(channel: ChannelSource) -> Iterator[str]:
    """Shell that makes a link to a folder, or a folder with copies of one file or of those with a name prefix."""
    source, place = quote(str(contract.file_path(channel.uri))), work_path(_all(channel))
    yield f'mkdir -p "$work/inputs/links"; rm -rf {place}'
    yield f"if [ -d {source} ]; then ln -s {source} {place}"
    yield f"elif [ -e {source} ]; then mkdir {place}; cp -L {source} {place}/"
    yield f"else mkdir {place}; cp -RL {source}* {place}/; fi"


def _folders(request: Mapping[str, Any], options: SubmitOptions) -> Iterator[str]:
    """One folder a node, with its /opt/ml and links to what it shares with others."""
    cluster = contract.hosts(request)
    yield f"mkdir -p {work_path(f'{WORK}/config')}"
    for name, text in contract.config_files(request, cluster[0], options.host.encoding).items():
        # Each node finds its hosts in Slurm's variables; this file would be another one on each.
        if name != "resourceconfig.json":
            yield here_document(work_path(f"{WORK}/config/{name}"), text)
    if contract.checkpoint_dir(request):
        yield f"mkdir -p {work_path(_checkpoints(request))}"
    yield f"for node in {' '.join(map(str, range(len(cluster))))}; do"
    yield "  host=$work/hosts/$node"
    yield '  mkdir -p "$host/input/data" "$host/model" "$host/output/data" "$host/links"'
    yield '  rm -rf "$host/input/config"; cp -R "$work/config" "$host/input/config"'
    if contract.checkpoint_dir(request):
        yield f'  ln -sfnT {work_path(_checkpoints(request))} "$host/links/checkpoints"'
    for number, channel in enumerate(contract.channels(request)):
        place = Quoted(f'"$work/inputs/$node/{channel.name}"') if channel.sharded else work_path(_all(channel))
        yield f'  ln -sfnT {place} "$host/links/{number}"'
        yield f'  mkdir -p "$host/input/data/{channel.name}"'
    yield "done"


def _checkpoints(request: Mapping[str, Any]) -> Path:
    store = request["CheckpointConfig"]["S3Uri"]
    return contract.file_path(store) if store.startswith("file://") else Path(WORK, "checkpoints")


def _store(request: Mapping[str, Any]) -> str | None:
    """The address on S3 that checkpoints are copied to."""
    uri = str(request.get("CheckpointConfig", {}).get("S3Uri", ""))
    return uri if uri.startswith("s3://") else None


def _keep_checkpoints(request: Mapping[str, Any]) -> Iterator[str]:
    if store := _store(request):
        yield f'aws s3 sync --only-show-errors {shlex.quote(store)} "$work/checkpoints"'
        copy = f'aws s3 sync --only-show-errors "$work/checkpoints" {shlex.quote(store)}'
        yield "("
        yield "trap 'kill \"$!\" 2>/dev/null; exit' TERM"
        yield f'while :; do sleep {SYNC_EVERY_S} & wait "$!"; {copy} || :; done'
        yield ") & syncer=$!"


def _start(request: Mapping[str, Any], options: SubmitOptions) -> Iterator[str]:
    entrypoint, arguments = contract.command(request)
    command = [*([entrypoint] if entrypoint else ENTRY), *arguments]
    variables = {
        "ESTIBA_INSTANCE_TYPE": contract.hosts(request)[0].instance_type,
        **options.environment,
        **contract.environment(request),
    }
    _check_names(variables, options.host.env_file)
    image = request["AlgorithmSpecification"]["TrainingImage"]
    yield "names=" + ",".join(variables)
    if options.host.env_file:
        yield ENV_LINES
        yield f"secrets=$(env_lines {shlex.quote(options.host.env_file)})"
        one_name = "while IFS='=' read -r name _; do printf ',%s' \"$name\"; done"
        yield f"names=$names$(printf '%s\\n' \"$secrets\" | sed -n '/=/p' | {one_name})"
    yield f"mounts={','.join(_mounts(request))}"
    yield "runtime=${RUNTIME:-}"
    yield '[ -n "$runtime" ] || { srun --help 2>&1 | grep -q container-image && runtime=pyxis; } || runtime=apptainer'
    # Hosts end each other; Slurm would kill those that are still saving.
    run: list[list[str]] = [[Quoted('"$(command -v srun)"'), "--kill-on-bad-exit=0", "--export=ALL"]]
    pyxis: list[list[str]] = [
        [Quoted(f'--container-image="${{IMAGE:-{_enroot(image)}}}"')],
        [Quoted('--container-mounts="$mounts"'), Quoted('--container-env="$names"')],
        ["--container-writable", "--no-container-mount-home", "--no-container-entrypoint"],
    ]
    gpus = [quote("--nv")] if gpus_per_host(options.host, contract.hosts(request)[0].instance_type) else []
    apptainer: list[list[str]] = [
        [Quoted('"$(command -v apptainer || command -v singularity)"'), quote("exec"), *gpus],
        ["--writable-tmpfs", "--no-home", Quoted('--bind "$mounts"'), Quoted('"$image"')],
    ]
    yield "case $runtime in"
    yield "pyxis)"
    yield f"set -- {render([*run, *pyxis, command])}"
    yield ";;"
    yield "apptainer)"
    yield "image=${IMAGE:-$work/image.sif}"
    yield f'[ -e "$image" ] || apptainer pull "$image" {quote(f"docker://{image}")}'
    yield f"set -- {render([*run, *apptainer, command])}"
    yield ";;"
    yield '*) echo "RUNTIME=$runtime: set it to pyxis or apptainer" >&2; exit 2 ;;'
    yield "esac"
    # Exported, not passed: other users see the words of a command. The words are set before, so no name is in the way.
    yield 'give() { export "${1?}" "APPTAINERENV_$1"; }'
    if options.host.env_file:
        yield 'while IFS= read -r line; do case $line in *=*) give "$line" ;; esac; done <<ESTIBA_SECRETS'
        yield "$secrets"
        yield "ESTIBA_SECRETS"
    for name, value in variables.items():
        yield f"give {quote(f'{name}={value}')}"
    yield 'exec "$@"'


def _check_names(variables: Mapping[str, str], env_file: str | None) -> None:
    """The script's shell must be able to set each variable. Raises LaunchError naming one that it cannot."""
    secrets = read_container_env(Path(env_file)) if env_file else {}
    places = {**dict.fromkeys(secrets, f"--env-file {env_file}: "), **dict.fromkeys(variables, "Environment: ")}
    for name, where in places.items():
        if name in OF_THE_SHELL or not re.fullmatch(NAME, name):
            what = "the shell's own variable" if name in OF_THE_SHELL else "no name of letters, digits and _"
            raise LaunchError(f"{where}{name!r} is {what}, so the batch file cannot set it; rename it")


def _mounts(request: Mapping[str, Any]) -> Iterator[str]:
    """`SOURCE:TARGET[:ro]`, which both runtimes read."""
    for name in ("input", "model", "output"):
        yield f"$here/{name}:/opt/ml/{name}"
    if place := contract.checkpoint_dir(request):
        if not PLAIN.fullmatch(place):
            raise LaunchError(
                f"CheckpointConfig.LocalPath {place!r}: Slurm's containers mount only paths of letters, digits and "
                "._+@=-; use /opt/ml/checkpoints"
            )
        yield f"$here/links/checkpoints:{place}"
    for number, channel in enumerate(contract.channels(request)):
        yield f"$here/links/{number}:/opt/ml/input/data/{channel.name}:ro"


def _enroot(image: str) -> str:
    """An image reference as Enroot writes it: REGISTRY#NAME."""
    registry, slash, name = image.partition("/")
    has_registry = slash and ("." in registry or ":" in registry or registry == "localhost")
    return f"{registry}#{name}" if has_registry else image


def _save(request: Mapping[str, Any], name: str) -> Iterator[str]:
    if store := _store(request):
        yield 'kill "$syncer" 2>/dev/null || :; wait "$syncer" || :'
        yield f'aws s3 sync --only-show-errors "$work/checkpoints" {shlex.quote(store)} || code=1'
    output = str(request["OutputDataConfig"]["S3OutputPath"])
    yield "ended=$code"
    yield f"for node in {' '.join(map(str, range(len(contract.hosts(request)))))}; do"
    yield "  for folder in model output; do"
    # A failed job has no model, as on SageMaker.
    yield '    [ "$folder" = output ] || [ "$ended" = 0 ] || continue'
    if output.startswith("s3://"):
        into = f'{quote(output.rstrip("/") + "/" + name)}/"$node/$folder"'
        yield f'    aws s3 sync --only-show-errors "$work/hosts/$node/$folder" {into} || code=1'
    else:
        into = f'{quote(str(contract.file_path(output) / name))}/"$node"'
        yield f'    {{ mkdir -p {into} && cp -R "$work/hosts/$node/$folder" {into}/; }} || code=1'
    yield "  done"
    yield "done"
