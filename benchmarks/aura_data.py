# environment: torch
# needs: corpus
"""aura's data path against Hugging Face's: text to packed token ids, and ids to batches.

    python benchmarks/aura_data.py --text runs/aura/input                 # text made by demo/aura_corpus.py
    python benchmarks/aura_data.py --text runs/aura/input --rounds 5 --copies 4

Needs a Python with aura's requirements and `datasets`; no network, no image. Rounds in turn, medians of the ratios.

Packing: theirs is run_clm's way, `datasets.map` of a fast tokenizer and of the grouping, batched, num_proc=2, writing
its cache; ours is `aura.data.corpus.prepare` with two workers, writing, syncing and verifying its shards. Both begin
with the text files and a loaded tokenizer, and end where the first batch can be taken. Loading: theirs is torch's
DataLoader over the grouped dataset in torch format, shuffled, in its default process and in two workers, whichever is
faster; ours is `Windows.take`. Both give int64 batches of the same shape.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
SEQ_LENGTH, BATCH, WORKERS, VOCABULARY = 1024, 8, 2, 32_000
LOADER_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=ROOT / "runs/aura/input", help="directory of .txt files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=2, help="how many times the text, each copy a little different")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    files = sorted(options.text.glob("*.txt"))
    if not files:
        print(f"no .txt in {options.text}; run: python demo/aura_corpus.py --out {options.text}", file=sys.stderr)
        return 2
    sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "images/aura")]
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", PYTHONWARNINGS="ignore")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    with tempfile.TemporaryDirectory(prefix="aura-data-") as folder:
        try:
            results = measure(files, Path(folder), options.rounds, options.copies)
        except ModuleNotFoundError as error:
            print(f"needs {error.name}: pip install -r images/aura/requirements.txt datasets", file=sys.stderr)
            return 2
    return report(results, options.results)


def measure(files: list[Path], folder: Path, rounds: int, copies: int) -> dict[str, Any]:
    from aura.data.documents import read_documents  # type: ignore[import-not-found,import-untyped]
    from aura.tokenizer.training import train_tokenizer  # type: ignore[import-not-found,import-untyped]

    text = folder / "text"
    text.mkdir()
    for copy in range(copies):
        for path in files:
            words = path.read_text("utf-8").replace(" de ", f" de{copy or ''} ")
            (text / f"{path.stem}-{copy}.txt").write_text(words, "utf-8")
    tokenizer = train_tokenizer(
        (piece for path in files for piece in read_documents(str(path))), vocab_size=VOCABULARY, folder=folder / "tok"
    )
    size_mb = sum(path.stat().st_size for path in text.iterdir()) / 1e6
    found: dict[str, Any] = {"text_mb": round(size_mb, 2), "rounds": rounds, "seconds": {"ours": [], "theirs": []}}
    makers: dict[str, Callable[[Path], Any]] = {
        "ours": lambda place: ours(text, place, tokenizer),
        "theirs": lambda place: theirs(text, place, folder / "tok"),
    }
    made: dict[str, Any] = {}
    for number in range(rounds):
        for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            place = folder / f"{name}-{number}"
            began = time.perf_counter()
            made[name] = makers[name](place)
            found["seconds"][name].append(round(time.perf_counter() - began, 3))
            if number + 1 < rounds:
                shutil.rmtree(place, ignore_errors=True)
    seconds = found["seconds"]
    found["mb_per_s"] = {name: round(size_mb / statistics.median(values), 2) for name, values in seconds.items()}
    found["packing_ratio"] = statistics.median(t / o for o, t in zip(seconds["ours"], seconds["theirs"], strict=True))
    rates: dict[str, list[float]] = {"ours": [], "dataloader": [], "dataloader, 2 workers": []}
    for _ in range(rounds):
        rates["ours"].append(ours_per_s(made["ours"].train))
        rates["dataloader"].append(theirs_per_s(made["theirs"], 0))
        rates["dataloader, 2 workers"].append(theirs_per_s(made["theirs"], WORKERS))
    found["loader_tokens_per_s"] = {name: round(statistics.median(values)) for name, values in rates.items()}
    found["loader_ratio"] = statistics.median(
        mine / max(one, two) for mine, one, two in zip(*rates.values(), strict=True)
    )
    return found


def ours(text: Path, place: Path, tokenizer: Any) -> Any:
    from aura.data.corpus import prepare  # type: ignore[import-not-found,import-untyped]
    from estiba.platform.stop import Stop

    return prepare(
        str(text), tokenizer=tokenizer, folder=place, seq_length=SEQ_LENGTH, validation_split=0.0,
        text_format="lines", workers=WORKERS, stop=Stop(), seed=1,
    )  # fmt: skip


def theirs(text: Path, place: Path, tokenizer: Path) -> Any:
    """As transformers/examples/pytorch/language-modeling/run_clm.py does it."""
    import datasets  # type: ignore[import-not-found,import-untyped]
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    fast = AutoTokenizer.from_pretrained(tokenizer)
    lines = datasets.load_dataset("text", data_files=sorted(map(str, text.iterdir())), split="train",
                                  cache_dir=str(place))  # fmt: skip

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return fast(rows["text"])

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*values)) for name, values in rows.items()}
        total = len(joined["input_ids"]) // SEQ_LENGTH * SEQ_LENGTH
        result = {
            name: [values[at : at + SEQ_LENGTH] for at in range(0, total, SEQ_LENGTH)]
            for name, values in joined.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    ids = lines.map(tokenize, batched=True, num_proc=WORKERS, remove_columns=["text"])
    return ids.map(group, batched=True, num_proc=WORKERS)


def ours_per_s(windows: Any) -> float:
    windows.take(0, BATCH)
    began, at = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < LOADER_S:
        for _ in range(64):
            windows.take(at, BATCH)
            at += BATCH
    return at * SEQ_LENGTH / took


def theirs_per_s(dataset: Any, workers: int) -> float:
    """The processes' start is not counted."""
    from torch.utils.data import DataLoader

    columns = dataset.with_format("torch", columns=["input_ids"])
    loader = DataLoader(columns, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    next(iter(loader))
    rows, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < LOADER_S:
        for batch in loader:
            rows += len(batch["input_ids"])
            if (took := time.perf_counter() - began) >= LOADER_S:
                break
    return rows * SEQ_LENGTH / took


def report(found: dict[str, Any], results: Path | None) -> int:
    rates, loader = found["mb_per_s"], found["loader_tokens_per_s"]
    print(f"text to packed ids, {found['text_mb']} MB, {WORKERS} processes")
    for name, label in (("ours", "aura.data.corpus.prepare"), ("theirs", "datasets.map + grouping")):
        print(f"  {label:<26}{rates[name]:>9.2f} MB/s")
    print(f"ids to batches of {BATCH} x {SEQ_LENGTH}")
    for name, rate in loader.items():
        print(f"  {name:<26}{rate / 1e6:>9.1f} M tokens/s")
    goals = [
        goal("packing, times datasets.map", round(found["packing_ratio"], 2), ">=1.8"),
        goal("loader, times DataLoader", round(found["loader_ratio"], 2), ">=5"),
    ]
    publish("aura_data", found, goals, path=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
