"""Random damage to valid files: each is read as pyarrow reads it, or named and skipped."""

from __future__ import annotations

import datetime as dt
import io
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rehearsal import WORDS
from whole_job import outputs, run

WRITERS = (
    {},
    {"compression": "none", "use_dictionary": False},
    {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 80},
    {"compression": "gzip", "write_page_index": True, "data_page_size": 1000},
    {"compression": "none", "use_dictionary": False, "column_encoding": {"texto": "DELTA_BYTE_ARRAY"}},
    {"compression": "snappy", "store_schema": False, "write_page_checksum": True},
    {"compression": "lz4", "use_deprecated_int96_timestamps": True, "row_group_size": 135},
)


def valid_files(dice: random.Random, rows: int = 240) -> list[bytes]:
    """Small files of several writers' kinds: encodings, compressions, page versions, nested and dictionary columns."""
    files = []
    for options in WRITERS:
        texts: list[str | None] = [" ".join(dice.choices(WORDS, k=dice.randint(1, 12))) for _ in range(rows)]
        texts[3], texts[5] = None, ""
        table = pa.table(
            {
                "id": pa.array(range(rows), pa.int64()),
                "texto": texts,
                "lista": [[index, None] for index in range(rows)],
                "hondo": [{"a": index, "b": str(index)} for index in range(rows)],
                "clase": pa.array(["x", "y", None] * (rows // 3)).dictionary_encode(),
                "hora": [dt.datetime(2026, 1, 1) + dt.timedelta(index) for index in range(rows)],
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, **options)
        files.append(sink.getvalue())
    return files


def damage(valid: bytes, dice: random.Random) -> tuple[str, bytes]:
    """Flip, cut, repeat or zero a range anywhere; every third time near the end, where the footer is."""
    raw = bytearray(valid)
    start = dice.randrange(len(raw))
    if dice.random() < 1 / 3:
        start = max(0, len(raw) - 1 - dice.randrange(2000))
    length = min(len(raw) - start, dice.choice((1, 1, 4, 16, 100, 1000)))
    kind = dice.choice(("flipped", "cut", "repeated", "zeroed"))
    if kind == "flipped":
        for index in range(start, start + length):
            raw[index] ^= 1 << dice.randrange(8)
    elif kind == "cut":
        del raw[start : start + length]
    elif kind == "repeated":
        raw[start:start] = raw[start : start + length]
    else:
        raw[start : start + length] = bytes(length)
    return kind, bytes(raw)


def as_pyarrow_reads(path: Path) -> pa.Table | None:
    try:
        return pq.read_table(path)
    except Exception:  # whatever it raises
        return None


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("count", "seed"), [pytest.param(40, 1, id="40"), pytest.param(200, 2, id="200", marks=pytest.mark.slow)]
)
def test_damaged_files_are_read_as_pyarrow_reads_them_or_named_and_skipped(root, inputs, tiny_model, count, seed):
    dice = random.Random(seed)
    files = valid_files(dice)
    kinds = {}
    for index in range(count):
        kind, raw = damage(dice.choice(files), dice)
        kinds[f"{index:03d}.parquet"] = kind
        (inputs / f"{index:03d}.parquet").write_bytes(raw)
    (inputs / "valid.parquet").write_bytes(files[0])
    results = run(tiny_model, on_bad_file="skip")
    bad = {item["path"]: item["reason"] for item in results["files"]["bad"]}
    written = {path.name for path in (root / "output/data").iterdir()} - {"results.json"}
    assert written | set(bad) == {*kinds, "valid.parquet"} and not written & set(bad) and "valid.parquet" in written
    assert all(bad.values())
    counts: Counter[str] = Counter()
    for name, kind in kinds.items():
        counts[f"{kind}: {'skipped' if name in bad else 'equal'}"] += 1
        if name in bad:
            continue
        expected = as_pyarrow_reads(inputs / name)
        assert expected is not None, f"{name} ({kind}): pyarrow cannot read what was embedded"
        assert outputs(root, name).select(expected.schema.names).equals(expected), f"{name} ({kind})"
        nulls = expected["texto"].is_null().to_pylist()  # the bytes need not be UTF-8
        assert [status == "null" for status in outputs(root, name)["status"].to_pylist()] == nulls
    print(f"{count} damages:", dict(sorted(counts.items())))
