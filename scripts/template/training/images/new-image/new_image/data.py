"""Text files to batches of bytes. A batch is a pure function of (seed, step, rank), so a resume needs only the step."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch
import xxhash

from estiba.errors import DataError

VALIDATION_SHARE = 0.05
Batch: TypeAlias = torch.Tensor
"""int64[batch, sequence + 1]: the inputs, and one more byte for the targets."""


class Text:
    """All bytes of a directory of text files, in memory."""

    def __init__(self, folder: Path, *, seq_length: int, seed: int) -> None:
        """Raises DataError if there is too little text for one sequence."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith((".", "_"))]
        text = b"".join(path.read_bytes() for path in files)
        self.digest = xxhash.xxh3_128_hexdigest(text)
        self._seq_length, self._seed = seq_length, seed
        held_out = max(seq_length + 1, int(len(text) * VALIDATION_SHARE))
        if len(text) < 2 * held_out:
            raise DataError(
                f"{folder}: {len(files)} files with {len(text)} bytes, and sequences of {seq_length} need at least "
                f"{2 * held_out}; give more text or a lower --seq-length"
            )
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._training, self._validation = content[:-held_out], content[-held_out:]

    def batch(self, step: int, rank: int, size: int) -> Batch:
        """Sequences at random positions."""
        seed = xxhash.xxh3_64_intdigest(f"{self._seed} {rank} {step}".encode())
        dice = torch.Generator().manual_seed(seed % 2**63)
        starts = torch.randint(len(self._training) - self._seq_length, (size,), generator=dice)
        return torch.stack([self._training[start : start + self._seq_length + 1] for start in starts]).long()

    def validation(self) -> list[Batch]:
        """The whole validation text, one sequence in each batch."""
        last = len(self._validation) - self._seq_length
        starts = range(0, last, self._seq_length)
        return [self._validation[start : start + self._seq_length + 1].long()[None] for start in starts]
