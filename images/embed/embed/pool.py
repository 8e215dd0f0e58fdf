"""The worker pool: this process, or one process per GPU. Both take tasks and emit events."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from embed.artifacts.old_outputs import OldOutputs
from embed.config import EmbedConfig
from embed.data.chunks import ModelInfo
from embed.data.known_vectors import KnownFile, KnownVectors, KnownVectorsWriter
from embed.data.windows import Task
from embed.events import Event, TaskDone
from embed.model import Encoder
from embed.pipeline import Pipeline
from embed.reuse import read_old_outputs
from embed.state import NOTHING_COMPUTED
from estiba.checkpoint import ChunkStore
from estiba.errors import EstibaError
from estiba.log import get_logger
from estiba.platform.stop import Stop
from estiba.processes import die_with_parent, exit_report, ignore_stop_signals
from estiba.storage import open_store

logger = get_logger(__name__)

CLOSE_TIMEOUT_S = 30.0
"""Time for a worker to finish a save; well within the grace period of a stop."""
POLL_S = 0.2
CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


class InProcess:
    """The model in this process."""

    def __init__(self, config: EmbedConfig, input_location: str, first_texts: Sequence[str], stop: Stop) -> None:
        limit_threads(1)
        encoder = stop.unless_stopped(lambda: Encoder(config, first_texts), NOTHING_COMPUTED)
        self.model = encoder.info
        self._pipeline = Pipeline(config=config, encoder=encoder, source=open_store(input_location))
        self._known: KnownVectors | None = None

    def read_old_outputs(self, old: OldOutputs, should_stop: Callable[[], bool]) -> None:
        """Read the vectors that `run` will reuse, unless they are read. Returns early when it should stop."""
        if self._known is None:
            writer = KnownVectorsWriter(old.dimensions, old.dtype)
            known = read_old_outputs(old, self._pipeline.encoder, writer, should_stop)
            self._known = None if known is None else KnownVectors(known)

    def run(
        self,
        tasks: Sequence[Task],
        chunks: ChunkStore,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        """Compute the tasks. `emit` is called from other threads."""
        self._pipeline.run(tasks, chunks, emit, should_stop, earlier, self._known)

    def close(self) -> None:
        pass


class MultiProcess:
    """One process per device, each with its own model. A process takes the next task as soon as it has room for
    more windows, and computes without a pause between two."""

    def __init__(
        self,
        config: EmbedConfig,
        input_location: str,
        first_texts: Sequence[str],
        devices: Sequence[str | None],
        stop: Stop,
    ) -> None:
        context = get_context("spawn")  # neither a CUDA context nor obstore's runtime survives a fork

        self._tasks: Any = context.Queue()
        self._events: Any = context.Queue()
        self._stop = context.Event()
        self._processes: list[BaseProcess] = []
        for device in devices:
            process = context.Process(
                target=_serve,
                args=(
                    os.getpid(),
                    len(devices),
                    config.model_copy(update={"device": device}),
                    input_location,
                    first_texts,
                    self._tasks,
                    self._events,
                    self._stop,
                ),
                daemon=True,
                name=f"embed-{device}",
            )
            process.start()
            self._processes.append(process)
        models: list[ModelInfo] = []
        for _ in devices:
            model = self._next_event(stop)
            if model is None:
                self.close()
                raise stop.interrupted(NOTHING_COMPUTED)
            models.append(model)
        self.model, self._engine = _common(models)
        self._known: KnownFile | None = None

    def read_old_outputs(self, old: OldOutputs, should_stop: Callable[[], bool]) -> None:
        """Have a worker read the vectors that all workers will reuse, unless they are read."""
        if self._known is None:
            self._tasks.put(old)
            self._known = self._next_event(should_stop)

    def run(
        self,
        tasks: Sequence[Task],
        chunks: ChunkStore,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        """Compute the tasks. `emit` is called from this thread."""
        earlier = self._engine or earlier
        for task in tasks:
            self._tasks.put(((chunks.store.url, chunks.prefix, earlier, self._known), task))
        remaining = len(tasks)
        while remaining:
            event = self._next_event(should_stop)
            if event is None:
                self._stop.set()
                self._drain(emit)
                return
            remaining -= isinstance(event, TaskDone)
            emit(event)

    def _drain(self, emit: Callable[[Event], None]) -> None:
        """Record what the workers save while they stop."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while time.monotonic() < deadline and any(process.is_alive() for process in self._processes):
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=POLL_S)
                if not isinstance(event, Exception):
                    emit(event)

    def close(self) -> None:
        self._stop.set()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for process in self._processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()

    def _next_event(self, should_stop: Callable[[], bool]) -> Any:
        """The next event, or None if the job should stop. Raises a worker's error, or EstibaError if one died."""
        while not should_stop():
            try:
                event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                for process in self._processes:
                    if process.exitcode:
                        report = exit_report(f"worker {process.name}", process.exitcode, workers_flag="--workers")
                        raise EstibaError(report) from None
                continue
            if isinstance(event, Exception):
                raise event
            return event
        return None


def _common(models: Sequence[ModelInfo]) -> tuple[ModelInfo, dict[str, Any] | None]:
    """The model of all workers, and torch as their engine if they did not all choose the same one.

    An engine needs memory, which may have been left to some of them only, or GPUs differ. Which worker computes a row
    depends on time, and its vector must not.
    """
    if len({model.engine for model in models}) == 1:
        return models[0], None
    engine, dtype = f"torch {torch.__version__}", models[0].dtype
    chosen = ", ".join(sorted({model.engine for model in models}))
    logger.warning(f"not every worker can use the same engine ({chosen}); {engine} computes in all of them")
    return replace(models[0], engine=f"{engine}, {dtype}"), {"engine": engine, "dtype": dtype}


def _serve(
    parent: int,
    workers: int,
    config: EmbedConfig,
    input_location: str,
    first_texts: Sequence[str],
    tasks: Any,
    events: Any,
    stop: Any,
) -> None:
    """The main function of a worker process."""
    ignore_stop_signals()
    die_with_parent(parent)
    limit_threads(workers)
    try:
        encoder = Encoder(config, first_texts)
        events.put(encoder.info)
        pipeline = Pipeline(config=config, encoder=encoder, source=open_store(input_location))
        received = _received(tasks, stop)
        first = next(received, None)
        if isinstance(first, OldOutputs):
            writer = KnownVectorsWriter(first.dimensions, first.dtype)  # open until this process ends: all read it
            events.put(read_old_outputs(first, encoder, writer, stop.is_set))
            first = next(received, None)
        if first is None:
            return
        (url, prefix, earlier, known_file), _ = first
        known = None if known_file is None else KnownVectors(known_file)
        # One pipeline for all tasks: it reads the next one while a task is computed and saved.
        all_tasks = (task for _, task in itertools.chain([first], received))
        chunks = ChunkStore(open_store(url), prefix, listed=False)
        pipeline.run(all_tasks, chunks, events.put, stop.is_set, earlier, known)
    except Exception as error:
        is_reportable = isinstance(error, EstibaError)
        try:
            events.put(error if is_reportable else EstibaError(f"{config.device}: {type(error).__name__}: {error}"))
        finally:
            events.close()
            events.join_thread()


def _received(tasks: Any, stop: Any) -> Iterator[Any]:
    """What the main process sends, until it says stop: a task, and with it the same four things each time.

    They are the address and prefix of the chunks, what computed the rows of an earlier attempt, and the vectors to
    reuse. One worker gets the old outputs before, which it reads for all.
    """
    while not stop.is_set():
        with contextlib.suppress(queue.Empty):
            yield tasks.get(timeout=POLL_S)


def limit_threads(workers: int) -> None:
    """Share the cores that this container may use among its workers: more threads than cores wait for each other."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, math.ceil(cores() / workers))))


def cores() -> float:
    """The cores of this process, or the container's limit (cgroup v2, `docker run --cpus`) if that is lower."""
    count = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = CGROUP_LIMIT.read_text().split()
        return min(count, int(quota) / int(period))  # a quota of "max" raises ValueError
    return count


def start_pool(
    config: EmbedConfig, input_location: str, first_texts: Sequence[str], stop: Stop
) -> InProcess | MultiProcess:
    """A process per GPU if there are several, or as many as `workers`; otherwise this process.

    `config.model` is a directory or a name on the hub. `first_texts` are some of the input, the same in each attempt.
    """
    devices = _devices(config)
    if len(devices) == 1:
        return InProcess(config.model_copy(update={"device": devices[0]}), input_location, first_texts, stop)
    logger.info(f"{len(devices)} workers: {', '.join(map(str, devices))}")
    return MultiProcess(config, input_location, first_texts, devices, stop)


def _devices(config: EmbedConfig) -> list[str | None]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.device in (None, "cuda") else 0
    count = config.workers or max(1, gpus)
    if count == 1:
        return [config.device]
    if gpus:
        return [f"cuda:{index % gpus}" for index in range(count)]
    return [config.device or "cpu"] * count
