"""Load Hugging Face, SentencePiece and our own tokenizers behind one interface.

It removes what other loaders let through: truncation and padding saved with a file, special tokens that a document
spells out, a padding token that equals the end of text (a model trained with one never stops).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from estiba.errors import ConfigError, StoreError
from estiba.storage import stage

# Set before the library starts its threads; without it, the library warns at every later fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tokenizers import Tokenizer as Backend

PAD, EOS = "<pad>", "</s>"
_KNOWN_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
_KNOWN_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|endofpad|>")
_REMEDY = (
    "give the directory of a saved tokenizer, a tokenizer.json, a SentencePiece .model, s3://BUCKET/PREFIX or a hub "
    "id; `aura tokenizer train` trains a Spanish one"
)
# GPT-4's word pattern (tiktoken's cl100k_base) without English contractions, with combining marks inside words and
# each digit alone.
SPANISH_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}[\p{L}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A loaded tokenizer. No method adds special tokens or parses them from text."""

    vocab_size: int
    """All ids are below it: the number of rows that an embedding needs."""
    bos_id: int | None
    eos_id: int
    pad_id: int
    """Never eos_id."""
    identity: str
    """16 hexadecimal digits: a digest of everything that determines ids."""

    def __init__(self, hf: Any) -> None:
        """Wrap a transformers tokenizer that has a backend, adding end-of-text and padding tokens if it lacks them."""
        backend: Backend = hf.backend_tokenizer
        eos = hf.eos_token or _first_known(backend, _KNOWN_EOS) or EOS
        pad = hf.pad_token if hf.pad_token not in (None, eos) else _first_known(backend, _KNOWN_PAD) or PAD
        hf.add_special_tokens({"eos_token": eos, "pad_token": pad})
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" in a document is plain text
        self._hf = hf
        self._backend = backend
        self.eos_id, self.pad_id, self.bos_id = hf.eos_token_id, hf.pad_token_id, hf.bos_token_id
        self.eos_text: str = eos
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        parts = json.loads(backend.to_str())
        rules = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        rules["ends"] = [self.eos_id, self.pad_id]
        self.identity = xxhash.xxh3_64_hexdigest(json.dumps(rules, sort_keys=True, ensure_ascii=False).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's ids, without special tokens. Uses all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self._backend.decode([int(id_) for id_ in ids], skip_special_tokens=True)

    @property
    def specials(self) -> tuple[tuple[int, str], ...]:
        """The ids and texts of all special tokens but the unknown one."""
        texts = [text for text in self._hf.all_special_tokens if text != self._hf.unk_token]
        pairs = {(self._backend.token_to_id(text), text) for text in texts}
        return tuple(sorted((id_, text) for id_, text in pairs if id_ is not None))

    def save(self, folder: Path) -> None:
        """Write a directory that `AutoTokenizer.from_pretrained` loads.

        It adds no special tokens to a text, as in training: most models' rules add a BOS, which this one never saw.
        """
        from transformers import PreTrainedTokenizerFast

        folder.mkdir(parents=True, exist_ok=True)
        rules = json.loads(self._backend.to_str())
        hf = self._hf
        if rules["post_processor"] is not None and rules["post_processor"]["type"] != "ByteLevel":
            named = {role: text for role, text in hf.special_tokens_map.items() if isinstance(text, str)}
            plain = Backend.from_str(json.dumps({**rules, "post_processor": None}))
            hf = PreTrainedTokenizerFast(tokenizer_object=plain, clean_up_tokenization_spaces=False, **named)
        hf.save_pretrained(str(folder))

    def save_vocabulary(self, folder: Path) -> None:
        """Write vocab.json, and merges.txt for BPE."""
        self._backend.model.save(str(folder))
        if not (folder / "vocab.json").exists():  # a Unigram model has a file of its own
            vocabulary = sorted(self._backend.get_vocab().items(), key=lambda item: item[1])
            text = json.dumps(dict(vocabulary), ensure_ascii=False)
            (folder / "vocab.json").write_text(text, encoding="utf-8")

    def backend_json(self) -> str:
        """Serialize the backend for `backend_from` in another process."""
        return self._backend.to_str()


def backend_from(text: str) -> Backend:
    """Load the output of `Tokenizer.backend_json` without importing transformers."""
    backend = Backend.from_str(text)
    backend.encode_special_tokens = True
    return backend


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Load a directory, hub id, s3:// directory, tokenizer.json or SentencePiece model. Raises ConfigError."""
    if "://" in name_or_path:
        with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
            try:
                return _load(stage(name_or_path, Path(folder) / "files"), name_or_path)
            except StoreError as error:
                raise ConfigError(f"tokenizer {name_or_path!r}: {error}") from error
    path = Path(name_or_path)
    if path.exists():
        return _load(path, name_or_path)
    if name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1 or not name_or_path.strip():
        raise ConfigError(f"tokenizer {name_or_path!r}: no such file or directory; {_REMEDY}")
    return _from_transformers(name_or_path, name_or_path)


def _load(path: Path, name: str) -> Tokenizer:
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir())
        if any(file in names for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")):
            return _from_transformers(str(path), name)
        models = sorted(path.glob("*.model"), key=lambda file: file.name != "tokenizer.model")
        if not models or (len(models) > 1 and models[0].name != "tokenizer.model"):
            found = ", ".join(names[:6]) or "nothing"
            raise ConfigError(f"tokenizer {name!r}: no tokenizer.json and no .model in it (found {found}); {_REMEDY}")
        path = models[0]
    if path.suffix == ".json":
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"tokenizer {name!r}: not a tokenizer.json ({_line(error)}); {_REMEDY}") from error
        return from_backend(backend)
    from aura.tokenizer.sentencepiece_models import convert

    backend, specials = convert(path, name)
    return from_backend(backend, **specials)


def from_backend(backend: Backend, **special_tokens: str) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens)
    return Tokenizer(hf)


def _from_transformers(source: str, name: str) -> Tokenizer:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # its warnings about a tokenizer are for the tokenizer's developers
    try:
        hf = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # two libraries parse third-party files, and the hub may be unreachable
        raise ConfigError(f"tokenizer {name!r}: cannot be loaded ({_line(error)}); {_REMEDY}") from error
    if getattr(hf, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"tokenizer {name!r}: is a {type(hf).__name__} without a tokenizer.json, too slow for a corpus; "
            f"convert it to one, or {_REMEDY}"
        )
    return Tokenizer(hf)


def _first_known(backend: Backend, names: Sequence[str]) -> str | None:
    return next((name for name in names if backend.token_to_id(name) is not None), None)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
