"""Files to documents: every odd file is read as it should be, or refused by name, line and remedy."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from aura import documents
from aura.documents import BLOCK_BYTES, PIECE_BYTES, STRETCH_BYTES, documents_in, form_of, read_documents, stretches
from aura.sources import find_sources
from estiba.errors import ConfigError, DataError

PROSE = (
    "Zarpamos al alba, con la bodega bien estibada.\nEl viento venía por la aleta.\n\nNadie habló hasta el mediodía.\n"
)


def texts(path: Path | str, text_format: documents.TextFormat = "auto") -> list[str]:
    found = []
    for source in find_sources(str(path)):
        for stretch in stretches(source, text_format):
            found += ["".join(document.pieces) for document in documents_in(stretch)]
    return found


@pytest.fixture
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(documents, "STRETCH_BYTES", 20_000)
    monkeypatch.setattr(documents, "SAMPLE_BYTES", 5_000)
    return 20_000


def test_running_text_comes_back_whole_in_blocks_that_end_at_paragraphs(tmp_path: Path) -> None:
    text = "".join(f"Párrafo número {number}: la mar estaba en calma.\n\n" for number in range(4000))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    blocks = texts(tmp_path)
    assert "".join(blocks) == text
    assert len(blocks) > len(text) // BLOCK_BYTES
    assert all(block.endswith(".\n\n") and len(block.encode()) <= 2 * BLOCK_BYTES for block in blocks)


@pytest.mark.parametrize("text_format", ["running", "lines"])
def test_stretches_join_to_the_file_and_know_their_first_line(
    tmp_path: Path, small_stretches: int, text_format: documents.TextFormat
) -> None:
    text = "".join(f"línea {number} " + "ñandú " * (number % 97) + "\n" for number in range(2000))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    (source,) = find_sources(str(tmp_path))
    found = list(stretches(source, text_format))
    assert len(found) > 5
    assert b"".join(stretch.data for stretch in found) == text.encode()
    line = 1
    for stretch in found:
        assert stretch.first_line == line
        line += stretch.data.count(b"\n")
    assert sum(stretch.raw_bytes for stretch in found) == len(text.encode())


def test_a_document_a_line_is_told_from_running_text() -> None:
    sentences = "El barco zarpó al alba con buen viento.\n" * 50
    wrapped = "El barco zarpó al alba con\nbuen viento y la mar en\ncalma, como se esperaba de\nese mes\n" * 20
    assert form_of(sentences.encode(), "text", "auto") == "lines"
    assert form_of(wrapped.encode(), "text", "auto") == "running"
    assert form_of((sentences[:400] + "\n" + sentences).encode(), "text", "auto") == "running"
    assert form_of("una sola línea sin fin".encode(), "text", "auto") == "running"
    assert form_of(sentences.encode(), "text", "running") == "running"
    assert form_of(b'{"text": "x"}', "jsonl", "lines") == "jsonl"


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path, small_stretches: int) -> None:
    text = PROSE * 800
    (tmp_path / "unix").mkdir()
    (tmp_path / "windows").mkdir()
    (tmp_path / "unix/a.txt").write_bytes(text.encode())
    (tmp_path / "windows/a.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert texts(tmp_path / "unix") == texts(tmp_path / "windows")


def test_a_carriage_return_at_the_end_of_a_read_is_not_torn_from_its_line_feed(
    tmp_path: Path, small_stretches: int
) -> None:
    for shift in range(4):
        text = "x" * shift + "ab\r\n" * 30_000
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert "".join(texts(tmp_path, "running")) == text.replace("\r\n", "\n")


def test_json_lines_give_their_text_field_and_blank_lines_are_no_documents(tmp_path: Path) -> None:
    rows = ["uno", "dos\ncon línea", "", "tres \\ñ 🚢"]
    lines = [json.dumps({"text": row, "id": 3}) for row in rows]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(lines) + "\n\n", "utf-8")
    assert texts(tmp_path) == rows


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "sin cerrar"', "line 3 is not JSON"),
        ('{"texto": "hola", "id": 1}', "no field `text` (found id, texto)"),
        ('["hola"]', "line 3 holds a list, not an object"),
        ('{"text": null}', "`text` is null, not a string"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": ' + "[" * 100_000, "line 3"),
    ],
)
def test_a_bad_json_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "uno"}\n{"text": "dos"}\n' + line + "\n", "utf-8")
    with pytest.raises(DataError) as caught:
        texts(path)
    assert str(path) in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("text_format", ["running", "lines"])
def test_bad_utf8_is_named_by_line_also_in_a_later_stretch(
    tmp_path: Path, small_stretches: int, text_format: documents.TextFormat
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("el niño llegó.\n".encode() * 5000 + "el niño".encode("latin-1") + b"\n" + b"otra.\n" * 10)
    with pytest.raises(DataError, match=r"a\.txt: line 5001 is not UTF-8 \(byte 0xf1\).*iconv"):
        texts(path, text_format)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("hola\n".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("hola, ¿qué tal?\n".encode("utf-16-le"), "UTF-16 or no text"),
        (b"\x00\x01\x02" * 500, "UTF-16 or no text"),
        (b"", "is empty (0 bytes)"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_what_is_no_utf8_text_is_refused_with_the_remedy(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        texts(tmp_path)
    assert str(path) in str(caught.value) and says in str(caught.value)


def test_empty_documents_are_seen_as_such_and_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Uno.\n\n   \nDos.\n", "utf-8")
    assert texts(tmp_path, "lines") == ["Uno.", "", "", "Dos."]


def test_compressed_files_are_read_by_what_they_are(tmp_path: Path) -> None:
    data = PROSE.encode() * 50
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data) + gzip.compress(data))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(data) + zstandard.compress(data))
    (tmp_path / "c.txt").write_bytes(gzip.compress(data * 2))  # its name says nothing of it
    found = [stretch.data for source in find_sources(str(tmp_path)) for stretch in stretches(source, "running")]
    assert found == [data * 2] * 3


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path: Path, kind: str) -> None:
    noise = os.urandom(300_000).hex().encode()
    whole = gzip.compress(noise) if kind == "gz" else zstandard.compress(noise)
    path = tmp_path / f"a.txt.{kind}"
    for size in (len(whole) - 3, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.txt\..*: damaged or cut short"):
            texts(path)


def test_a_long_document_goes_on_in_pieces_cut_between_words(tmp_path: Path) -> None:
    line = "palabra ñandú " * 100_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": line}) + "\n", "utf-8")
    pieces = list(read_documents(str(tmp_path)))
    assert "".join(pieces) == line
    assert len(pieces) > 4 and all(len(piece.encode()) <= PIECE_BYTES for piece in pieces)
    assert all(piece.startswith(" ") for piece in pieces[1:])


def test_text_without_any_space_is_cut_between_letters(tmp_path: Path) -> None:
    text = "ñ🚢" * 50_000
    (tmp_path / "a.txt").write_text(text, "utf-8")
    blocks = texts(tmp_path)
    assert len(blocks) > 10 and "".join(blocks) == text


def test_one_line_of_100_mb_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    piece = "una línea que no termina nunca, " * 32_768
    with path.open("w", encoding="utf-8") as file:
        for _ in range(100):
            file.write(piece)
    (source,) = find_sources(str(path))
    tracemalloc.start()
    try:
        size = sum(len(stretch.data) for stretch in stretches(source, "auto"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == path.stat().st_size
    assert peak < 5 * STRETCH_BYTES


def test_one_line_longer_than_a_stretch_is_one_document(tmp_path: Path, small_stretches: int) -> None:
    long = "una palabra " * 9000
    for text in (long, long + "\n", f"corta.\n{long}\notra.\n", f"{long}\n{long}"):
        (tmp_path / "a.txt").write_text(text, "utf-8")
        assert texts(tmp_path, "lines") == text.removesuffix("\n").split("\n")


def test_a_line_too_long_to_be_a_document_is_refused(
    tmp_path: Path, small_stretches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST_LINE_BYTES", 2**20)
    (tmp_path / "a.txt").write_text("corta.\n" * 10 + "x" * (3 * 2**20), "utf-8")
    with pytest.raises(DataError, match=r"line 11 is longer than 1 MiB.*--text_format running"):
        texts(tmp_path, "lines")
    assert len("".join(texts(tmp_path, "running"))) == 70 + 3 * 2**20


def test_directories_globs_and_lists_are_read_in_order_of_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub/.cache").mkdir(parents=True)
    for name in ("b.txt", "a.TXT", "sub/c.jsonl", "LEEME.md", "foto.png", ".oculto.txt", "sub/.cache/d.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n', "utf-8")

    def names(location: str) -> list[str]:
        return [source.url.removeprefix(f"{tmp_path}/") for source in find_sources(location)]

    assert names(str(tmp_path)) == ["a.TXT", "b.txt", "sub/c.jsonl"]
    assert "4 files of other kinds left alone" in capsys.readouterr().err
    assert names(f"{tmp_path}/*.txt") == ["b.txt"]
    assert names(f"{tmp_path}/**/*.jsonl") == ["sub/c.jsonl"]
    assert names(f"{tmp_path}/sub, {tmp_path}/b.txt,{tmp_path}/b.txt") == ["sub/c.jsonl", "b.txt"]
    assert names(f"file://{tmp_path}/b.txt") == ["b.txt"]
    assert names(f"file://{tmp_path}/*.txt") == ["b.txt"]


def test_a_name_with_a_comma_or_a_wildcard_that_exists_is_that_file(tmp_path: Path) -> None:
    for name in ("uno, dos.txt", "que[1].txt"):
        (tmp_path / name).write_text(PROSE, "utf-8")
        assert [source.path for source in find_sources(str(tmp_path / name))] == [name]


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("nada.txt", "no such file or directory"),
        ("*.txt", "no .txt or .jsonl file there (found nothing)"),
        ("otros", "no .txt or .jsonl file there (found a.csv)"),
        ("otros/a.csv", "not a kind of file that is read here"),
        ("", "dataset_path is empty"),
    ],
)
def test_a_path_without_text_is_a_mistake_that_says_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "otros").mkdir()
    (tmp_path / "otros/a.csv").write_text("a,b\n")
    with pytest.raises(ConfigError) as caught:
        find_sources(location)
    assert says in str(caught.value)


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "no está")
    with pytest.raises(Exception, match=r"a\.txt"):
        texts(tmp_path)
