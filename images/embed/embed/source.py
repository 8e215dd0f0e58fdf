"""Where a model comes from: a directory or the Hugging Face hub, loaded quietly or refused with a reason.

A hub id becomes a directory first (the snapshot in the hub's cache), so that everything after - loading, loading again
in float32, hashing - reads one directory and never the network.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers
import torch
import transformers
import xxhash
from sentence_transformers import SentenceTransformer
from sentence_transformers import __version__ as sentence_transformers_version
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import ORIGINAL_TRANSFORMER_MODELS
from transformers import modeling_utils

from estiba.errors import ConfigError, EstibaError

logger = logging.getLogger(__name__)

# Not read by sentence-transformers' torch backend, or not part of the model.
_IGNORED = [
    "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.tflite", "*.pt", "*.pth", "*.md", "*.png", "*.jpg", "*.pdf",
    "onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*", "runs/*", "eval/*", "imgs/*", ".*",
]  # fmt: skip
_PICKLES = "pytorch_model*.bin"
_HASHED_SUFFIXES = frozenset((".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".py", ".bpe"))
_NOT_HASHED_FOLDERS = frozenset(("onnx", "openvino", "coreml", "runs", "eval", "imgs", "__pycache__"))


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's files."""

    directory: Path
    name: str
    """The hub id; "local" for a directory, whose place on disk says nothing about the model."""
    commit: str | None
    """The hub commit; None for a directory."""


def find(model: str, revision: str | None) -> Source:
    """The files of `model`, fetched if need be. A directory is used as it is, without a look at the network.

    Raises ConfigError: no such directory or hub model, no access, hub not reached, not a model.
    """
    if "://" in model:
        raise ConfigError(f"model {model!r}: neither a directory nor a hub id; copy it to a directory and pass that")
    if Path(model).is_dir():
        source = Source(directory=Path(model), name="local", commit=None)
    elif model.startswith(("/", ".", "~")) or model.count("/") > 1 or Path(model).exists():
        raise ConfigError(f"model {model!r}: no such directory; pass --model DIRECTORY, s3://BUCKET/PREFIX or a hub id")
    else:
        source = _fetch(model, revision)
    names = sorted(path.name for path in source.directory.iterdir())
    if "modules.json" not in names and "config.json" not in names:
        raise ConfigError(
            f"model {model!r}: holds neither modules.json nor config.json (found {', '.join(names[:8]) or 'nothing'}); "
            "pass the directory that a model was saved to"
        )
    hidden = [name for name in names if not os.access(source.directory / name, os.R_OK)]
    if hidden:  # safetensors saves files that only their owner may read
        raise ConfigError(
            f"model {model!r}: user {os.getuid()} may not read {', '.join(hidden[:4])}; chmod a+r, or change --user"
        )
    return source


def _fetch(model: str, revision: str | None) -> Source:
    # sentence-transformers' own models may be named without their organisation.
    short = "/" not in model and model.lower() not in ORIGINAL_TRANSFORMER_MODELS
    name = f"sentence-transformers/{model}" if short else model
    logger.info("fetching %s from the hub, unless it is in the cache", name)
    try:
        with _quiet():
            directory = Path(
                huggingface_hub.snapshot_download(name, revision=revision, ignore_patterns=[*_IGNORED, "*.bin"])
            )
            folders = [directory]
            if (modules := directory / "modules.json").is_file():
                folders += [directory / module["path"] for module in json.loads(modules.read_text("utf-8"))]
            pickled = {
                (folder / _PICKLES).relative_to(directory).as_posix()
                for folder in folders
                if not any(folder.glob("*.safetensors"))
            }
            if pickled:
                huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=sorted(pickled))
    except EstibaError:
        raise
    except Exception as error:  # the hub's client has many, of three libraries
        at = f" at revision {revision!r}" if revision else ""
        raise ConfigError(
            f"model {name!r}{at}: no such directory, and the hub did not give it ({_first_line(error)}); check the "
            "name and --revision, set HF_TOKEN for a private model, or without a network pass --model DIRECTORY"
        ) from error
    return Source(directory=directory, name=name, commit=directory.name)


def load(source: Source, *, device: str, dtype: torch.dtype, trust_remote_code: bool) -> SentenceTransformer:
    """The model in eval mode. Raises ConfigError when it cannot be loaded or some of its weights are missing."""
    infos: list[Any] = []
    modeling: Any = modeling_utils
    report = modeling.log_state_dict_report

    def collect(*args: Any, **kwargs: Any) -> None:
        infos.append(kwargs["loading_info"])
        report(*args, **kwargs)  # raises on weights of the wrong shape

    try:
        modeling.log_state_dict_report = collect
        with _quiet():
            model = SentenceTransformer(
                str(source.directory),
                device=device,
                trust_remote_code=trust_remote_code,
                local_files_only=not trust_remote_code,  # such code may lie in another repository
                model_kwargs={"dtype": dtype},
            )
    except (EstibaError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a third party's files, read by three libraries
        remedy = "check that the directory is whole"
        if "trust_remote_code" in str(error) and not trust_remote_code:
            remedy = "it brings its own code: read it, and pass --trust-remote-code if you trust it"
        raise ConfigError(f"model in {source.directory}: cannot be loaded ({_first_line(error)}); {remedy}") from error
    finally:
        modeling.log_state_dict_report = report
    # The pooler on top of BERT-like models is not read by sentence embeddings and often not saved.
    missing = sorted(key for info in infos for key in info.missing_and_mismatched() if "pooler" not in key)
    if missing:
        raise ConfigError(
            f"model in {source.directory}: {len(missing)} weights are missing ({', '.join(missing[:3])}, ...) and "
            "would be random; the files do not belong to config.json, or a shard was not copied"
        )
    if not (source.directory / "modules.json").is_file():
        logger.info("no modules.json in %s: using %s, as sentence-transformers does", source.directory, pooling(model))
    return model.to(dtype=dtype).eval()


def pooling(model: SentenceTransformer) -> str:
    """The modules after one another, as in "Transformer > Pooling(mean) > Normalize"."""
    words = []
    for module in model:
        mode = f"({module.pooling_mode})" if isinstance(module, Pooling) else ""
        words.append(type(module).__name__ + mode)
    return " > ".join(words)


def digest(directory: Path) -> str:
    """xxh3-128 over the files that make the model: weights, configuration, tokenizer, code; hex.

    Names relative to `directory` and contents, in the order of the names, nothing else: a copy has the same digest
    wherever it lies. Pickled weights beside safetensors are not read, so they do not count.
    """
    files = [path for path in directory.rglob("*") if path.suffix in _HASHED_SUFFIXES and path.is_file()]
    total = xxhash.xxh3_128()
    for path in sorted(files, key=lambda path: path.relative_to(directory).as_posix()):
        relative = path.relative_to(directory)
        if any(part in _NOT_HASHED_FOLDERS or part.startswith(".") for part in relative.parts):
            continue
        if path.suffix == ".bin" and any(path.parent.glob("*.safetensors")):
            continue
        content = xxhash.xxh3_128()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                content.update(block)
        total.update(f"{relative.as_posix()}\0{path.stat().st_size}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """The libraries whose release may change a bit of a vector."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentence_transformers": sentence_transformers_version,
        "tokenizers": tokenizers.__version__,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from the libraries; their errors are exceptions, and those pass."""
    names = ("transformers", "sentence_transformers", "huggingface_hub")
    levels = {name: logging.getLogger(name).level for name in names}
    hub: Any = huggingface_hub.utils
    hub_bars = not hub.are_progress_bars_disabled()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hub.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if hub_bars:
            hub.enable_progress_bars()
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {line[:300]}" if line else type(error).__name__
