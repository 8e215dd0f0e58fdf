"""A Spanish corpus from Debian's documentation packages, as parquet files for `make demo` or as plain text.

    python demo/corpus.py --out runs/demo/input                  # about 6,000 passages in parquet, column `texto`
    python demo/corpus.py --out runs/corpus --full               # every passage
    python demo/corpus.py --out runs/text --format text          # every document, for training a language model

The text is fetched at run time through the machine's own apt and is never part of this repository. Each file's schema
metadata names its package and licence. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from packages import Package, PackageError, get_packages
from prose import Block, Document, read_fortunes, read_html, read_man

HERE = Path(__file__).resolve().parent


class CorpusError(Exception):
    """The corpus cannot be made in this directory; the message says what to do."""


@dataclass(frozen=True)
class Source:
    package: str
    licence: str
    """SPDX expression, from the package's copyright file."""
    pattern: str
    """Files to read, below the package's root."""
    share: float
    """Fraction of the demo's rows."""


SOURCES = (
    Source("gimp-help-es", "GFDL-1.2-or-later", "usr/share/gimp/2.0/help/es/*.html", 0.25),
    Source("libreoffice-help-es", "MPL-2.0", "usr/share/libreoffice/help/es/text/**/*.html", 0.30),
    Source("manpages-es", "GPL-3.0-or-later", "usr/share/man/es/man*/*.gz", 0.15),
    Source("manpages-es-dev", "GPL-3.0-or-later", "usr/share/man/es/man*/*.gz", 0.08),
    Source(
        "debian-handbook",
        "GPL-2.0-or-later OR CC-BY-SA-3.0",
        "usr/share/doc/debian-handbook/html/es-ES/*.html",
        0.12,
    ),
    Source("debian-reference-es", "GPL-2.0-or-later", "usr/share/debian-reference/*.es.html", 0.05),
    # games/fortunes/es/off, the offensive ones, is not read.
    Source("fortunes-es", "GPL-2.0-or-later", "usr/share/games/fortunes/es/*.fortunes", 0.05),
)

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("package", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("texto", pa.string()),
    ]
)

QUESTIONS = (
    "¿Cómo cambio el tamaño de una imagen?",
    "¿Cómo selecciono una parte de la imagen?",
    "¿Cómo configuro la red?",
    "¿Cómo instalo un paquete en Debian?",
    "¿Para qué sirve la libertad?",
)
"""Embedded by the demo with all other rows, so that it can show the nearest passages."""

TARGET_CHARS, MAX_CHARS, MIN_CHARS = 290, 620, 40
"""A passage ends once it reaches the target. Longer paragraphs are cut at sentence ends, shorter ones are dropped."""
BLANK_ROWS = 3
ROWS_PER_FILE = 950

_SPANISH = frozenset(
    "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ya este sí porque "
    "esta son entre está cuando muy sin sobre ser también hasta hay donde desde todo nos todos uno ni ese esto si "
    "puede fue tiene cada otro otra mismo cual".split()
)
_ENGLISH = frozenset(
    "the of and to is in that it for was with be this are as on by an or not from at which have has can will you "
    "if your when used all may but they there use one".split()
)


def is_spanish(text: str) -> bool:
    """Whether Spanish function words outnumber English ones. Text of fewer than 12 words is Spanish on a tie."""
    words = re.findall(r"[a-záéíóúüñ]+", text.lower())
    spanish, english = sum(word in _SPANISH for word in words), sum(word in _ENGLISH for word in words)
    return spanish > english if len(words) >= 12 else spanish >= english


def read_documents(source: Source, package: Package) -> Iterator[Document]:
    """All documents of a package in path order. Links are not followed, so nothing outside the package is read."""
    for path in sorted(package.root.glob(source.pattern)):
        if path.is_symlink() or not path.is_file():
            continue
        name = path.relative_to(package.root / "usr" / "share").as_posix()
        if path.suffix == ".fortunes":
            yield from read_fortunes(path, name)
        else:
            yield read_man(path, name) if path.suffix == ".gz" else read_html(path, name)


def clean(documents: Iterable[Document], seen: set[bytes]) -> Iterator[Document]:
    """Leave out paragraphs in other languages, and repeated ones of 40 characters or more.

    An empty document is kept; one that loses all its text is dropped.
    """
    for document in documents:
        kept = []
        for block in document.blocks:
            digest = hashlib.sha256(" ".join(block.text.casefold().split()).encode()).digest()[:16]
            if is_spanish(block.text) and (len(block.text) < MIN_CHARS or digest not in seen):
                kept.append(block)
            seen.add(digest)
        if kept or not document.blocks:
            yield Document(document.path, document.title, kept)


def passages(document: Document) -> Iterator[Block]:
    """Join short neighbours and cut long paragraphs, so that most passages have 290 to 620 characters."""
    heading, pieces = "", ""
    for block in document.blocks:
        for piece in _cut(block.text):
            new_topic = block.heading != heading and len(pieces) >= TARGET_CHARS // 3
            if pieces and (new_topic or len(pieces) + 1 + len(piece) > MAX_CHARS):
                yield Block(heading, pieces)
                pieces = ""
            if not pieces:
                heading = block.heading
            pieces = f"{pieces}\n{piece}" if pieces else piece
            if len(pieces) >= TARGET_CHARS:
                yield Block(heading, pieces)
                pieces = ""
    if pieces:
        yield Block(heading, pieces)


def _cut(text: str) -> Iterator[str]:
    """Cut at sentence ends into pieces of at most MAX_CHARS; a single longer sentence is left whole."""
    pieces = ""
    for sentence in re.split(r"(?<=[.!?:;])\s+(?=[¿¡«“\"(]?[A-ZÁÉÍÓÚÑ])", text):
        if pieces and len(pieces) + 1 + len(sentence) > MAX_CHARS:
            yield pieces
            pieces = ""
        pieces = f"{pieces} {sentence}" if pieces else sentence
    if pieces:
        yield pieces


def rows_of(package: str, documents: Iterable[Document]) -> Iterator[dict[str, str | None]]:
    """One row per passage; a document without text gives one row whose `texto` is null."""
    seen: set[str] = set()
    for document in documents:
        if not document.blocks:
            yield _row(package, document, 0, document.title, None)
        for number, passage in enumerate(passages(document)):
            text = passage.text
            if text not in seen and (len(text) >= MIN_CHARS or package.startswith("fortunes")):
                seen.add(text)
                yield _row(package, document, number, passage.heading, text)


def _row(package: str, document: Document, number: int, title: str, text: str | None) -> dict[str, str | None]:
    return {
        "id": f"{package}/{document.path}#{number}",
        "package": package,
        "path": document.path,
        "title": title or None,
        "texto": text,
    }


def choose(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows as whole documents, picked by a hash of their path, in their original order."""
    by_path: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_path.setdefault(str(row["path"]), []).append(row)
    chosen: set[str] = set()
    blank_left = 1
    for path in sorted(by_path, key=lambda path: hashlib.sha256(path.encode()).digest()):
        if len(chosen) >= count:
            break
        document = by_path[path]
        if document[0]["texto"] is None:
            if blank_left == 0:
                continue
            blank_left -= 1
        chosen.update(str(row["id"]) for row in document[: count - len(chosen)])
    return [row for row in rows if row["id"] in chosen]


def write_parquet(rows: list[dict[str, Any]], out: Path, packages: list[Package]) -> Iterator[Path]:
    """Write one or more files per package, with row groups of 96 to 192 rows and sources in the schema metadata."""
    licences = {source.package: source.licence for source in SOURCES}
    index = 0
    for package in packages:
        own = [row for row in rows if row["package"] == package.name]
        files = -(-len(own) // ROWS_PER_FILE)
        for part in range(files):
            slice_ = own[part * ROWS_PER_FILE : (part + 1) * ROWS_PER_FILE]
            about = {"package": package.name, "version": package.version, "licence": licences[package.name]}
            schema = SCHEMA.with_metadata(
                {
                    "source": f"Debian package {package.name} {package.version}",
                    "licence": licences[package.name],
                    "language": "es",
                    "estiba.corpus": json.dumps(about, sort_keys=True),
                }
            )
            name = f"{package.name}-{part:02d}.parquet" if files > 1 else f"{package.name}.parquet"
            path = out / name
            row_group_rows = 96 + 32 * (index % 4)
            pq.write_table(
                pa.Table.from_pylist(slice_, schema=schema), path, compression="zstd", row_group_size=row_group_rows
            )
            index += 1
            yield path


def write_questions(out: Path) -> Path:
    """Write the demo's own questions as one more input file."""
    path = out / "questions.parquet"
    document = Document("questions", "")
    rows = [_row("questions", document, number, "", text) for number, text in enumerate(QUESTIONS)]
    schema = SCHEMA.with_metadata({"source": "demo/corpus.py", "licence": "this repository's", "language": "es"})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
    return path


def write_text(documents: dict[str, list[Document]], out: Path) -> Iterator[Path]:
    """Write one UTF-8 file per package: paragraphs on lines of their own, a blank line between documents."""
    for package, own in documents.items():
        path = out / f"{package}.txt"
        blocks = ("\n".join(block.text for block in document.blocks) for document in own if document.blocks)
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
        yield path


def make(out: Path, cache: Path, *, form: str, rows: int | None) -> dict[str, Any]:
    """Make the corpus in `out`, whole or not at all. Returns its summary, which is also written beside it.

    `rows` None writes every passage. Raises PackageError if the packages cannot be fetched, and CorpusError if `out`
    holds anything that is not parquet or text.
    """
    if out.is_dir() and (others := [path.name for path in out.iterdir() if path.suffix not in (".parquet", ".txt")]):
        raise CorpusError(f"{out} holds {others[0]!r}, so it is not a corpus; choose a new directory with --out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    packages = get_packages([source.package for source in SOURCES], cache)
    by_name = {package.name: package for package in packages}
    seen: set[bytes] = set()
    documents = {
        source.package: list(clean(read_documents(source, by_name[source.package]), seen))
        for source in SOURCES
        if source.package in by_name
    }
    table: list[dict[str, Any]] = []
    if form == "text":
        files = list(write_text(documents, partial))
    else:
        shares = {source.package: source.share for source in SOURCES if source.package in by_name}
        for package, own in documents.items():
            all_rows = list(rows_of(package, own))
            count = None if rows is None else round(rows * shares[package] / sum(shares.values()))
            table += all_rows if count is None else choose(all_rows, count)
        files = list(write_parquet(table, partial, packages))
        if rows is not None:
            files.append(write_questions(partial))
    summary = {
        "key": _key(form, rows),
        "files": {path.name: path.stat().st_size for path in files},
        "documents": sum(len(own) for own in documents.values()),
        "rows": len(table),
        "blank_rows": sum(row["texto"] is None for row in table),
        "text_bytes": sum(len((row["texto"] or "").encode()) for row in table),
        "sources": [asdict(source) | {"version": by_name[source.package].version} for source in SOURCES
                    if source.package in by_name],
        "missing_packages": [source.package for source in SOURCES if source.package not in by_name],
    }  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    _summary_path(out).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def existing(out: Path, *, form: str, rows: int | None) -> dict[str, Any] | None:
    """The summary of a corpus that this code already made in `out` with the same options, else None."""
    try:
        summary: dict[str, Any] = json.loads(_summary_path(out).read_text(encoding="utf-8"))
        sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    except (OSError, ValueError):
        return None
    return summary if summary.get("key") == _key(form, rows) and summary["files"] == sizes else None


def _summary_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def _key(form: str, rows: int | None) -> str:
    """Digest of the options and of this code: a change of either makes the corpus again."""
    code = b"".join((HERE / name).read_bytes() for name in ("corpus.py", "packages.py", "prose.py"))
    return hashlib.sha256(code + json.dumps([form, rows, pa.__version__]).encode()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make; replaced if it exists")
    parser.add_argument("--format", choices=("parquet", "text"), default="parquet")
    parser.add_argument("--rows", type=int, default=6000, help="passages in the demo's subset (default 6000)")
    parser.add_argument("--full", action="store_true", help="every passage; text is always full")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo/.cache"), help="where packages are kept")
    options = parser.parse_args(arguments)
    if options.rows < 1:
        parser.error(f"--rows is {options.rows}; pass 1 or more, or --full")
    rows = None if options.full or options.format == "text" else options.rows
    started = time.monotonic()
    summary = existing(options.out, form=options.format, rows=rows)
    how = "already there"
    try:
        if summary is None:
            summary = make(options.out, options.cache, form=options.format, rows=rows)
            how = f"made in {time.monotonic() - started:.0f} s"
    except (PackageError, CorpusError) as error:
        print(f"corpus: {error}", file=sys.stderr)
        return 1
    size_mb = sum(summary["files"].values()) / 1e6
    count = f"{summary['rows']:,} passages" if summary["rows"] else f"{summary['documents']:,} documents"
    print(f"corpus: {count} in {len(summary['files'])} files ({size_mb:.1f} MB) in {options.out}, {how}")
    for name in summary["missing_packages"]:
        print(f"corpus: this machine's suite has no package {name}; the corpus is made without it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
