"""Whether all hosts listed the same input, from which each computes its own part.

Hosts do not communicate. A host that starts later, or again, may find another input; then the parts do not fit
together, and a file can be in none. The results of the hosts say what each has listed, so that the last one to end
finds it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from embed.artifacts.outputs import RESULTS_NAME
from embed.data.files import PARALLEL_READS, open_input
from embed.data.table import InputFile
from estiba.errors import ConfigError, StoreError
from estiba.log import get_logger
from estiba.platform.contract import Job
from estiba.storage import Store

logger = get_logger(__name__)

SHOWN = 5


def results_name(job: Job, host: str) -> str:
    return "results.json" if job.host_count == 1 else f"results-{host}.json"


def forget_own_results(target: Store, job: Job) -> None:
    """Delete what an earlier attempt of this host left: other hosts would take this one for ended."""
    if job.host_count > 1:
        with contextlib.suppress(StoreError):
            target.delete(results_name(job, job.current_host))


def write_results(target: Store, job: Job, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=2, ensure_ascii=True) + "\n"
    target.write(results_name(job, job.current_host), text.encode())


def listing_of(files: Sequence[InputFile]) -> dict[str, Any]:
    """What decides the parts of the hosts: paths and sizes, as JSON types."""
    lines = "\n".join(sorted(f"{file.path}\0{file.size_bytes}" for file in files))
    return {"files": len(files), "digest": xxhash.xxh3_128_hexdigest(lines.encode("utf-8", "surrogateescape"))}


def files_in_no_part(target: Store, job: Job, results: dict[str, Any], input_location: str) -> str | None:
    """What to tell the user if this is the last host to end, the listings differ, and a file has no output.

    `results` are this host's, written to `target` before, so that of two hosts that end together one sees the other's.
    Where no name tells this job from an earlier one, or nothing is missing, there is only a warning.
    """
    ended = _ended(target, job)
    mine = results["listing"]
    others = {host: found["listing"] for host, found in ended.items() if found["listing"] != mine}
    if not others or len(ended) < job.host_count:
        return None
    host, listing = next(iter(others.items()))
    text = (
        f"the input changed between the starts of the hosts: {host} listed {listing['files']:,} files "
        f"({listing['digest'][:8]}) and {job.current_host} {mine['files']:,} ({mine['digest'][:8]}), so that a file "
        "can be in the part of none"
    )
    remedy = "run the same command again, which keeps what is complete and embeds the rest"
    missing = _without_output(target, ended, input_location)
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        text += f"; without output: {', '.join(missing[:SHOWN])}{more}"
    if missing and job.name is not None:
        return f"{text}; {remedy}"
    logger.warning("%s; %s", text, remedy if missing else f"every file has an output, but it may be older; {remedy}")
    return None


def _ended(target: Store, job: Job) -> dict[str, dict[str, Any]]:
    """The results of this job's hosts that have ended, by host."""
    names = {results_name(job, host): host for host in job.hosts}
    there = [entry.path for entry in target.list() if RESULTS_NAME.fullmatch(entry.path) and entry.path in names]

    def read(name: str) -> Any:
        with contextlib.suppress(ValueError, StoreError):
            return json.loads(target.read(name))
        return None

    with ThreadPoolExecutor(PARALLEL_READS) as threads:
        found = dict(zip(there, threads.map(read, there), strict=True))
    return {
        names[name]: value
        for name, value in found.items()
        if isinstance(value, dict)
        and (value.get("job"), value.get("hosts")) == (job.name, job.host_count)
        and isinstance(value.get("listing"), dict)
    }


def _without_output(target: Store, ended: dict[str, dict[str, Any]], input_location: str) -> list[str]:
    """The files of the input as it is now that no host found bad and that have no output."""
    try:
        paths = {file.path for file in open_input(input_location).files}
    except ConfigError:  # it is gone by now
        return []
    bad = {item["path"] for found in ended.values() for item in found["files"]["bad"]}
    return sorted(paths - bad - {entry.path for entry in target.list()})
