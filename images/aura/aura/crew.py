"""Processes that pack units, fed one at a time: what is in memory is what they are working on, and one more."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import connection, get_context
from typing import Any

from aura.packing import Packer, Recipe, Unit
from estiba.errors import EstibaError

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.2

Packed = tuple[Unit, str, bytes]


def pack_here(units: Iterable[tuple[str, Unit]], recipe: Recipe, should_stop: Callable[[], bool]) -> Iterator[Packed]:
    """Pack in this process, on all cores where the tokenizer uses them. Ends early when it is to stop."""
    packer = Packer(recipe)
    for name, unit in units:
        data = packer.pack(unit, should_stop)
        if data is None:
            return
        yield unit, name, data


def pack_in_processes(
    units: Iterable[tuple[str, Unit]], recipe: Recipe, workers: int, should_stop: Callable[[], bool]
) -> Iterator[Packed]:
    """Pack in that many processes, in whatever order they are done. Raises what a worker raised, or that it died."""
    context = get_context("spawn")  # after a fork the tokenizer's threads would be missing
    crew: list[tuple[Any, Any]] = []
    try:
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(os.getpid(), theirs, recipe), daemon=True, name=f"aura-packer-{number}"
            )
            with _one_thread():
                process.start()
            theirs.close()
            crew.append((process, ours))
        yield from _feed(iter(units), crew, should_stop)
    finally:
        for process, pipe in crew:
            pipe.close()
            process.kill()  # nothing of theirs is half done: this process writes the files
            process.join()


def _feed(
    units: Iterator[tuple[str, Unit]], crew: list[tuple[Any, Any]], should_stop: Callable[[], bool]
) -> Iterator[Packed]:
    busy: dict[Any, tuple[str, Unit]] = {}
    idle = [pipe for _, pipe in crew]
    following = next(units, None)  # read ahead while all are at work
    while following is not None or busy:
        if should_stop():
            return
        while idle and following is not None:
            pipe = idle.pop()
            busy[pipe] = following
            with suppress(OSError):  # dead: its end of the pipe says so below
                pipe.send(following[1])
            following = next(units, None)
        ready: list[Any] = connection.wait(list(busy), timeout=_POLL_S)
        for pipe in ready:
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                process = next(process for process, own in crew if own is pipe)
                process.join(timeout=5)
                if should_stop():  # the signal went to all of them
                    return
                raise EstibaError(_obituary(process)) from None
            name, unit = busy.pop(pipe)
            if isinstance(answer, Exception):
                raise answer
            idle.append(pipe)
            yield unit, name, answer


def _serve(parent: int, pipe: Any, recipe: Recipe) -> None:
    """The life of one worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    packer = Packer(recipe)
    with suppress(EOFError, OSError):  # the parent has closed its end
        while True:
            unit = pipe.recv()
            try:
                answer: Any = packer.pack(unit)
            except EstibaError as error:
                answer = error
            except Exception as error:
                answer = EstibaError(f"{unit.stretches[0].url}: {type(error).__name__}: {error}")
            pipe.send(answer)


class _one_thread:
    """The children's tokenizers use one thread each: there is a process for every core."""

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")}
        os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _obituary(process: Any) -> str:
    if process.exitcode == -signal.SIGKILL:
        return f"{process.name} was killed, likely out of memory; give the machine more or use fewer --num_workers"
    return f"{process.name} ended with code {process.exitcode}; its last lines are in the log"
