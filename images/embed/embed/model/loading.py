"""Find a model's files and load them without the libraries' log noise, or explain why that is impossible.

A name on the hub becomes a directory first (the snapshot in the hub's cache), so that loading, loading again in float32
and hashing read one directory and never the network.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
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

# Not read by the torch backend of sentence-transformers, or not part of the model.
_IGNORED = [
    "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.tflite", "*.pt", "*.pth", "*.md", "*.png", "*.jpg", "*.pdf",
    "onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*", "runs/*", "eval/*", "imgs/*", ".*",
]  # fmt: skip
_PICKLES = "pytorch_model*.bin"
_HASHED_SUFFIXES = frozenset((".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".py", ".bpe"))
_NOT_HASHED_FOLDERS = frozenset(("onnx", "openvino", "coreml", "runs", "eval", "imgs", "__pycache__"))


KIND = "SentenceTransformer"


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model on disk, and where it came from."""

    directory: Path
    name: str
    """The name on the hub; "local" for a directory, whose path does not identify the model."""
    commit: str | None
    """The hub commit; None for a directory."""


def find(model: str, revision: str | None, more_files: Sequence[str] = ()) -> ModelFiles:
    """The files of `model`, fetched if necessary. A directory is used as it is, without the network.

    `more_files` are names of files that few models have.

    Raises ConfigError if there is no such directory or hub model, if access or the network is missing, or if the
    directory holds no model.
    """
    if "://" in model:
        raise ConfigError(
            f"model {model!r}: neither a directory nor a name on the hub; copy it to a directory and pass that"
        )
    if Path(model).is_dir():
        files = ModelFiles(directory=Path(model), name="local", commit=None)
    elif model.startswith(("/", ".", "~")) or model.count("/") > 1 or Path(model).exists():
        raise ConfigError(
            f"model {model!r}: no such directory; pass --model DIRECTORY, s3://BUCKET/PREFIX or a name on the hub"
        )
    else:
        files = _fetch(model, revision, more_files)
    names = sorted(path.name for path in files.directory.iterdir())
    if "modules.json" not in names and "config.json" not in names:
        raise ConfigError(
            f"model {model!r}: holds neither modules.json nor config.json (found {', '.join(names[:8]) or 'nothing'}); "
            "pass the directory that a model was saved to"
        )
    unreadable = [name for name in names if not os.access(files.directory / name, os.R_OK)]
    if unreadable:  # safetensors saves files that only their owner may read
        raise ConfigError(
            f"model {model!r}: user {os.getuid()} may not read {', '.join(unreadable[:4])}; chmod a+r, or change --user"
        )
    _refuse_other_kinds(files.directory, model)
    return files


def _refuse_other_kinds(directory: Path, model: str) -> None:
    """Raise ConfigError for a model whose vectors sentence-transformers makes with another class, or not at all."""
    kind = _json(directory / "config_sentence_transformers.json").get("model_type", KIND)
    if kind == KIND and (found := re.search(r"\b(sparse|cross)_encoder\b", _text(directory / "modules.json"))):
        kind = {"sparse": "SparseEncoder", "cross": "CrossEncoder"}[found[1]]  # by its modules
    if kind == KIND and not (directory / "modules.json").is_file():
        config = _json(directory / "config.json")
        heads = [name for name in config.get("architectures") or () if str(name).endswith("ForSequenceClassification")]
        kind = f"CrossEncoder or a classifier ({heads[0]})" if heads else KIND
    if kind != KIND:
        raise ConfigError(
            f"model {model!r}: is a {kind}, not a {KIND}; it gives no embedding of a text, pass a {KIND} model"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # loading the model names a broken file
        return {}
    return value if isinstance(value, dict) else {}


def _fetch(model: str, revision: str | None, more_files: Sequence[str]) -> ModelFiles:
    # Models of the sentence-transformers organisation may be named without it.
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
            if wanted := [*sorted(pickled), *more_files]:
                huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted)
    except EstibaError:
        raise
    except Exception as error:  # the hub client raises errors of three libraries
        at = f" at revision {revision!r}" if revision else ""
        raise ConfigError(
            f"model {name!r}{at}: no such directory, and the hub cannot provide it ({_first_line(error)}); check the "
            "name and --revision, set HF_TOKEN for a private model, or without a network pass --model DIRECTORY"
        ) from error
    return ModelFiles(directory=directory, name=name, commit=directory.name)


def load(files: ModelFiles, *, device: str, dtype: torch.dtype, trust_remote_code: bool) -> SentenceTransformer:
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
                str(files.directory),
                device=device,
                trust_remote_code=trust_remote_code,
                local_files_only=not trust_remote_code,  # such code may be in another repository
                model_kwargs={"dtype": dtype},
            )
    except (EstibaError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # untrusted files, read by three libraries
        remedy = "check that the directory is complete"
        if "trust_remote_code" in str(error) and not trust_remote_code:
            remedy = "it comes with its own code: read it, and pass --trust-remote-code if you trust it"
        raise ConfigError(f"model in {files.directory}: cannot be loaded ({_first_line(error)}); {remedy}") from error
    finally:
        modeling.log_state_dict_report = report
    # Sentence embeddings do not use the pooler of BERT-like models, and it is often not saved.
    missing = sorted(key for info in infos for key in info.missing_and_mismatched() if "pooler" not in key)
    if missing:
        raise ConfigError(
            f"model in {files.directory}: {len(missing)} weights are missing ({', '.join(missing[:3])}, ...) and "
            "would be random; the files do not match config.json, or a shard was not copied"
        )
    if not (files.directory / "modules.json").is_file():
        logger.info("no modules.json in %s: using %s, as sentence-transformers does", files.directory, pooling(model))
    return model.to(dtype=dtype).eval()


def pooling(model: SentenceTransformer) -> str:
    """The modules in order, such as "Transformer > Pooling(mean) > Normalize"."""
    names = []
    for module in model:
        mode = f"({module.pooling_mode})" if isinstance(module, Pooling) else ""
        names.append(type(module).__name__ + mode)
    return " > ".join(names)


def digest(directory: Path) -> str:
    """xxh3-128 of the files that make the model (weights, configuration, tokenizer, code), in hexadecimal.

    It covers names relative to `directory`, in order, and contents, so a copy elsewhere has the same digest. Pickled
    weights beside safetensors are not read, so they do not count.
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
    """The versions of the libraries that may change a bit of a vector."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentence_transformers": sentence_transformers_version,
        "tokenizers": tokenizers.__version__,
    }


_LIBRARIES = ("transformers", "sentence_transformers", "huggingface_hub")
_told: set[str] = set()
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the libraries print; afterwards, log each of their warnings once. Their errors still propagate."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(each.level, each.handlers[:], each.propagate) for each in loggers]
    collector = _Collector()
    hub: Any = huggingface_hub.utils
    hub_bars = not hub.are_progress_bars_disabled()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for each in loggers:
        each.handlers, each.propagate = [collector], False
        each.setLevel(logging.WARNING)
    hub.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("default")
            yield
        messages = collector.messages + [str(item.message) for item in raised if _is_about_models(item)]
        _tell_once(messages)
    finally:
        for each, (level, handlers, propagate) in zip(loggers, before, strict=True):
            each.handlers, each.propagate = handlers, propagate
            each.setLevel(level)
        if hub_bars:
            hub.enable_progress_bars()
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _is_about_models(item: warnings.WarningMessage) -> bool:
    """A library's advice to its own developers says nothing about the model."""
    return not issubclass(item.category, (DeprecationWarning, PendingDeprecationWarning, ImportWarning))


def _tell_once(messages: list[str]) -> None:
    for message in messages:
        text = " ".join(_COLOUR.sub("", message).split())[:500]
        # The report lists the weights that are missing, which `load` checks, and those that are not used.
        is_checked = "LOAD REPORT" in text and "UNEXPECTED" not in text
        if text and not is_checked and text not in _told:
            _told.add(text)
            logger.warning("%s", text)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {line[:300]}" if line else type(error).__name__
