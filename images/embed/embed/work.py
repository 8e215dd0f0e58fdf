"""The embed job from start to end: what is there, what is done, compute the rest, join, account for every row.

Nothing is lost and nothing is done twice, because what is finished is only ever one of two things: a verified piece
in the checkpoint store, or a whole output file whose digest the ledger knows. The output directory of a spot host is
neither, so an output that went with its host is joined again from its pieces.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from embed.config import EmbedConfig
from embed.crew import Hello, Solo, Team, gather
from embed.data import Bad, Table, check_columns, inspect, open_input, share_of
from embed.files import Work
from embed.output import check_names
from embed.results import results_of
from estiba import __version__
from estiba.checkpoint import Ledger, Pieces, exclusive
from estiba.contract import Job
from estiba.errors import ConfigError, DataError
from estiba.progress import Progress
from estiba.stop import Stop, say
from estiba.store import FileStore, Store, open_store, stage

PASSES = 3
"""A piece that does not verify is computed again; a disk that spoils it every time is not worth a fourth try."""
PARALLEL_LOOKS = 16


def embed(config: EmbedConfig, job: Job, stop: Stop) -> None:
    """Run the job. Raises EstibaError: Interrupted when asked to stop, DataError when a bad file should fail it."""
    started = time.monotonic()
    check_places(config)
    source, tables, bad, ignored = stop.unless_stopped(
        lambda: take_stock(config, job), "nothing was computed in this attempt, and what earlier ones saved is kept"
    )
    target = open_store(config.output_path)
    check_writable(target, "--output-path")
    with saved_work(config, job) as (saved, has_past):
        model = stop.unless_stopped(
            lambda: _local_model(config.model, config.revision),
            "nothing was computed in this attempt, and what earlier ones saved is kept",
        )
        crew = gather(config, model, source.url, stop)
        loaded = time.monotonic()
        try:
            work = open_work(config, job, crew.hello, source, target, saved, tables, bad)
            say(
                work.summary(
                    ignored, has_past, f"{crew.hello.dimensions} dimensions, {crew.hello.dtype} on {crew.hello.device}"
                )
            )
            compute(work, crew, job, stop)
        finally:
            crew.close()
        work.finish()
        results = results_of(
            work, config=config, job=job, hello=crew.hello, ignored=ignored, started=started, loaded=loaded
        )
    name = "results.json" if job.host_count == 1 else f"results-{job.current_host}.json"
    target.write(name, (json.dumps(results, indent=2, ensure_ascii=True) + "\n").encode())
    say(results["summary"])
    complain(work, config)


# --- before --------------------------------------------------------------------------------------------------------


def check_places(config: EmbedConfig) -> None:
    """Refuse places that would read their own output. Raises ConfigError."""
    places = {
        "--input-path": config.input_path,
        "--output-path": config.output_path,
        "--checkpoint-path": None if config.no_checkpoint else config.checkpoint_path,
    }
    plain = {flag: _comparable(place) for flag, place in places.items() if place is not None}
    flags = list(plain)
    for index, first in enumerate(flags):
        for second in flags[index + 1 :]:
            a, b = plain[first], plain[second]
            if a == b or a.startswith(b + "/") or b.startswith(a + "/"):
                raise ConfigError(
                    f"{first} {places[first]} and {second} {places[second]} lie in one another; give each its own place"
                )


def _comparable(location: str) -> str:
    return location.rstrip("/") if "://" in location and not location.startswith("file:") else open_store(location).url


def take_stock(config: EmbedConfig, job: Job) -> tuple[Store, list[Table], list[Bad], list[str]]:
    """This host's files: readable ones, bad ones, ignored names. Raises ConfigError where none can be embedded."""
    source, sources, ignored = open_input(config.input_path)
    channel = job.channel_of(Path(config.input_path)) if isinstance(source, FileStore) else None
    if not sources and not (channel and channel.is_sharded):
        raise DataError(
            f"{config.input_path}: holds no data files ({len(ignored)} hidden ones ignored); check the input"
        )
    if job.host_count > 1 and not (channel and channel.is_sharded):
        sources = share_of(sources, job.host_index, job.host_count)
        ignored = ignored if job.host_index == 0 else []
    with ThreadPoolExecutor(PARALLEL_LOOKS) as pool:
        looks = list(pool.map(lambda item: inspect(source, item), sources))
    bad = [look for look in looks if isinstance(look, Bad)]
    tables = [look for look in looks if isinstance(look, Table)]
    is_all = job.host_count == 1  # one host of several may have drawn the odd files
    tables, without_text = check_columns(tables, config.text_column, is_all=is_all)
    tables, clashing = check_names(tables, config, is_all=is_all)
    bad += without_text + clashing
    for item in bad:
        say(f"bad file: {item.path}: {item.reason}")
    return source, tables, sorted(bad, key=lambda item: item.path), ignored


def check_writable(store: Store, flag: str) -> None:
    """Find out now, not after an hour. S3 is asked by the first write: a probe would need a right to delete."""
    if isinstance(store, FileStore):
        try:
            store.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=store.root):
                pass
        except OSError as error:
            raise ConfigError(
                f"{store.url}: cannot be written ({error.strerror}) by user {os.getuid()}; "
                f"mount a directory that this user may write, or pass another {flag}"
            ) from None


@contextlib.contextmanager
def saved_work(config: EmbedConfig, job: Job) -> Iterator[tuple[Store, bool]]:
    """The store that finished pieces go to, and whether an earlier attempt was there.

    With --no-checkpoint it is one that ends with the job.
    """
    if config.no_checkpoint:
        with tempfile.TemporaryDirectory(prefix="estiba-embed-") as folder:
            yield FileStore(Path(folder)), False
        return
    store = open_store(config.checkpoint_path)
    check_writable(store, "--checkpoint-path, or --no-checkpoint to do without")
    has_past = bool(store.list())
    with exclusive(store, f"embed-{job.current_host}"):
        yield store, has_past


def _local_model(model: str, revision: str | None) -> str:
    """A model on S3 is copied here first; anything else is the encoder's business."""
    if revision is not None and ("://" in model or Path(model).is_dir()):
        raise ConfigError(f"--revision {revision} is of models on the hub, and {model} is a place; leave it out")
    if not model.startswith(("s3://", "file://")):
        return model
    folder = Path(tempfile.gettempdir()) / f"estiba-model-{xxhash.xxh3_64_hexdigest(model.encode())}"
    return str(stage(model, folder))


def open_work(
    config: EmbedConfig,
    job: Job,
    hello: Hello,
    source: Store,
    target: Store,
    saved: Store,
    tables: list[Table],
    bad: list[Bad],
) -> Work:
    """Put what an earlier attempt finished together with what is there now."""
    run_id = identity_of(config, hello)
    work = Work(
        config=config,
        source=source,
        target=target,
        pieces=Pieces(saved, f"embed-{run_id}/pieces"),
        ledger=None if config.no_checkpoint else Ledger(saved, f"embed-{run_id}/ledger", job.current_host),
        provenance={
            "estiba": __version__,
            "output_id": output_identity(config, run_id),
            "text_column": config.text_column,
            "embedding_dtype": config.embedding_dtype,
            **hello.identity,
            # A directory is known by its digest, wherever it is mounted.
            "model": config.model if config.model.startswith("s3://") else hello.identity["model"],
        },
        dimensions=hello.dimensions,
        bad=bad,
    )
    work.open(tables, PARALLEL_LOOKS)
    others = {entry.path.split("/")[0] for entry in saved.list() if entry.path.startswith("embed-")} - {
        f"embed-{run_id}"
    }
    if others and not config.no_checkpoint:
        say(
            f"{saved.url}: also holds work of {len(others)} other configuration(s) ({', '.join(sorted(others))}); "
            "not used here, delete it when it is no longer needed"
        )
    return work


IDENTITY = ("digest", "dtype", "pooling", "prompt", "max_length", "dimensions", "normalize")
"""What of a model changes a vector. Library versions do not: a new image goes on where the old one stopped."""


def identity_of(config: EmbedConfig, hello: Hello) -> str:
    """Names the work whose pieces can be used: same model, same text, same vectors."""
    parts = {name: hello.identity[name] for name in IDENTITY}
    parts |= {"text_column": config.text_column, "embedding_dtype": config.embedding_dtype}
    return _digest(parts)


def output_identity(config: EmbedConfig, run_id: str) -> str:
    """Names what an output file looks like, beyond its vectors."""
    fields = ("columns", "embedding_column", "status_column", "n_tokens", "truncated")
    return _digest({"run": run_id, **{name: getattr(config, name) for name in fields}})


def _digest(parts: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())[:16]


# --- during --------------------------------------------------------------------------------------------------------


def compute(work: Work, crew: Solo | Team, job: Job, stop: Stop) -> None:
    """Until every file is joined or bad. Raises Interrupted; what is finished is in the ledger however it ends."""
    progress = Progress(total=work.rows_total, unit="rows", done=work.rows_done, metrics_path=_metrics_path(work, job))
    work.progress = progress
    try:
        for _ in range(PASSES):
            if tasks := work.tasks():
                crew.run(tasks, work.pieces, work.on_event, lambda: stop() or work.error is not None)
            work.join(stop)
            if stop():
                raise stop.interrupted(work.what_is_safe())
            if not work.lost:
                return
            work.lost.clear()
        raise DataError(
            f"{work.pieces.store.url}: finished pieces fail their digest again and again; do not trust this disk"
        )
    except BaseException:
        with contextlib.suppress(Exception):  # a full disk, say: the first error is the one to tell
            work.abandon()
        raise
    finally:
        progress.close()


def _metrics_path(work: Work, job: Job) -> Path | None:
    store = work.pieces.store
    if work.ledger is None or not isinstance(store, FileStore):
        return None
    return store.path_of(f"metrics-{job.current_host}.jsonl")


# --- after ---------------------------------------------------------------------------------------------------------


def complain(work: Work, config: EmbedConfig) -> None:
    """Bad files end the job as failed, after everything else is done, unless they were allowed."""
    if not work.bad:
        return
    names = "; ".join(f"{item.path}: {item.reason}" for item in work.bad[:20])
    more = f"; and {len(work.bad) - 20} more, all in results.json" if len(work.bad) > 20 else ""
    text = f"{len(work.bad)} of {work.files_total} files could not be embedded: {names}{more}"
    if config.on_bad_file == "fail":
        raise DataError(f"{text}. All other files are complete; mend or remove these, or pass --on-bad-file skip")
    say(f"warning: {text}")
