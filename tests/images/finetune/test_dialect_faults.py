"""Delimited files whose quotes, backslashes, headers or code page are easily mistaken keep every cell."""

from __future__ import annotations

import csv
import io
import json

import pytest
from test_delimited import cells_of, parse

from finetune.data.encodings import decode


def written(rows: list[list[str]], delimiter: str = ",") -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


# --- backslashes -----------------------------------------------------------------------------------------------------

SPEECH = json.dumps([{"role": "user", "content": 'Say "x"'}, {"role": "assistant", "content": "x"}])
UNQUOTED = {
    "LaTeX": [["term", "markup"], *([f"term{n}", f"\\frac{{{n}}}{{2}}"] for n in range(99)), ["name", 'G\\"odel']],
    "C": [["prompt", "completion"], *([f"print {n}", 'printf(\\"%d\\\\n\\", i);'] for n in range(9))],
    "JSON": [["id", "messages"], *([str(n), SPEECH] for n in range(9))],
}


@pytest.mark.parametrize("name", UNQUOTED)
def test_a_backslash_in_an_unquoted_cell_is_text(name: str) -> None:
    header, *rows = UNQUOTED[name]

    parsed = parse("".join("\t".join(row) + "\n" for row in [header, *rows]))

    assert (parsed.columns, cells_of(parsed), parsed.bad) == (header, rows, [])


def test_a_backslash_before_a_doubled_quote_is_text() -> None:
    rows = [[str(n), ["plain text", '\\"', "don't", 'a "b"'][n % 4]] for n in range(60)]

    parsed = parse(written([["num", "text1"], *rows], "\t"))

    assert (cells_of(parsed), parsed.bad) == (rows, [])


def test_a_backslash_at_the_end_of_a_quoted_cell_is_text() -> None:
    rows = [[str(n), f"C:\\data, {n}\\", "x"] for n in range(9)]

    parsed = parse(written([["id", "path", "kind"], *rows]))

    assert (cells_of(parsed), parsed.bad) == (rows, [])


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (r'"he said \"no\", then left"', 'he said "no", then left'),
        (r'"he said \"no\""', 'he said "no"'),
        (r'"line one\nline \"two\""', r'line one\nline "two"'),
        (r'"\"C:\\temp\\\", I said"', '"C:\\temp\\", I said'),
        ('"a line\n\\"another\\", he said"', 'a line\n"another", he said'),
        (r'""', ""),
    ],
)
def test_escapes_are_undone_within_quotes_alone(cell: str, expected: str) -> None:
    text = "id,said,path\n" + "".join(f'{n},"\\"no{n}\\", then",C:\\temp\\d{n}\n' for n in range(9))

    parsed = parse(text + f"9,{cell},C:\\\\d\n")

    assert cells_of(parsed) == [
        *([str(n), f'"no{n}", then', f"C:\\temp\\d{n}"] for n in range(9)),
        ["9", expected, "C:\\\\d"],
    ]


def test_escapes_are_undone_where_a_blank_is_before_the_quote() -> None:
    parsed = parse('id, said\n1, "a \\"b\\", c"\n2, "d, \\"e\\""\n')

    assert cells_of(parsed) == [["1", 'a "b", c'], ["2", 'd, "e"']]


@pytest.mark.parametrize("name", ["messages", "text"])
def test_one_column_of_json_is_not_split(name: str) -> None:
    rows = [[json.dumps([{"role": "user", "content": f'What, say, does "word{n}" mean?'}])] for n in range(40)]

    parsed = parse(written([[name], *rows]))

    assert (parsed.columns, cells_of(parsed), parsed.bad) == ([name], rows, [])


# --- delimiters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_commas_of_decimals_do_not_separate(delimiter: str) -> None:
    rows = [["1,5", "2,5"], ["3,5", "4,25"], ["6,5", "7,75"], ["8,1", "9,9"]]
    text = "".join(delimiter.join(row) + "\n" for row in rows)

    assert cells_of(parse(text)) == rows
    named = parse(f"Länge, m{delimiter}Breite, m\n{text}")
    assert (named.columns, cells_of(named)) == (["Länge, m", "Breite, m"], rows)


def test_semicolons_within_cells_do_not_separate() -> None:
    parsed = parse("id,tags,name\n1,5;2,a\n2,6;3,b\n")

    assert cells_of(parsed) == [["1", "5;2", "a"], ["2", "6;3", "b"]]


# --- quotes ----------------------------------------------------------------------------------------------------------


def test_a_quoted_cell_of_a_bad_row_gives_no_rows() -> None:
    good = [f"{n},k{n % 3}\n" for n in range(300)]
    text = "id,kind\n" + "".join(good[:150]) + '77777,"first line\n88888,piece\nend",extra\n' + "".join(good[150:])

    parsed = parse(text)

    assert len(parsed.rows) == 300
    assert [(row.line, row.reason) for row in parsed.bad] == [(152, "wrong number of cells")]


def test_a_mistaken_quote_does_not_make_a_hundred_lines_a_cell() -> None:
    good = [f"{n},k{n % 3}\n" for n in range(300)]

    parsed = parse("id,kind\n" + "".join(good[:50]) + '777,"k1,x\n' + "".join(good[50:]) + '888,k1",x\n')

    assert len(parsed.rows) == 300


# --- headers ---------------------------------------------------------------------------------------------------------

IRIS = "5.1,3.5,1.4,0.2,setosa\n4.9,3.0,1.4,0.2,setosa\n7.0,3.2,4.7,1.4,versicolor\n6.3,3.3,6.0,2.5,virginica\n"
QUESTIONS = "What is your name?,How satisfied are you with our service?,What could be better?"
HEADERS = {
    "survey": f"Timestamp,{QUESTIONS}\n" + "".join(f"2024/01/{n} 10:00,N{n},very,More {n}.\n" for n in range(10, 30)),
    "dates": "place,Lat,Long,1/22/20,1/23/20\n" + "".join(f"C{n},{n}.5,-{n}.2,{n},{n + 2}\n" for n in range(9)),
    "ISO dates": "product,2023-01-01,2023-02-01\n" + "".join(f"p{n},{n},{n * 2}\n" for n in range(9)),
    "numbers": "store,1,2,3,4\n" + "".join(f"store {n},{n + 3},{n * 3},{n},{n + 2}\n" for n in range(9)),
    "an appended file": "city,food\nParis,bread\nRome,pasta\ncity,food\nGraz,cake\n",
    "a known name and the same word as a value": "prompt,completion\nword,text\nprompt,question\n",
}


@pytest.mark.parametrize("name", HEADERS)
def test_the_first_row_is_a_header(name: str) -> None:
    parsed = parse(HEADERS[name])

    assert parsed.columns == HEADERS[name].split("\n")[0].split(",")
    assert not parsed.warnings


@pytest.mark.parametrize(
    "text",
    [
        IRIS + IRIS.splitlines()[0] + "\n",
        "human,3,1\nanimal,4,0\nplant,5,1\n",
        "human,3\nanimal,4\nplant,5\n",
        "text,noun\nrun,verb\nuser,noun\nquery,noun\n",
        "Ann,2023-01-01,3\nBob,2023-02-01,4\nCy,2023-03-01,8\n",
        "What is 2+2?,Four\nWho wrote Faust?,Goethe\nWhere is Graz?,Austria\n",
        "How are you?,fine\nI am tired,ok\nIt rains,yes\nNo idea,well\n",
        "1,2,3,4,5\n2,3,4,5,6\n9,8,7,6,5\n",
    ],
)
def test_the_first_row_is_data(text: str) -> None:
    parsed = parse(text)

    assert cells_of(parsed) == [line.split(",") for line in text.splitlines()]
    assert not parsed.passed_over


def test_a_comment_as_wide_as_the_table_is_no_header() -> None:
    body = "".join(f"{n},n{n}\n" for n in range(30))

    parsed = parse("# export of crm, v2\nid,name\n" + body)

    assert (parsed.columns, len(parsed.rows)) == (["id", "name"], 30)
    assert [row.line for row in parsed.passed_over] == [1]
    assert parse("# id,name\n" + body).columns == ["# id", "name"]
    assert parse("# first name,number\n" + "".join(f"n{n},{n}\n" for n in range(30))).columns[1] == "number"


# --- encodings -------------------------------------------------------------------------------------------------------

NAMES = ["Müller", "Jörg", "José", "François", "Zoë", "Señora"]
FEW_ACCENTS = {
    "names": "".join(f"{n},{NAMES[n // 200] if n % 200 == 7 else f'name {n}'}\n" for n in range(1200)),
    "apostrophes": "".join(f"{n},{'I don’t like it' if n % 150 == 7 else f'A fine film {n}.'}\n" for n in range(1200)),
}


@pytest.mark.parametrize("name", FEW_ACCENTS)
def test_a_code_page_is_found_by_few_lines(name: str) -> None:
    decoded = decode("t.csv", FEW_ACCENTS[name].encode("cp1252"), None)

    assert (decoded.text, decoded.encoding, decoded.is_damaged) == (FEW_ACCENTS[name], "cp1252", False)


@pytest.mark.parametrize("name", FEW_ACCENTS)
def test_utf_8_with_a_few_bad_lines_stays_utf_8(name: str) -> None:
    decoded = decode("t.csv", FEW_ACCENTS[name].encode("cp1252") + "1200,é\n".encode(), None)

    assert (decoded.encoding, decoded.is_damaged) == ("utf-8", True)
