"""OpenVINO, where it is asked for, computes what torch does, with the same bits in every run, or is not used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embed.config import EmbedConfig
from embed.model import Encoder, engines, openvino
from embed.model.openvino import NotConvertible, OpenVinoEngine
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
    assert encoder(tiny).computed_by["engine"].startswith("torch ")
    assert encoder(tiny, engine="auto").computed_by["engine"].startswith("openvino ")
    assert encoder(tiny, engine="auto", dtype="bfloat16").computed_by["engine"].startswith("torch ")
    monkeypatch.setattr(engines, "is_installed", lambda: False)
    assert encoder(tiny, engine="auto").computed_by["engine"].startswith("torch ")
    with pytest.raises(ConfigError, match=r"--engine openvino: the package openvino is not installed; pass --engine"):
        encoder(tiny, engine="openvino")


BITS = """
import sys, numpy as np
from embed.config import EmbedConfig
from embed.model import Encoder
encoder = Encoder(EmbedConfig(model=sys.argv[1], device="cpu", engine="openvino", dtype="float32"))
texts = ["barco " * (1 + index % 50) for index in range(60)]
print(encoder.encode(encoder.tokenize(texts)).vectors.tobytes().hex())
"""


def test_a_cached_conversion_gives_the_bits_of_a_new_one(tiny, tmp_path):
    """Converted and kept, read from the cache, and converted where nothing can be kept."""

    def bits(home: Path) -> str:
        environ = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", BITS, str(tiny)]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout

    (tmp_path / "file").write_text("")
    first = bits(tmp_path / "home")
    kept = list((tmp_path / "home/estiba-openvino").iterdir())
    kept = [path for path in kept if path.name != "lock"]
    assert sorted(path.suffix for path in kept) == [".bin", ".xml"]
    before = [path.stat().st_mtime_ns for path in kept]
    assert bits(tmp_path / "home") == first
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert bits(tmp_path / "file/below") == first
    next(path for path in kept if path.suffix == ".xml").write_text("<net")
    assert bits(tmp_path / "home") == first


def test_an_engine_with_other_vectors_is_not_used_and_that_is_told(tiny, texts, monkeypatch, caplog):
    original = OpenVinoEngine.forward
    monkeypatch.setattr(OpenVinoEngine, "forward", lambda self, features: original(self, features).flip(1))
    with caplog.at_level(logging.WARNING):
        fallen = encoder(tiny, engine="auto")
    assert "gives other vectors than torch in float32 (lowest cosine" in caplog.text
    assert fallen.computed_by["engine"].startswith("torch ")
    with pytest.raises(ConfigError, match="--engine openvino: it gives other vectors than torch for this model"):
        encoder(tiny, engine="openvino")
    monkeypatch.undo()
    assert np.array_equal(vectors(fallen, texts), vectors(encoder(tiny, engine="torch"), texts))


def test_a_vector_of_another_length_is_another_vector(tiny, monkeypatch):
    original = OpenVinoEngine.forward
    monkeypatch.setattr(OpenVinoEngine, "forward", lambda self, features: original(self, features) * 1.02)
    with pytest.raises(ConfigError, match="gives other vectors"):
        encoder(tiny, engine="openvino", normalize=False)


def test_a_model_that_cannot_run_at_a_length_is_left_to_torch(tiny, texts, monkeypatch, caplog):
    """A traced model may hold the length of the sample."""

    class Fixed:
        def __init__(self, compiled):
            self.compiled = compiled

        def __call__(self, inputs):
            if inputs[0].shape[1] >= 200:
                raise RuntimeError("Exception from src/inference:\nshapes do not match")
            return self.compiled(inputs)

    original = OpenVinoEngine.__init__

    def init(self, *arguments):
        original(self, *arguments)
        self._compiled = Fixed(self._compiled)

    monkeypatch.setattr(OpenVinoEngine, "__init__", init)
    checked = encoder(tiny, max_length=256, engine="auto")
    window = checked.tokenize(["hola", "barco " * 300])
    with pytest.raises(DataError, match=r"cannot compute a batch .*shapes do not match.*pass --engine torch"):
        checked.encode(window)
    with caplog.at_level(logging.WARNING):
        checked.check_engine(window)
    assert "cannot compute this model at every length: Exception from src/inference: shapes do not match" in caplog.text
    assert checked.computed_by["engine"].startswith("torch ")
    asked = encoder(tiny, max_length=256, engine="openvino")
    with pytest.raises(ConfigError, match="pass --engine torch"):
        asked.check_engine(window)


def test_a_library_that_does_not_load_is_a_reason_for_torch(tiny, monkeypatch):
    def refuse() -> bool:
        raise ImportError("libtbb.so.12: cannot open")

    monkeypatch.setattr(engines, "has_bfloat16", refuse)
    assert encoder(tiny, engine="auto").computed_by["engine"].startswith("torch ")
    with pytest.raises(ConfigError, match=r"openvino does not start \(ImportError: libtbb"):
        encoder(tiny, engine="openvino")


def test_rows_longer_than_all_before_are_compared_too(tiny, texts, monkeypatch, caplog):
    """The sample may be right and a long text wrong."""
    original = OpenVinoEngine.forward

    def forward(self, features):
        output = original(self, features)
        return output if features["input_ids"].shape[1] < 200 else output.flip(1)

    monkeypatch.setattr(OpenVinoEngine, "forward", forward)
    checked = encoder(tiny, max_length=256, engine="auto")
    assert checked.computed_by["engine"].startswith("openvino ")
    window = checked.tokenize(["hola", "barco " * 300])
    checked.check_engine(checked.tokenize(["hola", None, "barco " * 90]))
    assert checked.computed_by["engine"].startswith("openvino ")
    with caplog.at_level(logging.WARNING):
        checked.check_engine(window)
    assert "gives other vectors than torch" in caplog.text
    assert checked.computed_by["engine"].startswith("torch ")
    checked.check_engine(window)


def test_bfloat16_products_are_used_where_the_cpu_has_them_unless_a_precision_is_asked_for(tiny_model, monkeypatch):
    made: list[str] = []
    original = OpenVinoEngine.__init__

    def init(self, reference, sample, digest, precision):
        made.append(precision)
        original(self, reference, sample, digest, "float32")  # this machine may not have them
        self.precision = precision

    monkeypatch.setattr(OpenVinoEngine, "__init__", init)
    for has, options, expected in (
        (True, {}, "bfloat16"), (True, {"dtype": "float32"}, "float32"), (False, {}, "float32"),
    ):  # fmt: skip
        monkeypatch.setattr(engines, "has_bfloat16", lambda has=has: has)
        found = encoder(tiny_model, engine="auto", **options)
        assert made.pop() == expected
        assert not made
        # Work in another precision is not taken for work in float32.
        assert found.identity.get("products", "float32") == expected


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
    assert sorted(path.suffix or path.name for path in folder.iterdir()) == [".bin", ".xml", "lock"]
