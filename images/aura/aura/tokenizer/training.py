"""A byte-level BPE tokenizer for Spanish, trained on the data if the user names no tokenizer."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from aura.tokenizer.loading import EOS, PAD, SPANISH_WORDS, Tokenizer, from_backend, load_tokenizer
from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.progress import Progress
from estiba.storage import sync_directory

logger = get_logger(__name__)

TRAINING_CHARACTERS = 200 * 10**6
"""More text than this does not improve the tokenizer."""
MAX_WORD_CHARACTERS = 1000
"""Training takes time quadratic in the longest word, so base64 or a line of dashes is cut into words of this length."""
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD_CHARACTERS}}}(?=\S)")
_LONG_SPACE = re.compile(rf"(\s{{{MAX_WORD_CHARACTERS}}})\s+")
_MIN_VOCAB_SIZE = 256 + 2
"""Every byte, end of text and padding."""


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, folder: Path) -> Tokenizer:
    """Train a byte-level BPE: NFC, one token per digit, no unknown characters. The same texts give the same bytes.

    Raises ConfigError if the vocabulary is too small for every byte or the text fills less than half of it.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size {vocab_size}: must be {_MIN_VOCAB_SIZE} or more, for every byte and two special tokens"
        )
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
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_reported(_limited(documents)), trainer)
    if backend.get_vocab_size() < vocab_size // 2:
        raise ConfigError(
            f"vocab_size {vocab_size}: these texts give only {backend.get_vocab_size()} tokens that occur twice; give "
            "more text or a smaller vocabulary"
        )
    tokenizer = from_backend(backend, eos_token=EOS, pad_token=PAD)
    tokenizer.save(folder)
    return tokenizer


def trained_once(
    texts: Callable[[], Iterable[str]], *, vocab_size: int, folder: Path, identity: str | None = None
) -> Tokenizer:
    """Load the tokenizer that an earlier attempt trained on `texts()` and saved in `folder`, or train and save it.

    Its directory is `tokenizer-SIZE-TEXT-FILES`, with digests of the text and of its files, so that another text never
    gets it. One that does not verify is quarantined and trained again. `identity` is that of a checkpoint's tokenizer:
    the one in `folder` is used without reading the text, whose own digest the checkpoint has.
    """
    intact = []
    for path in sorted(folder.glob(f"tokenizer-{vocab_size}-*")):
        if path.name.endswith(f"-{_digest(path)}"):
            intact.append(path)
            continue
        bad = path.with_name(f"bad-{path.name}")
        logger.warning(f"{path}: its bytes do not match its digest; quarantined as {bad.name}; training it again")
        shutil.rmtree(bad, ignore_errors=True)
        path.rename(bad)
    for path in intact if identity is not None else ():
        if (tokenizer := load_tokenizer(str(path))).identity == identity:
            return tokenizer
    text_digest = _digest_of_texts(texts())
    for path in intact:
        if path.name.startswith(f"tokenizer-{vocab_size}-{text_digest}-"):
            return load_tokenizer(str(path))
    logger.info("training a tokenizer of %d tokens on the data; will be saved in %s", vocab_size, folder)
    staging = folder / f".tokenizer-{vocab_size}.making"
    shutil.rmtree(staging, ignore_errors=True)
    train_tokenizer(texts(), vocab_size=vocab_size, folder=staging)
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    final = folder / f"tokenizer-{vocab_size}-{text_digest}-{_digest(staging)}"
    staging.rename(final)
    sync_directory(folder)
    return load_tokenizer(str(final))


def _limited(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts up to TRAINING_CHARACTERS, with line breaks in very long words."""
    characters = 0
    for text in texts:
        yield _LONG_SPACE.sub(r"\1", _LONG_WORD.sub("\\g<0>\n", text))
        characters += len(text)
        if characters > TRAINING_CHARACTERS:
            return


def _reported(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts and report how many characters were read."""
    progress = Progress(total=TRAINING_CHARACTERS, unit="tokenizer_characters")
    with contextlib.closing(progress):
        for text in texts:
            yield text
            progress.advance(len(text))
    logger.info("tokenizer: %s characters were read; now joining pairs", f"{progress.done:,}")


def _digest_of_texts(texts: Iterable[str]) -> str:
    """Return a digest of the texts that a tokenizer is trained on, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    for text in _limited(texts):
        data = text.encode()
        digest.update(f"{len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _digest(folder: Path) -> str:
    """Return a digest of every file's name and bytes, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
