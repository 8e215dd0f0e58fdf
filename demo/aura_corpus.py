"""Spanish text to train a small language model on: Debian's documentation in Spanish, and the Reina-Valera of 1909.

    python demo/aura_corpus.py                             # into runs/aura/input, about 12 MB in 8 .txt files
    python demo/aura_corpus.py --out DIR --cache DIR

Running text: one paragraph per line, a blank line between documents (chapters). The text is fetched at run time through
the machine's own apt and is never part of this repository. It is made again only if the files changed. The same
packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import corpus
from packages import Package, PackageError, get_packages

BIBLE = "sword-text-sparv"
"""Debian package; the text is in the public domain."""


def chapters(package: Package) -> Iterator[str]:
    """The text of a SWORD module, compressed by book (zText, OSIS markup): one verse per line, chapter by chapter."""
    for testament in ("ot", "nt"):
        for index in sorted(package.root.rglob(f"{testament}.bzs")):
            packed = index.with_suffix(".bzz").read_bytes()
            books = [
                zlib.decompress(packed[at : at + size])
                for at, size, _ in struct.iter_unpack("<III", index.read_bytes())
            ]
            verses: list[str] = []
            for book, at, size in struct.iter_unpack("<IIH", index.with_suffix(".bzv").read_bytes()):
                markup = books[book][at : at + size].decode() if size else ""
                if "<chapter" in markup and verses:
                    yield "\n".join(verses)
                    verses = []
                text = _plain(markup)
                if text and not markup.lstrip().startswith(("<div", "<milestone")):  # headings of a book
                    verses.append(text)
            if verses:
                yield "\n".join(verses)


def _plain(markup: str) -> str:
    text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<(note|title)\b.*?</\1>", "", markup, flags=re.DOTALL)))
    return re.sub(r"\s+([,.;:?!])", r"\1", " ".join(text.replace("¶", " ").split()))


def make(out: Path, cache: Path) -> dict[str, int]:
    """Make the corpus in `out`. Returns the sizes of its files. Raises PackageError or CorpusError."""
    stamp = out.with_name(f"{out.name}.json")
    key = hashlib.sha256(Path(__file__).read_bytes() + corpus._key("text", None).encode()).hexdigest()
    if (sizes := _existing(out, stamp, key)) is not None:
        return sizes
    documentation = out.with_name(f".{out.name}-documentation")
    corpus.make(documentation, cache, form="text", rows=None)
    try:
        for package in get_packages([BIBLE], cache):
            text = "\n\n".join(chapters(package))
            (documentation / "reina-valera-1909.txt").write_text(text + "\n", encoding="utf-8")
    except PackageError as error:  # the rest is enough to train on
        print(f"aura_corpus: without the Reina-Valera ({error})", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    documentation.replace(out)
    documentation.with_name(f"{documentation.name}.json").unlink(missing_ok=True)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    stamp.write_text(json.dumps({"key": key, "files": sizes}, indent=1) + "\n", encoding="utf-8")
    return sizes


def _existing(out: Path, stamp: Path, key: str) -> dict[str, int] | None:
    try:
        recorded = json.loads(stamp.read_text(encoding="utf-8"))
        sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    except (OSError, ValueError):
        return None
    return sizes if recorded.get("key") == key and recorded.get("files") == sizes else None


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/aura/input"), help="directory to make; replaced if it exists"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/demo/.cache"), help="where packages are kept")
    options = parser.parse_args(arguments)
    out: Path = options.out
    if out.is_dir() and (others := [path.name for path in out.iterdir() if path.suffix != ".txt"]):
        print(
            f"aura_corpus: {out} holds {others[0]!r}, so it is not a corpus; choose another directory with --out",
            file=sys.stderr,
        )
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        sizes = make(out, options.cache)
    except (PackageError, corpus.CorpusError) as error:
        print(f"aura_corpus: {error}", file=sys.stderr)
        return 1
    print(f"aura_corpus: {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB of Spanish, in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
