"""Which columns of a table decide which, measured on a sample of its rows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SAMPLE_ROWS = 20_000
_MAX_PAIRS_ROWS = 40_000_000
"""Rows times pairs of columns; a wide table is measured on fewer rows."""
_MIN_ROWS = 200
_DECIDES = 0.98
_SEEN = 0.5
"""A column decides others only if this share of its values comes up again: a serial number decides nothing."""
_LEFT = 0.2
"""The largest share of the commonest-value baseline's errors that a deciding column may leave."""


@dataclass(frozen=True, kw_only=True)
class ColumnProfile:
    """What a column's cells look like."""

    name: str
    distinct: int
    distinct_share: float
    """Distinct values per filled cell."""
    filled_share: float
    mean_chars: float
    numbers_share: float
    decimals_share: float
    commonest_share: float

    @property
    def is_constant(self) -> bool:
        return self.distinct <= 1

    @property
    def is_serial(self) -> bool:
        """Whether each row has its own whole number, as an index has."""
        return self.distinct_share > 0.999 and self.numbers_share > 0.99 and self.decimals_share == 0


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """For each pair of columns, how well the first gives the second."""

    names: list[str]
    accuracy: np.ndarray
    """[from, to]: share of the rows that the others with the same value in `from` give right; 0 where none is alike."""
    decides: np.ndarray
    """[from, to]: whether `from` gives `to`, but for a few rows."""

    def best(self, name: str, among: Sequence[str]) -> tuple[str | None, float]:
        """Return the column among the given ones that gives `name` best, and how often."""
        to = self.names.index(name)
        others = [self.names.index(other) for other in among if other != name]
        if not others:
            return None, 0.0
        top = max(others, key=lambda index: self.accuracy[index, to])
        return self.names[top], float(self.accuracy[top, to])

    def deciders(self, name: str) -> list[str]:
        to = self.names.index(name)
        return [other for index, other in enumerate(self.names) if self.decides[index, to]]


def sample_rows(count: int, columns: int, seed: int) -> list[int]:
    """Return the rows to measure, in order."""
    limit = min(SAMPLE_ROWS, max(_MIN_ROWS, _MAX_PAIRS_ROWS // max(1, columns * columns)))
    if count <= limit:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def profile(name: str, cells: Sequence[str]) -> ColumnProfile:
    texts = pa.array(cells, type=pa.large_string())
    filled = texts.filter(pc.not_equal(pc.utf8_trim_whitespace(texts), ""))
    count = max(1, len(filled))
    counts = pc.value_counts(filled).field("counts").to_numpy()
    number = pc.match_substring_regex(filled, r"^\s*[-+]?[$€£]?[\d., ]*\d[\d., ]*(?:[eE][-+]?\d+)?%?\s*$")
    decimal = pc.and_(number, pc.match_substring_regex(filled, r"\d[.,]\d"))
    return ColumnProfile(
        name=name,
        distinct=len(counts),
        distinct_share=len(counts) / count,
        filled_share=len(filled) / max(1, len(texts)),
        mean_chars=float(pc.mean(pc.utf8_length(filled)).as_py() or 0),
        numbers_share=float(pc.mean(number.cast(pa.int8())).as_py() or 0),
        decimals_share=float(pc.mean(decimal.cast(pa.int8())).as_py() or 0),
        commonest_share=int(counts.max()) / count if len(counts) else 0.0,
    )


def measure(columns: Mapping[str, Sequence[str]]) -> Dependencies:
    """Return how well each column gives each other one, judged for every row by the other rows alone."""
    names = list(columns)
    codes = [pa.array(cells, type=pa.large_string()).dictionary_encode() for cells in columns.values()]
    indices = [code.indices.to_numpy(zero_copy_only=False).astype(np.int64) for code in codes]
    sizes = [len(code.dictionary) for code in codes]
    accuracy = np.zeros((len(names), len(names)))
    decides = np.zeros((len(names), len(names)), dtype=bool)
    commonest = [float(np.bincount(index).max()) / len(index) if len(index) else 1.0 for index in indices]
    for first, given in enumerate(indices):
        repeats = np.bincount(given, minlength=sizes[first])[given] >= 2
        seen = float(repeats.mean()) if len(given) else 0.0
        for second, asked in enumerate(indices):
            if first == second or sizes[first] < 2 or sizes[second] < 2:
                continue
            right = _right_by_others(given, asked, sizes[second])
            accuracy[first, second] = right.mean()
            among_seen = float(right.sum()) / max(1, int(repeats.sum()))
            is_better = 1 - among_seen <= _LEFT * (1 - commonest[second])
            decides[first, second] = seen >= _SEEN and among_seen >= _DECIDES and is_better
    return Dependencies(names=names, accuracy=accuracy, decides=decides)


def _right_by_others(given: np.ndarray, asked: np.ndarray, asked_size: int) -> np.ndarray:
    """For each row: whether most of the other rows with the same `given` have the same `asked`."""
    pairs, inverse, counts = np.unique(given * asked_size + asked, return_inverse=True, return_counts=True)
    owners = pairs // asked_size
    order = np.lexsort((counts, owners))
    sorted_owners, sorted_counts = owners[order], counts[order]
    is_last = np.append(sorted_owners[1:] != sorted_owners[:-1], True)
    is_tied = np.zeros(len(order), dtype=bool)
    is_tied[1:] = (sorted_owners[1:] == sorted_owners[:-1]) & (sorted_counts[1:] == sorted_counts[:-1])
    wins = np.zeros(len(pairs), dtype=bool)
    wins[order] = is_last & ~is_tied & (sorted_counts >= 2)
    return wins[inverse]
