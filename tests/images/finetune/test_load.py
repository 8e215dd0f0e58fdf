"""From a folder to two sides of a split: files, duplicates, groups, and the identity of it all."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from estiba.errors import ConfigError, DataError
from finetune.data import Dataset, DataSettings, load

PAIRS = "prompt,completion\na,b\nc,d\n"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(side: list[Any]) -> list[str]:
    return [record.text or record.prompt or record.messages[0]["content"] for record in side]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_with_its_subfolders_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "two.csv.gz").write_bytes(gzip.compress(b"prompt,completion\ne,f\n"))
    (tmp_path / "a.csv").write_text(PAIRS)
    write_lines(
        tmp_path / "z.jsonl",
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}],
    )
    dataset = load(tmp_path, DataSettings(validation_split=0))
    assert [record.source for record in dataset.train] == ["a.csv:2", "a.csv:3", "b/deep/two.csv.gz:2", "z.jsonl:1"]
    report = dataset.report.as_json()
    assert report["format"] == ["csv", "jsonl"]
    assert report["records"] == ["prompt-completion", "messages"]
    assert [file["rows"] for file in report["files"]] == [2, 1, 1]


def test_hidden_files_and_companions_are_counted_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(PAIRS)
    for name in (".DS_Store", "_SUCCESS", "README.md", "LICENSE", "dataset_info.json", "load.py"):
        (tmp_path / name).write_text("no data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "more.csv").write_text(PAIRS)
    dataset = load(tmp_path, DataSettings())
    assert dataset.report.kept == 2
    assert "skipped 2 hidden files" in dataset.report.notes
    assert any(note.startswith("skipped, not data: LICENSE, README.md") for note in dataset.report.notes)


def test_a_companion_that_is_given_by_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("A text to train on.\n")
    assert load(tmp_path / "README.md", DataSettings()).report.kept == 1


def test_several_files_are_read_once_each(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PAIRS)
    (tmp_path / "b.csv").write_text("prompt,completion\nx,y\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "a.csv")
    dataset = load([tmp_path / "a.csv", tmp_path, tmp_path / "b.csv"], DataSettings(validation_split=0))
    assert (len(dataset.report.files), dataset.report.kept) == (2, 3)


def test_files_of_the_same_name_keep_their_paths(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.csv").write_text(f"prompt,completion\n{folder},x\n")
    dataset = load([tmp_path / "one" / "a.csv", tmp_path / "two" / "a.csv"], DataSettings())
    assert {record.source for record in dataset} == {"a.csv:2", f"{tmp_path}/two/a.csv:2"}


def test_tables_with_the_same_columns_are_one_table(tmp_path: Path) -> None:
    for part in range(3):
        rows = "".join(f"{part}{n},C{n % 3},K{n % 3}\n" for n in range(20))
        (tmp_path / f"part{part}.csv").write_text("serial,city,country\n" + rows)
    report = load(tmp_path, DataSettings()).report
    assert len(report.tables) == 1
    assert report.kept == 60


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere", "no such file or folder"), ("empty", "the folder is empty"), ("link", "cannot be read")],
)
def test_a_place_without_data_is_named(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises((ConfigError, DataError), match=says):
        load(tmp_path / name, DataSettings())


def test_one_empty_file_among_others_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PAIRS)
    (tmp_path / "b.csv").write_text("")
    with pytest.raises(DataError, match=r"^b.csv: is empty"):
        load(tmp_path, DataSettings())


def test_a_file_that_expands_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.files.BOMB_BYTES", 10_000)
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"\n" * 10_000_000))
    with pytest.raises(DataError, match=r"bomb.csv.gz: .* bytes expand to more than"):
        load(tmp_path, DataSettings())


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "real")
    (tmp_path / "data/again").symlink_to(tmp_path / "data")
    (tmp_path / "real/up").symlink_to(tmp_path / "data")
    assert load(tmp_path / "data", DataSettings()).report.kept == 1


def test_a_link_to_itself_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    with pytest.raises(DataError, match=r"loop\.csv: cannot be read .*check the file or link"):
        load(tmp_path, DataSettings())


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "locked").mkdir()
    listed = os.scandir

    def deny(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match=r"locked: cannot be read .Permission denied."):
        load(tmp_path, DataSettings())


def test_an_empty_marker_of_a_folder_in_s3_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "train_$folder$").touch()
    assert load(tmp_path, DataSettings()).report.kept == 1


def test_a_wrong_content_type_is_ignored_with_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PAIRS)
    dataset = load(tmp_path, DataSettings(), content_type="application/jsonlines")
    assert any("says 'application/jsonlines', the content is csv" in warning for warning in dataset.report.warnings)
    assert not load(tmp_path, DataSettings(validation_split=0), content_type="text/csv").report.warnings


# --- bad rows over all files -----------------------------------------------------------------------------------------


def test_one_percent_of_bad_rows_is_skipped_and_more_is_refused(tmp_path: Path) -> None:
    good = "".join(f"question {n},answer {n}\n" for n in range(198))
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{good}bad\nbad too,\n")
    dataset = load(tmp_path, DataSettings())
    assert dataset.report.dropped == {"wrong number of cells": ["a.csv:200"], "empty answer": ["a.csv:201"]}
    (tmp_path / "b.csv").write_text("prompt,completion\nbad\n")
    with pytest.raises(DataError, match=r"a.csv:200: .*; a.csv:201: .*; b.csv:2: .*3 of 201 rows"):
        load(tmp_path, DataSettings())


def test_fail_names_the_first_bad_row(tmp_path: Path) -> None:
    good = "".join(f"question {n},answer {n}\n" for n in range(500))
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{good},no question\nonly one\n")
    with pytest.raises(DataError, match=r"^a.csv:502: .*prompt is empty"):
        load(tmp_path, DataSettings(on_bad_row="fail"))


def test_no_row_left_is_an_error_whatever_the_setting(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na,\nb,\n")
    with pytest.raises(DataError, match="no row of the data can be used"):
        load(tmp_path, DataSettings(on_bad_row="skip"))


# --- split -----------------------------------------------------------------------------------------------------------


def test_the_same_prompt_is_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n % 50}", "completion": f"Answer {n}"} for n in range(500)]
    dataset = load(write_lines(tmp_path / "a.jsonl", rows), DataSettings(validation_split=0.2))
    assert len(dataset.validation) == 100
    assert not set(texts(dataset.train)) & set(texts(dataset.validation))


def sentences(seed: int, count: int) -> str:
    words = random.Random(seed)
    return " ".join(f"w{words.randrange(10_000)}" for _ in range(count))


def pieces_on_both_sides(dataset: Dataset, documents: list[str]) -> int:
    def touched(side: list[Any]) -> set[int]:
        return {n for n, document in enumerate(documents) for text in texts(side) if text[-60:] in document}

    return len(touched(dataset.train) & touched(dataset.validation))


def test_overlapping_pieces_of_a_document_stay_together(tmp_path: Path) -> None:
    documents = [sentences(seed, 800) for seed in range(30)]
    rows = [{"text": document[at : at + 900]} for document in documents for at in range(0, len(document) - 900, 450)]
    dataset = load(write_lines(tmp_path / "a.jsonl", rows), DataSettings(validation_split=0.2))
    assert dataset.validation
    assert pieces_on_both_sides(dataset, documents) == 0


def test_questions_about_the_same_passage_stay_together(tmp_path: Path) -> None:
    documents = [sentences(seed, 100) for seed in range(40)]
    rows = [
        {"question": f"What is number {n}?", "context": document, "answer": f"It is {n}"}
        for document in documents
        for n in range(5)
    ]
    dataset = load(write_lines(tmp_path / "a.jsonl", rows), DataSettings(validation_split=0.2))
    assert len(dataset.validation) == 40
    assert pieces_on_both_sides(dataset, documents) == 0


def test_a_form_of_words_in_all_prompts_joins_nothing(tmp_path: Path) -> None:
    frame = "Below is an instruction that describes a task. Write a response that completes the request. " * 3
    rows = [{"prompt": f"{frame}{sentences(n, 5)}", "completion": "Yes"} for n in range(300)]
    dataset = load(write_lines(tmp_path / "a.jsonl", rows), DataSettings(validation_split=0.1))
    assert len(dataset.validation) == 30


def test_pieces_with_the_same_document_id_stay_together(tmp_path: Path) -> None:
    rows = [{"doc_id": f"d{n % 40}", "text": f"Piece {n} says little."} for n in range(400)]
    dataset = load(write_lines(tmp_path / "a.jsonl", rows), DataSettings(validation_split=0.2))
    number = {record.source: int(record.text.split()[1]) % 40 for record in dataset}
    sides = [{number[record.source] for record in side} for side in (dataset.train, dataset.validation)]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_a_document_is_cut_into_records_of_one_group_without_loss(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {n} " + sentences(n, 40) for n in range(50)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "b.txt").write_text("Another text.\n\nIts end.\n")
    dataset = load(tmp_path, DataSettings(text_chunk_chars=1000, validation_split=0.2))
    sides = [{record.source.partition(":")[0] for record in side} for side in (dataset.train, dataset.validation)]
    assert sorted(sides, key=sorted) == [{"a.txt"}, {"b.txt"}]
    pieces = [record.text for record in dataset if record.source.startswith("a.txt")]
    assert max(map(len, pieces)) <= 1000
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)


def test_one_group_alone_is_all_trained_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    dataset = load(tmp_path, DataSettings())
    assert (len(dataset.train), dataset.validation) == (1, [])
    assert "no record is held out" in dataset.report.warnings[0]


def test_two_records_give_one_to_each_side(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PAIRS)
    dataset = load(tmp_path, DataSettings())
    assert (len(dataset.train), len(dataset.validation)) == (1, 1)


def test_the_split_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(200)]
    first = load(write_lines(tmp_path / "a.jsonl", rows), DataSettings())
    second = load(write_lines(tmp_path / "b.jsonl", rows[::-1]), DataSettings())
    assert set(texts(first.validation)) == set(texts(second.validation))
    other_seed = load(tmp_path / "a.jsonl", DataSettings(seed=7))
    assert set(texts(first.validation)) != set(texts(other_seed.validation))


def test_a_larger_sample_contains_a_smaller_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(300)])
    small, large = (load(path, DataSettings(max_records=count)) for count in (20, 60))
    assert len(list(small)) == 20
    assert set(texts(list(small))) < set(texts(list(large)))


# --- identity -------------------------------------------------------------------------------------------------------


def test_the_identity_follows_the_content_and_the_settings_that_change_the_records(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "a.csv").write_text(PAIRS)
    (tmp_path / "two" / "renamed.csv").write_text(PAIRS)
    base = load(tmp_path / "one", DataSettings()).identity
    assert load(tmp_path / "two", DataSettings()).identity == base
    assert load(tmp_path / "one", DataSettings(on_bad_row="skip")).identity == base
    assert load(tmp_path / "one", DataSettings(seed=1)).identity != base
    (tmp_path / "one" / "a.csv").write_text(PAIRS.replace("b", "B"))
    assert load(tmp_path / "one", DataSettings()).identity != base


def test_the_identity_follows_the_text_of_the_template(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("city,country\nLyon,France\nGraz,Austria\n")
    template = tmp_path / "row.jinja"
    identities = set()
    for source in ("{{ city }}", "{{ country }}"):
        template.write_text(source)
        identities.add(load(tmp_path / "a.csv", DataSettings(template=str(template))).identity)
    assert len(identities) == 2
