"""Paragraphs of prose from documentation files: HTML (lxml), man pages (troff) and fortune files.

Every reader returns `Document`s with blocks in reading order, without menus, tables of contents, listings and notices.
`corpus.py` selects by language, duplicates and size.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import lxml.html
from lxml.etree import ParserError


@dataclass(frozen=True)
class Block:
    heading: str
    """Heading above the paragraph."""
    text: str


@dataclass
class Document:
    path: str
    """Path inside the package, from /usr."""
    title: str
    blocks: list[Block] = field(default_factory=list)


# --- HTML ---------------------------------------------------------------------------------------------------------

_LEFT_OUT = (
    "head script style noscript nav header footer aside button form pre img svg "
    ".navheader .navfooter .docnav .toc .lot .list-of-tables .index .indexterm .legalnotice .revhistory .footnotes "
    ".programlisting .screen .synopsis .figure .informalfigure .mediaobject .mediaobjectco .caption .relatedtopics "
    ".howtoget .embeddedlink .debug .code-toolbar #banner #title #SearchFrame #DonationFrame #Bookmarks"
).split()
_BLOCK_TAGS = frozenset(
    "address article blockquote body caption dd div dl dt fieldset h1 h2 h3 h4 h5 h6 hr li main ol p section table "
    "tbody tfoot thead tr ul".split()
)
_HEADINGS = frozenset("h1 h2 h3 h4 h5 h6".split())
_NUMBERING = re.compile(r"^(?:Capítulo |Apéndice )?[\dA-Z]{1,2}(?:\.\d+)*\.\s+")


def read_html(path: Path, name: str) -> Document:
    """Read one HTML or XHTML page; a page without a body is a document without blocks."""
    parser = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        page = lxml.html.document_fromstring(path.read_bytes(), parser=parser)
    except ParserError:
        return Document(path=name, title="")
    title = _tidy(page.findtext(".//title") or "")
    document = Document(path=name, title=_NUMBERING.sub("", title))
    for selector in _LEFT_OUT:
        kind, value = {".": ("class", selector[1:]), "#": ("id", selector[1:])}.get(selector[0], ("", selector))
        where = {
            "class": f"//*[contains(concat(' ', normalize-space(@class), ' '), ' {value} ')]",
            "id": f"//*[@id='{value}']",
            "": f"//{value}",
        }[kind]
        for element in _select(page, where):
            if element.getparent() is not None:
                element.drop_tree()
    roots = _select(page, "//*[@id='DisplayArea']") or _select(page, "//body")
    if roots:
        _HtmlReader(document).read(roots[0])
    return document


def _select(page: lxml.html.HtmlElement, xpath: str) -> list[lxml.html.HtmlElement]:
    return cast("list[lxml.html.HtmlElement]", page.xpath(xpath))


class _HtmlReader:
    """Walks the tree once and ends a paragraph at every block element."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.heading = document.title
        self.pieces: list[str] = []

    def read(self, element: lxml.html.HtmlElement) -> None:
        self._walk(element)
        self._close()

    def _walk(self, element: lxml.html.HtmlElement) -> None:
        tag = element.tag if isinstance(element.tag, str) else ""
        if tag in _BLOCK_TAGS:
            self._close()
        elif tag in ("td", "th"):
            self.pieces.append(" · ")
        elif tag == "br":
            self.pieces.append(" ")
        self.pieces.append(element.text or "")
        for child in element:
            self._walk(child)
            self.pieces.append(child.tail or "")
        if tag in _HEADINGS:
            self.heading = _NUMBERING.sub("", _tidy("".join(self.pieces))) or self.heading
            self.pieces.clear()
        elif tag in _BLOCK_TAGS:
            self._close()

    def _close(self) -> None:
        text = _tidy("".join(self.pieces)).strip(" ·")
        self.pieces.clear()
        if text:
            self.document.blocks.append(Block(self.heading, text))


# --- man pages ----------------------------------------------------------------------------------------------------

_BREAKS = frozenset(".PP .P .LP .IP .TP .TQ .HP .sp .br .RS .RE .in .ti .HR .ce".split())
_INLINE = frozenset(".B .I .R .BI .BR .IB .IR .RB .RI .SM .SB .UR .MT .URL .MTO".split())
_SKIPPED = {".nf": ".fi", ".EX": ".EE", ".TS": ".TE", ".de": "..", ".ig": "..", ".Vb": ".Ve"}
_SKIPPED_SECTIONS = frozenset(
    "SINOPSIS SINTAXIS SYNOPSIS BIBLIOTECA COLOFÓN TRADUCCIÓN COPYRIGHT AUTOR AUTORES AUTHOR AUTHORS COLOPHON "
    "VERSIONES ATRIBUTOS ATRIBUTO".split()
) | {"VÉASE TAMBIÉN", "SEE ALSO", "DERECHOS DE AUTOR", "INFORMAR DE ERRORES", "CONFORME A", "VER TAMBIÉN"}
_SPECIAL = {
    "aq": "'", "dq": '"', "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "bu": "•", "em": "—", "en": "–", "hy": "-",
    "co": "©", "rg": "®", "tm": "™", "ha": "^", "ti": "~", "rs": "\\", "mu": "×", "+-": "±", "<=": "≤", ">=": "≥",
    "!=": "≠", "->": "→", "<-": "←", "de": "°", "Fo": "«", "Fc": "»", "r!": "¡", "r?": "¿", "ga": "`", "mi": "−",
}  # fmt: skip
_SINGLE = {"-": "-", "e": "\\", "~": " ", " ": " ", "0": " ", "'": "´", "`": "`", ".": "."}
_ESCAPE = re.compile(
    r"\\(?:"
    r"f(?:\[[^]]*]|\(..|.)"  # fonts
    r"|s(?:\[[^]]*]|\([+-]?..|[+-]?\d)"  # sizes
    r"|[hvwDlLoZbxX]'[^']*'"  # motions and drawing
    r"|[mMgkn](?:\[[^]]*]|\(..|.)"  # colours, registers
    r"|\*?(?:\[(?P<long>[^]]*)]|\((?P<two>..))"  # special characters and strings
    r"|(?P<one>.))"
)


def read_man(path: Path, name: str) -> Document:
    """Read one man page in the classic `man` macros; pages in mdoc, or that only include another, have no blocks."""
    raw = path.read_bytes()
    source = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", errors="replace")
    document = Document(path=name, title=Path(name).name.removesuffix(".gz"))
    if not re.search(r"^\.TH\b", source, re.MULTILINE):
        return document
    pieces: list[str] = []
    heading, until, wants_tag = "", "", False

    def close() -> None:
        text = _tidy(" ".join(pieces))
        pieces.clear()
        if text and heading not in _SKIPPED_SECTIONS:
            document.blocks.append(Block(f"{document.title}: {heading}", text))

    for line in source.splitlines():
        macro, _, rest = line.replace("'", ".", 1).partition(" ") if line[:1] in (".", "'") else ("", "", line)
        macro = macro[:1] + macro[1:].strip()
        if until:
            until = "" if macro == until else until
        elif macro in _SKIPPED:
            until = _SKIPPED[macro]
        elif macro in (".SH", ".SS"):
            close()
            heading = _tidy(_plain(rest).strip('"')) if macro == ".SH" else heading
        elif macro in _BREAKS:
            close()
            wants_tag = macro in (".TP", ".TQ")
            if macro == ".IP" and (tag := _arguments(rest)[:1]) and len(tag[0]) > 1:
                pieces.append(_plain(tag[0]) + ":")
        elif macro in _INLINE or not macro:
            text = _plain(_inline(macro, rest))
            if not text.strip():
                close()
            else:
                pieces.append(text.strip() + (":" if wants_tag else ""))
                wants_tag = False
    close()
    return document


def _inline(macro: str, rest: str) -> str:
    """The text of a font macro: .BR and similar macros alternate fonts within a word, the others between words."""
    if not macro:
        return rest
    return ("" if re.fullmatch(r"\.[BIR][BIR]", macro) else " ").join(_arguments(rest))


def _arguments(rest: str) -> list[str]:
    """The arguments of a macro line, where quotes join words."""
    return [quoted or bare for quoted, bare in re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)]


def _plain(text: str) -> str:
    """Resolve troff escapes in a line of text."""
    text = re.sub(r'\\["#].*', "", text)

    def resolve(match: re.Match[str]) -> str:
        if (name := match["long"] or match["two"]) is not None:
            return _SPECIAL.get(name, "")
        return _SINGLE.get(match["one"] or "", "")

    return _ESCAPE.sub(resolve, text)


# --- fortunes -----------------------------------------------------------------------------------------------------


def read_fortunes(path: Path, name: str) -> list[Document]:
    """Read a fortune file: each saying with its author is a document with one block."""
    topic = path.name.removesuffix(".fortunes")
    documents = []
    for number, saying in enumerate(re.split(r"^%\s*$", path.read_text("utf-8", errors="replace"), flags=re.MULTILINE)):
        text = _tidy(re.sub(r"\s+--\s*", " — ", re.sub(r"\x1b\[[\d;]*m|.\x08", "", saying)))
        if text:
            documents.append(Document(path=f"{name}#{number}", title=topic, blocks=[Block(topic, text)]))
    return documents


def _tidy(text: str) -> str:
    """One line, single spaces, without control characters or soft hyphens; empty if there are only symbols."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\xad\u200b\ufeff]", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([,.;:)\]»”])", r"\1", text)
    return text if re.search(r"\w", text) else ""
