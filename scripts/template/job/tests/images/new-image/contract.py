"""The new-image job as the contract's checks run it (tests/contract)."""

from __future__ import annotations

import random
import re
from pathlib import Path

from contract.containers import Image
from contract.workloads import NO_INPUT, Job, Prepared

WORDS = "el barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto".split()


def prepare(image: Image, folder: Path) -> Prepared:
    """Three small files, and four of a thousand chunks each."""
    dice = random.Random(0)

    def write(path: Path, lines: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(" ".join(dice.choices(WORDS, k=dice.randint(0, 12))) + "\n" for _ in range(lines)))

    for name in ("a.txt", "b.txt", "puerto/c.txt"):
        write(folder / "quick" / name, 25)
    for index in range(4):
        write(folder / "slow" / f"s{index}.txt", 1000)
    return Prepared(
        quick=Job(channels={"dataset": folder / "quick"}, settings={"chunk-lines": 10, "longest-word": True}),
        slow=Job(channels={"dataset": folder / "slow"}, settings={"chunk-lines": 1}),
        commits=lambda checkpoints: sum(1 for _ in checkpoints.rglob("*.piece")),
        commits_before_a_signal=50,
        ignore=("results*.json",),
        resumed=re.compile(r"resuming: [1-9]\d* chunks are saved"),
        misspelt=("chunk-line", "chunk-lines"),
        ill_typed=("chunk-lines", "muchas"),
        refusals=(NO_INPUT,),
        splits_files_by_host=True,
        imports_torch=False,
    )
