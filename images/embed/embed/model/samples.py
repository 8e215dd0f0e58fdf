"""Texts on which a model is tried at the start, and batches of them on which an engine is compared with torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embed.data.chunks import Status
from embed.data.rows import COMPARED_TEXTS
from embed.model.batches import pack
from embed.model.tokens import Features, Tokens, Window, read_window

SENTENCES = (
    "Zarpamos al alba, con la bodega bien estibada.",
    "The price of wheat rose by 12% in 1887.",
    "我们明天去港口。",
)
"""Several scripts, since a model of one language may know no word of another."""
WIDTHS = (8, 64, 512)
"""Tokens of the rows that are compared at the start. Longer ones may take minutes."""
CALIBRATION_TOKENS = 1024
"""In a batch: the ranges are means over batches, so they do not depend on the settings."""


def batches(tokens: Tokens, known_ids: int | None, first_texts: Sequence[str], token_budget: int) -> list[Features]:
    """Batches of rows of several widths; the last ones hold the first texts of the input.

    `known_ids` is the number of token ids that the model knows.
    """
    window = read_window(tokens, [*SENTENCES, " ".join(SENTENCES * 2)], known_ids)
    found = [tokens.features(window, np.flatnonzero(window.status == Status.OK), 1)]
    window = _of_widths(tokens, WIDTHS)
    found.append(tokens.features(window, np.arange(len(WIDTHS)), 1))
    window = read_window(tokens, first_texts[:COMPARED_TEXTS], known_ids)
    rows = np.flatnonzero((window.status == Status.OK) & (window.n_tokens <= max(WIDTHS)))
    return found + [
        tokens.features(window, batch, 1) for batch in pack(window.n_tokens, rows, lambda width: token_budget // width)
    ]


def calibration(tokens: Tokens, known_ids: int | None, first_texts: Sequence[str]) -> list[Features]:
    """Batches of sentences and of the first texts of the input, without those that are compared if there are enough.

    A longer text counts with as many tokens as the longest row that is compared.
    """
    rest = first_texts[COMPARED_TEXTS:]
    texts = rest if len(rest) >= COMPARED_TEXTS else first_texts
    window = read_window(tokens, [*SENTENCES, *texts], known_ids)
    rows_ids = np.split(window.ids, window.starts[1:-1])
    window = _window([ids[: max(WIDTHS)] for ids in rows_ids if len(ids)])
    rows = np.arange(len(window.n_tokens))
    return [
        tokens.features(window, batch, 1)
        for batch in pack(window.n_tokens, rows, lambda width: CALIBRATION_TOKENS // width)
    ]


def row_of_width(tokens: Tokens, width: int) -> Features:
    """A batch of one row with `width` tokens, or as many as the model reads."""
    return tokens.features(_of_widths(tokens, [width]), np.arange(1), 1)


def rows_of_width(tokens: Tokens, width: int, rows: int) -> Features:
    """As many rows of `width` tokens, but for one that is shorter by one: without padding there would be no mask."""
    numbers = np.zeros(rows, np.int64)
    numbers[1:2] = 1
    return tokens.features(_of_widths(tokens, [width, max(1, width - 1)]), numbers, 1)


def _of_widths(tokens: Tokens, widths: Sequence[int]) -> Window:
    text = " ".join(SENTENCES * max(widths))  # each has a token at least
    ids = read_window(tokens, [text]).ids
    return _window([ids[:width] for width in widths])


def _window(rows: Sequence[np.ndarray]) -> Window:
    lengths = np.array([len(row) for row in rows], np.int32)
    return Window(
        status=np.zeros(len(lengths), np.uint8),
        n_tokens=lengths,
        truncated=np.zeros(len(lengths), bool),
        ids=np.concatenate(rows),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        unknown={},
        texts=[],
    )
