"""OpenVINO, where it is asked for, computes what torch does, with the same bits in every run, or is not used."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kills import Killed, kill_at
from rehearsal import compare
from whole_job import run

from embed.config import EmbedConfig
from embed.data import windows
from embed.model import Encoder, engines, openvino
from embed.model.openvino import EngineError, NotConvertible, OpenVinoEngine
from estiba.errors import ConfigError, DataError


def encoder(model: Path, **options: object) -> Encoder:
    return Encoder(EmbedConfig(model=str(model), device="cpu", **options))  # type: ignore[arg-type]


def vectors(encoder: Encoder, texts: list[str]) -> np.ndarray:
    return encoder.encode(encoder.tokenize(texts)).vectors


@pytest.mark.parametrize("model", ["minilm", "tiny", "tiny_model"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"dimensions": 16, "normalize": False}, {"prompt": "a: "}])
def test_openvino_gives_the_vectors_of_torch(request, texts, model, options):
    directory = request.getfixturevalue(model)
    fast, exact = (encoder(directory, engine=kind, dtype="float32", **options) for kind in ("openvino", "torch"))
    assert fast.computed_by["engine"].startswith("openvino ")
    assert exact.computed_by["engine"].startswith("torch ")
    assert np.allclose(vectors(fast, texts), vectors(exact, texts), atol=2e-6, rtol=1e-4)
    assert fast.identity == exact.identity  # so that either finishes the work of the other


def test_auto_is_openvino_on_a_cpu_and_torch_for_other_weights(tiny, monkeypatch):
    assert encoder(tiny, engine="torch").computed_by["engine"].startswith("torch ")
    assert encoder(tiny).computed_by["engine"].startswith("openvino ")
    assert encoder(tiny, engine="auto", dtype="bfloat16").computed_by["engine"].startswith("torch ")
    monkeypatch.setattr(engines, "is_installed", lambda: False)
    assert encoder(tiny, engine="auto").computed_by["engine"].startswith("torch ")
    with pytest.raises(ConfigError, match=r"--engine openvino: the package openvino is not installed; pass --engine"):
        encoder(tiny, engine="openvino")


def test_a_cached_conversion_gives_the_bits_of_a_new_one(tiny, texts, tmp_path, monkeypatch):
    """Converted and kept, read from the cache, and converted where nothing can be kept."""

    def bits(home: Path) -> bytes:
        monkeypatch.setattr(openvino.huggingface_hub.constants, "HF_HOME", str(home))
        return vectors(encoder(tiny, engine="openvino", dtype="float32"), texts).tobytes()

    (tmp_path / "file").write_text("")
    first = bits(tmp_path / "home")
    kept = list((tmp_path / "home/estiba-openvino").iterdir())
    kept = [path for path in kept if path.suffix != ".lock"]
    assert sorted(path.suffix for path in kept) == [".bin", ".xml"]
    before = [path.stat().st_mtime_ns for path in kept]
    assert bits(tmp_path / "home") == first
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert bits(tmp_path / "file/below") == first
    next(path for path in kept if path.suffix == ".xml").write_text("<net")
    assert bits(tmp_path / "home") == first


def alter(monkeypatch, change, from_width=0):
    """Let OpenVINO give `change(vectors)` for batches of at least `from_width` columns."""
    original = OpenVinoEngine.launch

    def launch(self, features, rows):
        batch = original(self, features, rows)
        if features["input_ids"].shape[1] < from_width:
            return batch
        return dataclasses.replace(batch, finish=lambda: change(batch.finish()))

    monkeypatch.setattr(OpenVinoEngine, "launch", launch)


def reversed_(vectors):
    return vectors.flip(1)


def fail(_):
    raise EngineError("Exception from src/inference: shapes do not match")


def test_an_engine_with_other_vectors_is_not_used_and_that_is_told(tiny, texts, monkeypatch, caplog):
    alter(monkeypatch, reversed_)
    with caplog.at_level(logging.WARNING):
        fallen = encoder(tiny)
    assert "gives other vectors than torch in float32 (lowest cosine" in caplog.text
    assert fallen.computed_by["engine"].startswith("torch ")
    with pytest.raises(ConfigError, match="--engine openvino: it gives other vectors than torch for this model"):
        encoder(tiny, engine="openvino")
    monkeypatch.undo()
    assert np.array_equal(vectors(fallen, texts), vectors(encoder(tiny, engine="torch"), texts))


def test_a_vector_of_another_length_is_another_vector(tiny, monkeypatch):
    alter(monkeypatch, lambda vectors: vectors * 1.02)
    with pytest.raises(ConfigError, match="gives other vectors"):
        encoder(tiny, engine="openvino", normalize=False)


def test_the_first_texts_of_the_input_are_compared_too(root, inputs, tiny_model, monkeypatch):
    """The sentences may be right and the input wrong: one text of 30 tokens or more here."""
    texts = [f"barco {index}" for index in range(20)]
    pq.write_table(pa.table({"texto": ["", None, *texts]}), inputs / "b.parquet")
    alter(monkeypatch, lambda vectors: reversed_(vectors) if len(vectors) >= 10 else vectors)
    assert run(tiny_model)["engine"].startswith("torch ")
    assert run(tiny_model, engine="torch", output_path=str(root / "other"), no_checkpoint=True)["status"] == "complete"


@pytest.fixture
def long(tiny, copy_of):
    """A model that reads 2,048 tokens."""
    import torch
    from transformers import BertConfig, BertModel

    directory = copy_of(tiny, {"model.safetensors": None}, "long")
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=30522, max_position_embeddings=2048, **sizes)
    (directory / "config.json").unlink()
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (reversed_, "gives other vectors than torch in float32"),
        (fail, "cannot compute this model at every length: Exception from src/inference: shapes do not match"),
    ],
)
def test_windows_with_longer_rows_than_the_engine_can_compute_are_left_to_torch(
    long, monkeypatch, caplog, change, said
):
    """A traced model may hold the length of its sample. Windows of shorter rows keep the engine."""
    alter(monkeypatch, change, from_width=1500)
    checked = encoder(long, max_length=2048)
    short, wide = checked.tokenize(["hola", None, "barco " * 500]), checked.tokenize(["hola", "barco " * 800])
    expected = [(short, "openvino", 0), (wide, "torch", 1), (short, "openvino", 1), (wide, "torch", 1)]
    for window, kind, messages in expected:
        with caplog.at_level(logging.WARNING):
            checked.choose_engine(window)
        assert checked.computed_by["engine"].startswith(kind)
        assert caplog.text.count(said) == messages
    asked = encoder(long, max_length=2048, engine="openvino")
    asked.choose_engine(short)
    with pytest.raises(ConfigError, match="pass --engine torch"):
        asked.choose_engine(wide)


def test_a_resume_after_a_window_that_was_left_to_torch_keeps_the_engine_of_the_job(root, inputs, long, monkeypatch):
    texts = ["barco " * 800, *(f"barco {index} " * (1 + index % 20) for index in range(179))]
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet", row_group_size=60)
    monkeypatch.setattr(windows, "CPU_LIMITS", (60, 2**19))
    alter(monkeypatch, reversed_, from_width=1500)
    options = {"max_length": 2048, "batch_size": 16}
    run(long, **options, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    with monkeypatch.context() as patched:
        kill_at(patched, 5, after_a_save=True)  # when rows of the first window are saved
        with pytest.raises(Killed):
            run(long, **options)
    assert run(long, **options)["rows"]["resumed"] > 0
    assert compare(root / "whole", root / "output/data") == []
    entries = json.loads(pq.read_metadata(root / "output/data/a.parquet").metadata[b"estiba.computed_by"])
    found = [(entry["row_groups"], engine["engine"].split()[0]) for entry in entries for engine in entry["engines"]]
    assert found == [([0, 1], "torch"), ([1, 3], "openvino")]
    assert entries[0]["engines"][0]["instead_of"]["engine"] == entries[1]["engines"][0]["engine"]


def test_a_batch_that_the_engine_cannot_compute_ends_the_job_with_a_remedy(tiny, monkeypatch):
    checked = encoder(tiny)
    window = checked.tokenize(["hola", "barco " * 300] * 20)
    alter(monkeypatch, fail, from_width=200)
    with pytest.raises(DataError, match=r"cannot compute a batch .*shapes do not match.*pass --engine torch"):
        checked.encode(window)
    monkeypatch.undo()
    assert np.isfinite(checked.encode(window).vectors).all()


def test_the_number_of_cores_changes_no_bit(tiny_model, texts):
    """Each core computes batches of its own."""
    import torch

    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made = encoder(tiny_model, batch_size=3)
            assert made.computed_by["threads"] == 1
            found.append(vectors(made, texts * 5).tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


def test_a_library_that_does_not_load_is_a_reason_for_torch(tiny, monkeypatch):
    def refuse() -> bool:
        raise ImportError("libtbb.so.12: cannot open")

    monkeypatch.setattr(engines, "has_bfloat16", refuse)
    assert encoder(tiny, engine="auto").computed_by["engine"].startswith("torch ")
    with pytest.raises(ConfigError, match=r"openvino does not start \(ImportError: libtbb"):
        encoder(tiny, engine="openvino")


def test_bfloat16_products_are_used_where_the_cpu_has_them_unless_a_precision_is_asked_for(tiny_model, monkeypatch):
    made: list[str] = []
    original = OpenVinoEngine.__init__

    def init(self, reference, sample, digest, precision, calibration):
        made.append(precision)
        original(self, reference, sample, digest, "float32")  # this machine may not have them
        self.precision = precision

    monkeypatch.setattr(OpenVinoEngine, "__init__", init)
    for has, is_faster, options, expected in (
        (True, True, {}, "bfloat16"),
        (True, False, {}, "float32"),
        (True, True, {"dtype": "float32"}, "float32"),
        (False, True, {}, "float32"),
    ):
        monkeypatch.setattr(engines, "has_bfloat16", lambda has=has: has)
        monkeypatch.setattr(engines, "is_bfloat16_faster", lambda is_faster=is_faster: is_faster)
        found = encoder(tiny_model, engine="auto", **options)
        assert made.pop() == expected
        assert not made
        # Work that may be in another precision is not taken for work in float32.
        assert found.identity.get("products") == options.get("dtype")


@pytest.fixture
def bfloat16(monkeypatch):
    if not openvino.has_bfloat16():
        pytest.skip("this CPU does not multiply bfloat16 in hardware")
    monkeypatch.setattr(engines, "has_bfloat16", lambda: True)
    monkeypatch.setattr(engines, "is_bfloat16_faster", lambda: True)


@pytest.mark.parametrize(
    ("vendor", "flags", "is_faster"),
    [
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", True),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        (None, "bf16", True),  # another architecture
    ],
)
def test_intel_multiplies_bfloat16_faster_than_float32_with_amx_only(tmp_path, vendor, flags, is_faster):
    lines = ["processor\t: 0", *([] if vendor is None else [f"vendor_id\t: {vendor}"]), f"flags\t\t: fpu {flags}"]
    (tmp_path / "cpuinfo").write_text("\n".join(lines) + "\n\n")
    assert openvino.is_bfloat16_faster(tmp_path / "cpuinfo") is is_faster
    assert openvino.is_bfloat16_faster(tmp_path / "none") is True


def test_work_in_bfloat16_is_finished_in_it_where_float32_would_be_faster(
    bfloat16, root, inputs, minilm, texts, monkeypatch
):
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet", row_group_size=10)
    monkeypatch.setattr("embed.state.JobState.computed_by", lambda _: {"engine": "openvino 1", "dtype": "bfloat16"})
    monkeypatch.setattr(engines, "is_bfloat16_faster", lambda: False)
    run(minilm)
    metadata = pq.read_metadata(root / "output/data/a.parquet").metadata
    assert json.loads(metadata[b"estiba.computed_by"])[0]["engines"][0]["dtype"] == "bfloat16"


def test_vectors_of_bfloat16_products_point_where_those_of_float32_do(bfloat16, minilm, texts):
    fast, exact = encoder(minilm), encoder(minilm, engine="torch")
    assert fast.computed_by["dtype"] == "bfloat16"
    assert (vectors(fast, texts) * vectors(exact, texts)).sum(axis=1).min() >= 0.9999


def test_work_in_bfloat16_is_finished_in_float32_where_the_cpu_has_only_that(
    bfloat16, root, inputs, minilm, texts, monkeypatch
):
    """Nothing that is finished is computed again, and each row group says what computed it."""
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet", row_group_size=10)
    run(minilm)
    pq.write_table(pa.table({"texto": texts[::-1]}), inputs / "b.parquet", row_group_size=10)
    monkeypatch.setattr(engines, "has_bfloat16", lambda: False)
    results = run(minilm)
    assert (results["files"]["already_complete"], results["files"]["done_in_this_attempt"]) == (1, 1)
    found = [
        json.loads(pq.read_metadata(root / f"output/data/{name}.parquet").metadata[b"estiba.computed_by"])
        for name in "ab"
    ]
    assert [entry[0]["engines"][0]["dtype"] for entry in found] == ["bfloat16", "float32"]
    assert run(minilm, dtype="float32")["files"]["already_complete"] == 0


def test_a_model_that_openvino_cannot_run_is_computed_by_torch(tiny, monkeypatch):
    def init(self, *_):
        raise NotConvertible("operation x is not known")

    monkeypatch.setattr(OpenVinoEngine, "__init__", init)
    assert encoder(tiny, engine="auto").computed_by["engine"].startswith("torch ")
    with pytest.raises(ConfigError, match="--engine openvino: operation x is not known; pass --engine auto or torch"):
        encoder(tiny, engine="openvino")


def test_a_model_whose_positions_depend_on_the_length_is_not_converted(tiny, monkeypatch):
    plain = encoder(tiny, engine="torch")
    engine = plain._engine
    monkeypatch.setattr(
        engine.model.transformers_model.config, "rope_parameters", {"rope_type": "longrope"}, raising=False
    )
    window = plain.tokenize(["hola"])
    with pytest.raises(NotConvertible, match="its positions depend on the length"):
        OpenVinoEngine(engine, plain._tokens.features(window, np.arange(1), 1), "0" * 32, "float32")


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_model_that_does_not_fit_in_memory_twice_is_computed_by_torch(is_converted, minilm, monkeypatch, tmp_path):
    monkeypatch.setattr(openvino.huggingface_hub.constants, "HF_HOME", str(tmp_path))
    if is_converted:
        encoder(minilm, engine="openvino")
    monkeypatch.setattr(openvino, "available_memory_bytes", lambda: 2**20)
    assert encoder(minilm, engine="auto").computed_by["engine"].startswith("torch ")
    with pytest.raises(ConfigError, match=r"it needs about .* MiB, and 1 are free"):
        encoder(minilm, engine="openvino")


def test_what_a_killed_conversion_left_is_removed(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(openvino.huggingface_hub.constants, "HF_HOME", str(tmp_path))
    encoder(tiny, engine="openvino")
    folder = tmp_path / "estiba-openvino"
    (made,) = folder.glob("*.xml")
    made.unlink()
    (made.with_suffix(".new")).mkdir()
    (made.with_suffix(".new") / "half.bin").write_bytes(b"x")
    encoder(tiny, engine="openvino")
    assert sorted(path.suffix for path in folder.iterdir()) == [".bin", ".lock", ".xml"]
