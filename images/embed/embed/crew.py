"""Who computes: this process, or one process per GPU. Either way tasks go in and events come out."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

from embed.config import EmbedConfig
from embed.model import Encoder
from embed.worker import Event, Task, encoder_config, work_through
from estiba.checkpoint import Pieces
from estiba.errors import EstibaError
from estiba.stop import Stop, say
from estiba.store import open_store

_PR_SET_PDEATHSIG = 1
PATIENCE_S = 30.0
"""For a worker to save what it is saving; well inside the grace period of a stop."""


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What the parent needs to know of a loaded model."""

    identity: dict[str, str]
    dimensions: int
    device: str
    dtype: str


class Solo:
    """The model in this process."""

    def __init__(self, config: EmbedConfig, model: str, input_location: str, stop: Stop) -> None:
        self._config = config
        self._encoder = stop.unless_stopped(
            lambda: Encoder(encoder_config(config, model, config.device)),
            "nothing was computed in this attempt, and what earlier ones saved is kept",
        )
        self._source = open_store(input_location)
        self.hello = _hello(self._encoder)
        self.size = 1

    def run(
        self, tasks: Sequence[Task], pieces: Pieces, emit: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> None:
        """Compute the tasks. `emit` is called from other threads."""
        work_through(
            tasks,
            encoder=self._encoder,
            source=self._source,
            pieces=pieces,
            config=self._config,
            emit=emit,
            should_stop=should_stop,
        )

    def close(self) -> None:
        pass


class Team:
    """One process per device, each with its own model, fed with row groups as they become free."""

    def __init__(
        self, config: EmbedConfig, model: str, input_location: str, devices: Sequence[str | None], stop: Stop
    ) -> None:
        context = get_context("spawn")  # a forked CUDA context or obstore runtime does not work
        self.size = len(devices)
        self._tasks: Any = context.Queue()
        self._events: Any = context.Queue()
        self._stop = context.Event()
        self._processes: list[BaseProcess] = []
        for device in devices:
            process = context.Process(
                target=_serve,
                args=(os.getpid(), config, model, input_location, device, self._tasks, self._events, self._stop),
                daemon=True,
                name=f"embed-{device}",
            )
            process.start()
            self._processes.append(process)
        waiting = self.size
        while waiting:
            event = self._next(stop)
            if event is None:
                self.close()
                raise stop.interrupted("nothing was computed in this attempt, and what earlier ones saved is kept")
            if isinstance(event, Hello):
                self.hello = event
                waiting -= 1

    def run(
        self, tasks: Sequence[Task], pieces: Pieces, emit: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> None:
        for task in tasks:
            self._tasks.put((pieces.store.url, pieces.prefix, task))
        left = len(tasks)
        while left:
            event = self._next(should_stop)
            if event is None:
                self._stop.set()
                return
            if event == "task ended":
                left -= 1
            else:
                emit(event)

    def close(self) -> None:
        self._stop.set()
        deadline = time.monotonic() + PATIENCE_S
        for process in self._processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()

    def _next(self, should_stop: Callable[[], bool]) -> Any:
        """The next event, or None when the job should stop. Raises what a worker raised, or that one died."""
        while not should_stop():
            try:
                event = self._events.get(timeout=0.2)
            except queue.Empty:
                for process in self._processes:
                    if process.exitcode not in (None, 0):
                        raise EstibaError(_obituary(process)) from None
                continue
            if isinstance(event, Exception):
                raise event
            return event
        return None


def _serve(
    parent: int, config: EmbedConfig, model: str, input_location: str, device: str, tasks: Any, events: Any, stop: Any
) -> None:
    """The life of one worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    try:
        encoder = Encoder(encoder_config(config, model, device))
        events.put(_hello(encoder))
        source = open_store(input_location)
        pieces: Pieces | None = None
        while not stop.is_set():
            try:
                url, prefix, task = tasks.get(timeout=0.2)
            except queue.Empty:
                continue
            if pieces is None:
                pieces = Pieces(open_store(url), prefix, listed=False)
            work_through(
                [task],
                encoder=encoder,
                source=source,
                pieces=pieces,
                config=config,
                emit=events.put,
                should_stop=stop.is_set,
            )
            events.put("task ended")
    except Exception as error:
        try:
            events.put(
                error if isinstance(error, EstibaError) else EstibaError(f"{device}: {type(error).__name__}: {error}")
            )
        finally:
            events.close()
            events.join_thread()


def gather(config: EmbedConfig, model: str, input_location: str, stop: Stop) -> Solo | Team:
    """The crew for this machine: a process per GPU where there are several, else this one."""
    devices = _devices(config)
    if len(devices) == 1:
        return Solo(config.model_copy(update={"device": devices[0]}), model, input_location, stop)
    say(f"{len(devices)} workers: {', '.join(map(str, devices))}")
    return Team(config, model, input_location, devices, stop)


def _devices(config: EmbedConfig) -> list[str | None]:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.device in (None, "cuda") else 0
    count = config.workers or max(1, gpus)
    if count == 1:
        return [config.device]
    if gpus:
        return [f"cuda:{index % gpus}" for index in range(count)]
    return [config.device or "cpu"] * count


def _hello(encoder: Encoder) -> Hello:
    return Hello(identity=encoder.identity, dimensions=encoder.dimensions, device=encoder.device, dtype=encoder.dtype)


def _obituary(process: BaseProcess) -> str:
    code = process.exitcode
    if code == -signal.SIGKILL:
        return f"worker {process.name} was killed, likely out of memory; give the container more or use fewer --workers"
    return f"worker {process.name} ended with code {code}; its last lines are in the log"
