"""Bytes to documents: running text, a document a line, JSON lines with `text`; nothing is dropped without a word.

A file is cut into stretches of a few megabytes at places where no document is cut, so that each can be read by another
process; a stretch knows its file and first line, so that a mistake is named by both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import xxhash

from aura.sources import Source, find_sources
from estiba.errors import DataError

Form = Literal["running", "lines", "jsonl"]
TextFormat = Literal["auto", "running", "lines"]

STRETCH_BYTES = 8 * 2**20
LONGEST_LINE_BYTES = 256 * 2**20
"""A document a line has to fit in memory, several times over."""
BLOCK_BYTES = 4096
"""Running text is cut at the last end of a paragraph within so much; what the validation split chooses from."""
PIECE_BYTES = 2**18
"""A longer document goes to the tokenizer in pieces: its memory is fifty times the text's."""
SAMPLE_BYTES = 2**20

_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_UTF8_BOM = b"\xef\xbb\xbf"
_ENDS = (".", "!", "?", "…", ":", ";", '"', "»", "”", "'", ")", "]", "*")
_JSON_SHOWN = 6


@dataclass(frozen=True)
class Stretch:
    """Whole documents of one file, or a run of its text."""

    url: str
    form: Form
    first_line: int
    """From 1."""
    data: bytes
    raw_bytes: int
    """Bytes of the file as it lies there that this took, for progress."""


@dataclass(frozen=True)
class Document:
    """A document, or a block of running text."""

    pieces: list[str]
    """The text, in order; more than one where it is long. Empty where there is none but white space."""
    share: float
    """0 to 1, a hash of the text: below the validation split, it is held out."""
    size_bytes: int
    is_running: bool
    """The next document of the stretch goes on where this one ends."""


def stretches(source: Source, text_format: TextFormat) -> Iterator[Stretch]:
    """Cut a file. Raises DataError: empty, not UTF-8 by its first bytes, a line that is too long, damaged."""
    stream = source.open()
    try:
        data = _normal(stream.read(STRETCH_BYTES), stream.read, source)
        if not data:
            raise DataError(f"{source.url}: is empty once unpacked; remove it, or put its text there again")
        form = form_of(data[:SAMPLE_BYTES], source.kind, text_format)
        line, raw = 1, 0
        more = True
        while True:
            while more and len(data) < STRETCH_BYTES:
                part = stream.read(STRETCH_BYTES)
                more = bool(part)
                data += _without_cr(part, stream.read)
            if not data:
                break
            end = _stretch_end(data, form) if more or len(data) > STRETCH_BYTES else len(data)
            while end == 0:  # one line longer than a stretch
                part = stream.read(STRETCH_BYTES)
                if not part:
                    end = len(data)
                elif len(data) > LONGEST_LINE_BYTES:
                    raise DataError(
                        f"{source.url}: line {line} is longer than {LONGEST_LINE_BYTES // 2**20} MiB; cut it into "
                        "documents, or where it is running text pass --text_format running"
                    )
                else:
                    part = _without_cr(part, stream.read)
                    newline = part.find(b"\n")
                    end = len(data) + newline + 1 if newline >= 0 else 0
                    data += part
            at = stream.raw_position()
            yield Stretch(source.url, form, line, data[:end], at - raw)
            raw = at
            line += data.count(b"\n", 0, end)
            data = data[end:]
    finally:
        stream.close()


def documents_in(stretch: Stretch) -> Iterator[Document]:
    """The documents of a stretch, in order. Raises DataError with file and line."""
    if stretch.form == "running":
        yield from _blocks(stretch)
    else:
        number = stretch.first_line - 1
        for line in stretch.data.removesuffix(b"\n").split(b"\n"):
            number += 1
            if stretch.form == "lines":
                yield _document(line, _decoded(line, stretch, number))
            elif line.strip():  # a blank line between objects is no document
                text = _json_text(line, stretch, number)
                try:
                    data = text.encode()
                except UnicodeEncodeError as error:
                    raise DataError(
                        f"{stretch.url}: line {number}: `text` holds half of a surrogate pair "
                        f"({text[error.start]!r}); write it as UTF-8 again from where it came"
                    ) from error
                yield _document(data, text)


def read_documents(dataset_path: str, text_format: TextFormat = "auto") -> Iterator[str]:
    """Every text at a path, blocks of running text and pieces of long documents one by one: to train a tokenizer."""
    for source in find_sources(dataset_path):
        for stretch in stretches(source, text_format):
            for document in documents_in(stretch):
                yield from document.pieces


def form_of(sample: bytes, kind: str, text_format: TextFormat) -> Form:
    """How a file is to be read, told from its beginning where nobody says.

    Blank lines part paragraphs, so there is running text; and so it is where lines are broken in mid sentence.
    """
    if kind == "jsonl":
        return "jsonl"
    if text_format != "auto":
        return text_format
    lines = sample.decode("utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if len(sample) >= SAMPLE_BYTES and len(lines) > 1:
        lines.pop()  # cut off by the sample's end
    filled = [line.strip() for line in lines if line.strip()]
    if len(filled) < 2 or len(lines) - len(filled) > len(lines) // 1000:
        return "running"
    ended = sum(line.endswith(_ENDS) for line in filled)
    return "lines" if ended * 2 >= len(filled) else "running"


def cut_at(data: bytes, low: int, high: int) -> int:
    """Where to cut between `low` and `high`: after a paragraph, a line, a sentence, before a word, between letters."""
    for mark, offset in ((b"\n\n", 2), (b"\n", 1), (b". ", 1), (b" ", 0)):
        found = data.rfind(mark, low, high)
        if found > 0:
            return found + offset
    while high > low and data[high] & 0xC0 == 0x80:  # inside a letter
        high -= 1
    return high


def _stretch_end(data: bytes, form: Form) -> int:
    """0 where the first line does not end within `data`."""
    if form == "running":
        return cut_at(data, STRETCH_BYTES - SAMPLE_BYTES, STRETCH_BYTES - 1)
    return (data.rfind(b"\n", 0, STRETCH_BYTES) + 1) or (data.find(b"\n") + 1)


def _normal(data: bytes, read: Callable[[int], bytes], source: Source) -> bytes:
    """Without a byte order mark, lines ended by a line feed. Raises DataError for what is no UTF-8 at a glance."""
    for mark, name in _BOMS.items():
        if data.startswith(mark):
            raise DataError(f"{source.url}: is {name}, not UTF-8; convert it: iconv -f {name} -t UTF-8 OLD > NEW")
    head = data[:4096]
    if head.count(0) * 10 > len(head):
        raise DataError(
            f"{source.url}: every tenth byte of its beginning is zero, so it is UTF-16 or no text; convert it with "
            "iconv -f UTF-16LE -t UTF-8, or leave it out"
        )
    return _without_cr(data.removeprefix(_UTF8_BOM), read)


def _without_cr(data: bytes, read: Callable[[int], bytes]) -> bytes:
    """Lines end in a line feed, also where the file came from Windows."""
    if b"\r" not in data:
        return data
    while data.endswith(b"\r") and (following := read(1)):
        data += following
    return data.replace(b"\r\n", b"\n")


def _blocks(stretch: Stretch) -> Iterator[Document]:
    data = stretch.data
    _decoded(data, stretch, stretch.first_line)
    start = 0
    while start < len(data):
        end = len(data)
        if end - start > BLOCK_BYTES:
            end = cut_at(data, start + BLOCK_BYTES // 2, start + BLOCK_BYTES)
            while data.startswith(b"\n", end) and end < start + 2 * BLOCK_BYTES:
                end += 1  # blank lines belong to what they end
        block = data[start:end]
        yield _document(block, block.decode(), is_running=end < len(data))
        start = end


def _document(data: bytes, text: str, *, is_running: bool = False) -> Document:
    share = xxhash.xxh3_64_intdigest(data) / 2**64
    if not text.strip():
        return Document([], share, len(data), is_running)
    if len(data) <= PIECE_BYTES:
        return Document([text], share, len(data), is_running)
    pieces, start = [], 0
    while start < len(data):
        end = len(data)
        if end - start > PIECE_BYTES:
            end = cut_at(data, start + PIECE_BYTES // 2, start + PIECE_BYTES)
        pieces.append(data[start:end].decode())
        start = end
    return Document(pieces, share, len(data), is_running)


def _decoded(data: bytes, stretch: Stretch, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{stretch.url}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); convert the file: "
            "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW (or the encoding that it has)"
        ) from error


def _json_text(line: bytes, stretch: Stretch, number: int) -> str:
    where = f"{stretch.url}: line {number}"
    text = _decoded(line, stretch, number)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f'{where} is not JSON ({error}); each line has to be one object such as {{"text": "..."}}'
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where} holds a {type(record).__name__}, not an object; each line has to be one object with `text` "
            "(a whole file of JSON: jq -c '.[]' OLD > NEW)"
        )
    if "text" not in record:
        names = ", ".join(sorted(map(str, record))[:_JSON_SHOWN]) or "nothing"
        raise DataError(f"{where} has no field `text` (found {names}); rename the field: jq -c '{{text: .FIELD}}'")
    if not isinstance(record["text"], str):
        raise DataError(
            f"{where}: `text` is {json.dumps(record['text'])[:40]}, not a string; mend the line or leave it out"
        )
    return record["text"]
