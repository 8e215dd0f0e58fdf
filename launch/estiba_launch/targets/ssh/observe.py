"""The status of jobs on a remote host: one shell command for all of them, and what follows from its answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from estiba_launch.jobs.record import enter, now_text, seconds_between
from estiba_launch.request import contract
from estiba_launch.targets.ssh.script import INSPECT, container_names, work_dir

MARK = "=== estiba"


@dataclass(frozen=True, kw_only=True)
class ContainerState:
    """The state of one host's container."""

    exit_code: int
    out_of_memory: bool
    started: str
    finished: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the remote host knows about a job."""

    ended: bool
    gone: bool
    """Its folder was removed, and no container runs."""
    watched: bool
    """Its watcher is running."""
    stop_reason: str
    """Why it was stopped; empty when it was not."""
    containers: Mapping[str, ContainerState]
    """By name."""
    failures: Mapping[str, str]
    """Host to the text of its failure file."""
    unsynced: str = ""
    """What of the checkpoints the last sync could not bring to the store."""
    restarts: Sequence[str] = ()
    """When the containers were started again after the machine or its engine restarted."""
    unstarted: bool = False
    """Its start was cut off before there was anything to watch."""
    disk_full: bool = False


def command(requests: Sequence[Mapping[str, Any]]) -> str:
    """Shell that prints what the host knows about these jobs. Changes nothing."""
    names = [name for one in requests for name in container_names(one["TrainingJobName"], one)]
    sections = [_section(request) for request in requests]
    # Through stdin: the names of many jobs are longer than a command line may be.
    inspect = f"xargs docker inspect --format '{INSPECT}' 2>/dev/null <<'EOF'\n{chr(10).join(names)}\nEOF"
    # While the engine is away (the machine is booting), nothing is known of containers.
    return "\n".join([*sections, f"docker version >/dev/null 2>&1 && echo '{MARK} live'", inspect, ":"])


def _section(request: Mapping[str, Any]) -> str:
    name = request["TrainingJobName"]
    hosts = " ".join(host.name for host in contract.hosts(request))
    return f"""\
if cd "$HOME/{work_dir(name)}" 2>/dev/null; then
echo '{MARK} job {name}'
if [ -e stopped ]; then echo '{MARK} stopped'; cat stopped; fi
[ ! -e start.lock ] || flock -n start.lock true || echo '{MARK} starting'
if [ -e end ]; then echo '{MARK} end'; cat end
else
  if [ -e start.sh ]; then [ ! -e watch.lock ] || ! flock -n watch.lock true || echo '{MARK} unwatched'
  elif [ ! -e watch.lock ] || flock -n watch.lock true; then echo '{MARK} unwatched'; echo '{MARK} gone'; fi
  [ -e watch.lock ] || [ -z "$(find start.lock -mmin +1 2>/dev/null)" ] || ! flock -n start.lock true ||
    echo '{MARK} unstarted'
  [ "$(df -Pk . | awk 'NR == 2 {{print $4}}')" -gt 1024 ] || echo '{MARK} full'
fi
if [ -e restarts ]; then echo '{MARK} restarts'; cat restarts; fi
if [ -e unsynced ]; then echo '{MARK} unsynced'; cat unsynced; echo; fi
for host in {hosts}; do
  if [ -e "$host/output/failure" ]; then echo "{MARK} failure $host"; head -c 4096 "$host/output/failure"; echo; fi
done
else echo '{MARK} job {name}'; echo '{MARK} unwatched'; echo '{MARK} gone'; fi"""


def parse(text: str, requests: Sequence[Mapping[str, Any]]) -> dict[str, Snapshot]:
    """Job name to what `command` printed. A job whose folder is missing on the host has no snapshot."""
    jobs: dict[str, dict[str, str]] = {}
    live: dict[str, ContainerState] | None = None
    parts: dict[str, str] = {}
    for part in text.split(f"{MARK} ")[1:]:
        title, _, content = part.partition("\n")
        if title.startswith("job "):
            parts = jobs[title.removeprefix("job ")] = {}
        elif title == "live":
            live = _containers(content)
        else:
            parts[title] = content.strip()

    def own(name: str, request: Mapping[str, Any]) -> dict[str, ContainerState] | None:
        return None if live is None else {one: live[one] for one in container_names(name, request) if one in live}

    return {
        name: _snapshot(jobs[name], own(name, request))
        for request in requests
        if (name := request["TrainingJobName"]) in jobs
    }


def _containers(text: str) -> dict[str, ContainerState]:
    """What `docker inspect` printed, by container name."""
    lines = [line.split() for line in text.splitlines()]
    return {
        words[0].lstrip("/"): ContainerState(
            exit_code=int(words[2]),
            out_of_memory=words[3] == "true",
            started=words[4],
            finished=words[5],
        )
        for words in lines
        if len(words) == 6
    }


def _snapshot(parts: Mapping[str, str], live: Mapping[str, ContainerState] | None) -> Snapshot:
    # The file is empty where the disk was full.
    stop_reason = (parts["stopped"] or "requested by the user") if "stopped" in parts else ""
    return Snapshot(
        # Stopped before it had a container: no watcher will write its end.
        ended="end" in parts or bool(stop_reason and live is not None and not live and "starting" not in parts),
        # Nor where its folder was removed.
        gone="gone" in parts
        and live is not None
        and not any(one.finished.startswith("0001-") for one in live.values()),
        watched="unwatched" not in parts,
        stop_reason=stop_reason,
        containers=_containers(parts["end"]) if "end" in parts else live or {},
        unsynced=parts.get("unsynced", ""),
        failures={title.split()[1]: body for title, body in parts.items() if title.startswith("failure ")},
        restarts=parts.get("restarts", "").split(),
        unstarted="unstarted" in parts,
        disk_full="full" in parts,
    )


def advance(document: Mapping[str, Any], seen: Snapshot, target: str) -> dict[str, Any]:
    """The job's document, brought up to date with a snapshot."""
    value: dict[str, Any] = copy.deepcopy(dict(document))
    attempts = value["Estiba"]["Attempts"]
    for restarted in seen.restarts[len(attempts) - 1 :]:
        attempts[-1].update(EndTime=restarted, Outcome="Interrupted", Reason="the host or its engine restarted")
        attempts.append({"Number": len(attempts) + 1, "StartTime": restarted, "Hosts": attempts[-1].get("Hosts", [])})
    if seen.unstarted:
        reason = "InternalServerError: the connection or the host was lost before it had started; run it again"
        attempts[-1].update(EndTime=now_text(), Outcome="Failed", Reason=reason)
        enter(value, "Failed", reason)
        return value
    # A job that is being started has no folder for a moment.
    if not seen.ended and not (seen.gone and value["SecondaryStatus"] != "Starting"):
        if seen.disk_full:
            value["Estiba"]["Unreachable"] = f"the disk of {target} is full; make room there (`df -h`, ~/estiba/jobs)"
        if seen.stop_reason and value["TrainingJobStatus"] != "Stopping":
            enter(value, "Stopping", "Stopping the training job")
        elif seen.containers and value["SecondaryStatus"] == "Starting":
            enter(value, "Training", f"Training on {target}")
        return value
    name = value["TrainingJobName"]
    hosts = [host.name for host in contract.hosts(value)]
    ends = {
        host: seen.containers.get(container)
        for host, container in zip(hosts, container_names(name, value), strict=True)
    }
    outcome, reason = _outcome(seen, ends)
    attempt = attempts[-1]
    codes = {host: end.exit_code if end else None for host, end in ends.items()}
    attempt.update(EndTime=now_text(), Outcome=outcome, Reason=reason, ExitCodes=codes)
    known = [end for end in ends.values() if end]
    if known:
        attempt.update(StartTime=min(end.started for end in known), EndTime=max(end.finished for end in known))
        value["TrainingStartTime"] = attempts[0]["StartTime"]
    seconds = round(sum(seconds_between(one["StartTime"], one["EndTime"]) for one in attempts))
    value.update(TrainingEndTime=attempt["EndTime"], TrainingTimeInSeconds=seconds, BillableTimeInSeconds=seconds)
    if seen.unsynced:
        attempt["Unsynced"] = seen.unsynced
    if outcome == "Failed":
        enter(value, "Failed", reason)
    else:
        place = f"{target}:{work_dir(name)}"
        value["ModelArtifacts"] = {"S3ModelArtifacts": f"{place}/*/model"}
        value["Estiba"]["OutputArtifacts"] = f"{place}/*/output/data"
        note = f"; checkpoints not synced: {seen.unsynced}" if seen.unsynced else ""
        enter(value, outcome, f"Training job {outcome}{note}")
    return value


def _outcome(seen: Snapshot, ends: Mapping[str, ContainerState | None]) -> tuple[str, str]:
    if seen.stop_reason:
        return ("MaxRuntimeExceeded" if seen.stop_reason == "MaxRuntimeExceeded" else "Stopped"), seen.stop_reason
    failed = {host: end for host, end in ends.items() if end is None or end.exit_code != 0}
    if not failed:
        return "Completed", ""
    # The host that failed by itself ended first. The others were stopped because of it.
    host, end = min(failed.items(), key=lambda item: item[1].finished if item[1] else "")
    where = f" on {host}" if len(ends) > 1 else ""
    if host in seen.failures:
        return "Failed", seen.failures[host]
    if end is None:
        return "Failed", f"InternalServerError: the container{where} was removed from the host"
    if end.out_of_memory:
        return "Failed", f"OutOfMemory: the container was killed{where}; the host or --memory has too little"
    return (
        "Failed",
        f"AlgorithmError: exit code {end.exit_code}{where}; /opt/ml/output/failure was not written, see the log",
    )
