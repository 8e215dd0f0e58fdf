"""Tokenizers: whatever the Hugging Face hub, SentencePiece or this image made, as one thing that never surprises.

What other loaders leave in stays out here: truncation and padding that a file was saved with, special tokens that a
document spells out, a pad token that is the end of text (a model trained so never stops).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from estiba.errors import ConfigError, StoreError
from estiba.store import stage

# Said before the library starts its threads, else it warns at every later fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

_PAD, _EOS = "<pad>", "</s>"
_KNOWN_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
_KNOWN_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|endofpad|>")
_REMEDY = (
    "give a directory that a tokenizer was saved to, a tokenizer.json, a SentencePiece .model, s3://BUCKET/PREFIX or a "
    "hub id; `aura tokenizer train` makes a Spanish one"
)
_LEAST_VOCABULARY = 256 + 2
"""Every byte, the end and the padding."""

# Words with the character before them, marks inside words, each digit alone, runs of punctuation, line ends, spaces:
# as in GPT-4's, without its English contractions. Source: tiktoken's cl100k_base.
SPANISH_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}[\p{L}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A loaded tokenizer. No call adds special tokens, and none reads them out of a text."""

    vocab_size: int
    """Ids are below it; what an embedding needs."""
    bos_id: int | None
    eos_id: int
    pad_id: int
    """Never eos_id."""
    identity: str
    """16 hexadecimal digits: xxh3 of everything that decides ids."""

    def __init__(self, hf: Any) -> None:
        """Wrap a transformers tokenizer that has a backend, giving it an end and a padding of its own."""
        backend: Backend = hf.backend_tokenizer
        eos = hf.eos_token or _first_known(backend, _KNOWN_EOS) or _EOS
        pad = hf.pad_token if hf.pad_token not in (None, eos) else _first_known(backend, _KNOWN_PAD) or _PAD
        hf.add_special_tokens({"eos_token": eos, "pad_token": pad})
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" in a document is four characters
        self._hf = hf
        self._backend = backend
        self.eos_id, self.pad_id, self.bos_id = hf.eos_token_id, hf.pad_token_id, hf.bos_token_id
        self.eos_text: str = eos
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        parts = json.loads(backend.to_str())
        decides = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        decides["ends"] = [self.eos_id, self.pad_id]
        self.identity = xxhash.xxh3_64_hexdigest(json.dumps(decides, sort_keys=True, ensure_ascii=False).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens. Uses all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""
        return self._backend.decode([int(id_) for id_ in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """A directory that `AutoTokenizer.from_pretrained` loads."""
        folder.mkdir(parents=True, exist_ok=True)
        self._hf.save_pretrained(str(folder))

    def backend_json(self) -> str:
        """What another process needs to give the same ids: see `backend_from`."""
        return self._backend.to_str()


def backend_from(text: str) -> Backend:
    """The tokenizer of `Tokenizer.backend_json`, in a process that has not loaded transformers."""
    backend = Backend.from_str(text)
    backend.encode_special_tokens = True
    return backend


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """A directory, hub id, s3:// directory, tokenizer.json or SentencePiece model. Raises ConfigError."""
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
    return Tokenizer(_from_transformers(name_or_path, name_or_path))


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, folder: Path) -> Tokenizer:
    """A byte-level BPE for Spanish: NFC, every digit alone, no character unknown. The same texts give the same bytes.

    Raises ConfigError for a vocabulary that cannot hold every byte, or texts too few to fill it by half.
    """
    if vocab_size < _LEAST_VOCABULARY:
        raise ConfigError(f"vocab_size {vocab_size}: every byte and two special tokens need {_LEAST_VOCABULARY}")
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPANISH_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[_PAD, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    if backend.get_vocab_size() < vocab_size // 2:
        raise ConfigError(
            f"vocab_size {vocab_size}: these texts give only {backend.get_vocab_size()} tokens that occur twice; give "
            "more text or a smaller vocabulary"
        )
    tokenizer = Tokenizer(_wrapped(backend, eos_token=_EOS, pad_token=_PAD))
    tokenizer.save(folder)
    return tokenizer


def _load(path: Path, name: str) -> Tokenizer:
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir())
        if any(file in names for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")):
            return Tokenizer(_from_transformers(str(path), name))
        models_here = [file for file in names if file.endswith(".model")]
        if len(models_here) == 1 or "tokenizer.model" in models_here:
            path = path / ("tokenizer.model" if "tokenizer.model" in models_here else models_here[0])
        else:
            found = ", ".join(names[:6]) or "nothing"
            raise ConfigError(f"tokenizer {name!r}: no tokenizer.json and no .model there (found {found}); {_REMEDY}")
    if path.suffix == ".json":
        try:
            return Tokenizer(_wrapped(Backend.from_file(str(path))))
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"tokenizer {name!r}: not a tokenizer.json ({_line(error)}); {_REMEDY}") from error
    from aura.sentencepieces import convert

    backend, specials = convert(path, name)
    return Tokenizer(_wrapped(backend, **specials))


def _wrapped(backend: Backend, **specials: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **specials)


def _from_transformers(source: str, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            hf = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a third party's files, read by two libraries, or a hub that is not reached
        raise ConfigError(f"tokenizer {name!r}: cannot be loaded ({_line(error)}); {_REMEDY}") from error
    if getattr(hf, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"tokenizer {name!r}: is a {type(hf).__name__} without a tokenizer.json, too slow for a corpus; save it "
            f"as one, or {_REMEDY}"
        )
    return hf


def _first_known(backend: Backend, names: Sequence[str]) -> str | None:
    return next((name for name in names if backend.token_to_id(name) is not None), None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What transformers remarks on a tokenizer it loads is for its own developers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
