"""The host's memory allocator, set for training steps on a CPU."""

from __future__ import annotations

import ctypes

from estiba.memory import available_memory_bytes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES = 2**30
_TRIM_THRESHOLD_BYTES = 2**31 - 1
ROOM_BYTES = 8 * 2**30
"""Memory that must be left. Kept blocks of different sizes leave gaps, so a process grows by half or more."""


def keep_freed_memory() -> bool:
    """Have malloc keep large freed blocks for the next step. Returns False if memory is short, or malloc not glibc's.

    By default glibc returns blocks of more than 32 MB to the kernel at once. A step on a CPU frees dozens of them and
    allocates as many again, and the kernel has to clear their pages: a fifth of a step of brain-to-text's decoder.
    Source: mallopt(3).
    """
    left_bytes = available_memory_bytes()
    if left_bytes is not None and left_bytes < ROOM_BYTES:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES))
