"""How the main rank learns that every rank wrote its part, without a collective that training would wait for."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed

from estiba.checkpoint.manager import RANK_TIMEOUT_S
from estiba.distributed import DistContext
from estiba.errors import CheckpointError

POLL_S = 0.05
CLOSING_TIMEOUT_S = 30.0
"""How long a run that ends, perhaps since it lost a host, waits for the parts of the other ranks."""
_FAILED = "!"


class Receipts:
    """Each rank's record of its part, or the reason why there is none. The main rank's process holds them."""

    def __init__(self, dist: DistContext) -> None:
        """All ranks call it together."""
        self._rank, self._ranks = dist.rank, dist.world_size
        self._store: Any = torch.distributed.HashStore()
        if dist.world_size == 1:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if dist.is_main:
            self._store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = dist.broadcast(self._store.port if dist.is_main else None)
        if not dist.is_main:
            self._store = torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False)

    def give(self, number: int, record: str) -> None:
        """Tell the main rank that this rank wrote its part of the save with this number."""
        with contextlib.suppress(RuntimeError):  # the main rank's host is gone; S3 has the record all the same
            self._store.set(f"{number}/{self._rank}", record)

    def give_failure(self, number: int, reason: str) -> None:
        self.give(number, _FAILED + reason)

    def collect(self, number: int, is_over: threading.Event, closed_at: Callable[[], float | None]) -> list[str] | None:
        """Return the records of all ranks, or None once the save is over. `closed_at` is when the run began to end.

        Raises CheckpointError, with the first rank that failed, or those that did not write in time.
        """
        keys = [f"{number}/{rank}" for rank in range(self._ranks)]
        deadline = time.monotonic() + RANK_TIMEOUT_S
        try:
            while not self._store.check(keys):
                if is_over.is_set():
                    return None
                closed = closed_at()
                if time.monotonic() > (deadline if closed is None else min(deadline, closed + CLOSING_TIMEOUT_S)):
                    missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                    raise CheckpointError(f"ranks {missing} did not write their parts in time")
                time.sleep(POLL_S)
            records = [self._store.get(key).decode() for key in keys]
            for key in keys:
                self._store.delete_key(key)
        except RuntimeError as error:
            raise CheckpointError(f"the ranks lost each other ({error})") from None
        for rank, record in enumerate(records):
            if record.startswith(_FAILED):
                raise CheckpointError(f"rank {rank}: {record.removeprefix(_FAILED)}")
        return records
