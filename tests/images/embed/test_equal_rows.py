"""Rows of a window that the model reads alike are computed once and share the vector."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kills import run_killed
from rehearsal import WORDS, compare
from whole_job import outputs, run, write

from embed import saving
from embed.config import EmbedConfig
from embed.data.chunks import Status
from embed.model import Encoder
from embed.model.known import digests_of, divide
from embed.model.tokens import Window
from estiba.checkpoint import ChunkStore
from estiba.errors import StoreError


def vectors(root, name: str = "a.parquet") -> list[bytes | None]:
    column = outputs(root, name)["embeddings"].combine_chunks()
    return [None if not item.is_valid else np.array(item.as_py(), np.float32).tobytes() for item in column]


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """The number of rows of each batch that is computed."""
    sizes: list[int] = []
    original = Encoder._launch

    def launch(self, engine, window, batch):
        sizes.append(len(batch))
        return original(self, engine, window, batch)

    monkeypatch.setattr(Encoder, "_launch", launch)
    return sizes


def test_equal_texts_of_a_window_are_computed_once_and_share_the_vector(root, inputs, tiny_model, launched):
    texts = ["el barco zarpa", "la mar", None, "el barco zarpa", "", "la mar", "el barco zarpa", "faro"]
    write(inputs / "a.parquet", texts)
    results = run(tiny_model)
    assert sum(launched) == 3
    assert results["rows"]["copied"] == 3 and results["rows"]["embedded"] == 6
    assert results["rows"]["computed_in_this_attempt"] == 5  # the null and the empty row are counted, as always
    assert "3 copied from equal rows" in results["summary"]
    found = vectors(root)
    assert found[0] == found[3] == found[6] and found[1] == found[5]
    assert len({found[0], found[1], found[7]}) == 3
    assert outputs(root)["status"].to_pylist() == ["ok", "ok", "null", "ok", "empty", "ok", "ok", "ok"]
    counts = json.loads(outputs(root).schema.metadata.get(b"estiba.counts") or metadata(root)[b"estiba.counts"])
    assert counts["copied"] == 3 and counts["reused"] == 0


def metadata(root) -> dict[bytes, bytes]:
    return pq.read_metadata(root / "output/data/a.parquet").metadata


def test_a_window_with_copies_has_the_vectors_of_one_without_them(root, inputs, tiny_model):
    distinct = [" ".join(WORDS[: 1 + index]) for index in range(20)]
    write(inputs / "a.parquet", distinct)
    write(inputs / "b.parquet", [text for text in distinct for _ in range(5)])
    run(tiny_model)
    assert vectors(root, "b.parquet") == [vector for vector in vectors(root) for _ in range(5)]


def test_texts_that_differ_beyond_the_last_token_read_are_copies_and_keep_their_own_counts(root, inputs, tiny_model):
    short = " ".join(WORDS[:6])
    write(inputs / "a.parquet", [short, f"{short} mar", f"{short} faro y niebla"])
    results = run(tiny_model, max_length=8, n_tokens=True, truncated=True)
    out = outputs(root)
    assert out["n_tokens"].to_pylist() == [8, 8, 8]
    assert out["truncated"].to_pylist() == [False, True, True]
    assert results["rows"]["copied"] == 2 and len(set(vectors(root))) == 1


def test_counts_of_copies_survive_an_attempt_that_only_joins(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["mar"] * 10)
    run(tiny_model)
    (root / "output/data/a.parquet").unlink()
    again = run(tiny_model)
    assert again["rows"]["copied"] == 9 and again["rows"]["computed_in_this_attempt"] == 0
    assert again["rows"]["resumed"] == 10


def test_copies_of_a_row_without_a_finite_vector_have_none_either(root, inputs, tiny_model, monkeypatch):
    write(inputs / "a.parquet", ["mar", "faro", "mar"])
    encoder = Encoder(EmbedConfig(model=str(tiny_model), engine="torch"))
    original = encoder._engine.launch

    def launch(features, rows):
        launched = original(features, rows)
        with torch.inference_mode():
            launched.vectors_BD[rows == 0] = float("nan")
        return launched

    monkeypatch.setattr(encoder._engine, "launch", launch)
    encoded = encoder.encode(encoder.tokenize(["mar", "faro", "mar"]))
    assert encoded.status.tolist() == [Status.NOT_FINITE, Status.OK, Status.NOT_FINITE]
    assert encoded.n_tokens[0] == encoded.n_tokens[2] == 0 and not encoded.vectors[[0, 2]].any()


def test_a_job_that_is_killed_among_copies_ends_with_the_same_bytes(root, inputs, tiny_model, monkeypatch):
    texts = [f"barco {index % 90} " * (1 + index % 9) for index in range(600)]
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet")
    run(tiny_model, batch_size=16, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    for batches in (3, 2, 2, 1):
        run_killed(monkeypatch, tiny_model, batches, batch_size=16)
    results = run(tiny_model, batch_size=16)
    rows = results["rows"]
    assert rows["resumed"] > 0 and rows["copied"] > 100
    assert compare(root / "whole", root / "output/data") == []


def test_copies_of_rows_whose_chunk_is_saved_already_get_the_same_vectors(root, inputs, tiny_model, monkeypatch):
    """Two files share a window; the chunk of the first is saved, and that of the second is not."""
    texts = [f"barco {index} " * (1 + index % 9) for index in range(90)]
    write(inputs / "a.parquet", texts)
    write(inputs / "b.parquet", [*texts[::2], "otra cosa"])
    run(tiny_model, batch_size=16, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    original, saved = ChunkStore.commit, []

    def commit(self, key, data):
        if "/000000-" in key and not key.endswith("-partial"):
            saved.append(key)
            if len(saved) == 2:
                raise StoreError("the disk is full")
        return original(self, key, data)

    with monkeypatch.context() as patched:
        patched.setattr(saving, "SAVES_AT_ONCE", 1)
        patched.setattr(ChunkStore, "commit", commit)
        with pytest.raises(StoreError):
            run(tiny_model, batch_size=16)
    results = run(tiny_model, batch_size=16)
    assert len(saved) == 2 and results["rows"]["resumed"] >= 90
    assert results["rows"]["copied"] == 45
    assert compare(root / "whole", root / "output/data") == []


def test_a_model_with_a_tokenizer_of_its_own_tells_rows_apart_by_their_text():
    texts = ["uno", "dos", "uno", ""]
    window = Window(
        status=np.array([0, 0, 0, Status.EMPTY], np.uint8), n_tokens=np.array([1, 1, 1, 0], np.int32),
        truncated=np.zeros(4, bool), ids=np.zeros(0, np.int32), starts=np.zeros(5, np.int64), unknown={}, texts=texts,
    )  # fmt: skip
    division = divide(window, None)
    assert division.computed.tolist() == [0, 1] and division.copies.tolist() == [2]
    assert division.originals.tolist() == [0]


def test_a_digest_depends_on_all_ids_and_their_order():
    ids = np.array([1, 2, 3, 1, 3, 2, 1, 2, 1, 2, 3], np.int32)
    starts = np.array([0, 3, 6, 8, 11], np.int64)
    window: Window = SimpleNamespace(ids=ids, starts=starts, texts=[])  # type: ignore[assignment]
    digests = digests_of(window, np.arange(4)).tolist()
    assert digests[0] == digests[3] and len(set(digests)) == 3
