"""Lists of names in error messages."""

from __future__ import annotations

from collections.abc import Sequence

MAX_NAMES = 5
"""How many names an error message lists."""


def first_few(names: Sequence[str]) -> str:
    """Return the first few names as text, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
