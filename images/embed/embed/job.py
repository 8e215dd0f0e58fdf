"""The embed job from start to end: list the input, find finished work, compute the rest, join it, report.

Finished work is one of two things: a verified chunk in the checkpoint store, or a complete output file whose digest the
ledger records. A file in the output directory proves nothing by itself, since a spot host takes the directory with it;
lost outputs are joined again from their chunks.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from embed.artifacts import stale
from embed.artifacts.metrics import metrics_writer, write_last
from embed.artifacts.old_outputs import OldOutputs, find_old_outputs
from embed.artifacts.other_hosts import files_in_no_part, forget_own_results, listing_of, write_results
from embed.artifacts.outputs import added_columns, kept_columns, why_not_named, why_not_writable
from embed.artifacts.results import results_of
from embed.artifacts.stale import OldOutput
from embed.checks import check_buckets, check_environment, check_locations, check_writable
from embed.config import EmbedConfig
from embed.data.chunks import ModelInfo
from embed.data.files import PARALLEL_READS, inspect, open_input, require_input, separate_bad, share_of, why_not_text
from embed.data.int96 import with_exact_timestamps
from embed.data.precision import decoding
from embed.data.rows import CALIBRATION_TEXTS, COMPARED_TEXTS, first_texts
from embed.data.table import BadFile, Table
from embed.state import NOTHING_COMPUTED, JobState
from estiba import __version__
from estiba.checkpoint import ChunkStore, Ledger, exclusive
from estiba.errors import ConfigError, DataError
from estiba.log import get_logger
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.progress import Progress
from estiba.storage import FileStore, Store, open_store, stage

if TYPE_CHECKING:
    from embed.pool import InProcess, MultiProcess
    from estiba.metrics_output import MetricsWriter

logger = get_logger(__name__)

PASSES = 3
"""A chunk that fails verification is computed again. After three passes the disk is at fault and the job fails."""
CHECKPOINT_FLAG = "--checkpoint-path, or --no-checkpoint to do without"


def embed(config: EmbedConfig, job: Job, stop: Stop) -> None:
    """Run the job. Raises EstibaError: Interrupted on a stop, DataError if a bad file fails the job."""
    started = time.monotonic()
    check_environment()
    require_input(config.input_path)
    check_locations(config)
    stop.unless_stopped(lambda: check_buckets(config), NOTHING_COMPUTED)
    target = open_store(config.output_path)
    check_writable(target, "--output-path")
    if not config.no_checkpoint:
        check_writable(open_store(config.checkpoint_path), CHECKPOINT_FLAG)
    found = stop.unless_stopped(lambda: list_input(config, job, target), NOTHING_COMPUTED)
    stop.unless_stopped(lambda: forget_own_results(target, job), NOTHING_COMPUTED)
    old_run = stop.unless_stopped(lambda: find_old_outputs(config), NOTHING_COMPUTED)
    from embed.pool import start_pool  # imports torch, which takes seconds; mistakes above are reported at once

    with checkpoint_store(config, job) as (saved, is_resumed):
        location = stop.unless_stopped(lambda: local_model(config), NOTHING_COMPUTED)
        try:
            count = COMPARED_TEXTS + (CALIBRATION_TEXTS if config.dtype == "int8" else 0)
            first = stop.unless_stopped(
                lambda: first_texts(found.store, found.tables, config.text_column, count), NOTHING_COMPUTED
            )
            pool = start_pool(config.model_copy(update={"model": location}), found.store.url, first, stop)
        except ConfigError as error:  # the user knows the address, and not the directory that it was copied to
            raise ConfigError(str(error).replace(location, config.model)) from error
        loaded = time.monotonic()
        try:
            if old_run is not None:
                old_run.refuse_other_settings(config, pool.model.identity)
            state = open_state(config, job, pool.model, found.store, target, saved, found.tables, list(found.bad))
            old = old_outputs(config, job, state, pool.model, found)
            model = f"{pool.model.dimensions} dimensions, {pool.model.dtype} on {pool.model.device} "
            model += f"({pool.model.engine}); "
            model += f"--batch-size {config.batch_size}: {batches_of(config, pool.model)}"
            logger.info(state.summary(found.ignored, is_resumed, model))
            metrics = metrics_writer(config, job, saved)
            compute(state, pool, metrics, stop, old_run)
            computed = time.monotonic()
        finally:
            pool.close()
        state.finish()
        old += [
            OldOutput(path=item.path, reason="its input can no longer be embedded")
            for item in state.bad
            if item.path in state.old_outputs and not item.may_be_good
        ]
        results = results_of(
            state,
            config=config,
            job=job,
            model=pool.model,
            ignored=found.ignored,
            stale=old,
            started=started,
            loaded=loaded,
            computed=computed,
        )
        results["listing"] = found.listing
        write_last(metrics, results)
    write_results(target, job, results)
    stale.handle(target, old, config.stale_outputs)
    logger.info(results["summary"])
    left_out = None
    if found.listing is not None and job.host_count > 1:
        left_out = files_in_no_part(target, job, results, config.input_path)
    if left_out is not None:
        write_results(target, job, results | {"status": "failed"})
    report_failures(state, config, left_out)


# --- before --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Input:
    """This host's part of the input."""

    store: Store
    tables: list[Table]
    bad: list[BadFile]
    ignored: list[str]
    paths: frozenset[str] | None
    """All files of all hosts; None if this host does not see them all, or the input is one file of many."""
    listing: dict[str, Any] | None
    """What every host must have listed; None if this host does not see all files."""


def list_input(config: EmbedConfig, job: Job, target: Store) -> Input:
    """List and inspect this host's files. Raises ConfigError if none can be embedded."""
    store = open_store(config.input_path)
    channel = job.channel_of(Path(config.input_path)) if isinstance(store, FileStore) else None
    is_sharded = channel is not None and channel.is_sharded
    listing = open_input(config.input_path, may_be_empty=is_sharded)
    source, files, ignored = listing.store, listing.files, listing.ignored
    if not files and not is_sharded:
        raise ConfigError(
            f"--input-path {config.input_path}: holds hidden files only ({names_of(ignored)}); a name that begins with "
            "a dot or an underscore is ignored, unless it is a partition such as _id=3"
        )
    is_part = listing.is_one_file or (is_sharded and job.host_count > 1)
    paths = None if is_part else frozenset(file.path for file in files)
    listed = None if is_part else listing_of(files)
    if job.host_count > 1 and not is_sharded:
        files = share_of(files, job.host_index, job.host_count)
        ignored = ignored if job.host_index == 0 else []
    with ThreadPoolExecutor(PARALLEL_READS) as threads:
        inspected = list(threads.map(lambda file: inspect(source, file), files))
        bad = [item for item in inspected if isinstance(item, BadFile)]
        tables = [item for item in inspected if isinstance(item, Table)]
        added_columns(config)
        is_whole = job.host_count == 1  # one host of several may have only the bad files

        def why_bad(table: Table) -> str | None:
            return (
                why_not_text(table, config.text_column, binary_as_text=config.binary_as_text)
                or why_not_writable(table, config)
                or why_not_named(table.path, target)
            )

        tables, more = separate_bad(tables, why_bad, is_whole_input=is_whole)
        bad += more
        exact = list(
            threads.map(lambda table: with_exact_timestamps(source, table, kept_columns(table, config)), tables)
        )
    bad += [item for item in exact if isinstance(item, BadFile)]
    tables = [item for item in exact if isinstance(item, Table)]
    for item in bad:
        logger.info(f"bad file: {item.path}: {item.reason}")
    bad = sorted(bad, key=lambda item: item.path)
    return Input(store=source, tables=tables, bad=bad, ignored=ignored, paths=paths, listing=listed)


def batches_of(config: EmbedConfig, model: ModelInfo) -> str:
    rows = f"at most {config.batch_size} rows" if config.batch_size else "any number of rows"
    return f"{rows} and at most {model.token_budget} tokens in a batch on {model.device}"


def names_of(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@contextlib.contextmanager
def checkpoint_store(config: EmbedConfig, job: Job) -> Iterator[tuple[Store, bool]]:
    """The store for finished chunks, and whether an earlier attempt left something in it.

    With --no-checkpoint it is a temporary directory.
    """
    if config.no_checkpoint:
        with tempfile.TemporaryDirectory(prefix="estiba-embed-") as folder:
            yield FileStore(Path(folder)), False
        return
    store = open_store(config.checkpoint_path)
    is_resumed = bool(store.list())
    with exclusive(store, f"embed-{job.current_host}"):
        yield store, is_resumed


def local_model(config: EmbedConfig) -> str:
    """The model's directory, or its name on the hub. A model on S3 is copied to a temporary directory first."""
    model, revision = config.model, config.revision
    if revision is not None and ("://" in model or Path(model).is_dir()):
        raise ConfigError(f"--revision {revision} applies to hub models only, and {model} is a location; leave it out")
    if not model.startswith(("s3://", "file://")):
        return model
    store = open_store(model)
    if isinstance(store, FileStore):
        return str(store.root)
    # A model that was replaced at the same address has another listing.
    listing = [f"{entry.path} {entry.size_bytes} {entry.etag}" for entry in store.list()]
    name = xxhash.xxh3_64_hexdigest("\0".join([model, *listing]).encode())
    return str(stage(model, Path(tempfile.gettempdir()) / f"estiba-model-{name}"))


def open_state(
    config: EmbedConfig,
    job: Job,
    model: ModelInfo,
    source: Store,
    target: Store,
    saved: Store,
    tables: list[Table],
    bad: list[BadFile],
) -> JobState:
    """The job's files, with the work that earlier attempts finished."""
    chunks_id = chunks_identity(config, model)
    folder = f"embed-{chunks_id}"
    state = JobState(
        config=config,
        source=source,
        target=target,
        chunks=ChunkStore(saved, f"{folder}/pieces"),
        ledger=None if config.no_checkpoint else Ledger(saved, f"{folder}/ledger", job.current_host),
        provenance={
            "estiba": __version__,
            "output_id": output_identity(config, chunks_id),
            "text_column": config.text_column,
            "embedding_column": config.embedding_column,
            "embedding_dtype": config.embedding_dtype,
            **decoding(config.embedding_dtype),
            **model.identity,
            # A directory is identified by its digest, wherever it is mounted.
            "model": config.model if config.model.startswith("s3://") else model.identity["model"],
        },
        dimensions=model.dimensions,
        token_dimensions=model.token_dimensions,
        device=model.device,
        bad=bad,
    )
    state.open(tables, PARALLEL_READS)
    others = {name for entry in saved.list() if (name := entry.path.split("/")[0]).startswith("embed-")} - {folder}
    if others and not config.no_checkpoint:
        logger.info(
            f"{saved.url}: ignoring saved work of {len(others)} other configuration(s) ({', '.join(sorted(others))}); "
            "delete it when it is no longer needed"
        )
    return state


def old_outputs(config: EmbedConfig, job: Job, state: JobState, model: ModelInfo, found: Input) -> list[OldOutput]:
    """What earlier runs left in the output folder and this one will not replace.

    Raises ConfigError if the outputs are another model's, or by --stale-outputs refuse.
    """
    known = {path for path, item in state.files.items() if item.written is not None}
    paths = [entry.path for entry in state.target.list()]
    provenance = stale.find_provenance(state.target, [path for path in paths if path not in known])
    if config.stale_outputs != "remove":
        stale.refuse_two_models(
            state.target, provenance, model, "pass another --output-path, or --stale-outputs remove to replace them"
        )
    elif found.paths is None and job.host_count == 1:  # one file: the outputs of others are neither replaced nor stale
        others = {path: value for path, value in provenance.items() if path not in state.files}
        stale.refuse_two_models(
            state.target, others, model, "one input file replaces its own output only; pass another --output-path"
        )
    state.old_outputs = frozenset(provenance)
    if job.host_index != 0:
        return []
    old = stale.without_input(provenance, found.paths) + stale.results_of_other_hosts(state.target, paths, job)
    if config.stale_outputs == "refuse":
        stale.refuse(state.target, old)
    return old


IDENTITY = (
    *("digest", "dtype", "products", "pooling", "prompt", "max_length", "dimensions", "normalize"),
    *("chunk", "chunk_overlap", "chunk_output", "sparse", "multi_vector"),
)
"""What changes a vector; a model has those that the settings ask for. Library versions are not included, so a new image
continues the work of the old one."""


def chunks_identity(config: EmbedConfig, model: ModelInfo) -> str:
    """Names the chunks that this job can use: same model, same text column, same stored precision."""
    parts = {name: model.identity[name] for name in IDENTITY if name in model.identity}
    return _digest(parts | {"text_column": config.text_column, "embedding_dtype": config.embedding_dtype})


def output_identity(config: EmbedConfig, chunks_id: str) -> str:
    """Names everything else that shapes an output file."""
    fields = ("columns", "embedding_column", "status_column", "n_tokens", "truncated")
    return _digest({"run": chunks_id, **{name: getattr(config, name) for name in fields}})


def _digest(parts: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())[:16]


# --- during --------------------------------------------------------------------------------------------------------


def compute(
    state: JobState,
    pool: InProcess | MultiProcess,
    metrics: MetricsWriter | None,
    stop: Stop,
    old_run: OldOutputs | None = None,
) -> None:
    """Work until every file is joined or bad. Raises Interrupted on a stop; the ledger is written in any case."""
    progress = Progress(total=state.rows_total, unit="rows", done=state.rows_saved, metrics=metrics)
    state.progress = progress
    try:
        for _ in range(PASSES):
            earlier = state.computed_by() if state.config.engine == "auto" else None
            tasks = state.tasks()
            if tasks and old_run is not None:
                began = time.monotonic()
                pool.read_old_outputs(old_run, stop)
                state.attempt.reading_old_s += time.monotonic() - began
            if tasks and not stop():
                pool.run(tasks, state.chunks, state.on_event, lambda: stop() or state.error is not None, earlier)
            state.join(stop)
            if stop():
                raise stop.interrupted(state.what_is_saved())
            if not state.lost:
                return
            state.lost.clear()
        raise DataError(
            f"{state.chunks.store.url}: saved chunks failed verification {PASSES} times; "
            "do not trust this disk, use another --checkpoint-path"
        )
    except BaseException:
        with contextlib.suppress(Exception):  # such as a full disk; the first error is the one to report
            state.abandon()
        raise
    finally:
        progress.close()


# --- after ---------------------------------------------------------------------------------------------------------


def report_failures(state: JobState, config: EmbedConfig, left_out: str | None = None) -> None:
    """Raise DataError after everything else is done, if there were bad files or rows that are not to be skipped.

    `left_out` says which files no host has in its part.
    """
    problems = []
    if state.bad:
        names = "; ".join(f"{item.path}: {item.reason}" for item in state.bad[:20])
        more = f"; and {len(state.bad) - 20} more, all in results.json" if len(state.bad) > 20 else ""
        text = f"{len(state.bad)} of {state.files_total} files could not be embedded: {names}{more}"
        remedy = "All other files are complete; repair or remove these, or pass --on-bad-file skip"
        problems.append((text, remedy, config.on_bad_file))
    if bad_rows := state.bad_rows():
        names = "; ".join(f"{path}: row {names_of([str(row) for row in rows])}" for path, rows in bad_rows[:20])
        more = f"; and in {len(bad_rows) - 20} more files" if len(bad_rows) > 20 else ""
        text = f"rows with tokens that the model's embedding table lacks got no vector: {names}{more}"
        remedy = "All other rows are complete; use a model with its own tokenizer, or pass --on-bad-row skip"
        problems.append((text, remedy, config.on_bad_row))
    failures = [left_out] if left_out is not None else []
    failures += [f"{text}. {remedy}" for text, remedy, policy in problems if policy == "fail"]
    for text, _, policy in problems:
        if policy == "skip":
            logger.warning(text)
    if failures:
        raise DataError(". ".join(failures))
