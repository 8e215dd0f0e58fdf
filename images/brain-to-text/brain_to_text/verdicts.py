"""What a model made of each trial, and the error rates over many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from brain_to_text.batches import Micro, Preparation
from brain_to_text.ctc import DIPHONES, edits, greedy, marginal
from estiba.loop.ahead import Ahead, to_device

if TYPE_CHECKING:
    from brain_to_text.data import Trials
    from brain_to_text.reading.collate import Batch


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One trial. Phonemes as class numbers; rates are None where the trial has no label."""

    session: str
    trial: str
    predicted: list[int]
    true: list[int] | None
    edits: int | None
    """Between the two."""
    diphone_edits: int | None = None
    """Of a diphone decoder: between the diphones themselves."""
    n_diphones: int = 0
    sentence: str | None = None


def judge(logits_BNK: Tensor, micro: Micro, batch: Batch, sessions: Sequence[str]) -> list[Verdict]:
    """Decode greedily and count edits. `sessions` are the reader's, which `batch.day` numbers."""
    is_diphones = logits_BNK.shape[-1] == DIPHONES
    diphones = greedy(logits_BNK, micro.frames) if is_diphones else None
    predicted = greedy(marginal(logits_BNK.float()) if is_diphones else logits_BNK, micro.frames)
    labels, lengths = micro.labels.cpu().numpy(), micro.label_lengths
    spelt = labels if micro.phonemes is None else micro.phonemes.cpu().numpy()
    found = []
    for row, prediction in enumerate(predicted):
        has_label = lengths[row] > 0
        true = spelt[row, : micro.phoneme_lengths[row]].tolist() if has_label else None
        found.append(
            Verdict(
                session=sessions[int(batch.day[row])],
                trial=str(batch.trial[row]).rpartition("/")[2],
                predicted=prediction,
                true=true,
                edits=None if true is None else edits(prediction, true),
                diphone_edits=(
                    edits(diphones[row], labels[row, : lengths[row]].tolist()) if diphones and has_label else None
                ),
                n_diphones=lengths[row] if diphones else 0,
                sentence=batch.sentences[row],
            )
        )
    return found


def error_rates(verdicts: Iterable[Verdict]) -> dict[str, tuple[int, int]]:
    """(edits, phonemes) of each session; their sums are the total."""
    days: dict[str, tuple[int, int]] = {}
    for verdict in verdicts:
        if verdict.true is not None and verdict.edits is not None:
            before = days.get(verdict.session, (0, 0))
            days[verdict.session] = (before[0] + verdict.edits, before[1] + len(verdict.true))
    return days


def prepared(
    trials: Trials, prepare: Preparation, batch_size: int, device: torch.device
) -> Iterator[tuple[Batch, Micro, Micro]]:
    """Every trial once, in batches of one day: as read, prepared, and on the device. Read and prepared in a thread."""
    sweep = trials.sweep(batch_size)
    reading = trials.read_all(sweep)

    def make(_: int) -> Any:
        batch = next(reading)
        return batch, prepare(batch)[0]

    ahead: Ahead[Any] = Ahead(make, 0, len(sweep))
    try:
        for index in range(len(sweep)):
            item = ahead.next(index, lambda: False)
            assert item is not None
            batch, micro = item
            yield batch, micro, to_device(micro, device)
    finally:
        ahead.close()
        with contextlib.suppress(ValueError):  # a thread that is stuck in a read still holds it
            reading.close()  # type: ignore[attr-defined]
