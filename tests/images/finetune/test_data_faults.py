"""Input that was altered, refused or reported wrongly: each kind stays as it is written, with the right place."""

from __future__ import annotations

import decimal
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.check import run

PAIRS = [{"prompt": f"What is {number} plus {number}?", "completion": str(2 * number)} for number in range(200)]
LINES = "".join(json.dumps(pair) + "\n" for pair in PAIRS)


class Checker:
    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def path(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def report(self, name: str, content: str | bytes, *arguments: str) -> dict[str, Any]:
        code, out, err = self.run(self.path(name, content), "--json", *arguments)
        assert code == 0, err
        report: dict[str, Any] = json.loads(out)
        return report

    def written(self, name: str, content: str | bytes, *arguments: str) -> list[dict[str, Any]]:
        records = self.folder / "written.jsonl"
        self.report(name, content, "--validation-split", "0", "--write", str(records), *arguments)
        return [json.loads(line) for line in records.read_text().splitlines()]


@pytest.fixture
def checker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Checker:
    return Checker(tmp_path, capsys)


def parquet(path: Path, **columns: Any) -> bytes:
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


# --- --write ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["in the folder", "hard link", "symbolic link", "new", "in a linked folder"])
def test_no_input_of_a_folder_is_written_over(checker: Checker, kind: str) -> None:
    data = checker.path("wf/data.jsonl", LINES)
    target = data
    if kind == "hard link":
        target = checker.folder / "other.jsonl"
        os.link(data, target)
    elif kind == "symbolic link":
        target = checker.folder / "link.jsonl"
        target.symlink_to(data)
    elif kind == "new":
        target = data.with_name("new.jsonl")
    elif kind == "in a linked folder":
        outside = checker.path("outside/more.jsonl", LINES)
        (data.parent / "linked").symlink_to(outside.parent)
        target = outside
    code, out, err = checker.run(data.parent, "--write", target)
    assert (code, out) == (2, "") and "--write" in err
    assert data.read_text() == LINES
    assert target.exists() == (kind != "new")


# --- text and numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (
            pa.array([decimal.Decimal("0"), decimal.Decimal("0.0000001")], pa.decimal128(38, 10)),
            "0.0000000000 0.0000001000",
        ),
        (pa.array([491701234567.0, None, 12.0]), "491701234567 12"),
        (pa.array([1e300, 1.5]), "1e+300 1.5"),
        (pa.array([float("inf"), 1.5, float("-inf")]), "Infinity 1.5 -Infinity"),
        (pa.array([[0.1, 2.0]], pa.list_(pa.float32())), "[0.1, 2.0]"),
        (pa.array([{"a": 0.1}], pa.struct([("a", pa.float32())])), '{"a": 0.1}'),
        (pa.array([[("k", 0.1)]], pa.map_(pa.string(), pa.float32())), '{"k": 0.1}'),
    ],
    ids=["decimal", "integers with a gap", "large", "infinite", "list", "struct", "map"],
)
def test_numbers_of_parquet_keep_their_digits(checker: Checker, array: Any, expected: str) -> None:
    prompts = [f"Question {index}?" for index in range(len(array))]
    data = parquet(checker.folder / "n.parquet", prompt=prompts, completion=array)
    found = [line["completion"] for line in checker.written("n.parquet", data, "--on-bad-row", "skip")]
    assert " ".join(sorted(found)) == " ".join(sorted(expected.split(" "))) or found == [expected]


def test_infinity_is_no_empty_cell(checker: Checker) -> None:
    lines = '{"prompt": "a", "completion": Infinity}\n{"prompt": "b", "completion": -Infinity}\n'
    assert {line["completion"] for line in checker.written("d.jsonl", lines)} == {"Infinity", "-Infinity"}


def test_blank_lines_of_a_document_stay(checker: Checker) -> None:
    code = "import os\n\n\ndef f():\n    return 1\n\n\n\n\nprint(f())"
    assert checker.written("code.txt", f"\n\n\n{code}\n\n\n") == [{"text": code}]


def test_indentation_of_code_stays(checker: Checker) -> None:
    row = {"instruction": "    if x:\n        y()", "input": "    z = 1\n    w = 2", "output": "    pass"}
    (line,) = checker.written("d.jsonl", json.dumps(row) + "\n")
    assert [message["content"] for message in line["messages"]] == [
        f"{row['instruction']}\n\n{row['input']}",
        "    pass",
    ]


def test_a_cell_of_several_lines_keeps_its_indentation(checker: Checker) -> None:
    table = "name,code\n" + "".join(f'n{n},"    a = {n % 3}\n    b = {n % 3}\n"\n' for n in range(9))
    lines = checker.written("t.csv", table, "--target-columns", "code", "--key-columns", "name")
    assert {line["messages"][-1]["content"] for line in lines} == {f"    a = {n}\n    b = {n}" for n in range(3)}


def test_keys_that_differ_in_a_blank_are_two(checker: Checker) -> None:
    report = checker.report("d.jsonl", '{"a": 1, "a ": 2, "b": "x"}\n{"a": 2, "a ": 3, "b": "y"}\n')
    assert report["columns"] == ["a", "a ", "b"]


def test_what_a_conversation_has_and_is_not_trained_is_noted(checker: Checker) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", "reasoning_content": "They greet."},
    ]
    notes = " ".join(
        checker.report("c.jsonl", json.dumps({"messages": messages, "system": "Be long."}) + "\n")["notes"]
    )
    assert "'reasoning_content' is not trained (1 row)" in notes
    assert "a system column beside a system message is not trained (1 row)" in notes


# --- messages or not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    ['[{"from": "Paris", "to": "Rome"}]', '[{"role": "user", "content": "x"}]'],
    ids=["flights", "messages as text"],
)
def test_an_answer_that_is_json_text_is_text(checker: Checker, answer: str) -> None:
    rows = [{"prompt": f"Extract flight {n}", "completion": answer} for n in range(8)]
    written = checker.written("d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert sorted(line["completion"] for line in written) == [answer] * 8
    rows = [{"instruction": f"Extract flight {n}", "output": answer} for n in range(8)]
    written = checker.written("e.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [line["messages"][-1]["content"] for line in written] == [answer] * 8


@pytest.mark.parametrize("field", ["value", "content"])
def test_payments_and_emails_are_no_conversation(checker: Checker, field: str) -> None:
    rows = [{"from": f"acc{n % 4}", "to": f"acc{n}", field: f"v{n % 3}"} for n in range(20)]
    assert checker.report("tx.json", json.dumps(rows))["rows"] == 20


# --- JSON or not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("refs.txt", "[1] Smith, A. (2001). On whales. Oxford.\n[2] Jones, B. (2003). On ships. Leeds.\n"),
        ("a.log", "[2024-01-01 10:00:00] INFO started\n[2024-01-01 10:00:01] INFO stopped\n"),
        ("wiki.txt", "[[File:Foo.jpg|thumb]]\nThe foo is a bird of the north.\n"),
        ("novel.txt", '["Hello," said Ann, and closed the door.]\nThen she went away.\n'),
    ],
)
def test_text_that_begins_with_a_bracket_is_text(checker: Checker, name: str, text: str) -> None:
    assert checker.report(name, text)["records"] == "text"


def test_a_list_that_is_cut_off_is_no_text(checker: Checker) -> None:
    for text in ('[{"prompt": "a", "completion": "b"}, {"pro', '[["prompt", "completion"], ["a", "b"], ["c'):
        code, _, err = checker.run(checker.path("d.txt", text))
        assert code == 2 and "cut off" in err


@pytest.mark.parametrize("first", ["undefined", "# made by x, today", "Downloading data..."])
def test_a_first_line_that_is_no_json_is_one_bad_row(checker: Checker, first: str) -> None:
    report = checker.report("d.jsonl", f"{first}\n{LINES}")
    assert (report["format"], report["kept"], report["dropped"]) == ("jsonl", 200, {"not JSON": ["d.jsonl:1"]})


# --- other kinds of files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["ORCID", "ID3", "PAR1", "FEA1", "GGUF"])
def test_a_header_that_begins_as_a_binary_file_does(checker: Checker, first: str) -> None:
    table = f"{first},name,field\n" + "".join(f"x{n},n{n % 5},f{n % 5}\n" for n in range(40))
    assert checker.report("t.csv", table)["columns"] == [first, "name", "field"]


@pytest.mark.parametrize("suffix", ["xml", "sql", "jsonl", "parquet"])
def test_a_table_under_a_false_name_is_read_with_a_warning(checker: Checker, suffix: str) -> None:
    report = checker.report(f"t.{suffix}", "id,name,kind\n" + "".join(f"{n},n{n % 5},k{n % 5}\n" for n in range(40)))
    assert report["format"] == "csv"
    assert any(f"the suffix says {suffix}, the content is csv" in warning for warning in report["warnings"])


@pytest.mark.parametrize("suffix", ["yml", "sql", "toml"])
def test_what_is_no_table_is_still_refused_by_its_suffix(checker: Checker, suffix: str) -> None:
    text = {
        "yml": "a: b, c\n" * 9,
        "sql": "INSERT INTO t VALUES (1, 'a', 'b');\n" * 9,
        "toml": "a = [1, 2, 3]\n" * 9,
    }[suffix]
    code, _, err = checker.run(checker.path(f"t.{suffix}", text))
    assert code == 2 and "which is not read" in err


def test_other_formats_under_a_false_name_warn(checker: Checker) -> None:
    assert "the content is jsonl" in checker.report("a.csv", LINES)["warnings"][0]
    data = parquet(checker.folder / "p", prompt=["a", "b"], completion=["c", "d"])
    assert "the content is parquet" in checker.report("b.csv", data)["warnings"][0]


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    ["body,mass,radius", "document,amount,currency", "accepted_on,rejected_on,officer"],
)
def test_a_table_is_not_taken_for_text_or_preferences(checker: Checker, header: str) -> None:
    rows = "".join(f"INV-{n:04},2024-01-{n % 28 + 1:02},EUR{n % 3}\n" for n in range(60))
    assert checker.report("t.csv", f"{header}\n{rows}")["records"] == "table"


@pytest.mark.parametrize("sentence", ["A film about the number {}.", "東京は日本の首都です{}"])
def test_a_column_of_sentences_beside_others_is_text(checker: Checker, sentence: str) -> None:
    rows = "".join(f"{sentence.format(n)},author {n % 3}\n" for n in range(30))
    assert checker.report("t.csv", f"body,author\n{rows}")["records"] == "text"


# --- surrogates and places --------------------------------------------------------------------------------------------


def test_half_of_a_surrogate_pair_in_a_table_is_a_bad_row(checker: Checker) -> None:
    good = [{"a": f"x{n}", "b": str(n % 5)} for n in range(200)]
    text = '{"a": "x\\ud800", "b": "1"}\n' + "".join(json.dumps(row) + "\n" for row in good)
    assert checker.report("d.jsonl", text)["dropped"]["not UTF-8"] == ["d.jsonl:1"]
    array = '[{"a": "x\\ud800", "b": "1"}, ' + json.dumps(good)[1:]
    assert checker.report("d.json", array)["dropped"] == {"not UTF-8": ["d.json:1"]}


@pytest.mark.parametrize("embedded", [False, True])
def test_half_of_a_surrogate_pair_in_a_tool_call_is_a_bad_row(checker: Checker, embedded: bool) -> None:
    arguments: Any = {"a": "x\ud800"}
    call = {"function": {"name": "f", "arguments": json.dumps(arguments) if embedded else arguments}}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    ]
    rows += [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(200)
    ]
    report = checker.report("c.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert (report["kept"], report["dropped"]) == (200, {"not UTF-8": ["c.jsonl:1"]})


def test_a_bad_line_among_trailing_commas_and_blank_lines_has_its_number(checker: Checker) -> None:
    lines = [json.dumps(pair) for pair in PAIRS]
    lines[50] = '{"prompt": "x", "completion": ""}'
    assert checker.report("d.jsonl", ",\n\n".join(lines) + ",\n")["dropped"] == {"empty answer": ["d.jsonl:101"]}


def test_a_key_twice_in_an_array_is_one_bad_row(checker: Checker) -> None:
    twice = '{"prompt": "x", "completion": "a", "completion": "b"}'
    report = checker.report("d.json", json.dumps(PAIRS)[:-1] + f", {twice}]")
    assert (report["kept"], report["dropped"]) == (200, {"duplicate key": ["d.json:201"]})
    code, _, err = checker.run(checker.path("e.json", '{"data": [{"a": 1}], "data": [{"a": 2}]}'))
    assert code == 2 and "the key 'data' is duplicated" in err


def test_files_of_one_name_in_two_folders_are_told_apart(checker: Checker) -> None:
    folders = [checker.path(f"{name}/a.jsonl", LINES + LINES[:60]).parent for name in ("two1", "two2")]
    code, out, err = checker.run(*folders, "--json", "--on-bad-row", "skip")
    assert code == 0, err
    assert [file["name"] for file in json.loads(out)["files"]] == ["a.jsonl", f"{folders[1]}/a.jsonl"]
