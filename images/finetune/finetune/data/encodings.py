"""Bytes to text. A character is never replaced: what is not valid marks its line as bad, or names another encoding."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from estiba.errors import ConfigError, DataError
from finetune.data.code_pages import Verdict, find_code_page

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8 with a byte order mark"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32 with a byte order mark"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32 with a byte order mark"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16 with a byte order mark"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16 with a byte order mark"),
)
_SAMPLE_BYTES = 2**16
_SAMPLE_LINES = 1000
_WIDE_SAMPLE_BYTES = 2**14
_NUL_SHARE = 0.02
"""Text of UTF-16 has at least this share of zero bytes, from its line feeds, blanks and commas."""
_DAMAGED_LINE_SHARE = 0.01
_ESCAPED = re.compile("[\udc80-\udcff]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_SEPARATORS = "\x01\x1e\x1f"
"""Control characters that delimited files use."""
_WESTERN_SHARE = 0.95
_MIXED_SHARE = 0.05
"""Lines of UTF-8 among those of a Western code page, which never looks like UTF-8, show two encodings in one file."""
_MIXED_SHARE_OTHERS = 1 / 3
"""Short words of other code pages may be valid UTF-8 by accident."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A file's text. Bytes that are not valid are lone surrogates U+DC80 to U+DCFF (Python's surrogateescape)."""

    text: str
    encoding: str
    evidence: str
    is_damaged: bool = False
    """Whether some bytes are not valid."""


def decode(name: str, data: bytes, encoding: str | None) -> Decoded:
    """Return a file's text. Raises DataError if no encoding fits, ConfigError for an unknown `encoding`."""
    if encoding is not None:
        return _with_encoding(name, data, encoding)
    for mark, codec, evidence in _BOMS:
        if data.startswith(mark):
            return _strict(name, data, codec, evidence)
    wide = _wide_encoding(data)
    if wide is not None:
        return _strict(name, data, wide, f"{wide.upper()} without a byte order mark, detected from its zero bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return _not_utf8(name, data)
    if text.isascii() and "\x1b$" in text and _decodes(data, "iso2022_jp"):
        return _strict(name, data, "iso2022_jp", "escape sequences of ISO-2022-JP")
    _refuse_binary(name, text)
    return Decoded(text=text, encoding="utf-8", evidence="valid UTF-8 throughout")


def bad_bytes_in(text: str) -> str | None:
    """Return the first bytes of a text that are not valid, as "0xE9", or None."""
    found = _ESCAPED.search(text)
    return None if found is None else " ".join(f"0x{ord(mark) - 0xDC00:02X}" for mark in found[0][:4])


def _with_encoding(name: str, data: bytes, encoding: str) -> Decoded:
    try:
        codec = codecs.lookup(encoding)
        if not getattr(codec, "_is_text_encoding", True):
            raise LookupError
    except LookupError as error:
        raise ConfigError(
            f"encoding {encoding!r} is unknown; give a name such as utf-8, cp1252 or shift_jis"
        ) from error
    chosen = "utf-8-sig" if codec.name == "utf-8" else codec.name
    errors = "surrogateescape" if codec.name in ("utf-8", "ascii") else "strict"
    return _strict(name, data, chosen, f"--encoding {encoding}", errors)


def _strict(name: str, data: bytes, codec: str, evidence: str, errors: str | None = None) -> Decoded:
    errors = errors or ("surrogateescape" if codec == "utf-8-sig" else "strict")
    try:
        text = data.decode(codec, errors)
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        line = data.count(b"\n", 0, start) + 1
        reason = getattr(error, "reason", str(error))
        raise DataError(
            f"{name}:{line}: byte {start:,} is not valid {codec} ({reason}; {evidence}); "
            "save the file as UTF-8, or give --encoding"
        ) from error
    shown = {"utf-8-sig": "utf-8"}.get(codec, codec)
    text = text.removeprefix("\ufeff")
    _refuse_binary(name, text)
    return Decoded(text=text, encoding=shown, evidence=evidence)


def _wide_encoding(data: bytes) -> str | None:
    """Return utf-16-le and the like for text without a byte order mark, by where its zero bytes stand."""
    sample = data[: _WIDE_SAMPLE_BYTES - _WIDE_SAMPLE_BYTES % 4]
    zeros = sample.count(0)
    if len(data) % 2 or zeros < max(1, _NUL_SHARE * len(sample)):
        return None
    by_place = [sample[place::4].count(0) * 4 / max(1, len(sample)) for place in range(4)]
    if len(data) % 4 == 0 and min(by_place[2:]) > 0.95 and by_place[0] < 0.05:
        return "utf-32-le"
    if len(data) % 4 == 0 and min(by_place[:2]) > 0.95 and by_place[3] < 0.05:
        return "utf-32-be"
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    for codec, high, low in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if high > 20 * low:
            try:
                text = data.decode(codec)
            except UnicodeDecodeError:
                continue
            if not _CONTROLS.search(text):
                return codec
    return None


def _not_utf8(name: str, data: bytes) -> Decoded:
    """UTF-8 with damaged bytes, or a legacy code page."""
    text = data.decode("utf-8", "surrogateescape")
    damaged = _ESCAPED.findall(text)
    bad_bytes = sum(map(len, damaged))
    valid = len(text) - len(text.encode("ascii", "ignore")) - bad_bytes
    lines = data.splitlines()
    foreign = [line for line in lines if not _is_utf8(line)]
    first = next(number for number, line in enumerate(lines, start=1) if not _is_utf8(line))
    is_mostly_utf8 = valid > 2 * bad_bytes
    is_one_accident = len(foreign) <= max(1, _DAMAGED_LINE_SHARE * len(lines)) and (
        (len(lines) >= 100 and (valid > 0 or len(foreign) == 1)) or not isinstance(_code_page(foreign, data), Verdict)
    )
    if is_mostly_utf8 or is_one_accident or _is_mixed(lines, foreign):
        other = "" if valid else "; if they are no accident, give --encoding, such as cp1252"
        evidence = f"UTF-8 with {bad_bytes} bad byte{'s' * (bad_bytes > 1)}, the first in line {first}{other}"
        _refuse_binary(name, text)
        return Decoded(text=text, encoding="utf-8", evidence=evidence, is_damaged=True)
    codec, evidence = _legacy_encoding(name, first, foreign, data)
    decoded = data.decode(codec)
    _refuse_binary(name, decoded)
    return Decoded(text=decoded, encoding=codec, evidence=evidence)


def _is_mixed(lines: list[bytes], foreign: list[bytes]) -> bool:
    """Whether other lines than the foreign ones hold UTF-8, as where files of two encodings were joined."""
    utf8 = sum(not line.isascii() for line in lines) - len(foreign)
    share = _MIXED_SHARE if _western_share(foreign) > _WESTERN_SHARE else _MIXED_SHARE_OTHERS
    return utf8 > 1 and utf8 > share * (utf8 + len(foreign))


def _western_share(foreign: list[bytes]) -> float:
    return sum(map(_is_western, foreign[:1000])) / min(1000, len(foreign))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_western(line: bytes) -> bool:
    """Whether every byte above ASCII is a common Western European letter or sign in cp1252."""
    try:
        text = line.decode("cp1252")
    except UnicodeDecodeError:
        return False
    letters = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûü"
    signs = "€‚„…‘’“”•–—™ ¡¢£©ª«®°±²³´µ·¹º»¼½¾¿×"
    return all(character < "\x80" or character in letters or character in signs for character in text)


def _legacy_encoding(name: str, first: int, foreign: list[bytes], data: bytes) -> tuple[str, str]:
    """Return the code page of the lines that are not UTF-8, and why. Raises DataError if none fits, or two do."""
    found = _code_page(foreign, data)
    if isinstance(found, Verdict):
        return found.codec, f"not UTF-8; {found.codec}: the affected lines read as {found.language}"
    shown = "no other encoding fits the file"
    if found:
        shown = "it may be " + " or ".join(f"{one.codec} ({one.language}: {_excerpt(one.text)!r})" for one in found)
    marks = bad_bytes_in(data.decode("utf-8", "surrogateescape"))
    raise DataError(
        f"{name}:{first}: byte {marks} is not valid UTF-8 and {shown}; save it as UTF-8, or give --encoding"
    )


def _code_page(foreign: list[bytes], data: bytes) -> Verdict | list[Verdict]:
    sample = b"\n".join(dict.fromkeys(foreign[:_SAMPLE_LINES])) + b"\n"  # a line that comes again is no more evidence
    return find_code_page(sample, lambda codec: _decodes(data, codec))


def _excerpt(text: str) -> str:
    return next((line for line in text.splitlines() if not line.isascii()), text).strip()[:12]


def _decodes(data: bytes, codec: str) -> bool:
    try:
        data.decode(codec)
    except (UnicodeError, LookupError):
        return False
    return True


def _refuse_binary(name: str, text: str) -> None:
    """Raise DataError for text that is mostly control characters."""
    sample = text[:_SAMPLE_BYTES]
    controls = sum(mark not in _SEPARATORS for mark in _CONTROLS.findall(sample))
    if controls > 4 and controls > 0.02 * len(sample):
        raise DataError(
            f"{name}: is binary data, not text ({controls} control characters in its first {len(sample):,}); "
            "give CSV, JSON, JSON Lines, plain text or parquet"
        )
