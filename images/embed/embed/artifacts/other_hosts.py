"""Whether all hosts listed the same input, from which each computes its own part.

Hosts do not communicate. A host that starts later, or again, may find another input; then the parts do not fit
together, and a file can be in none. The results of the hosts say what each has listed, so that the last one to end
finds it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import xxhash

from embed.data.table import InputFile
from estiba.errors import DataError, StoreError
from estiba.log import get_logger
from estiba.platform.contract import Job
from estiba.storage import Store

logger = get_logger(__name__)

SHOWN = 5


def results_name(job: Job, host: str) -> str:
    return "results.json" if job.host_count == 1 else f"results-{host}.json"


def write_results(target: Store, job: Job, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=2, ensure_ascii=True) + "\n"
    target.write(results_name(job, job.current_host), text.encode())


def listing_of(files: Sequence[InputFile]) -> dict[str, Any]:
    """What decides the parts of the hosts: paths and sizes, as JSON types."""
    lines = sorted(f"{file.path}\0{file.size_bytes}" for file in files)
    return {"files": len(files), "digest": xxhash.xxh3_128_hexdigest("\n".join(lines).encode())}


def check_listings(target: Store, job: Job, results: dict[str, Any], paths: frozenset[str]) -> None:
    """Raise DataError if another host of this job ended with another listing; warn where no name tells the jobs apart.

    `results` are this host's, written to `target` before, so that of two hosts that end together one sees the other's;
    `paths` are all input files.
    """
    mine = results["listing"]
    ended = {host: found for host in job.hosts if (found := _results(target, results_name(job, host), job)) is not None}
    others = {
        host: found["listing"] for host, found in ended.items() if host != job.current_host and found["listing"] != mine
    }
    if not others:
        return
    host, listing = next(iter(others.items()))
    what = (
        f"the input changed between the starts of the hosts: {host} listed {listing['files']:,} files "
        f"({listing['digest'][:8]}) and {job.current_host} {mine['files']:,} ({mine['digest'][:8]}), so that a file "
        "can be in the part of neither"
    )
    if len(ended) == job.host_count and (missing := _without_output(target, paths, ended.values())):
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        what += f"; without output: {', '.join(missing[:SHOWN])}{more}"
    remedy = "run the same command again, which keeps what is complete and embeds the rest"
    if job.name is None:
        logger.warning(f"{what}. If {host} ended in this run and not in an earlier one, {remedy}")
        return
    write_results(target, job, results | {"status": "failed"})
    raise DataError(f"{what}; {remedy}")


def _results(target: Store, name: str, job: Job) -> dict[str, Any] | None:
    """The results of another host of this job, or None."""
    try:
        found = json.loads(target.read(name))
    except (ValueError, StoreError):
        return None
    is_of_job = isinstance(found, dict) and found.get("job") == job.name and found.get("hosts") == job.host_count
    return found if is_of_job and isinstance(found.get("listing"), dict) else None


def _without_output(target: Store, paths: frozenset[str], ended: Any) -> list[str]:
    bad = {item["path"] for found in ended for item in found["files"]["bad"]}
    return sorted(paths - bad - {entry.path for entry in target.list()})
