"""Evaluation results: the decoded phonemes of each trial, and error rates over many trials."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brain_to_text.ctc import edits, greedy, marginalize
from brain_to_text.data.batches import MicroBatch, MicroBatcher
from brain_to_text.data.collate import Batch
from brain_to_text.data.dataset import TrialDataset
from brain_to_text.data.schema import N_DIPHONES
from estiba.training.prefetch import Prefetcher, to_device


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The result of one trial, with phonemes as class numbers. `true` and the edits are None if it has no labels."""

    session: str
    trial: str
    predicted: list[int]
    true: list[int] | None
    edits: int | None
    """Edit distance between `predicted` and `true`."""
    diphone_edits: int | None = None
    """With a diphone decoder: edit distance between predicted and true diphones."""
    n_diphones: int = 0
    sentence: str | None = None


def score_batch(
    logits_BNK: Tensor, micro_batch: MicroBatch, batch: Batch, sessions: Sequence[str]
) -> list[TrialResult]:
    """Decode greedily and count edits. `batch.day` indexes `sessions`."""
    is_diphones = logits_BNK.shape[-1] == N_DIPHONES
    diphones = greedy(logits_BNK, micro_batch.frames) if is_diphones else None
    predicted = greedy(marginalize(logits_BNK.float()) if is_diphones else logits_BNK, micro_batch.frames)
    labels, lengths = micro_batch.labels.cpu().numpy(), micro_batch.label_lengths
    phonemes = labels if micro_batch.phonemes is None else micro_batch.phonemes.cpu().numpy()
    results = []
    for row, prediction in enumerate(predicted):
        has_labels = lengths[row] > 0
        true = phonemes[row, : micro_batch.phoneme_lengths[row]].tolist() if has_labels else None
        diphone_edits = None
        if diphones is not None and has_labels:
            diphone_edits = edits(diphones[row], labels[row, : lengths[row]].tolist())
        results.append(
            TrialResult(
                session=sessions[int(batch.day[row])],
                trial=str(batch.trial[row]).rpartition("/")[2],
                predicted=prediction,
                true=true,
                edits=None if true is None else edits(prediction, true),
                diphone_edits=diphone_edits,
                n_diphones=lengths[row] if is_diphones else 0,
                sentence=batch.sentences[row],
            )
        )
    return results


def error_rates(results: Iterable[TrialResult]) -> dict[str, tuple[int, int]]:
    """Return (edits, phonemes) by session, sorted by name."""
    days: dict[str, tuple[int, int]] = {}
    for result in results:
        if result.true is not None and result.edits is not None:
            n_edits, n_phonemes = days.get(result.session, (0, 0))
            days[result.session] = (n_edits + result.edits, n_phonemes + len(result.true))
    return dict(sorted(days.items()))


def total(days: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Return (edits, phonemes) summed over sessions."""
    return sum(edits for edits, _ in days.values()), sum(length for _, length in days.values())


def evaluation_batches(
    trials: TrialDataset, micro_batcher: MicroBatcher, batch_size: int, device: torch.device
) -> Iterator[tuple[Batch, MicroBatch, MicroBatch]]:
    """Yield every trial once, in batches of one day: as read, as a micro-batch, and as a micro-batch on the device.

    A thread reads and prepares batches ahead of time.
    """
    ids = trials.sweep(batch_size)
    batches = trials.read_all(ids)

    def prepare_next(_: int) -> Any:
        batch = next(batches)
        return batch, micro_batcher(batch)[0]

    prefetcher: Prefetcher[Any] = Prefetcher(prepare_next, 0, len(ids))
    try:
        for index in range(len(ids)):
            item = prefetcher.next(index, lambda: False)
            assert item is not None
            batch, micro_batch = item
            yield batch, micro_batch, to_device(micro_batch, device)
    finally:
        prefetcher.close()
        with contextlib.suppress(ValueError):  # the thread is still inside a read
            batches.close()  # type: ignore[attr-defined]
