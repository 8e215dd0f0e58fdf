"""English sentences from a file or from Python's documentation, with their pronunciation from CMUdict."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from brain_to_text.data.schema import PHONEMES, SILENCE
from estiba.errors import ConfigError, DataError

MIN_WORDS, MAX_WORDS = 3, 9
MIN_SENTENCES = 20
_CODES = {name: number for number, name in enumerate(PHONEMES)}
_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+|\n\s*\n")
_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_WORDS = re.compile(r"[a-z]+(?:'[a-z]+)?")
_CODE = re.compile(r"[`_=<>{}\[\]|\\/*#@$%^~()\"]|\d")


@dataclass(frozen=True)
class Sentence:
    """A sentence, and the phonemes of its words."""

    text: str
    words: tuple[tuple[int, ...], ...]

    @property
    def phonemes(self) -> tuple[int, ...]:
        """The phoneme classes, with a silence after every word."""
        return tuple(phoneme for word in self.words for phoneme in (*word, SILENCE))

    def cut(self, words: int) -> Sentence:
        """Return the sentence cut off after at most `words` words."""
        if len(self.words) <= words:
            return self
        ends = [match.end() for match in _WORDS.finditer(self.text.lower())]
        return Sentence(self.text[: ends[words - 1]] + ".", self.words[:words])


def read_sentences(text: str | None) -> tuple[Sentence, ...]:
    """Return the distinct sentences whose words are all in the dictionary, sorted.

    `text` is a file; None uses Python's documentation. Raises ConfigError if it cannot be read, DataError if there are
    too few sentences.
    """
    sentences = _documentation() if text is None else _pronounceable([_read(text)])
    if len(sentences) < MIN_SENTENCES:
        raise DataError(
            f"{text or 'the documentation of this Python'}: has only {len(sentences)} English sentences of {MIN_WORDS} "
            f"to {MAX_WORDS} words; give --text FILE with more prose"
        )
    return sentences


@cache
def _documentation() -> tuple[Sentence, ...]:
    """Return sentences from triple-quoted strings in the standard library, which are mostly docstrings."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with suppress(OSError):
            texts += _QUOTED.findall(path.read_text("utf-8", errors="replace"))
    return _pronounceable(texts)


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"--text {path}: {error.strerror}; give a UTF-8 text file") from None


def _pronounceable(texts: Iterable[str]) -> tuple[Sentence, ...]:
    distinct: dict[str, Sentence] = {}
    for sentence in _sentences(texts):
        distinct.setdefault(sentence.text, sentence)
    return tuple(distinct[text] for text in sorted(distinct))


def _sentences(texts: Iterable[str]) -> Iterator[Sentence]:
    for prose in texts:
        for candidate in _SENTENCE_END.split(prose):
            words = _WORDS.findall(candidate.lower())
            if _CODE.search(candidate) or not candidate[:1].isalpha() or not MIN_WORDS <= len(words) <= MAX_WORDS:
                continue
            pronounced = [_dictionary()[word] for word in words if word in _dictionary()]
            if len(pronounced) == len(words):
                text = " ".join(candidate.split()).strip(" .:;-\"'()")
                yield Sentence(text if text.endswith(("?", "!")) else text + ".", tuple(pronounced))


@cache
def _dictionary() -> dict[str, tuple[int, ...]]:
    """Return the first pronunciation of each word, without stress marks."""
    path = Path(sys.prefix, "share/cmudict/cmudict.dict")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; `generate` needs this pronouncing dictionary, which the image has")
    pronunciations: dict[str, tuple[int, ...]] = {}
    for line in path.read_text("utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        if not word.endswith(")"):  # "tomato(2)" is an alternative pronunciation
            pronunciations[word] = tuple(_CODES[sound.rstrip("012")] for sound in sounds)
    return pronunciations
