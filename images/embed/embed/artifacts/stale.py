"""Outputs of earlier runs that this run does not replace: their input is gone or unreadable, or their model another.

Only files that this job layer wrote are looked at; whatever else lies in the output folder stays unmentioned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.parquet as pq

from embed.artifacts.outputs import RESULTS_NAME
from embed.artifacts.written import METADATA_KEY
from embed.data.chunks import ModelInfo
from embed.data.files import PARALLEL_READS
from estiba.errors import ConfigError, StoreError
from estiba.log import get_logger
from estiba.platform.contract import Job
from estiba.storage import Store

logger = get_logger(__name__)

SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class OldOutput:
    """A file of an earlier run."""

    path: str
    reason: str
    """Why it is stale."""


def find_provenance(target: Store, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The provenance of those of the files that are outputs, by path."""

    def read(path: str) -> tuple[str, dict[str, Any] | None]:
        try:
            with target.open(path) as file:
                value = json.loads((pq.read_metadata(file).metadata or {})[METADATA_KEY])
        except StoreError:
            if target.is_durable:
                raise
            return path, None
        except Exception:  # not an output of this job
            return path, None
        return path, value if isinstance(value, dict) and "output_id" in value else None

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        return {path: value for path, value in pool.map(read, paths) if value is not None}


def refuse_two_models(target: Store, found: dict[str, dict[str, Any]], model: ModelInfo, remedy: str) -> None:
    """Raise ConfigError if the folder holds vectors of another model, which nothing may compare with this one's."""
    others = {
        path: value
        for path, value in sorted(found.items())
        if (value.get("digest"), value.get("pooling")) != (model.identity["digest"], model.identity["pooling"])
    }
    if others:
        path, value = next(iter(others.items()))
        raise ConfigError(
            f"{target.url} holds {len(others)} outputs of another model ({path}: {value.get('model')}, "
            f"{value.get('digest')}); {remedy}"
        )


def without_input(found: Iterable[str], inputs: frozenset[str] | None) -> list[OldOutput]:
    """The outputs whose input file no longer exists. Without the list of all inputs, none is known."""
    if inputs is None:
        return []
    return [OldOutput(path=path, reason="its input no longer exists") for path in sorted(found) if path not in inputs]


def results_of_other_hosts(target: Store, paths: Iterable[str], job: Job) -> list[OldOutput]:
    """Those of the files that are the results.json of hosts that this job does not have."""
    if job.host_count == 1:
        own = {"results.json"}
    else:
        own = {f"results-{host}.json" for host in job.hosts}
    found = []
    for path in paths:
        if RESULTS_NAME.fullmatch(path) and path not in own:
            try:
                value = json.loads(target.read(path))
            except (ValueError, StoreError):
                continue
            if isinstance(value, dict) and {"job", "host", "files", "summary"} <= value.keys():
                found.append(OldOutput(path=path, reason="results of an earlier run with other hosts"))
    return found


def handle(target: Store, stale: list[OldOutput], policy: Literal["keep", "remove", "refuse"]) -> None:
    """Name the old outputs in the log, or remove them."""
    if not stale:
        return
    names = ", ".join(f"{item.path} ({item.reason})" for item in stale[:SHOWN])
    more = f" and {len(stale) - SHOWN} more, all in results.json" if len(stale) > SHOWN else ""
    if policy == "remove":
        for item in stale:
            target.delete(item.path)
        logger.info(f"removed {len(stale)} outputs of earlier runs: {names}{more}")
    else:
        logger.warning(
            f"{target.url} still holds {len(stale)} outputs of earlier runs: {names}{more}; "
            "delete them, or pass --stale-outputs remove"
        )


def refuse(target: Store, stale: list[OldOutput]) -> None:
    """Raise ConfigError if there are old outputs."""
    if stale:
        names = ", ".join(item.path for item in stale[:SHOWN])
        raise ConfigError(
            f"{target.url} holds {len(stale)} outputs whose input no longer exists ({names}); delete them, "
            "or pass --stale-outputs remove"
        )
