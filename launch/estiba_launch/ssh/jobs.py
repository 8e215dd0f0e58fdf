"""Jobs on an ssh box, from outside: start, look, stop, follow, fetch. What is known is on this machine's disk too."""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import contract, state
from ..errors import HostError, LaunchError
from ..jobfile import JobFile
from ..localhost import channels, control
from ..localhost.logs import LOG, JobLog, Metrics, Pump
from ..localhost.record import TERMINAL, Record, seconds_between
from ..localhost.store import walk
from ..scripts import DOCKER_STOP_S, HostOptions
from ..target import Target
from . import credentials, ship
from .box import Box, BoxError, BoxGone
from .script import INSPECT, containers, start_script, work_dir

TARGET = "target.json"
METRICS = "metrics.json"
LOOK_S = 2.0
PATIENCE_S = 600.0
"""How long a box may be out of reach before waiting for it is given up."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """A job that runs on its box by itself now."""

    name: str
    directory: Path


def start(
    job: JobFile,
    options: HostOptions,
    say: Callable[[str], None] = lambda _: None,
    *,
    usd_per_h: float | None = None,
) -> Started:
    """Bring engine, image and data to the box, and start the job there. Raises LaunchError before anything runs."""
    box = Box(job.target)
    request = job.request
    local = [channel for channel in contract.channels(request) if channel.uri.startswith("file://")]
    for channel in local:
        channels.check(channel)
    environment, warnings = credentials.given(job, options.env_file)
    for warning in warnings:
        say(f"warning: {warning}")
    directory = state.jobs_root() / job.name
    if directory.exists():
        raise LaunchError(
            f"{job.name}: a job of this name is known already ({directory}); pass --set JOB_NAME=ANOTHER, or leave the "
            "time in TrainingJobName (${ESTIBA_TIMESTAMP})"
        )
    box.connect()
    store = request.get("CheckpointConfig", {}).get("S3Uri", "")
    found = ship.bootstrap(box, say, needs_rsync=bool(local) or store.startswith("file://"))
    options = with_gpus(options, found, say)
    ship.image(box, request["AlgorithmSpecification"]["TrainingImage"], say)
    work = work_dir(job.name)
    made = box.run(f"mkdir -p estiba/data estiba/jobs && mkdir {work} {work}/data", check=False)
    if made.code:
        raise BoxError(
            f"{job.target}: cannot make ~/{work} ({made.error.strip()[-200:]}); pass --set JOB_NAME=OTHER or make room"
        )
    try:
        ship.data(box, job, say)
    except BaseException:
        # Not a job yet. What was sent of its data is kept apart, for the next try.
        _clear(box, work)
        raise
    directory.mkdir(parents=True)
    state.write_json(directory / TARGET, {"target": str(job.target), "user_id": found.user_id, "usd_per_h": usd_per_h})
    control.LocalOptions(host=options).write(directory)
    record = Record.create(directory, request)
    record.begin_attempt([host.name for host in contract.hosts(request)])
    state.write_json(directory / control.REQUEST, request)
    try:
        box.run(f"cat > {work}/start.sh", input=start_script(job, options))
        say(f"{job.name}: starting on {job.target}")
        box.run(f"sh {work}/start.sh", input=environment, timeout_s=None, what="the start")
    except HostError as error:
        _end(box, job.name, request)
        record.fail(f"could not be started: {error}")
        raise
    record.to("Training", f"Training on {job.target}")
    return Started(name=job.name, directory=directory)


def with_gpus(options: HostOptions, found: ship.Found, say: Callable[[str], None]) -> HostOptions:
    """The options for this box. Raises LaunchError when GPUs were asked for and it has none."""
    if not options.gpus or (found.gpu and found.gpu_in_docker):
        return options
    if not options.gpus_if_any:
        raise LaunchError(
            f"--gpus {options.gpus}: the box has {'a GPU that docker cannot give' if found.gpu else 'no GPU'}; see "
            "`nvidia-smi` there, or pass --gpus none"
        )
    say("the box has no GPU: the job runs on its CPU")
    return replace(options, gpus=None)


def _clear(box: Box, work: str) -> None:
    try:
        box.run(f"rm -rf {work}", check=False)
    except HostError:
        pass


def _end(box: Box, name: str, request: dict[str, Any]) -> None:
    """Remove what a start left half-way."""
    names = shlex.join([*containers(name, request), f"{name}-sync"])
    try:
        box.run(f"docker rm --force {names}; docker network rm estiba-{name}", check=False)
    except HostError:
        pass


# ---- looking


def target_of(directory: Path) -> Target:
    return Target.parse(state.read_json(directory / TARGET)["target"])


def describe(name: str) -> dict[str, Any]:
    """The job as DescribeTrainingJob would tell it; the box is asked until the job is over.

    A box that cannot be reached is no error: what was known last is told, with the reason under `Estiba.Unreachable`.
    """
    directory = state.job_dir(name)
    record = Record.load(directory)
    value = record.value
    target = target_of(directory)
    value["FinalMetricDataList"] = state.read_json(directory / METRICS, [])
    usd_per_h = state.read_json(directory / TARGET).get("usd_per_h")
    value["Estiba"].update(Supervised=True, Directory=str(directory), Target=str(target), UsdPerHour=usd_per_h)
    if is_over(value) or not record.attempts:
        return value
    try:
        seen = look(Box(target), name, value)
    except HostError as error:
        value["Estiba"]["Unreachable"] = str(error)
        return value
    learn(record, seen, target)
    return record.value


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the box says of a job."""

    over: bool
    stopped: str
    """Why it was stopped, or nothing."""
    hosts: dict[str, tuple[str, int, bool, str, str]]
    """Container -> (status, exit code, out of memory, started, finished)."""
    failures: dict[str, str]
    """Host -> its failure file."""


def look(box: Box, name: str, request: dict[str, Any]) -> Seen:
    """Ask the box, and start the job's watcher again in case it died. Raises BoxGone, BoxError."""
    names = containers(name, request)
    hosts = [host.name for host in contract.hosts(request)]
    mark = "=== estiba"
    script = f"""\
cd "$HOME/{work_dir(name)}" || exit 1
[ -e end ] || setsid nohup sh watch.sh >>watch.log 2>&1 </dev/null &
echo '{mark} stopped'; cat stopped 2>/dev/null
if [ -e end ]; then echo '{mark} end'; cat end
else echo '{mark} live'; docker inspect --format '{INSPECT}' {shlex.join(names)} 2>/dev/null; fi
for host in {" ".join(hosts)}; do
  if [ -e "$host/output/failure" ]; then echo; echo "{mark} failure $host"; head -c 4096 "$host/output/failure"; fi
done
"""
    text = box.run(script, timeout_s=60, what="a look at the job").out
    parts: dict[str, str] = {}
    for part in text.split(f"{mark} ")[1:]:
        title, _, body = part.partition("\n")
        parts[title] = body.strip()
    found = {}
    for line in parts.get("end", parts.get("live", "")).splitlines():
        words = line.split()
        if len(words) == 6:
            found[words[0].lstrip("/")] = (words[1], int(words[2]), words[3] == "true", words[4], words[5])
    failures = {title.split()[1]: body for title, body in parts.items() if title.startswith("failure ")}
    stopped = parts.get("stopped", "")
    # Stopped before there was a container: nobody will write its end.
    over = "end" in parts or bool(stopped and not found)
    return Seen(over=over, stopped=stopped, hosts=found, failures=failures)


def learn(record: Record, seen: Seen, target: Target) -> None:
    """Bring the record up to what was seen."""
    value = record.value
    value["Estiba"].pop("Unreachable", None)
    if not seen.over:
        if seen.stopped and value["TrainingJobStatus"] != "Stopping":
            record.to("Stopping", "Stopping the training job")
        return
    name = value["TrainingJobName"]
    hosts = [host.name for host in contract.hosts(value)]
    ends = dict(zip(hosts, (seen.hosts.get(one) for one in containers(name, value)), strict=True))
    codes = {host: end[1] if end else None for host, end in ends.items()}
    known = [end for end in ends.values() if end]
    outcome, reason = _outcome(seen, ends)
    record.end_attempt(outcome, codes, reason)
    if known:
        attempt = record.attempts[-1]
        attempt["StartTime"], attempt["EndTime"] = min(end[3] for end in known), max(end[4] for end in known)
        seconds = round(seconds_between(_stamp(attempt["StartTime"]), _stamp(attempt["EndTime"])))
        value.update(TrainingStartTime=attempt["StartTime"], TrainingEndTime=attempt["EndTime"])
        value.update(TrainingTimeInSeconds=seconds, BillableTimeInSeconds=seconds)
    if outcome in ("Completed", "Stopped", "MaxRuntimeExceeded"):
        place = f"{target}:{work_dir(name)}"
        value["ModelArtifacts"] = {"S3ModelArtifacts": f"{place}/*/model"}
        value["Estiba"]["OutputArtifacts"] = f"{place}/*/output/data"
        record.to(outcome, f"Training job {outcome}")
    else:
        record.fail(reason)


def _stamp(text: str) -> str:
    """Docker's nine digits of a second cut to what Python reads."""
    head, _, fraction = text.rstrip("Z").partition(".")
    return f"{head}.{fraction[:6]:0<6}+00:00"


def _outcome(seen: Seen, ends: dict[str, tuple[str, int, bool, str, str] | None]) -> tuple[str, str]:
    if seen.stopped:
        return ("MaxRuntimeExceeded" if seen.stopped == "MaxRuntimeExceeded" else "Stopped"), seen.stopped
    bad = {host: end for host, end in ends.items() if end is None or end[1] != 0}
    if not bad:
        return "Completed", ""
    # The host that failed by itself ended first; the others were stopped for it.
    host, end = min(bad.items(), key=lambda item: item[1][4] if item[1] else "")
    where = f" on {host}" if len(ends) > 1 else ""
    if host in seen.failures:
        return "Failed", seen.failures[host]
    if end is None:
        return "Failed", f"InternalServerError: the container{where} was removed from the box"
    if end[2]:
        return "Failed", f"OutOfMemory: the container was killed{where}; the box or --memory has too little"
    return "Failed", f"AlgorithmError: exit code {end[1]}{where}; /opt/ml/output/failure was not written, see the log"


def is_over(value: dict[str, Any]) -> bool:
    return value["TrainingJobStatus"] in TERMINAL


def wait(name: str, timeout_s: float | None = None) -> dict[str, Any]:
    """Until the job is over. Raises LaunchError after `timeout_s`, or when the box stays out of reach."""
    started = time.monotonic()
    lost_since: float | None = None
    while True:
        value = describe(name)
        if is_over(value):
            return value
        reason = value["Estiba"].get("Unreachable")
        lost_since = (lost_since or time.monotonic()) if reason else None
        if lost_since and time.monotonic() - lost_since > PATIENCE_S:
            raise BoxGone(f"{name}: {reason}; the job may be running, `estiba status {name}` asks again")
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            raise LaunchError(f"{name}: still {value['SecondaryStatus']} after {timeout_s:g} s")
        time.sleep(LOOK_S)


def stop(name: str, reason: str = "asked for") -> None:
    """TERM, then KILL after 120 s; returns at once. Raises LaunchError when the job is over, BoxGone."""
    value = describe(name)
    if is_over(value):
        raise LaunchError(f"{name}: is over already ({value['TrainingJobStatus']}); nothing to stop")
    names = shlex.join(containers(name, value))
    target = target_of(state.job_dir(name))
    Box(target).run(
        f"cd {work_dir(name)} && echo {shlex.quote(reason)} > stopped && "
        f"{{ setsid nohup docker stop --time {DOCKER_STOP_S} {names} >/dev/null 2>&1 </dev/null & }}"
    )


# ---- the log


class Copier(threading.Thread):
    """Copies the log of every host into the job's file here, while nobody else does.

    `done` is set when the file is whole; `error` says why it could not be made so.
    """

    def __init__(self, name: str, follow: bool) -> None:
        super().__init__(name=f"log of {name}", daemon=True)
        self.job, self.follow = name, follow
        self.directory = state.job_dir(name)
        self.box = Box(target_of(self.directory))
        self.done = threading.Event()
        self.quit = threading.Event()
        self.error: HostError | None = None
        self._open: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        try:
            self._run()
        except HostError as error:
            self.error = error
        finally:
            self.done.set()

    def _run(self) -> None:
        while not self.quit.is_set():
            lock = control.hold(self.directory)
            if lock is None:
                # Another terminal copies; its file is ours.
                if not self.follow:
                    return
                self.quit.wait(LOOK_S)
                continue
            with lock:
                value = describe(self.job)
                over = is_over(value)
                reason = value["Estiba"].get("Unreachable")
                if reason and not self.follow:
                    raise BoxGone(reason)
                if not reason:
                    self._copy(value, follow=self.follow and not over)
            if over or not self.follow:
                return
            self.quit.wait(LOOK_S)

    def _copy(self, value: dict[str, Any], *, follow: bool) -> None:
        hosts = contract.hosts(value)
        log = JobLog(self.directory, len(hosts) > 1)
        metrics = Metrics(value["AlgorithmSpecification"].get("MetricDefinitions", []), self._keep_metrics)
        pumps = []
        for host, container in zip(hosts, containers(self.job, value), strict=True):

            def stream(since: float | None, container: str = container) -> Iterator[bytes]:
                return self._stream(container, since, follow)

            pumps.append(Pump(host.name, self.directory / f"{host.name}.log", log, metrics, stream))
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        metrics.flush()

    def _keep_metrics(self, latest: dict[str, tuple[float, float]]) -> None:
        # Apart from the record, which another process may be changing.
        state.write_json(
            self.directory / METRICS,
            [{"MetricName": name, "Value": value, "Timestamp": at} for name, (value, at) in latest.items()],
        )

    def _stream(self, container: str, since: float | None, follow: bool) -> Iterator[bytes]:
        words = ["docker", "logs", "--timestamps", *(["--follow"] if follow else [])]
        words += ["--since", f"{since:.6f}"] if since is not None else []
        command = (
            f"if docker inspect {container} >/dev/null 2>&1; then {shlex.join([*words, container])} 2>&1; "
            f"else cat {work_dir(self.job)}/{container}.log; fi"
        )
        process = self.box.open(command)
        self._open.append(process)
        assert process.stdout
        while chunk := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            yield chunk
        if process.wait() == 255 and not self.quit.is_set():
            raise BoxGone(f"{self.box.target}: connection lost")

    def leave(self) -> None:
        """Stop copying; the job is not touched."""
        self.quit.set()
        for process in self._open:
            process.terminate()


def log_lines(name: str, *, follow: bool) -> Iterator[str]:
    """The whole log, which is kept in a file here as well; with `follow` until the job is over.

    Raises BoxGone after what is known, when the box cannot be asked.
    """
    path = state.job_dir(name) / LOG
    copier = Copier(name, follow)
    copier.start()
    rest, position = "", 0
    try:
        while True:
            done = copier.done.is_set()
            if path.exists():
                with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                    file.seek(position)
                    rest += file.read()
                    position = file.tell()
                *lines, rest = rest.split("\n")
                yield from lines
            if done:
                if rest:
                    yield rest
                break
            copier.done.wait(0.2)
    finally:
        copier.leave()
    if copier.error:
        raise copier.error


# ---- what it left


def fetch(name: str, into: Path) -> dict[str, int]:
    """Bring model and output of a finished job below `into`: number of files of each.

    Checkpoints go back to their own address when that is file://. Raises LaunchError.
    """
    value = describe(name)
    if not is_over(value):
        raise LaunchError(
            f"{name}: still {value['SecondaryStatus']}; wait for it (`estiba logs -f {name}`) or stop it first"
        )
    directory = state.job_dir(name)
    box, work = Box(target_of(directory)), work_dir(name)
    request = state.read_json(directory / control.REQUEST)
    hosts = [host.name for host in contract.hosts(request)]
    image = request["AlgorithmSpecification"]["TrainingImage"]
    user_id = state.read_json(directory / TARGET).get("user_id", "0:0")
    if user_id != "0:0":
        # What containers made is root's, and may be closed to others.
        give = f'docker run --rm --network none --user 0 -v "$HOME/{work}:/work" --entrypoint chown'
        box.run(f"{give} {shlex.quote(image)} -R {user_id} /work", timeout_s=600, what="taking over the files")
    found: dict[str, int] = {}
    for what, folder in (("model", "model"), ("output", "output/data")):
        place = into / what
        place.mkdir(parents=True, exist_ok=True)
        for index, host in enumerate(hosts):
            # Where two hosts wrote the same name, the first host's is kept. The box's links are not followed here.
            keep = ["--ignore-existing"] if index else []
            box.rsync(["-rt", "--partial", "--no-links", *keep, f"{box.rsync_at}:{work}/{host}/{folder}/", f"{place}/"])
        found[what] = sum(1 for _ in walk(place))
    store = request.get("CheckpointConfig", {}).get("S3Uri", "")
    if store.startswith("file://"):
        place = contract.file_path(store)
        place.mkdir(parents=True, exist_ok=True)
        box.rsync(["-rt", "--partial", "--no-links", f"{box.rsync_at}:{work}/checkpoints/", f"{place}/"])
    for _ in log_lines(name, follow=False):
        pass
    return found
