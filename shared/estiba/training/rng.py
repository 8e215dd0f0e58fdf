"""The random state of a process: Python's, numpy's and torch's generators together."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed(value: int) -> None:
    """Seed every generator of this process."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def get_state(*, quick: bool = False) -> dict[str, Any]:
    """Return the state of every generator. `quick` leaves out Python's and numpy's, which a model's step never uses."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if not quick:
        state["python"] = random.getstate()
        name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        state["numpy"] = (name, torch.from_numpy(keys.copy()), position, has_gauss, gauss)
    return state


def set_state(state: dict[str, Any]) -> None:
    """Restore what `get_state` returned. A state from a CPU run leaves a GPU's generator as it is."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "python" in state:
        random.setstate(state["python"])
    if "numpy" in state:
        name, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Restore the random state at the end of the block, so that an extra evaluation does not change the training."""
    state = get_state()
    try:
        yield
    finally:
        set_state(state)
