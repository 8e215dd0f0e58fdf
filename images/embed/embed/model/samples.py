"""Texts on which a model is tried at the start, and batches of them on which an engine is compared with torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embed.data.chunks import Status
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
TEXTS = 16
"""Texts of the input that are compared at the start, but for longer ones."""
CALIBRATION_TEXTS = 64
"""Texts of the input from which products in int8 get their ranges. Of MiniLM-L6 300 give no better ones."""


def batches(tokens: Tokens, known_ids: int | None, first_texts: Sequence[str], token_budget: int) -> list[Features]:
    """Batches of rows of several widths; the last ones hold the first texts of the input.

    `known_ids` is the number of token ids that the model knows.
    """
    window = read_window(tokens, [*SENTENCES, " ".join(SENTENCES * 2)], known_ids)
    found = [tokens.features(window, np.flatnonzero(window.status == Status.OK), 1)]
    window = _of_widths(tokens, WIDTHS)
    found.append(tokens.features(window, np.arange(len(WIDTHS)), 1))
    window = read_window(tokens, first_texts[:TEXTS], known_ids)
    rows = np.flatnonzero((window.status == Status.OK) & (window.n_tokens <= max(WIDTHS)))
    return found + [tokens.features(window, batch, 1) for batch in pack(window.n_tokens, rows, lambda: token_budget)]


def calibration(tokens: Tokens, known_ids: int | None, first_texts: Sequence[str], token_budget: int) -> list[Features]:
    """Batches of the first texts of the input, and of the sentences."""
    window = read_window(tokens, [*SENTENCES, *first_texts[:CALIBRATION_TEXTS]], known_ids)
    rows = np.flatnonzero(window.status == Status.OK)
    return [tokens.features(window, batch, 1) for batch in pack(window.n_tokens, rows, lambda: token_budget)]


def row_of_width(tokens: Tokens, width: int) -> Features:
    """A batch of one row with `width` tokens, or as many as the model reads."""
    return tokens.features(_of_widths(tokens, [width]), np.arange(1), 1)


def _of_widths(tokens: Tokens, widths: Sequence[int]) -> Window:
    text = " ".join(SENTENCES * max(widths))  # each has a token at least
    ids = read_window(tokens, [text]).ids
    lengths = np.minimum(widths, len(ids)).astype(np.int32)
    return Window(
        status=np.zeros(len(lengths), np.uint8),
        n_tokens=lengths,
        truncated=np.zeros(len(lengths), bool),
        ids=np.concatenate([ids[:length] for length in lengths]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        unknown={},
        texts=[],
    )
