"""Cells of delimited files are those that Python's csv and pandas read."""

from __future__ import annotations

import csv
import io

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from estiba.errors import DataError
from finetune.data.delimited import guess_for, parse_delimited
from finetune.data.dialects import split_lines
from finetune.data.rows import ParsedFile
from finetune.data.settings import DataSettings

SPECTRUM = {
    "comma in quotes": 'first,last,address,city,zip\nJohn,Doe,120 any st.,"Anytown, WW",08123\n',
    "empty cells": 'a,b,c\n1,"",""\n2,3,4\n',
    "empty cells, CR LF": 'a,b,c\r\n1,"",""\r\n2,3,4\r\n',
    "escaped quotes": 'a,b\n1,"ha ""ha"" ha"\n3,4\n',
    "JSON": 'key,val\n1,"{""type"": ""Point"", ""coordinates"": [102.0, 0.5]}"\n',
    "line feeds": 'a,b,c\n1,2,3\n"Once upon \na time",5,6\n7,8,9\n',
    "line feeds, CR LF": 'a,b,c\r\n1,2,3\r\n"Once upon \r\na time",5,6\r\n7,8,9\r\n',
    "quotes and line feeds": 'a,b\n1,"ha \n""ha"" \nha"\n3,4\n',
    "simple": "a,b,c\n1,2,3\n",
    "simple, CR LF": "a,b,c\r\n1,2,3\r\n",
    "no line feed at the end": "a,b,c\n1,2,3",
    "UTF-8": "a,b,c\n1,2,3\n4,5,ʤ\n",
    "minutes and seconds": 'place,degrees\nA,"40°26\'46"" N 79°58\'56"" W"\nB,"51° 30\' 30"" N"\n',
    "blanks around cells": "a,b\n x , y \n  z,w  \n",
    "blank lines": "a,b\n\n1,2\n\n\n3,4\n",
    "a quote inside a cell": 'a,b\n5" pipe,x\n6" pipe,y\n',
    "text after a closing quote": 'a,b\n"x"y,1\n"z" ,2\n',
    "quoted delimiters alone": 'a,b\n",",";"\n"\t","|"\n',
    "quoted header": '"a","b, c"\n1,2\n',
    "cells that look like other types": "a,b\n007,1e5\nNA,None\ntrue,-0\n0x1F,1_000\nnan,inf\n",
    "semicolons": "a;b;c\n1,5;2,5;x\n2,5;3,5;y\n",
    "tabs": 'a\tb\n1,2\t"x\ty"\n3,4\tz\n',
    "bars": "a|b|c\n1|2|3\n",
    "a null byte's neighbours": "a,b\n\x01,\x7f\n2,3\n",
    "Unicode line separators": "a,b\nx\u2028y,z\u0085w\n1,2\n",
    "a vertical tab and a form feed": "a,b\nx\x0by,z\x0cw\n1,2\n",
    "commas and more commas": 'a,b,c,d\n,,,1\n"",2,,\n',
}
DELIMITERS = {"semicolons": ";", "tabs": "\t", "bars": "|"}


def parse(text: str, **options: str) -> ParsedFile:
    settings = DataSettings.model_validate(options)
    lines = split_lines(text)
    return parse_delimited("t.csv", lines, guess_for(lines, settings), settings)


def cells_of(parsed: ParsedFile) -> list[list[str]]:
    return [list(row.cells.values()) for row in parsed.rows]


@pytest.mark.parametrize("name", SPECTRUM)
def test_cells_are_those_that_csv_and_pandas_read(name: str) -> None:
    text, delimiter = SPECTRUM[name], DELIMITERS.get(name, ",")
    header, *body = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    frame = pd.read_csv(io.StringIO(text, newline=""), sep=delimiter, dtype=str, keep_default_na=False)
    assert frame.to_numpy().tolist() == body, "csv and pandas disagree: not a case for this test"

    parsed = parse(text, csv_header="yes")

    assert (parsed.columns, cells_of(parsed), parsed.bad) == (header, body, [])


CELLS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=12)


@given(
    rows=st.integers(2, 5)
    .flatmap(lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=12))
    .filter(lambda rows: any(cell.strip() for row in rows for cell in row)),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
)
@settings(max_examples=300, deadline=None)
def test_what_a_csv_writer_writes_comes_back(rows: list[list[str]], delimiter: str, end: str, quoting: int) -> None:
    # Python 3.11's writer quotes only the line ends that it writes itself.
    foreign = set("\r\n") - set(end)
    assume(quoting == csv.QUOTE_ALL or not any(foreign.intersection(cell) for row in rows for cell in row))
    header = [f"column {number}" for number in range(len(rows[0]))]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([header, *rows])

    named = "tab" if delimiter == "\t" else delimiter
    parsed = parse(buffer.getvalue(), csv_delimiter=named, csv_quote='"', csv_header="yes")

    filled = [row for row in rows if any(cell.strip() for cell in row)]
    assert (parsed.columns, cells_of(parsed), parsed.bad) == (header, filled, [])


WORDS = st.text("abcdefghij KLM,;|\t\"'\n-0123456789.é", min_size=1, max_size=15).filter(lambda text: text.strip())


@given(
    rows=st.lists(st.lists(WORDS, min_size=3, max_size=3), min_size=4, max_size=20),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=300, deadline=None)
def test_the_dialect_of_a_csv_writer_is_found(rows: list[list[str]], delimiter: str, end: str) -> None:
    header = ["city", "country", "language"]
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator=end).writerows([header, *rows])

    parsed = parse(buffer.getvalue(), csv_header="yes")

    assert (parsed.columns, cells_of(parsed), parsed.bad) == (header, rows, [])


@given(text=st.text(st.sampled_from("ab,;\"'\n\r\t |#\\1"), max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_text_gives_each_line_to_a_row_a_fault_or_an_error(text: str) -> None:
    try:
        parsed = parse("first,second\n" + text)
    except DataError:
        return
    numbers = [row.line for row in [*parsed.rows, *parsed.bad, *parsed.passed_over]]
    assert len(numbers) == len(set(numbers))
    assert all(set(row.cells) == set(parsed.columns) for row in parsed.rows)
