"""`finetune check`: one report on standard output, or one sentence on standard error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nasty
import pytest
from nasty_json import CHAT_FILES, JSON_FILES
from nasty_others import OTHER_KINDS, TEXT_FILES
from nasty_tables import COMPRESSED, DELIMITED, ENCODINGS, LONG_LINES
from survey import write_survey

from finetune.data.check import run


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = check(capsys, *arguments, "--json")
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


CASES = [*DELIMITED, *ENCODINGS, *LONG_LINES, *COMPRESSED, *JSON_FILES, *CHAT_FILES, *TEXT_FILES, *OTHER_KINDS]


def test_the_report_for_a_person_shows_template_roles_and_five_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = check(capsys, str(write_survey(tmp_path / "survey.csv", rows=3000)))
    assert (code, err) == (0, "")
    assert "asked: Units: decided by Variable_code (100% of the rows)" in out
    assert "asked: Value: memorisation: nothing predicts it" in out
    assert '{% block known %}Year: {{ row["Year"] }}' in out
    assert "sample 5" in out and "sample 6" not in out


def test_json_is_one_object_and_nothing_else_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(capsys, str(write_survey(tmp_path / "survey.csv", rows=500)))
    assert {"format", "encoding", "columns", "rows", "kept", "dropped", "records"} <= report.keys()
    assert (report["kept"], report["questions"]) == (500, 3000)


def test_what_is_written_is_what_check_reads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    survey, records = write_survey(tmp_path / "survey.csv", rows=500), tmp_path / "records.jsonl"
    report = report_of(capsys, str(survey), "--write", str(records))
    again = report_of(capsys, str(records))
    assert (again["records"], again["kept"], again["dropped"]) == ("messages", report["questions"], {})


def test_the_data_itself_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    survey = write_survey(tmp_path / "survey.csv", rows=50)
    before = survey.read_bytes()
    code, out, err = check(capsys, str(survey), "--write", str(survey))
    assert (code, out) == (2, "") and "is an input file" in err
    assert survey.read_bytes() == before


def test_several_files_may_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(f"prompt,completion\n{name},x\n")
    report = report_of(capsys, str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    assert [file["name"] for file in report["files"]] == ["a.csv", "b.csv"]


def test_a_file_named_after_a_test_set_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(f"prompt,completion\n{name},x\n")
    assert "suggests a test set: test.csv" in report_of(capsys, str(tmp_path))["warnings"][0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no data is given"),
        (("nowhere.csv",), "no such file or folder"),
        (("x.csv", "--colour", "red"), "unknown flag '--colour'"),
        (("x.csv", "--on-bad-row", "maybe"), "--on-bad-row"),
        (("x.csv", "--validation-split", "2"), "--validation-split"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = check(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_fault_of_the_check_itself_is_a_sentence_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr("finetune.data.check.load", fail)
    code, out, err = check(capsys, str(tmp_path))
    assert (code, out) == (2, "")
    assert "Traceback" not in err and "please report" in err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_each_file_is_read_rightly_or_refused_in_one_sentence(
    case: nasty.Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.content)
    written = tmp_path / "written.out"

    code, out, err = check(capsys, str(path), "--json", "--write", str(written), *case.arguments)

    if isinstance(case.outcome, nasty.Refused):
        assert (code, out) == (2, ""), out
        assert err.count("\n") == 1 and "Traceback" not in err and "cannot be checked" not in err, err
        assert err.startswith("error: ") and all(part in err for part in case.outcome.says), err
        return
    assert code == 0, err
    report = json.loads(out)
    assert {name: report[name] for name in case.outcome.fields} == case.outcome.fields
    for reason, places in case.outcome.dropped.items():
        assert report["dropped"].get(reason) == places, report["dropped"]
    if case.outcome.warns is not None:
        assert case.outcome.warns in " ".join(report["warnings"])
    if case.outcome.writes is not None:
        lines = [json.loads(line) for line in written.read_text().splitlines()]
        assert sorted(lines, key=repr) == sorted(case.outcome.writes, key=repr)
