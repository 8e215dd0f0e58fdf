"""A table's questions: which columns are asked for, which are stated, and what the template makes of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from survey import COLUMNS, ROWS, write_survey

from estiba.errors import ConfigError, DataError
from finetune.data import Dataset, DataSettings, load
from finetune.data.template import MAX_RENDERED_CHARS, SYSTEM_LINE, ColumnTemplate, RowTemplate


def load_table(folder: Path, text: str, **settings: Any) -> Dataset:
    path = folder / "table.csv"
    path.write_text(text)
    return load(path, DataSettings(**settings))


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = write_survey(tmp_path_factory.mktemp("survey") / "survey.csv")
    return load(path, DataSettings())


def test_the_survey_is_asked_for_what_its_codes_decide_and_for_the_value(survey: Dataset) -> None:
    [table] = survey.report.tables
    assert table.key_columns == ["Year", "Industry_code_NZSIOC", "Variable_code"]
    assert table.target_columns == [
        "Industry_aggregation_NZSIOC",
        "Industry_name_NZSIOC",
        "Units",
        "Variable_name",
        "Variable_category",
        "Value",
    ]
    assert table.memorisation_columns == ["Value"]
    assert table.decided_by["Units"] == "Variable_code"
    assert table.decided_by["Industry_aggregation_NZSIOC"] == "Industry_code_NZSIOC"
    assert table.predictability["Units"] == 1.0
    assert table.predictability["Value"] < 0.1


@pytest.mark.parametrize(
    ("keys", "decides_units"),
    [(("Year", "Industry_name_NZSIOC", "Variable_name"), "Variable_name"), (("Year", "Industry_code_NZSIOC"), None)],
)
def test_a_column_is_decided_by_what_the_question_states(
    tmp_path: Path, keys: tuple[str, ...], decides_units: str | None
) -> None:
    path = write_survey(tmp_path / "survey.csv", rows=2_000)
    [table] = load(path, DataSettings(key_columns=keys, target_columns=("Units", "Value"))).report.tables
    assert table.decided_by.get("Units") == decides_units


def test_every_row_of_the_survey_is_kept(survey: Dataset) -> None:
    assert (survey.report.rows, survey.report.kept, survey.report.dropped) == (ROWS, ROWS, {})
    assert len(survey.validation) == round(0.05 * ROWS)
    assert survey.report.files[0].columns == list(COLUMNS)


def test_no_question_of_the_survey_is_asked_on_both_sides(survey: Dataset) -> None:
    def facts(side: str) -> set[tuple[str, str]]:
        return {(record.known, question.text) for record in getattr(survey, side) for question in record.questions}

    assert not facts("train") & facts("validation")


def test_thousands_and_suppressed_values_stay_the_text_that_they_are(survey: Dataset) -> None:
    answers = {question.answer for record in survey for question in record.questions if question.column == "Value"}
    assert {"S", "C"} < answers
    assert any("," in answer for answer in answers)


def test_the_template_that_the_report_shows_makes_the_records(survey: Dataset) -> None:
    template = RowTemplate("shown", survey.report.tables[0].template)
    row = {column: f"<{column}> & 'quoted'" for column in COLUMNS}
    default = ColumnTemplate(survey.report.tables[0].key_columns, [])
    assert template.known(row) == default.known(row)
    assert template.system(row) == default.system(row) == SYSTEM_LINE
    assert template.question(row, "Units") == default.question(row, "Units") == "Units:"
    assert template.answer(row, "Units") == default.answer(row, "Units") == row["Units"]


@pytest.mark.parametrize(
    "key", ['a "quoted" name', "{{ braces }}", "{% tag %}", "{# comment #}", "back\\slash", "two\nlines"]
)
@pytest.mark.parametrize("cell", ["plain", "", "{{ 7 * 7 }}", "{% raw %}"])
def test_names_and_cells_are_never_read_as_jinja(key: str, cell: str) -> None:
    default = ColumnTemplate([key, "other"], with_gaps=[key])
    row = {key: cell, "other": "x"}
    assert RowTemplate("shown", default.source).known(row) == default.known(row)
    assert cell in default.known(row)


def test_a_row_gives_one_line_per_question(tmp_path: Path) -> None:
    text = "city,country\n" + "".join(f"{c}\n" for c in ["Lyon,France", "Nice,France", "Graz,Austria"] * 2)
    dataset = load_table(tmp_path, text, key_columns=("city",), target_columns=("country",), validation_split=0)
    assert dataset.train[0].as_json() == [
        {
            "messages": [
                {"role": "system", "content": SYSTEM_LINE},
                {"role": "user", "content": "city: Lyon\ncountry:"},
                {"role": "assistant", "content": "France"},
            ]
        }
    ]
    assert dataset.report.dropped == {"exact duplicate": ["table.csv:5", "table.csv:6", "table.csv:7"]}


def test_an_empty_target_leaves_out_its_question_alone(tmp_path: Path) -> None:
    dataset = load_table(
        tmp_path, "k,a,b\n1,x,\n2,y,z\n", key_columns=("k",), target_columns=("a", "b"), validation_split=0
    )
    assert [[question.column for question in record.questions] for record in dataset.train] == [["a"], ["a", "b"]]


def test_a_row_without_any_answer_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"table.csv:3: empty: a; fill"):
        load_table(tmp_path, "k,a\n1,x\n2,\n3,y\n", key_columns=("k",), target_columns=("a",))


def test_an_empty_key_has_no_line(tmp_path: Path) -> None:
    dataset = load_table(
        tmp_path, "k,l,a\n1,p,x\n2,,y\n", key_columns=("k", "l"), target_columns=("a",), validation_split=0
    )
    assert [record.known for record in dataset.train] == ["k: 1\nl: p", "k: 2"]


def test_rows_that_the_keys_do_not_distinguish_are_reported(tmp_path: Path) -> None:
    dataset = load_table(tmp_path, "k,a\n1,x\n1,y\n2,z\n", key_columns=("k",), target_columns=("a",))
    assert "1 question has more than one answer (such as table.csv:3)" in dataset.report.warnings[0]


def test_records_of_the_same_key_stay_on_one_side(tmp_path: Path) -> None:
    text = "k,l,a\n" + "".join(f"{number % 20},{number},{number % 7}\n" for number in range(400))
    dataset = load_table(tmp_path, text, key_columns=("k",), target_columns=("a",), validation_split=0.2)
    assert dataset.validation
    assert not {record.known for record in dataset.train} & {record.known for record in dataset.validation}


def test_facts_asked_on_both_sides_of_a_given_group_are_held_out_of_validation(tmp_path: Path) -> None:
    text = "year,city,country,price\n" + "".join(
        f"{year},C{n},K{n % 5},{year * n}\n" for year in range(2000, 2010) for n in range(1, 30)
    )
    settings = {"key_columns": ("city",), "target_columns": ("country", "price"), "validation_split": 0.2}
    dataset = load_table(tmp_path, text, group_by="year", **settings)
    assert len(dataset.validation) == 2 * 29
    assert {question.column for record in dataset.validation for question in record.questions} == {"price"}


def test_groups_stay_together(tmp_path: Path) -> None:
    text = "shop,item,price\n" + "".join(f"S{n % 10},I{n},{n * 37 % 101}.5\n" for n in range(200))
    dataset = load_table(
        tmp_path, text, group_by=" Shop", key_columns=("shop", "item"), target_columns=("price",), validation_split=0.3
    )

    def shops(side: str) -> set[str]:
        return {record.known.partition("\n")[0] for record in getattr(dataset, side)}

    assert len(shops("validation")) == 3
    assert not shops("train") & shops("validation")


def test_a_serial_number_is_a_key_and_no_target(tmp_path: Path) -> None:
    text = "id,city,country,area\n" + "".join(
        f"{n},{city},{country},{n * 7919 % 10007 / 10}\n"
        for n, (city, country) in enumerate([("Lyon", "France"), ("Graz", "Austria"), ("Nice", "France")] * 30)
    )
    [table] = load_table(tmp_path, text).report.tables
    assert "id" in table.key_columns
    assert table.target_columns == ["country", "area"]
    assert table.memorisation_columns == ["area"]


def test_an_index_column_does_not_take_the_place_of_a_meaningful_key(tmp_path: Path) -> None:
    path = write_survey(tmp_path / "survey.csv", rows=5000)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f",{lines[0]}", *(f"{number},{line}" for number, line in enumerate(lines[1:]))]))
    [table] = load(path, DataSettings()).report.tables
    assert table.key_columns == ["Year", "Industry_code_NZSIOC", "Variable_code"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_columns": ("land",)}, "--target-columns 'land': no column"),
        ({"key_columns": ("land",)}, "--key-columns 'land': no column"),
        ({"group_by": "land"}, "--group-by 'land': no column"),
        ({"text_column": "land"}, "--text-column 'land': no column"),
        ({"target_columns": ("b",), "key_columns": ("b",)}, "both name 'b'"),
    ],
)
def test_a_setting_that_names_no_column_says_which_there_are(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_table(tmp_path, "a,b\n1,x\n2,y\n", **settings)


# --- templates ------------------------------------------------------------------------------------------------------


def template_file(folder: Path, source: str) -> str:
    path = folder / "row.jinja"
    path.write_text(source)
    return str(path)


def test_a_template_of_blocks_asks_its_own_questions(tmp_path: Path) -> None:
    template = template_file(
        tmp_path,
        "{% block system %}Be brief.{% endblock %}{% block known %}In {{ city }},{% endblock %}"
        "{% block question %}what is the {{ column }}?{% endblock %}"
        "{% block answer %}{{ row[column]|upper }}{% endblock %}",
    )
    dataset = load_table(
        tmp_path, "city,country\nLyon,France\nGraz,Austria\n", template=template, target_columns=("country",),
        validation_split=0,
    )  # fmt: skip
    assert [message["content"] for message in dataset.train[0].as_json()[0]["messages"]] == [
        "Be brief.",
        "In Lyon,\nwhat is the country?",
        "FRANCE",
    ]


def test_a_template_without_blocks_makes_text(tmp_path: Path) -> None:
    template = template_file(tmp_path, "{{ row['city'] }} is in {{ country }}.")
    dataset = load_table(tmp_path, "city,country\nLyon,France\nGraz,Austria\n", template=template, validation_split=0)
    assert [record.text for record in dataset.train] == ["Lyon is in France.", "Graz is in Austria."]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ missing }}", "'missing' is undefined.*the columns are a, b"),
        ("{{ row['missing'] }}", "missing.*the columns are a, b"),
        ("{% block known %}", "template fails"),
        ("{% block other %}{% endblock %}", "unknown block 'other'"),
        ("{% block question %}x{% endblock %}", "no block `known`"),
        ("", "is empty"),
        ("{{ 'x' * 10000000000 }}", "not allowed"),
        ("{{ 9 ** 9 ** 9 }}", "not allowed"),
        ("{{ '%999999999d' % 1 }}", "not allowed"),
        ("{{ a.__class__.__mro__ }}", "fails"),
        ("{{ a.format(a) }}", "fails"),
        ("{{ row.update({'a': 1}) }}", "fails"),
        ("{% include 'x' %}", "fails"),
        ("{% for n in range(9) %}{% endfor %}", "'range' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails"),
        ("{{ a|center(1000000000) }}", "fails"),
        ("{{ lipsum() }}", "undefined"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_name(tmp_path: Path, source: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load_table(tmp_path, "a,b\n1,x\n2,y\n", template=template_file(tmp_path, source), target_columns=("b",))
    assert "row.jinja" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_makes_no_endless_text() -> None:
    loops = "{% for a in row %}" * 4 + "x" * 200 + "{% endfor %}" * 4
    with pytest.raises(ConfigError, match="characters of one row"):
        RowTemplate("t", loops).text({str(number): "" for number in range(10)})
    assert MAX_RENDERED_CHARS < 200 * 10**4


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.jinja: cannot be read"):
        load_table(tmp_path, "a,b\n1,x\n2,y\n", template=str(tmp_path / "none.jinja"))
