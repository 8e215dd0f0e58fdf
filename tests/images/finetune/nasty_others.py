"""Plain text, and files that are no training data at all."""

from __future__ import annotations

import gzip
import pickle

import pyarrow as pa
from nasty import accepted, cities, lines, parquet, refused, sqlite, table, tarred, zipped

TEXT_FILES = [
    accepted("a document", "d.txt", "One paragraph.\n\nAnother one.\n", format="txt", records="text", kept=1),
    accepted("a record per line", "d.txt", "One line.\nAnother line.\nA third.\n", rows=3, kept=3, records="text"),
    accepted(
        "one document, by flag", "d.txt", "One line.\nAnother line.\nA third.\n", "--text-format", "document", kept=1
    ),
    accepted("commas in prose", "d.txt", "Well, I said so.\nYes, you did.\nNo, never, ever.\n", format="txt", kept=3),
    accepted("a bracket at the start", "d.txt", "[Chorus] la la la.\nThe song ends.\n", format="txt", kept=2),
    accepted(
        "text in JSON lines", "d.jsonl", lines([{"text": f"Tale {n}."} for n in range(5)]), records="text", kept=5
    ),
    accepted("text and an id", "d.csv", "id,text\n1,One tale.\n2,Another.\n", records="text", kept=2),
    accepted(
        "text and a label",
        "d.csv",
        "text,label\nGood film,pos\nBad film,neg\nFine,pos\nPoor,neg\n",
        records="table",
        key_columns=["text"],
        target_columns=["label"],
        kept=4,
    ),
    accepted("one column called text", "d.csv", "text\nOne tale\nAnother\n", records="text", kept=2),
    accepted(
        "a text column by name", "d.csv", "a,b\nOne tale,1\nAnother,2\n", "--text-column", "A", records="text", kept=2
    ),
    refused("blank space alone", "d.txt", " \n\t\n", "only blank space"),
    refused("random bytes", "d.txt", bytes(range(1, 32)) * 50, "binary data"),
]

OTHER_KINDS = [
    refused("a notebook", "t.json", '{"cells": [], "metadata": {}, "nbformat": 4}', "Jupyter notebook"),
    refused("an error as JSON", "t.json", '{"message": "Forbidden"}', "error message", "Forbidden"),
    refused("a page that was not found", "t.csv", "404: Not Found\n", "server's answer"),
    refused("an empty file", "e.csv", b"", "e.csv", "empty"),
    refused("an empty file in gzip", "e.csv.gz", gzip.compress(b""), "empty after decompression"),
    refused(
        "a spreadsheet", "t.csv", zipped(**{"[Content_Types].xml": "", "xl__workbook.xml": ""}), "t.csv", "Excel", "CSV"
    ),
    refused("an old spreadsheet", "t.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "Excel"),
    refused(
        "an OpenDocument spreadsheet",
        "t.csv",
        zipped(mimetype="application/vnd.oasis.opendocument.spreadsheet"),
        "OpenDocument",
    ),
    refused(
        "a spreadsheet as XML",
        "t.xls",
        '<?xml version="1.0"?><Workbook xmlns="urn:schemas-microsoft-com:office:spreadsheet">',
        "Excel",
    ),
    refused("a Word document", "t.txt", zipped(word__document="x"), "Word"),
    refused("a web page", "t.csv", "<!DOCTYPE html>\n<html><body>a,b</body></html>", "web page"),
    refused("a web page after blanks", "t.json", "\n\n  <html lang=en>", "web page"),
    refused("a web page in UTF-16", "t.csv", "<!doctype html><p>a".encode("utf-16"), "web page"),
    refused(
        "an S3 error",
        "t.csv",
        '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
        "AccessDenied",
    ),
    refused("XML", "t.csv", '<?xml version="1.0"?><rows><row a="1"/></rows>', "XML"),
    refused("a PDF", "t.txt", b"%PDF-1.7\n%\xe2\xe3", "PDF"),
    refused("an image", "t.csv", b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG"),
    refused("a photograph", "t.csv", b"\xff\xd8\xff\xe0" + bytes(100), "JPEG"),
    refused("a pickle", "t.csv", pickle.dumps({"a": [1, 2]}), "pickle"),
    refused("an old pickle", "t.csv", pickle.dumps({"a": [1, 2]}, protocol=0), "pickle"),
    refused("a database", "t.csv", sqlite(), "SQLite"),
    refused("a zip archive", "t.csv", zipped(data="a,b\n1,2\n"), "zip archive", "unpack"),
    refused("a damaged zip archive", "t.csv", zipped(data="a,b\n" * 99)[:60], "damaged"),
    refused("a tar archive", "t.csv", tarred(), "tar archive"),
    refused("a tar archive without a magic number", "t.csv", tarred(old=True), "tar archive"),
    refused("a piece of a web page", "t.xls", "<table border=1><tr><td>a</td></tr></table>", "web page"),
    refused("YAML", "t.yaml", "- prompt: a\n  completion: b\n", "YAML", "convert"),
    refused("statements of SQL", "t.sql", "CREATE TABLE t (a int, b int);\nINSERT INTO t VALUES (1, 2);\n", "SQL"),
    refused("a text file of numbers", "t.txt", "".join(f"{n * 3.5}\n" for n in range(99)), "t.txt:1", "holds numbers"),
    refused("a tar.gz archive", "t.csv.gz", tarred(gz=True), "tar archive"),
    refused(
        "a Git LFS pointer",
        "t.csv",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "git lfs pull",
    ),
    refused("a safetensors model", "t.csv", (16).to_bytes(8, "little") + b'{"a":{}}        ', "safetensors"),
    refused("a GGUF model", "t.txt", b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
    refused("a NumPy array", "t.csv", b"\x93NUMPY\x01\0" + bytes(50), "NumPy"),
    refused("a damaged parquet file", "t.parquet", parquet({"a": ["x"]})[:-20], "damaged parquet"),
    refused("an empty parquet file", "t.parquet", parquet({"a": pa.array([], pa.string())}), "no rows"),
    refused("gzip cut in half", "t.csv.gz", gzip.compress(table(cities(500)).encode())[:200], "damaged or cut short"),
]
