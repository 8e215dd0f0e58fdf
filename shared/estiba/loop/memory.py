"""Memory of the host that steps on a CPU use again and again."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK_BYTES = 2**30
_MOST_KEPT_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have malloc keep large blocks that are freed; False where it is not glibc's.

    By itself it gives blocks of more than 32 MB back to the kernel at once. A step on a CPU frees some dozens of them
    and asks for as many again, whose pages the kernel has to clear: a fifth of a step of brain-to-text's decoder.
    Source: mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK_BYTES) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES))
