"""Workers that take turns: one computes, all others wait, and each does the same files in equal parts."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedders.corpus import Corpus
from embedders.environments import python_of
from embedders.peers import Peer

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).parent / "workers"
START_S, TURN_S = 900.0, 900.0
SPINS = "3000"
"""Of idle OpenMP threads, as the image has it: they sleep soon, also while another worker has its turn."""


class WorkerFailed(Exception):
    """Why a peer has no figures."""


def environ_of(place: Path, threads: int) -> dict[str, str]:
    """The same for all."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": SPINS,
        "HF_HOME": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("images/embed", "shared")),
    }


class Worker:
    """A peer in its process. `turns` holds what it answered, a list for each file."""

    def __init__(
        self, peer: Peer, place: Path, corpus: Corpus, *, model: Path, max_length: int, threads: int, install: bool
    ) -> None:
        """Start it and wait until it is ready. Raises WorkerFailed or NotInstalled."""
        self.peer = peer
        stem = peer.name.replace(" ", "-").replace(",", "")
        self.vectors = place / f"{stem}.npy"
        self._log = place / f"{stem}.log"
        task = {
            "module": peer.module,
            "options": peer.options,
            "model": str(model),
            "converted": str(place / f"converted-{max_length}"),
            "files": [str(path) for path in corpus.files],
            "file_tokens": corpus.file_tokens,
            "vectors": str(self.vectors),
            "max_length": max_length,
            "threads": threads,
        }
        self.turns: list[list[dict[str, Any]]] = []
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python_of(peer.environment, install=install)), str(WORKERS / "worker.py"), json.dumps(task)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environ_of(place, threads),
            )  # fmt: skip
        self.about = self._answer(START_S)

    def turn(self, tokens: int) -> bool:
        """Compute at least so many tokens, or to the end of the file. Returns whether that is reached."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{tokens}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        answer = self._answer(TURN_S)
        self.turns[-1].append(answer)
        return bool(answer["is_file_done"])

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else b""
        if line:
            return dict(json.loads(line))
        self.stop()
        lines = self._log.read_text("utf-8", "replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip() and "://" not in line), "nothing")
        raise WorkerFailed(said[:300] if ready else f"no answer for {timeout_s:.0f} s; it said last: {said[:200]}")


def take_turns(workers: Sequence[Worker], files: int, turn_tokens: int) -> dict[str, str]:
    """Have all workers embed the files. Returns the reasons of those that failed on the way.

    Within a file each takes its turn until it is done, and the next file begins when all are: slow and fast ones meet
    the same texts and the same neighbours of this machine.
    """
    failed: dict[str, str] = {}
    for number in range(files):
        first = number % max(1, len(workers))
        left = [each for each in (*workers[first:], *workers[:first]) if each.peer.name not in failed]
        for worker in left:
            worker.turns.append([])
        while left:
            for worker in list(left):
                try:
                    if worker.turn(turn_tokens):
                        left.remove(worker)
                except WorkerFailed as error:
                    failed[worker.peer.name] = str(error)
                    left.remove(worker)
        print(f"file {number + 1} of {files} done", file=sys.stderr)
    return failed
