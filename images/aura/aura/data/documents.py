"""Files to documents: running text, one document per line, or JSON lines with `text`. No text is dropped silently.

A file is read in chunks of a few megabytes that end at the end of a document, so that worker processes can share it. A
chunk knows its file and first line, so that every error names both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import xxhash

from aura.data.sources import Source, Stream, find_sources
from estiba.errors import DataError

TextLayout = Literal["running", "lines", "jsonl"]
TextFormat = Literal["auto", "running", "lines"]

CHUNK_BYTES = 8 * 2**20
MAX_LINE_BYTES = 256 * 2**20
"""A one-line document has to fit in memory several times over."""
BLOCK_BYTES = 4096
"""Running text is cut into blocks of at most this size, at ends of paragraphs; the validation split selects blocks."""
PART_BYTES = 2**18
"""A longer document reaches the tokenizer in parts, since encoding takes fifty times the memory of the text."""
SAMPLE_BYTES = 2**20
"""How much of a file `detect_layout` reads."""

_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_BOM = b"\xef\xbb\xbf"
_SENTENCE_ENDS = (".", "!", "?", "…", ":", ";", '"', "»", "”", "'", ")", "]", "*")
_FIELDS_SHOWN = 6


@dataclass(frozen=True)
class Chunk:
    """Whole documents of one file, or a range of its running text."""

    url: str
    layout: TextLayout
    first_line: int
    """From 1."""
    data: bytes
    raw_bytes: int
    """Bytes of the stored file read for this chunk, for progress."""


@dataclass(frozen=True)
class Document:
    """A document, or a block of running text."""

    parts: list[str]
    """The text in order; several parts if it is long, none if it is only white space."""
    hash_fraction: float
    """A hash of the text between 0 and 1. The document is held out if it is below the validation split."""
    size_bytes: int
    continues: bool
    """Whether the next document of the chunk continues this one's text."""


def read_chunks(source: Source, text_format: TextFormat) -> Iterator[Chunk]:
    """Yield a file's chunks. Raises DataError if it is empty, damaged, not UTF-8, or has too long a line."""
    stream = Stream(source)
    try:
        data = _normalized_start(stream.read(CHUNK_BYTES), stream.read, source)
        if not data:
            raise DataError(f"{source.url}: is empty after decompression; remove it, or restore its text")
        layout = detect_layout(data[:SAMPLE_BYTES], source.kind, text_format)
        line, raw_start = 1, 0
        more = True
        while True:
            while more and len(data) < CHUNK_BYTES:
                part = stream.read(CHUNK_BYTES)
                more = bool(part)
                data += _without_cr(part, stream.read)
            if not data:
                break
            end = _chunk_end(data, layout) if more or len(data) > CHUNK_BYTES else len(data)
            while end == 0:  # one line is longer than a chunk
                part = stream.read(CHUNK_BYTES)
                if not part:
                    end = len(data)
                elif len(data) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{source.url}: line {line} is longer than {MAX_LINE_BYTES // 2**20} MiB; split it into "
                        "documents, or pass --text_format running if it is running text"
                    )
                else:
                    part = _without_cr(part, stream.read)
                    newline = part.find(b"\n")
                    end = len(data) + newline + 1 if newline >= 0 else 0
                    data += part
            raw_end = stream.raw_position()
            yield Chunk(source.url, layout, line, data[:end], raw_end - raw_start)
            raw_start = raw_end
            line += data.count(b"\n", 0, end)
            data = data[end:]
    finally:
        stream.close()


def documents_in(chunk: Chunk) -> Iterator[Document]:
    """Yield a chunk's documents in order. Raises DataError with file and line."""
    if chunk.layout == "running":
        yield from _blocks(chunk)
        return
    for number, line in enumerate(chunk.data.removesuffix(b"\n").split(b"\n"), start=chunk.first_line):
        if chunk.layout == "lines":
            yield _document(line, _decoded(line, chunk, number))
        elif line.strip():  # JSON lines may have blank lines between objects
            text = _json_text(line, chunk, number)
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{chunk.url}: line {number}: `text` contains half of a surrogate pair ({text[error.start]!r}); "
                    "export the file as UTF-8 again"
                ) from error
            yield _document(data, text)


def read_documents(dataset_path: str, text_format: TextFormat = "auto") -> Iterator[str]:
    """Yield all text at a path to train a tokenizer; long documents and running text come in parts."""
    for source in find_sources(dataset_path):
        for chunk in read_chunks(source, text_format):
            for document in documents_in(chunk):
                yield from document.parts


def detect_layout(sample: bytes, kind: str, text_format: TextFormat) -> TextLayout:
    """Return how to read a file; if `text_format` is auto, detect it from the beginning of the file.

    Blank lines separate paragraphs, so they indicate running text, as do lines that break in mid-sentence.
    """
    if kind == "jsonl":
        return "jsonl"
    if text_format != "auto":
        return text_format
    lines = sample.decode("utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if len(sample) >= SAMPLE_BYTES and len(lines) > 1:
        lines.pop()  # the end of the sample cuts it
    filled = [line.strip() for line in lines if line.strip()]
    if len(filled) < 2 or len(lines) - len(filled) > len(lines) // 1000:
        return "running"
    ended = sum(line.endswith(_SENTENCE_ENDS) for line in filled)
    return "lines" if ended * 2 >= len(filled) else "running"


def find_cut(data: bytes, low: int, high: int) -> int:
    """Return where to cut between `low` and `high`: after a paragraph, line or sentence, before a word, or anywhere
    between characters."""
    for mark, offset in ((b"\n\n", 2), (b"\n", 1), (b". ", 1), (b" ", 0)):
        found = data.rfind(mark, low, high)
        if found > 0:
            return found + offset
    while high > low and data[high] & 0xC0 == 0x80:  # inside a UTF-8 sequence
        high -= 1
    return high


def _chunk_end(data: bytes, layout: TextLayout) -> int:
    """Return where the last whole document ends, or 0 if the first line does not end within `data`."""
    if layout == "running":
        return find_cut(data, CHUNK_BYTES - SAMPLE_BYTES, CHUNK_BYTES - 1)
    return (data.rfind(b"\n", 0, CHUNK_BYTES) + 1) or (data.find(b"\n") + 1)


def _normalized_start(data: bytes, read: Callable[[int], bytes], source: Source) -> bytes:
    """Strip a byte order mark and carriage returns. Raises DataError if the text is obviously not UTF-8."""
    if data.startswith(_UTF16_BOMS):
        raise DataError(f"{source.url}: is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    head = data[:4096]
    if head.count(0) * 10 > len(head):
        raise DataError(
            f"{source.url}: over a tenth of its first bytes are zero, so it is UTF-16 or not text; convert it with "
            "iconv -f UTF-16LE -t UTF-8, or remove it"
        )
    return _without_cr(data.removeprefix(_UTF8_BOM), read)


def _without_cr(data: bytes, read: Callable[[int], bytes]) -> bytes:
    """Convert Windows line endings, reading further if one may be split between two reads."""
    if b"\r" not in data:
        return data
    while data.endswith(b"\r") and (following := read(1)):
        data += following
    return data.replace(b"\r\n", b"\n")


def _blocks(chunk: Chunk) -> Iterator[Document]:
    data = chunk.data
    _decoded(data, chunk, chunk.first_line)  # raises for the whole chunk, with the right line
    start = 0
    while start < len(data):
        end = len(data)
        if end - start > BLOCK_BYTES:
            end = find_cut(data, start + BLOCK_BYTES // 2, start + BLOCK_BYTES)
            while data.startswith(b"\n", end) and end < start + 2 * BLOCK_BYTES:
                end += 1  # blank lines belong to the paragraph before them
        block = data[start:end]
        yield _document(block, block.decode(), continues=end < len(data))
        start = end


def _document(data: bytes, text: str, *, continues: bool = False) -> Document:
    hash_fraction = xxhash.xxh3_64_intdigest(data) / 2**64
    parts: list[str] = []
    if not text.strip():
        return Document(parts, hash_fraction, len(data), continues)
    start = 0
    while start < len(data):
        end = len(data)
        if end - start > PART_BYTES:
            end = find_cut(data, start + PART_BYTES // 2, start + PART_BYTES)
        parts.append(data[start:end].decode())
        start = end
    return Document(parts, hash_fraction, len(data), continues)


def _decoded(data: bytes, chunk: Chunk, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        bad, good = _utf8_share(chunk.data)
        remedy = (
            f"the rest of it is, with {bad} such bytes in this part; correct them, or drop them: "
            "iconv -c -f UTF-8 -t UTF-8 OLD > NEW"
            if good > bad
            else "convert the file: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW (or its actual encoding)"
        )
        raise DataError(f"{chunk.url}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); {remedy}") from error


def _utf8_share(data: bytes) -> tuple[int, int]:
    """Return how many bytes are not UTF-8, and how many characters beyond ASCII are."""
    text = data.decode(errors="surrogateescape")
    bad = sum("\udc80" <= character <= "\udcff" for character in text)
    return bad, sum(character > "\x7f" for character in text) - bad


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice, and only one value can be used")
    return record


def _json_text(line: bytes, chunk: Chunk, number: int) -> str:
    where = f"{chunk.url}: line {number}"
    text = _decoded(line, chunk, number)
    try:
        record = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f'{where} is not JSON ({error}); each line must be one object like {{"text": "..."}}'
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where} is a {type(record).__name__}, not an object; each line must be one object with `text` "
            "(to convert a file that is one JSON array: jq -c '.[]' OLD > NEW)"
        )
    if "text" not in record:
        names = ", ".join(sorted(map(str, record))[:_FIELDS_SHOWN]) or "nothing"
        raise DataError(f"{where} has no field `text` (found {names}); rename the field: jq -c '{{text: .FIELD}}'")
    if not isinstance(record["text"], str):
        raise DataError(
            f"{where}: `text` is {json.dumps(record['text'])[:40]}, not a string; correct or remove the line"
        )
    return record["text"]
