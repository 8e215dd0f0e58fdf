"""Files to documents: every unusual file is read correctly, or is an error with name, line and remedy."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from backports import zstd

from aura.data import documents
from aura.data.documents import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    PART_BYTES,
    detect_layout,
    documents_in,
    read_chunks,
    read_documents,
)
from aura.data.sources import find_sources
from estiba.errors import ConfigError, DataError

PROSE = (
    "Zarpamos al alba, con la bodega bien estibada.\nEl viento venía por la aleta.\n\nNadie habló hasta el mediodía.\n"
)


def texts(path: Path | str, text_format: documents.TextFormat = "auto") -> list[str]:
    found = []
    for source in find_sources(str(path)):
        for chunk in read_chunks(source, text_format):
            found += ["".join(document.parts) for document in documents_in(chunk)]
    return found


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(documents, "SAMPLE_BYTES", 5_000)
    return 20_000


def test_running_text_is_split_without_loss_into_blocks_that_end_at_paragraphs(tmp_path: Path) -> None:
    text = "".join(f"Párrafo número {number}: la mar estaba en calma.\n\n" for number in range(4000))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    blocks = texts(tmp_path)
    assert "".join(blocks) == text
    assert len(blocks) > len(text) // BLOCK_BYTES
    assert all(block.endswith(".\n\n") and len(block.encode()) <= 2 * BLOCK_BYTES for block in blocks)


@pytest.mark.parametrize("text_format", ["running", "lines"])
def test_chunks_join_to_the_file_and_know_their_first_line(
    tmp_path: Path, small_chunks: int, text_format: documents.TextFormat
) -> None:
    text = "".join(f"línea {number} " + "ñandú " * (number % 97) + "\n" for number in range(2000))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    (source,) = find_sources(str(tmp_path))
    found = list(read_chunks(source, text_format))
    assert len(found) > 5
    assert b"".join(chunk.data for chunk in found) == text.encode()
    line = 1
    for chunk in found:
        assert chunk.first_line == line
        line += chunk.data.count(b"\n")
    assert sum(chunk.raw_bytes for chunk in found) == len(text.encode())


def test_one_document_per_line_is_distinguished_from_running_text() -> None:
    sentences = "El barco zarpó al alba con buen viento.\n" * 50
    wrapped = "El barco zarpó al alba con\nbuen viento y la mar en\ncalma, como se esperaba de\nese mes\n" * 20
    assert detect_layout(sentences.encode(), "text", "auto") == "lines"
    assert detect_layout(wrapped.encode(), "text", "auto") == "running"
    assert detect_layout((sentences[:400] + "\n" + sentences).encode(), "text", "auto") == "running"
    assert detect_layout("una sola línea sin fin".encode(), "text", "auto") == "running"
    assert detect_layout(sentences.encode(), "text", "running") == "running"
    assert detect_layout(b'{"text": "x"}', "jsonl", "lines") == "jsonl"


def test_windows_line_ends_and_a_byte_order_mark_make_no_difference(tmp_path: Path, small_chunks: int) -> None:
    text = PROSE * 800
    (tmp_path / "unix").mkdir()
    (tmp_path / "windows").mkdir()
    (tmp_path / "unix/a.txt").write_bytes(text.encode())
    (tmp_path / "windows/a.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert texts(tmp_path / "unix") == texts(tmp_path / "windows")


def test_a_carriage_return_at_the_end_of_a_read_stays_with_its_line_feed(tmp_path: Path, small_chunks: int) -> None:
    for shift in range(4):
        text = "x" * shift + "ab\r\n" * 30_000
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert "".join(texts(tmp_path, "running")) == text.replace("\r\n", "\n")


def test_json_lines_give_their_text_field_and_blank_lines_are_ignored(tmp_path: Path) -> None:
    rows = ["uno", "dos\ncon línea", "", "tres \\ñ 🚢"]
    lines = [json.dumps({"text": row, "id": 3}) for row in rows]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(lines) + "\n\n", "utf-8")
    assert texts(tmp_path) == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "sin cerrar"', "line 3 is not JSON"),
        ('{"texto": "hola", "id": 1}', "no field `text` (found id, texto)"),
        ('["hola"]', "line 3 is a list, not an object"),
        ('{"text": null}', "`text` is null, not a string"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": ' + "[" * 100_000, "line 3"),
    ],
)
def test_a_bad_json_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "uno"}\n{"text": "dos"}\n' + line + "\n", "utf-8")
    with pytest.raises(DataError) as caught:
        texts(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("text_format", ["running", "lines"])
def test_invalid_utf8_is_reported_with_its_line_also_in_a_later_chunk(
    tmp_path: Path, small_chunks: int, text_format: documents.TextFormat
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("el niño llegó.\n".encode() * 5000 + "el niño".encode("latin-1") + b"\n" + b"otra.\n" * 10)
    with pytest.raises(DataError, match=r"a\.txt: line 5001 is not UTF-8 \(byte 0xf1\).*iconv"):
        texts(path, text_format)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hola\n".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("hola, ¿qué tal?\n".encode("utf-16-le"), "UTF-16 or not text"),
        (b"\x00\x01\x02" * 500, "UTF-16 or not text"),
        (b"", "is empty (0 bytes)"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_text_that_is_not_utf8_is_an_error_with_a_remedy(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        texts(tmp_path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_empty_documents_are_kept_as_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Uno.\n\n   \nDos.\n", "utf-8")
    assert texts(tmp_path, "lines") == ["Uno.", "", "", "Dos."]


def test_compression_is_recognised_by_content(tmp_path: Path) -> None:
    data = PROSE.encode() * 50
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data) + gzip.compress(data))
    (tmp_path / "b.txt.zst").write_bytes(zstd.compress(data) + zstd.compress(data))
    (tmp_path / "c.txt").write_bytes(gzip.compress(data * 2))  # the name does not show it
    found = [chunk.data for source in find_sources(str(tmp_path)) for chunk in read_chunks(source, "running")]
    assert found == [data * 2] * 3


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_truncated_compressed_file_is_an_error(tmp_path: Path, kind: str) -> None:
    noise = os.urandom(300_000).hex().encode()
    whole = gzip.compress(noise) if kind == "gz" else zstd.compress(noise)
    path = tmp_path / f"a.txt.{kind}"
    for size in (len(whole) - 3, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.txt\..*: damaged or cut short"):
            texts(path)


def test_a_long_document_is_split_into_parts_between_words(tmp_path: Path) -> None:
    line = "palabra ñandú " * 100_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": line}) + "\n", "utf-8")
    pieces = list(read_documents(str(tmp_path)))
    assert "".join(pieces) == line
    assert len(pieces) > 4 and all(len(piece.encode()) <= PART_BYTES for piece in pieces)
    assert all(piece.startswith(" ") for piece in pieces[1:])


def test_text_without_spaces_is_split_between_characters(tmp_path: Path) -> None:
    text = "ñ🚢" * 50_000
    (tmp_path / "a.txt").write_text(text, "utf-8")
    blocks = texts(tmp_path)
    assert len(blocks) > 10 and "".join(blocks) == text


def test_one_line_of_100_mb_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    piece = "una línea que no termina nunca, " * 32_768
    with path.open("w", encoding="utf-8") as file:
        for _ in range(100):
            file.write(piece)
    (source,) = find_sources(str(path))
    tracemalloc.start()
    try:
        size = sum(len(chunk.data) for chunk in read_chunks(source, "auto"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == path.stat().st_size
    assert peak < 5 * CHUNK_BYTES


def test_one_line_longer_than_a_chunk_is_one_document(tmp_path: Path, small_chunks: int) -> None:
    long = "una palabra " * 9000
    for text in (long, long + "\n", f"corta.\n{long}\notra.\n", f"{long}\n{long}"):
        (tmp_path / "a.txt").write_text(text, "utf-8")
        assert texts(tmp_path, "lines") == text.removesuffix("\n").split("\n")


def test_a_line_that_is_too_long_for_a_document_is_an_error(
    tmp_path: Path, small_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.txt").write_text("corta.\n" * 10 + "x" * (3 * 2**20), "utf-8")
    with pytest.raises(DataError, match=r"line 11 is longer than 1 MiB.*--text_format running"):
        texts(tmp_path, "lines")
    assert len("".join(texts(tmp_path, "running"))) == 70 + 3 * 2**20


def test_directories_globs_and_lists_are_sorted_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub/.cache").mkdir(parents=True)
    for name in ("b.txt", "a.TXT", "sub/c.jsonl", "LEEME.md", "foto.png", ".oculto.txt", "sub/.cache/d.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n', "utf-8")

    def names(location: str) -> list[str]:
        return [source.url.removeprefix(f"{tmp_path}/") for source in find_sources(location)]

    assert names(str(tmp_path)) == ["a.TXT", "b.txt", "sub/c.jsonl"]
    assert "ignored 4 files of other kinds" in capsys.readouterr().err
    assert names(f"{tmp_path}/*.txt") == ["b.txt"]
    assert names(f"{tmp_path}/**/*.jsonl") == ["sub/c.jsonl"]
    assert names(f"{tmp_path}/sub, {tmp_path}/b.txt,{tmp_path}/b.txt") == ["sub/c.jsonl", "b.txt"]
    assert names(f"file://{tmp_path}/b.txt") == ["b.txt"]
    assert names(f"file://{tmp_path}/*.txt") == ["b.txt"]


def test_an_existing_name_with_a_comma_or_a_wildcard_is_that_file(tmp_path: Path) -> None:
    for name in ("uno, dos.txt", "que[1].txt"):
        (tmp_path / name).write_text(PROSE, "utf-8")
        assert [source.path for source in find_sources(str(tmp_path / name))] == [name]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nada.txt", "no such file or directory"),
        ("*.txt", "no .txt or .jsonl file there (found nothing)"),
        ("otros", "no .txt or .jsonl file there (found a.csv)"),
        ("otros/a.csv", "this kind of file is not supported"),
        ("", "dataset_path is empty"),
    ],
)
def test_a_path_without_text_is_an_error_that_names_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "otros").mkdir()
    (tmp_path / "otros/a.csv").write_text("a,b\n")
    with pytest.raises(ConfigError) as caught:
        find_sources(location)
    assert message in str(caught.value)


def test_a_pipe_is_called_one_since_a_resume_cannot_read_it_again(tmp_path: Path) -> None:
    """As in --dataset_path <(zcat corpus.gz)."""
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(
        ConfigError, match=r"a\.txt': is a pipe or a device, which cannot be read again; write the text"
    ):
        find_sources(str(tmp_path / "a.txt"))


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "no está")
    with pytest.raises(Exception, match=r"a\.txt"):
        texts(tmp_path)


def test_one_bad_byte_in_a_utf8_file_is_not_advised_away_with_another_encoding(tmp_path: Path) -> None:
    text = "La niña añoró el otoño, según la capitana.\n" * 100
    (tmp_path / "a.txt").write_bytes(text.encode() + b"ma\xf1ana\n" + text.encode())
    with pytest.raises(DataError, match=r"line 101 is not UTF-8 \(byte 0xf1\).*with 1 such bytes") as caught:
        texts(tmp_path)
    assert "iconv -c -f UTF-8 -t UTF-8" in str(caught.value) and "WINDOWS-1252" not in str(caught.value)
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    with pytest.raises(DataError, match="WINDOWS-1252"):
        texts(tmp_path)


def test_a_key_that_occurs_twice_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "uno"}\n{"text": "dos", "text": "tres"}\n')
    with pytest.raises(DataError, match=r"line 2 is not JSON \(the key 'text' occurs twice"):
        texts(tmp_path)
