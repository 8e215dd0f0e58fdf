"""A small model with the shape of BGE-M3, built by the tests, and its heads computed without this project's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rehearsal import WORDS

HIDDEN, TOKEN_WIDTH = 32, 16


def build(folder: Path) -> Path:
    """XLM-R with one layer, CLS pooling and both heads; random weights. Writes it to `folder` and returns that."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    tokenizer.train_from_iterator([" ".join(WORDS), "abcdefghijklmnopqrstuvwxyz 0123456789"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    plain = folder.with_name(folder.name + "-plain")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>",
    ).save_pretrained(plain)  # fmt: skip
    torch.manual_seed(3)
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=130, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        type_vocab_size=1,
    )  # fmt: skip
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=64)
    modules = [transformer, Pooling(HIDDEN, pooling_mode="cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    save_head(folder, "sparse_linear", torch.randn(1, HIDDEN), torch.zeros(1))
    save_head(folder, "colbert_linear", torch.randn(TOKEN_WIDTH, HIDDEN), torch.randn(TOKEN_WIDTH))
    return folder


def save_head(folder: Path, name: str, weight: Any, bias: Any) -> None:
    import torch

    torch.save({"weight": weight, "bias": bias}, folder / f"{name}.pt")


def reference(folder: Path, text: str) -> tuple[dict[int, float], np.ndarray]:
    """The weights by token id and the vectors of the tokens after the first, of one text, as FlagEmbedding has them."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    ids = tokenizer(text, truncation=True, max_length=64)["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    sparse, colbert = (torch.load(folder / f"{name}_linear.pt") for name in ("sparse", "colbert"))
    weights = np.maximum(hidden @ sparse["weight"].numpy().T + sparse["bias"].numpy(), 0)[:, 0]
    by_id: dict[int, float] = {}
    for id, weight in zip(ids, weights.tolist(), strict=True):
        if id not in (0, 1, 2, 3) and weight > by_id.get(id, 0.0):
            by_id[id] = weight
    vectors = hidden[1:] @ colbert["weight"].numpy().T + colbert["bias"].numpy()
    return by_id, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
