"""Recognise, by content, files that are not training data, and name them in the error."""

from __future__ import annotations

import io
import re
import struct
import zipfile

from estiba.errors import DataError

PARQUET_MAGIC = b"PAR1"

_UNPACK = "unpack it and give the files inside"
_CONVERT = "convert it to CSV, JSON Lines or parquet"
_EXTRACT = "extract its text to a .txt file"
_MODEL = "this is no training data: give the data file (a model goes to base_model)"

_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"%PDF-", "a PDF document", _EXTRACT),
    (0, b"{\\rtf", "an RTF document", _EXTRACT),
    (0, b"%!PS", "a PostScript document", _EXTRACT),
    (0, b"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (0, b"\x93NUMPY", "a NumPy array", _CONVERT),
    (0, b"ARROW1\x00\x00", "an Arrow file", "write it as parquet"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "write it as parquet"),
    (0, b"FEA1", "a Feather file", "write it as parquet"),
    (0, b"ORC", "an ORC file", "write it as parquet"),
    (0, b"Obj\x01", "an Avro file", "write it as parquet"),
    (0, b"GGUF", "a GGUF model", _MODEL),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", _EXTRACT),
    (0, b"\xff\xd8\xff", "a JPEG image", _EXTRACT),
    (0, b"GIF87a", "a GIF image", _EXTRACT),
    (0, b"GIF89a", "a GIF image", _EXTRACT),
    (0, b"II*\x00", "a TIFF image", _EXTRACT),
    (0, b"MM\x00*", "a TIFF image", _EXTRACT),
    (0, b"ID3", "an MP3 recording", "transcribe it to a .txt file"),
    (0, b"OggS", "an Ogg recording", "transcribe it to a .txt file"),
    (0, b"fLaC", "a FLAC recording", "transcribe it to a .txt file"),
    (4, b"ftyp", "a video or recording (MP4)", "transcribe it to a .txt file"),
    (0, b"\x7fELF", "a program", "give the data file"),
    (0, b"MZ\x90\x00", "a program", "give the data file"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file", "decompress it"),
    (0, b"\x1f\x9d", "a file of the old Unix compress", "decompress it"),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer, not the data", "run `git lfs pull`"),
    (0, b"/annex/objects/", "a git-annex pointer, not the data", "run `git annex get`"),
)
_ALSO_TEXT = frozenset((b"FEA1", b"ORC", b"GGUF", b"GIF87a", b"GIF89a", b"ID3", b"OggS", b"fLaC", b"ftyp", b"ustar"))
"""Signatures that the header of a table may begin with: ORCID, ID3_tag. The file has bytes that no text has."""
_ZIP_CONTENT = (
    ("xl/", "an Excel spreadsheet (xlsx)", "save it as CSV UTF-8, one file per sheet"),
    ("word/", "a Word document (docx)", "save it as plain text"),
    ("ppt/", "a PowerPoint presentation", _EXTRACT),
    ("Index/Document.iwa", "an Apple Numbers or Pages document", "export it as CSV or plain text"),
)
_MIMETYPES = {
    b"application/vnd.oasis.opendocument.spreadsheet": ("an OpenDocument spreadsheet (ods)", "save it as CSV UTF-8"),
    b"application/vnd.oasis.opendocument.text": ("an OpenDocument text (odt)", "save it as plain text"),
    b"application/epub+zip": ("an EPUB book", _EXTRACT),
}
_WEB_PAGE = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype\s+html|<html|<head|<body)", re.I | re.DOTALL)
_FRAGMENT = re.compile(
    rb"\s*(<!--.*?-->\s*)*<(table|div|meta|script|style|title|span|p|ul|h[1-6])[\s>]", re.I | re.DOTALL
)
_XML = re.compile(rb"\s*(<\?xml[\s?]|<!DOCTYPE\s)", re.I)
_XML_TABLES = (
    (b"urn:schemas-microsoft-com:office:spreadsheet", "an Excel spreadsheet (XML)"),
    (b"<svg", "an SVG image"),
)
_ELEMENT = re.compile(rb"\s*<([A-Za-z_][\w:.-]{0,80})[^<>]*>")
_ANSWERS = re.compile(rb"\s*(404: Not Found|404 page not found|Not Found|Access Denied|Forbidden|Unauthorized)\s*")
_S3_ERROR = re.compile(rb"<Error>\s*<Code>(\w{1,60})</Code>")


def refuse_other_kinds(name: str, data: bytes) -> None:
    """Raise DataError if the content is recognisably no training data."""
    found = _recognise(data)
    if found is not None:
        what, remedy = found
        raise DataError(f"{name}: is {what}; {remedy}")


def _recognise(data: bytes) -> tuple[str, str] | None:
    head = data[:4096]
    for offset, magic, what, remedy in _SIGNATURES:
        if head.startswith(magic, offset) and (magic not in _ALSO_TEXT or is_binary(head)):
            return what, remedy
    if _is_old_tar(head):
        return "a tar archive", _UNPACK
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_content(data)
    if head.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return "an old Office file, such as an Excel spreadsheet (xls)", "save it as CSV UTF-8"
    if head.startswith(b"RIFF") and head[8:12] in (b"WEBP", b"WAVE", b"AVI "):
        return {b"WEBP": ("a WebP image", _EXTRACT)}.get(head[8:12], ("a recording", "transcribe it to a .txt file"))
    if head.startswith(b"BM") and head[6:10] == b"\x00\x00\x00\x00":
        return "a BMP image", _EXTRACT
    if re.match(rb"\x80[\x02-\x05](}|\]|\x95|c|\(|K|X|\x8a|\x8c|N)", head):
        return "a Python pickle, which could run code when opened", _CONVERT
    if re.match(rb"(cos\nsystem|c__builtin__\n|cbuiltins\n|\(dp\d+\n|\(lp\d+\n)", head):
        return "a Python pickle, which could run code when opened", _CONVERT
    if len(data) > 9 and data[8:10] in (b'{"', b"{}", b"{ ") and 2 <= struct.unpack("<Q", data[:8])[0] < len(data):
        return "a safetensors model", _MODEL
    return _markup(_as_ascii(head), _as_ascii(data[: 2**16]))


def is_binary(head: bytes) -> bool:
    """Whether bytes have control characters that no text has."""
    return any(byte < 9 for byte in head)


def _is_old_tar(head: bytes) -> bool:
    """Whether a block is the header of a tar archive without a magic number, by its checksum."""
    try:
        expected = int(head[148:156].strip(b" \x00"), 8)
    except ValueError:
        return False
    return len(head) >= 512 and expected == sum(head[:148]) + 8 * ord(" ") + sum(head[156:512])


def _as_ascii(data: bytes) -> bytes:
    """The ASCII letters of UTF-8 and UTF-16 text alike."""
    return data.removeprefix(b"\xef\xbb\xbf").removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff").replace(b"\x00", b"")


def _markup(head: bytes, start: bytes) -> tuple[str, str] | None:
    error = _S3_ERROR.search(head)
    if error is not None and (_XML.match(head) or head.lstrip().startswith(b"<Error>")):
        return f"an S3 error message ({error[1].decode()}), not the data", "download it again with valid credentials"
    if _ANSWERS.fullmatch(head):
        return f"a server's answer ({head.decode().strip()}), not the data", "download it again"
    if _WEB_PAGE.match(head) or _FRAGMENT.match(head):
        return "a web page (HTML)", "download the data itself, or extract its text to a .txt file"
    if _XML.match(head) or head.lstrip().startswith(b"<svg"):
        known = next((what for mark, what in _XML_TABLES if mark in start), None)
        return known or "an XML document", _CONVERT
    root = _ELEMENT.match(head)
    if root is not None and start.rstrip().endswith(b"</" + root[1] + b">"):
        return "an XML document", _CONVERT
    return None


def _zip_content(data: bytes) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()[:10_000]
            if "mimetype" in names and archive.getinfo("mimetype").file_size < 200:
                known = _MIMETYPES.get(archive.read("mimetype").strip())
                if known is not None:
                    return known
    except Exception:  # a damaged archive raises many things; it is an archive all the same
        return "a zip archive that is damaged or cut short", "copy it again and unpack it"
    for prefix, what, remedy in _ZIP_CONTENT:
        if any(name.startswith(prefix) for name in names):
            return what, remedy
    if any(name.endswith("data.pkl") for name in names):
        return "a PyTorch model", _MODEL
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive", _CONVERT
    return "a zip archive", _UNPACK
