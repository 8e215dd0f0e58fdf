"""A directory that is no sentence-transformers model, or only half of one, is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tiny
from whole_job import outputs, run, write

from embed.config import EmbedConfig
from embed.model import Encoder, loading
from estiba.errors import ConfigError, DataError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def bert(minilm: Path, folder: Path, architecture: str) -> Path:
    import transformers

    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=1
    )
    getattr(transformers, architecture)(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(minilm / name, folder)
    return folder


def encoder(model: Path) -> Encoder:
    return Encoder(EmbedConfig(model=str(model), device="cpu"))


def test_a_sparse_encoder_is_refused_by_name(minilm, tmp_path):
    from sentence_transformers import SparseEncoder

    SparseEncoder(str(bert(minilm, tmp_path / "mlm", "BertForMaskedLM"))).save(str(tmp_path / "sparse"))
    with pytest.raises(ConfigError, match=r"sparse.*is a SparseEncoder, not a SentenceTransformer"):
        encoder(tmp_path / "sparse")
    (tmp_path / "sparse/config_sentence_transformers.json").unlink()  # as models of earlier versions: by its modules
    with pytest.raises(ConfigError, match=r"sparse.*is a SparseEncoder, not a SentenceTransformer"):
        encoder(tmp_path / "sparse")


def test_a_model_whose_modules_give_no_vector_of_a_text_is_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m")
    modules = json.loads((tmp_path / "m/modules.json").read_text())
    (tmp_path / "m/modules.json").write_text(json.dumps(modules[:1]))
    with pytest.raises(ConfigError, match=r"gives no vector of a text, only .*token_embeddings"):
        encoder(tmp_path / "m")


@pytest.mark.parametrize("is_saved_by_the_library", [True, False])
def test_a_cross_encoder_is_refused_by_name(minilm, tmp_path, is_saved_by_the_library):
    from sentence_transformers import CrossEncoder

    model = bert(minilm, tmp_path / "cross", "BertForSequenceClassification")
    if is_saved_by_the_library:
        CrossEncoder(str(model)).save(str(tmp_path / "saved"))
        model = tmp_path / "saved"
    with pytest.raises(ConfigError, match="is a CrossEncoder"):
        encoder(model)


def test_a_model_without_its_tokenizer_is_refused(tiny, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, tmp_path)
    with pytest.raises(ConfigError, match=r"knows no word and reads only \[UNK\].*tokenizer.json"):
        encoder(tmp_path)


def test_a_model_that_gives_every_sentence_the_same_vector_is_refused(minilm, tmp_path):
    def forget(model):
        model.embeddings.word_embeddings.weight.zero_()
        model.embeddings.position_embeddings.weight.zero_()

    with pytest.raises(ConfigError, match="gives different sentences the same vector"):
        encoder(make_tiny(minilm, tmp_path / "same", forget))


def test_a_librarys_warning_about_a_model_is_told_once(tiny, capfd, monkeypatch):
    import logging

    from sentence_transformers import SentenceTransformer

    class Warns(SentenceTransformer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            logging.getLogger("sentence_transformers.x").warning("this model needs %s", "care")

    monkeypatch.setattr(loading, "SentenceTransformer", Warns)
    monkeypatch.setattr(loading, "_told", set())
    for _ in range(2):
        encoder(tiny)
    assert capfd.readouterr().err.count("this model needs care") == 1


@pytest.fixture
def with_new_tokens(minilm, tmp_path) -> Path:
    """MiniLM's tokenizer with two tokens that were added after the embedding table had been made."""
    model = make_tiny(minilm, tmp_path / "added")
    document = json.loads((model / "tokenizer.json").read_text("utf-8"))
    for index, token in enumerate(("<barco>", "<ancla>")):
        document["added_tokens"].append(
            {
                "id": 30522 + index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": False,
            }
        )
    (model / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    return model


def test_a_token_that_the_embedding_table_lacks_costs_its_row_and_is_named(root, inputs, with_new_tokens, capfd):
    texts = [f"hola {index}" for index in range(40)]
    texts[7], texts[31] = "un <ancla> en la costa", "otro <barco> más"
    pq.write_table(pa.table({"texto": texts}), inputs / "a.parquet", row_group_size=20)
    write(inputs / "b.parquet", ["hola"])
    with pytest.raises(DataError, match=r"a\.parquet: row 7, 31.*--on-bad-row skip"):
        run(with_new_tokens)
    shown = capfd.readouterr().err
    assert "30522 rows" in shown and "'<barco>' (30522)" in shown
    assert "a.parquet: row 7 holds the token '<ancla>' (30523)" in shown
    statuses = outputs(root)["status"].to_pylist()
    assert [row for row, status in enumerate(statuses) if status == "unknown token"] == [7, 31]
    assert outputs(root)["embeddings"].is_null().to_pylist() == [row in (7, 31) for row in range(40)]
    results = run(with_new_tokens, on_bad_row="skip")  # from the finished outputs: nothing is computed again
    assert results["rows"]["computed_in_this_attempt"] == 0 and results["status"] == "complete"
    assert results["rows"]["bad"] == [{"path": "a.parquet", "rows": [7, 31]}]
    assert results["rows"]["without_vector"] == {"unknown token": 2}
