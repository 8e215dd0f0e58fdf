"""Reading: every row exactly once, for any file layout and wherever an earlier attempt stopped."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed.data import files
from embed.data import rows as reading
from embed.data.chunks import (
    Coverage,
    Encoded,
    MissingRows,
    RowRange,
    Status,
    file_key,
    from_bytes,
    key_of,
    range_of,
    to_bytes,
)
from embed.data.rows import SCAN_BYTES, RangeLimits, first_texts, record_batches, text_ranges
from embed.data.table import BadFile, InputFile, Table
from estiba.errors import ConfigError, DataError, StoreError
from estiba.storage import FileStore


def table_of(folder: Path, columns: dict[str, object] | pa.Table, name: str = "a.parquet", **options: object) -> Table:
    content = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(content, folder / name, **options)
    return inspected(folder, name)


def inspected(folder: Path, name: str) -> Table:
    store = FileStore(folder)
    entry = store.head(name)
    table = files.inspect(store, InputFile(path=name, size_bytes=entry.size_bytes, etag=None))
    assert isinstance(table, Table)
    return table


def read(folder: Path, table: Table, row_group: int, limits: RangeLimits, coverage: Coverage, column: str = "texto"):
    rows = MissingRows(table=table, row_group=row_group, missing=coverage.gaps(row_group))
    return list(text_ranges(FileStore(folder), rows, column, limits))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=300),
    rows=st.integers(1, 64),
    characters=st.integers(1, 2000),
    group=st.integers(1, 300),
    killed_after=st.integers(0, 50),
)
def test_text_ranges_cover_every_row_once_and_a_resumed_job_cuts_the_same(
    tmp_path_factory, lengths, rows, characters, group, killed_after
):
    folder = tmp_path_factory.mktemp("ranges")
    texts = [f"{index}:" + "x" * length for index, length in enumerate(lengths)]
    table = table_of(folder, {"texto": texts}, row_group_size=group)
    limits = RangeLimits(rows=rows, characters=characters, row_characters=100)

    def cut(coverage: Coverage) -> list[tuple[int, int, list]]:
        return [
            (index, item.start, item.texts)
            for index in range(len(table.row_group_rows))
            for item in read(folder, table, index, limits, coverage)
        ]

    whole = cut(Coverage(table))
    assert [text for _, _, part in whole for text in part] == texts
    assert all(len(part) <= rows for _, _, part in whole)
    done = Coverage(table)
    for row_group, start, part in whole[1 : killed_after + 1 : 2]:  # every other chunk survived the kill
        assert done.add(RowRange(row_group=row_group, start=start, rows=len(part)))
    survived = {(row_group, start) for row_group, start, _ in whole[1 : killed_after + 1 : 2]}
    assert cut(done) == [item for item in whole if item[:2] not in survived]


def test_a_saved_and_a_computed_range_are_never_more_than_a_row_group():
    limits = RangeLimits(rows=8192, characters=10**9, row_characters=100)
    for rows in range(1, 5000):
        limit = limits.rows_in(rows)
        assert limit == rows if rows < 128 else 2 * limit <= rows + 1


def test_coverage_refuses_overlapping_and_nonexistent_rows(tmp_path):
    table = table_of(tmp_path, {"texto": ["a"] * 10})
    coverage = Coverage(table, [RowRange(row_group=0, start=0, rows=4)])
    assert not coverage.add(RowRange(row_group=0, start=3, rows=2))
    assert not coverage.add(RowRange(row_group=0, start=8, rows=3))
    assert not coverage.add(RowRange(row_group=1, start=0, rows=1))
    assert coverage.gaps(0) == ((4, 10),)
    assert coverage.add(RowRange(row_group=0, start=4, rows=6)) and coverage.is_complete


def test_keys_and_chunks_survive_a_round_trip(tmp_path):
    table = table_of(tmp_path, {"texto": ["a"]})
    span = RowRange(row_group=12, start=345, rows=6)
    assert range_of(key_of(file_key(table), span)) == span
    assert range_of("ledger/0000000001") is None
    vectors = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    encoded = Encoded(
        vectors=vectors,
        status=np.array([Status.OK, Status.NULL, Status.OK], np.uint8),
        n_tokens=np.array([3, 0, 9], np.int32),
        truncated=np.array([False, False, True]),
        padded_tokens=18,
    )
    batch = from_bytes(to_bytes(encoded, "float32"))
    back = batch.column("vectors")
    assert back.to_pylist()[1] is None
    assert np.array_equal(np.array(back[0].as_py(), np.float32), vectors[0])
    assert batch.column("n_tokens").to_pylist() == [3, 0, 9]
    assert from_bytes(to_bytes(encoded, "float16")).schema.field("vectors").type == pa.list_(pa.float16(), 5)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_arrow_text_type_is_read(tmp_path, kind):
    texts = ["uno", None, "tres", "uno"]
    table = table_of(tmp_path, pa.table({"texto": pa.array(texts, pa.string()).cast(kind)}))
    found = read(tmp_path, table, 0, RangeLimits(rows=10, characters=999, row_characters=99), Coverage(table))
    assert [text for item in found for text in item.texts] == texts


def test_a_dotted_name_selects_a_struct_field_and_null_parents_give_null(tmp_path):
    columns = pa.table(
        {"doc": pa.array([{"cuerpo": {"texto": "a"}}, None, {"cuerpo": None}, {"cuerpo": {"texto": None}}])}
    )
    table = table_of(tmp_path, columns)
    assert files.why_not_text(table, "doc.cuerpo.texto") is None
    found = read(
        tmp_path, table, 0, RangeLimits(rows=9, characters=99, row_characters=9), Coverage(table), "doc.cuerpo.texto"
    )
    assert found[0].texts == ["a", None, None, None]
    assert "no column" in files.why_not_text(table, "doc.nada")
    assert "not text" in files.why_not_text(table, "doc.cuerpo")


def test_a_column_of_nulls_is_all_null_and_invalid_utf8_stays_bytes(tmp_path):
    table = table_of(tmp_path, {"texto": pa.nulls(3)})
    assert (
        read(tmp_path, table, 0, RangeLimits(rows=9, characters=9, row_characters=9), Coverage(table))[0].texts
        == [None] * 3
    )
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"ok\xff\xfe"))
    table = table_of(tmp_path, pa.table({"texto": broken}), "b.parquet")
    assert read(tmp_path, table, 0, RangeLimits(rows=9, characters=9, row_characters=9), Coverage(table))[0].texts == [
        "ok",
        b"\xff\xfe",
    ]


def test_identity_depends_on_content_and_not_on_location_or_time(tmp_path):
    (tmp_path / "x").mkdir()
    one = table_of(tmp_path, {"texto": ["a", "b"]})
    same = table_of(tmp_path / "x", {"texto": ["a", "b"]})
    other = table_of(tmp_path, {"texto": ["a", "c"]}, "c.parquet")
    assert one.identity == same.identity != other.identity


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hola", b"PAR1" + bytes(100) + b"PAR1", b"PAR1" + bytes(100)])
def test_a_file_that_is_not_parquet_is_a_bad_file_and_not_an_exception(tmp_path, content):
    (tmp_path / "mal.parquet").write_bytes(content)
    found = files.inspect(FileStore(tmp_path), InputFile(path="mal.parquet", size_bytes=len(content), etag=None))
    assert isinstance(found, BadFile) and found.path == "mal.parquet" and found.reason


def test_a_corrupt_page_is_a_data_error_that_names_the_file(tmp_path):
    table = table_of(
        tmp_path, {"texto": [f"fila {i}" * 20 for i in range(3000)]}, compression="zstd", use_dictionary=False
    )
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[4 : len(raw) // 2] = bytes(len(raw) // 2 - 4)
    (tmp_path / "a.parquet").write_bytes(raw)
    table = inspected(tmp_path, "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet.*row group 0"):
        read(tmp_path, table, 0, RangeLimits(rows=99, characters=10**6, row_characters=99), Coverage(table))


@given(sizes=st.lists(st.integers(0, 10**6), max_size=60), hosts=st.integers(1, 9))
def test_hosts_share_every_file_exactly_once_and_evenly(sizes, hosts):
    sources = [InputFile(path=f"f{index}", size_bytes=size, etag=None) for index, size in enumerate(sizes)]
    shares = [files.share_of(sources, index, hosts) for index in range(hosts)]
    assert sorted(item.path for share in shares for item in share) == sorted(item.path for item in sources)
    loads = [sum(item.size_bytes for item in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0) + len(sizes)


def test_hidden_files_are_ignored_and_named_and_a_single_file_is_an_input(tmp_path):
    for name in ("a.parquet", "_SUCCESS", ".a.crc", "x/.oculto/b.parquet", "notas.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    listing = files.open_input(str(tmp_path))
    assert [item.path for item in listing.files] == ["a.parquet", "notas.txt"]
    assert sorted(listing.ignored) == [".a.crc", "_SUCCESS", "x/.oculto/b.parquet"]
    single = files.open_input(str(tmp_path / "a.parquet"))
    assert [item.path for item in single.files] == ["a.parquet"] and single.is_one_file
    with pytest.raises(ConfigError, match="--input-path"):
        files.open_input(str(tmp_path / "nada"))


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    rows = 60_000
    table = table_of(tmp_path, {"texto": ["palabra " * 60] * rows, "n": np.arange(rows)}, use_dictionary=False)
    pool = pa.default_memory_pool()
    before, rows_read = pool.bytes_allocated(), 0
    with open(tmp_path / "a.parquet", "rb") as file:
        for batch in record_batches(file, table, 0, ["texto", "n"]):
            rows_read += batch.num_rows
            assert pool.bytes_allocated() - before < 4 * SCAN_BYTES
    assert rows_read == rows and isinstance(file, io.BufferedReader)


def test_the_first_texts_are_those_of_the_first_row_groups_that_can_be_read(tmp_path, monkeypatch):
    """Whatever a reader raises is that file's fault, but an S3 server that does not answer says nothing of a file."""
    tables = [table_of(tmp_path, {"texto": [None, f"{name} uno", " "]}, f"{name}.parquet") for name in "ab"]
    store, original = FileStore(tmp_path), reading.texts_of
    assert first_texts(store, tables, "texto", 1) == ["a uno"]
    assert first_texts(store, tables, "texto", 9) == ["a uno", "b uno"]

    def texts_of(batch: pa.RecordBatch, column: str) -> list[str | bytes | None]:
        found = original(batch, column)
        if "a uno" in found:
            raise pa.ArrowInvalid("index out of bounds")
        return found

    monkeypatch.setattr(reading, "texts_of", texts_of)
    assert first_texts(store, tables, "texto", 9) == ["b uno"]
    monkeypatch.setattr(FileStore, "is_durable", True)

    def unanswered(*_: object, **__: object) -> None:
        raise StoreError("no answer in three minutes")

    monkeypatch.setattr(FileStore, "open", unanswered)
    with pytest.raises(StoreError, match="no answer"):
        first_texts(store, tables, "texto", 9)
