"""Plain text to rows: one record per line, or one document cut at the ends of paragraphs."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.data.dialects import split_lines
from finetune.data.encodings import bad_bytes_in
from finetune.data.rows import MAX_LINE_CHARS, BadRow, ParsedFile, Row
from finetune.data.settings import TextFormat

_SAMPLE_LINES = 20_000
_SENTENCE_ENDS = (".", "!", "?", "…", ":", ";", '"', "»", "”", "'", ")", "]", "。", "！", "？", "」")


def parse_text(name: str, text: str, text_format: TextFormat) -> ParsedFile:
    """Return the lines of a text file, or its paragraphs as parts of one document."""
    lines = split_lines(text)
    layout = text_format if text_format != "auto" else guess_layout(lines)
    parsed = ParsedFile(format="txt", columns=["text"], dialect="a record per line" if layout == "lines" else "")
    if layout == "document":
        parsed.document_of = name
        parsed.dialect = "one document"
    paragraph: list[str] = []
    first = 1
    blank = 0  # lines above the paragraph
    for number, line in enumerate(lines, start=1):
        fault = _fault(line)
        if fault is not None:
            parsed.bad.append(BadRow(number, *fault))
            continue
        body = line.rstrip("\r\n")
        if layout == "lines":
            if body.strip():
                parsed.rows.append(Row(number, {"text": body}))
        elif body.strip():
            if not paragraph:
                first = number
                paragraph = [""] * (blank - 1)  # paragraphs are joined with one blank line; the others stay
                blank = 0
            paragraph.append(body)
        else:
            blank += 1
            if paragraph:
                parsed.rows.append(Row(first, {"text": "\n".join(paragraph)}))
                paragraph = []
    if paragraph:
        parsed.rows.append(Row(first, {"text": "\n".join(paragraph)}))
    parsed.row_count = len(parsed.rows) + len(parsed.bad)
    return parsed


def guess_layout(lines: list[str]) -> TextFormat:
    """Blank lines separate paragraphs, so they mean a document, as do lines that break in mid-sentence."""
    sample = [line.strip() for line in lines[:_SAMPLE_LINES]]
    while sample and not sample[-1]:
        sample.pop()
    filled = [line for line in sample if line]
    if len(filled) < 2 or len(sample) - len(filled) > len(sample) // 1000:
        return "document"
    ended = sum(line.endswith(_SENTENCE_ENDS) for line in filled)
    return "lines" if 2 * ended >= len(filled) else "document"


def cut_text(text: str, limit: int) -> Iterator[str]:
    """Yield a long text in pieces of at most `limit` characters, cut after a paragraph, line, sentence or word."""
    start = 0
    while len(text) - start > limit:
        end = _cut(text, start, limit)
        yield text[start:end].strip("\n")
        start = end
    yield text[start:].strip("\n") if start else text


def _cut(text: str, start: int, limit: int) -> int:
    for mark in ("\n\n", "\n", ". ", "。", " "):
        place = text.rfind(mark, start + limit // 2, start + limit)
        if place >= 0:
            return place + len(mark)
    return start + limit


def _fault(line: str) -> tuple[str, str] | None:
    if len(line) > MAX_LINE_CHARS:
        longest = f"{MAX_LINE_CHARS // 10**6} million"
        return "line too long", f"{len(line):,} characters, more than {longest}; break it into paragraphs"
    if not line.isascii() and (mark := bad_bytes_in(line)):
        return "not UTF-8", f"byte {mark} is not valid UTF-8; repair the line"
    if "\x00" in line:
        return "NUL byte", "holds a NUL byte; remove it"
    return None
