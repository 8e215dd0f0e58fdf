"""Builders for the cases in nasty_*.py: a file, and what `finetune check` must make of it."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PAIRS = [{"prompt": f"What is {number} plus {number}?", "completion": str(2 * number)} for number in range(40)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Hello {n}"}, {"role": "assistant", "content": f"Good day {n}"}]}
    for n in range(40)
]


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The report's fields that are stated, and the lines that are dropped."""

    fields: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    warns: str | None = None
    writes: list[dict[str, Any]] | None = None
    """All lines of --write, in any order."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Parts of the one sentence on standard error."""

    says: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    id: str
    name: str
    content: bytes
    outcome: Accepted | Refused
    arguments: tuple[str, ...] = ()


def accepted(
    id: str,
    name: str,
    content: str | bytes,
    *arguments: str,
    dropped: dict[str, list[str]] | None = None,
    warns: str | None = None,
    writes: list[dict[str, Any]] | None = None,
    **fields: Any,
) -> Case:
    outcome = Accepted(fields=fields, dropped=dropped or {}, warns=warns, writes=writes)
    return Case(id=id, name=name, content=_bytes(content), outcome=outcome, arguments=arguments)


def refused(id: str, name: str, content: str | bytes, *says: str, arguments: tuple[str, ...] = ()) -> Case:
    return Case(id=id, name=name, content=_bytes(content), outcome=Refused(says=says), arguments=arguments)


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: list[list[str]], delimiter: str = ",", end: str = "\n") -> str:
    return "".join(delimiter.join(row) + end for row in rows)


def with_30_mb(start: str) -> str:
    return start + "x" * 30_000_000


def cities(count: int = 12) -> list[list[str]]:
    """A city decides its country and language."""
    known = [("Lyon", "France", "French"), ("Graz", "Austria", "German"), ("Turin", "Italy", "Italian")]
    rows = [["year", "city", "country", "language"]]
    return rows + [[str(2000 + number), *known[number % 3]] for number in range(count)]


def zipped(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def tarred(gz: bool = False, old: bool = False) -> bytes:
    """An archive; an old one is of the time before the magic number."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if gz else "w") as archive:
        member = tarfile.TarInfo("data.csv")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"a,b\n"))
    if not old:
        return buffer.getvalue()
    header = bytearray(buffer.getvalue())
    header[148:156], header[257:265] = b" " * 8, bytes(8)
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def sqlite() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(Path(folder) / "db")
        connection.execute("create table t (a)")
        connection.commit()
        connection.close()
        return (Path(folder) / "db").read_bytes()


def parquet(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def chat(*messages: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"messages": list(messages), **extra}


USER = {"role": "user", "content": "Hello"}
HELLO = {"role": "assistant", "content": "Good day"}
CITY_TABLE = {"records": "table", "key_columns": ["year", "city"], "target_columns": ["country", "language"]}
CSV_PAIRS = "prompt,completion\n" + "".join(f"{pair['prompt']},{pair['completion']}\n" for pair in PAIRS)
SPANISH = "pregunta,respuesta\n" + "".join(
    f"¿Dónde está {n}?,Está aquí, señor {n}\n".replace(", s", " s") for n in range(9)
)
