"""`--reuse OLD_OUTPUT`: rows that an earlier run has embedded get its vector, bit for bit, and are not computed."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kills import run_killed
from pydantic import ValidationError
from rehearsal import WORDS, compare
from tiny_model import build
from whole_job import run, write

from embed import pool, saving
from embed.artifacts import old_outputs
from embed.config import EmbedConfig
from embed.data import windows
from embed.data.known_vectors import KnownVectors, KnownVectorsWriter
from embed.job import embed
from embed.model import Encoder
from estiba.errors import ConfigError, Interrupted, StoreError
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.storage import open_store

ROWS = 600


def sentences(count: int, seed: int = 5) -> list[str | None]:
    """Different texts of different lengths, with some rows without text."""
    dice = random.Random(seed)
    texts: list[str | None] = [f"{index} " + " ".join(dice.choices(WORDS, k=1 + index % 30)) for index in range(count)]
    texts[7], texts[11] = None, " "
    return texts


def write_files(folder: Path, texts: list[str | None], files: int, row_group: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    step = -(-len(texts) // files)
    for index in range(files):
        part = pa.table({"texto": pa.array(texts[index * step : (index + 1) * step], pa.string())})
        pq.write_table(part, folder / f"f{index}.parquet", row_group_size=row_group)


def vectors_by_text(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.rglob("*.parquet"):
        table = pq.read_table(path)
        for text, vector in zip(table["texto"].to_pylist(), table["embeddings"].to_pylist(), strict=True):
            if vector is not None:
                found[text] = np.array(vector, np.float64).tobytes()
    return found


@pytest.fixture
def old(root, inputs, tiny_model) -> Path:
    """The outputs of an earlier run over three files, whose vectors are not what another batch would give."""
    write_files(root / "old-input", sentences(ROWS), files=3, row_group=100)
    run(tiny_model, input_path=str(root / "old-input"), output_path=str(root / "old"), no_checkpoint=True, batch_size=7)
    return root / "old"


@pytest.fixture
def changed(inputs) -> list[str | None]:
    """One row in a hundred is new, and the rest is shuffled over other files with other row groups."""
    texts = sentences(ROWS)
    for row in range(50, ROWS, 100):
        texts[row] = f"nuevo {row} {texts[row]}"
    random.Random(9).shuffle(texts)
    write_files(inputs, texts, files=5, row_group=64)
    return texts


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))


def test_only_new_rows_are_computed_and_all_others_have_the_old_bits(root, old, changed, tiny_model, capfd):
    results = run(tiny_model, reuse=str(old))
    before, after = vectors_by_text(old), vectors_by_text(root / "output/data")
    new = {text for text in changed if text is not None and text.startswith("nuevo")}
    assert len(new) == 6 and set(after) - set(before) == new
    assert all(after[text] == before[text] for text in set(after) - new)
    rows = results["rows"]
    assert rows["reused"] == ROWS - 2 - 6 and rows["computed_in_this_attempt"] == 6 + 2  # the two without text
    assert results["tokens"]["computed_in_this_attempt"] < 200 and results["reuse"] == str(old)
    assert f"{rows['reused']} reused" in results["summary"]
    assert "598 vectors in 600 rows of 3 files" in capfd.readouterr().err


def test_the_speed_is_that_of_computing_and_not_of_reading_old_outputs(root, old, changed, tiny_model, monkeypatch):
    original = pool.read_old_outputs

    def slowly(*given):
        time.sleep(3)
        return original(*given)

    monkeypatch.setattr(pool, "read_old_outputs", slowly)
    seconds = run(tiny_model, reuse=str(old))["seconds"]
    assert seconds["embedding"] < 3 < seconds["total"]


def test_each_row_group_says_that_its_vectors_are_reused_and_what_computed_them(root, old, changed, tiny_model):
    (computed,) = json.loads(pq.read_metadata(old / "f0.parquet").metadata[b"estiba.computed_by"])[0]["engines"]
    run(tiny_model, reuse=str(old))
    kinds = set()
    for name in names(root / "output/data"):
        for entry in json.loads(pq.read_metadata(root / "output/data" / name).metadata[b"estiba.computed_by"]):
            reused, *others = entry["engines"]
            assert reused == {"engine": "reused", "computed_by": [computed]}
            kinds.add(tuple(engine["engine"] for engine in others))
    assert kinds == {(), (computed["engine"],)}
    shutil.copytree(root / "output/data", root / "second")
    results = run(tiny_model, reuse=str(root / "second"), output_path=str(root / "third"), no_checkpoint=True)
    assert results["rows"]["computed_in_this_attempt"] == 2
    metadata = pq.read_metadata(root / "third" / names(root / "third")[0]).metadata
    assert json.loads(metadata[b"estiba.computed_by"])[0]["engines"] == [
        {"engine": "reused", "computed_by": [computed]}
    ]


def test_texts_that_differ_beyond_the_last_token_read_are_reused(root, inputs, tiny_model):
    long = [" ".join(random.Random(seed).choices(WORDS, k=40)) for seed in range(20)]
    write(root / "old-input/a.parquet", long)
    run(tiny_model, input_path=str(root / "old-input"), output_path=str(root / "old"), max_length=16)
    write(inputs / "b.parquet", [f"{text} y un final distinto" for text in long])
    results = run(tiny_model, reuse=str(root / "old"), max_length=16, truncated=True)
    assert results["rows"]["reused"] == 20 and results["rows"]["truncated"] == 20


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"max_length": 32}, ["--max-length '256' there and '32' here"]),
        ({"prompt": "pasaje: "}, ["--prompt '' there and 'pasaje: ' here"]),
        ({"dimensions": 8}, ["--dimensions '32' there and '8' here"]),
        ({"normalize": False}, ["--normalize 'true' there and 'false' here"]),
        ({"normalize": False, "max_length": 32}, ["--max-length", "--normalize"]),
        ({"dtype": "bfloat16"}, ["--dtype 'float32' there and 'bfloat16' here"]),
        ({"dtype": "float32"}, ["--dtype not set there and 'float32' here"]),
    ],
)
def test_other_settings_are_refused_by_name_before_the_model_is_loaded(
    root, old, changed, tiny_model, monkeypatch, now, words
):
    monkeypatch.setattr(pool, "start_pool", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="leave out --reuse") as refused:
        run(tiny_model, reuse=str(old), **now)
    assert all(word in str(refused.value) for word in words)


def test_vectors_of_exact_products_can_be_reused_by_a_job_that_takes_any(root, changed, tiny_model):
    run(tiny_model, output_path=str(root / "exact"), no_checkpoint=True, dtype="float32")
    assert run(tiny_model, reuse=str(root / "exact"))["rows"]["reused"] == ROWS - 2


def test_vectors_that_were_rounded_are_refused_where_more_bits_are_needed(root, changed, tiny_model):
    old = {"input_path": str(root / "input/data/dataset"), "no_checkpoint": True}
    run(tiny_model, output_path=str(root / "half"), embedding_dtype="float16", **old)
    with pytest.raises(ConfigError, match="--embedding-dtype float16 there and float32 here"):
        run(tiny_model, reuse=str(root / "half"))
    with pytest.raises(ConfigError, match="--embedding-dtype float16 there and int8 here"):
        run(tiny_model, reuse=str(root / "half"), embedding_dtype="int8")
    again = run(tiny_model, reuse=str(root / "half"), embedding_dtype="float16")
    assert again["rows"]["computed_in_this_attempt"] == 2
    assert vectors_by_text(root / "half") == vectors_by_text(root / "output/data")
    run(tiny_model, output_path=str(root / "full"), **old)
    results = run(
        tiny_model,
        reuse=str(root / "full"),
        embedding_dtype="float16",
        output_path=str(root / "rounded"),
        checkpoint_path=str(root / "third"),
    )
    assert results["rows"]["computed_in_this_attempt"] == 2
    assert vectors_by_text(root / "half") == vectors_by_text(root / "rounded")


def test_another_model_and_another_default_are_refused_when_the_model_is_loaded(root, old, changed, tmp_path_factory):
    other = build(tmp_path_factory.mktemp("other") / "model", max_length=17)
    with pytest.raises(ConfigError) as refused:
        run(other, reuse=str(old))
    text = str(refused.value)
    assert (
        text.count("local (xxh3-128:") == 2 and "--model" in text and "--max-length '256' there and '17' here" in text
    )
    assert not list((root / "output").rglob("*.parquet"))


def test_outputs_of_two_runs_are_refused_by_the_setting_that_differs(root, old, changed, tiny_model):
    run(tiny_model, output_path=str(root / "short"), max_length=32, no_checkpoint=True)
    shutil.copy(root / "short/f0.parquet", old / "g.parquet")
    with pytest.raises(ConfigError, match=r"--max-length is '256' in f0\.parquet and '32' in g\.parquet"):
        run(tiny_model, reuse=str(old))


def test_outputs_without_their_text_or_vectors_are_refused_with_the_remedy(root, changed, inputs, tiny_model):
    for path in inputs.iterdir():
        table = pq.read_table(path)
        pq.write_table(table.append_column("id", pa.array(range(len(table)), pa.int64())), path)
    run(tiny_model, output_path=str(root / "old"), columns=["id"])
    with pytest.raises(ConfigError, match=r"f0\.parquet has no text column 'texto'.*--columns"):
        run(tiny_model, reuse=str(root / "old"))
    results = run(tiny_model, output_path=str(root / "old"), columns=["id", "texto"])  # the remedy
    assert results["rows"]["computed_in_this_attempt"] == 0
    assert run(tiny_model, reuse=str(root / "old"), no_checkpoint=True)["rows"]["reused"] == ROWS - 2


def test_outputs_with_other_column_names_are_reused(root, inputs, tiny_model):
    texts = [text for text in sentences(40) if text and text.strip()]
    (root / "old-input").mkdir()
    pq.write_table(pa.table({"doc": [{"cuerpo": text} for text in texts]}), root / "old-input/a.parquet")
    names = {"text_column": "doc.cuerpo", "embedding_column": "v", "status_column": "s"}
    run(tiny_model, input_path=str(root / "old-input"), output_path=str(root / "old"), **names)
    write(inputs / "b.parquet", texts)
    assert run(tiny_model, reuse=str(root / "old"))["rows"]["reused"] == len(texts)


def test_an_empty_folder_and_one_with_files_of_others_only_are_refused(root, changed, tiny_model):
    (root / "none").mkdir()
    with pytest.raises(ConfigError, match=r"no output of an earlier run is there \(found nothing\)"):
        run(tiny_model, reuse=str(root / "none"))
    write(root / "none/a.parquet", ["hola"])
    (root / "none/notas.txt").write_text("hola")
    with pytest.raises(ConfigError, match=r"found a\.parquet, notas\.txt"):
        run(tiny_model, reuse=str(root / "none"))


def test_chunked_texts_are_refused_at_both_ends(root, changed, tiny_model):
    with pytest.raises(ValidationError, match="--reuse takes the vectors of whole texts, and --chunk cuts them"):
        run(tiny_model, reuse=str(root / "old"), chunk=32)
    run(tiny_model, output_path=str(root / "old"), chunk=32)
    with pytest.raises(ConfigError, match="--chunk '32' there and not set here"):
        run(tiny_model, reuse=str(root / "old"))


def test_a_job_with_sparse_or_token_vectors_is_refused(root, changed, tiny_model):
    for flag in ("sparse", "multi_vector"):
        with pytest.raises(ValidationError, match="--reuse takes dense vectors only"):
            run(tiny_model, reuse=str(root / "old"), **{flag: True})


def test_bytes_become_no_vectors_again(root, changed, tiny_model):
    run(tiny_model, output_path=str(root / "bytes"), embedding_dtype="int8", no_checkpoint=True)
    with pytest.raises(ConfigError, match="--embedding-dtype int8 there, of which only float32 and float16 can be"):
        run(tiny_model, reuse=str(root / "bytes"), embedding_dtype="int8")
    run(tiny_model, output_path=str(root / "full"), no_checkpoint=True)
    run(tiny_model, reuse=str(root / "full"), embedding_dtype="int8")
    assert vectors_by_text(root / "output/data") == vectors_by_text(root / "bytes")


def test_the_output_path_itself_cannot_be_reused(root, changed, tiny_model):
    with pytest.raises(ConfigError, match=r"--output-path .* and --reuse .* overlap"):
        run(tiny_model, reuse=str(root / "output/data"))


def test_damaged_outputs_and_files_of_others_are_named_and_their_rows_computed(root, old, changed, tiny_model, capfd):
    raw = (old / "f0.parquet").read_bytes()
    (old / "f0.parquet").write_bytes(raw[: len(raw) // 2])
    raw = bytearray((old / "f1.parquet").read_bytes())
    middle = pq.read_metadata(old / "f1.parquet").row_group(1).column(0)  # of the output's own row groups
    raw[middle.data_page_offset + 30 : middle.data_page_offset + 400] = b"\xff" * 370
    (old / "f1.parquet").write_bytes(raw)
    (old / "notas.txt").write_text("hola")
    before = vectors_by_text(old / "f2.parquet")
    results = run(tiny_model, reuse=str(old))
    shown = capfd.readouterr().err
    assert "f0.parquet is damaged" in shown and "f1.parquet: corrupt at row group 1" in shown
    assert "1 files are no outputs of this image: notas.txt" in shown
    assert 190 <= results["rows"]["reused"] <= 200 and results["rows"]["embedded"] == ROWS - 2
    after = vectors_by_text(root / "output/data")
    assert all(after[text] == vector for text, vector in before.items() if text in after)


def test_vectors_that_were_damaged_without_a_trace_are_computed_again(root, old, changed, tiny_model, capfd):
    table = pq.read_table(old / "f0.parquet")
    values = table["embeddings"].combine_chunks().flatten().to_numpy().copy()
    values[5] = np.inf
    kind = table.schema.field("embeddings").type
    vectors = pa.FixedSizeListArray.from_arrays(values, kind.list_size)
    mask = pa.array([text is None or not text.strip() for text in table["texto"].to_pylist()])
    assert mask.to_pylist().count(True) == 2
    flat = np.zeros((len(table), kind.list_size), np.float32)
    flat[~mask.to_numpy(zero_copy_only=False)] = vectors.flatten().to_numpy().reshape(-1, kind.list_size)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), kind.list_size, mask=mask).cast(kind)
    pq.write_table(table.set_column(table.schema.names.index("embeddings"), "embeddings", vectors), old / "f0.parquet")
    results = run(tiny_model, reuse=str(old))
    assert "f0.parquet: 1 vectors are not finite or have another length" in capfd.readouterr().err
    assert results["rows"]["reused"] == ROWS - 2 - 6 - 1 and results["rows"]["embedded"] == ROWS - 2


def test_a_killed_job_that_reuses_ends_with_the_same_bytes(root, inputs, old, tiny_model, monkeypatch):
    texts = sentences(ROWS)
    for row in range(0, ROWS, 2):
        texts[row] = f"nuevo {row}" if texts[row] else None
    write_files(inputs, texts, files=2, row_group=200)
    options: dict[str, Any] = {"reuse": str(old), "batch_size": 16}
    run(tiny_model, output_path=str(root / "whole"), checkpoint_path=str(root / "other"), **options)
    for batches in (3, 5, 2, 4):
        run_killed(monkeypatch, tiny_model, batches, **options)
    results = run(tiny_model, **options)
    assert results["rows"]["resumed"] > 0 and results["rows"]["reused"] > 250
    assert compare(root / "whole", root / "output/data") == []


def test_a_resume_with_other_old_outputs_or_none_uses_the_finished_chunks(root, old, changed, tiny_model, monkeypatch):
    monkeypatch.setattr(windows, "CPU_LIMITS", (128, 2**19))  # several windows
    stop, original = Stop(), saving.Saver._save

    def save(self, item, *rest):
        original(self, item, *rest)
        stop.request("SIGTERM", signum=15)

    with monkeypatch.context() as patched:
        patched.setattr(saving.Saver, "_save", save)
        with pytest.raises(Interrupted):
            embed(EmbedConfig(model=str(tiny_model), reuse=str(old)), Job.read(), stop)
    results = run(tiny_model)
    assert results["rows"]["resumed"] > 0 and 0 < results["rows"]["reused"] < ROWS / 2
    complete = run(tiny_model, reuse=str(old))
    assert complete["rows"]["computed_in_this_attempt"] == 0


def test_a_stop_while_old_outputs_are_read_ends_the_job_at_once(root, old, changed, tiny_model, monkeypatch):
    stop, original = Stop(), Encoder.tokenize

    def tokenize(self, texts):
        if len(texts) > 50:  # not the model's own check
            stop.request("SIGTERM", signum=15)
        return original(self, texts)

    monkeypatch.setattr(Encoder, "tokenize", tokenize)
    with pytest.raises(Interrupted, match="0 of 600 rows are saved"):
        embed(EmbedConfig(model=str(tiny_model), reuse=str(old)), Job.read(), stop)


def test_two_workers_share_the_old_vectors(root, old, changed, tiny_model):
    results = run(tiny_model, reuse=str(old), workers=2, device="cpu")
    before, after = vectors_by_text(old), vectors_by_text(root / "output/data")
    assert results["rows"]["reused"] == ROWS - 2 - 6 and results["rows"]["computed_in_this_attempt"] == 6 + 2
    assert all(after[text] == before[text] for text in set(after) & set(before))


def test_old_outputs_are_read_from_s3(root, old, changed, tiny_model, s3):
    store = open_store(f"s3://{s3.bucket}/old")
    for path in old.iterdir():
        store.put_file(path.name, path)
    results = run(tiny_model, reuse=f"s3://{s3.bucket}/old")
    assert results["rows"]["reused"] == ROWS - 2 - 6
    before, after = vectors_by_text(old), vectors_by_text(root / "output/data")
    assert all(after[text] == before[text] for text in set(after) & set(before))


def test_vectors_that_do_not_fit_on_the_disk_are_refused_at_the_start(root, old, changed, tiny_model, monkeypatch):
    usage = shutil.disk_usage(root)._replace(free=1000)
    monkeypatch.setattr(old_outputs.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"600 vectors take 0\.00 GB in .* TMPDIR"):
        run(tiny_model, reuse=str(old))


def test_a_disk_that_is_full_while_old_outputs_are_read_ends_the_job_with_a_remedy(
    root, old, changed, tiny_model, monkeypatch
):
    def add(self, digests, vectors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KnownVectorsWriter, "add", add)
    with pytest.raises(StoreError, match=r"No space left on device.*TMPDIR"):
        run(tiny_model, reuse=str(old))


def test_known_vectors_are_found_by_their_digest_and_dropped_with_their_file():
    dice = np.random.default_rng(1)
    digests = np.frombuffer(dice.bytes(16 * 100), "S16")
    vectors = dice.standard_normal((100, 3), np.float32)
    writer = KnownVectorsWriter(3, "float32")
    writer.add(digests[:60], vectors[:60])
    writer.add(digests[60:90], vectors[60:90])
    writer.keep(70)
    writer.add(digests[90:], vectors[90:])
    writer.add(digests[:5], vectors[95:])  # equal rows: the first one counts
    known = KnownVectors(writer.finish({"engine": "reused"}))
    del writer
    places = known.find(digests)
    assert (places[:70] >= 0).all() and (places[70:90] == -1).all() and (places[90:] >= 0).all()
    found = np.flatnonzero(places >= 0)
    assert np.array_equal(known.vectors(places[found]), vectors[found])
    empty = KnownVectorsWriter(3, "float16")
    assert KnownVectors(empty.finish({})).find(digests[:4]).tolist() == [-1] * 4
