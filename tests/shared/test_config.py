"""The same field is a flag, an environment variable and a hyperparameter, and every mistake is named."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from estiba.config import RESERVED_ENV, Config, load
from estiba.errors import ConfigError


class Sample(Config):
    """A workload's configuration."""

    text_column: str = "texto"
    """The column to read, 100% of it."""
    batch_size: Annotated[int, Field(ge=0)] = 0
    """Rows in a batch."""
    learning_rate: float = 1e-3
    """Step size."""
    save_every_s: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds between checkpoints."""
    verbose: bool = False
    """Say more."""
    normalize: bool = True
    """Scale vectors."""
    resume: bool | None = None
    """Go on from a checkpoint; default is to see for itself."""
    prompt: str | None = None
    """Text before every row."""
    columns: list[str] | None = None
    """Columns to keep."""
    sizes: list[int] = Field(default_factory=lambda: [1, 2])
    """Sizes to try."""
    bits: Literal[4, 8] = 8
    """Bits of a weight."""
    dtype: Literal["auto", "float32"] = "auto"
    """Precision."""


class Needy(Config):
    """A configuration with a field that must be given."""

    dataset: str
    """Where the data is."""
    epochs: int
    """How often."""


def sample(
    *argv: str, env: dict[str, str] | None = None, hyper: dict[str, str] | None = None, cls: type[Config] = Sample
) -> Any:
    return load(cls, argv=argv, environ=env or {}, hyperparameters=hyper or {})


def mistakes(*argv: str, env: dict[str, str] | None = None, hyper: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        sample(*argv, env=env, hyper=hyper)
    return str(caught.value).splitlines()


# --- which source wins ---------------------------------------------------------------------------------------------


def test_each_source_beats_the_ones_below_it() -> None:
    hyper = {"text-column": "from hyperparameter"}
    env: dict[str, str] = {}
    assert sample().text_column == "texto"
    assert sample(hyper=hyper).text_column == "from hyperparameter"
    for variable in ("TEXT_COLUMN", "SM_HP_TEXT-COLUMN", "SM_HP_TEXT_COLUMN", "ESTIBA_TEXT_COLUMN"):
        env[variable] = f"from {variable}"
        assert sample(env=env, hyper=hyper).text_column == f"from {variable}"
    assert sample("--text-column", "from flag", env=env, hyper=hyper).text_column == "from flag"


def test_one_source_may_set_one_field_and_another_the_next() -> None:
    config = sample("--batch-size=4", env={"ESTIBA_DTYPE": "float32"}, hyper={"bits": "4"})
    assert (config.batch_size, config.dtype, config.bits, config.text_column) == (4, "float32", 4, "texto")


def test_a_terminals_own_columns_variable_is_not_the_field_of_that_name() -> None:
    assert sample(env={"COLUMNS": "132"}).columns is None
    assert sample(env={"COLUMNS": "132", "ESTIBA_COLUMNS": "a,b"}).columns == ["a", "b"]
    assert sample(env={"COLUMNS": "132", "SM_HP_COLUMNS": "c"}).columns == ["c"]


def test_an_empty_variable_counts_as_unset() -> None:
    assert sample(env={"ESTIBA_BATCH_SIZE": ""}, hyper={"batch-size": "3"}).batch_size == 3


# --- spellings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text-column", "text_column"])
def test_flags_and_hyperparameters_take_dashes_and_underscores(name: str) -> None:
    assert sample(f"--{name}", "a").text_column == "a"
    assert sample(f"--{name}=a_b").text_column == "a_b"
    assert sample(hyper={name: "a"}).text_column == "a"


def test_both_spellings_of_a_hyperparameter_may_agree_but_not_differ() -> None:
    assert sample(hyper={"text-column": "a", "text_column": "a"}).text_column == "a"
    [message] = mistakes(hyper={"text-column": "a", "text_column": "b"})
    assert "'text-column'" in message
    assert "'text_column'" in message
    assert '"' not in message


@pytest.mark.parametrize(
    ("field", "bare", "expected"),
    [
        ("text_column", "texto", "texto"),
        ("batch_size", "8", 8),
        ("learning_rate", "2e-5", 2e-5),
        ("save_every_s", "none", None),
        ("verbose", "true", True),
        ("columns", '["a", "b"]', ["a", "b"]),
        ("dtype", "float32", "float32"),
        ("bits", "4", 4),
    ],
)
def test_json_quoted_and_bare_hyperparameters_are_the_same(field: str, bare: str, expected: object) -> None:
    assert getattr(sample(hyper={field: bare}), field) == expected
    assert getattr(sample(hyper={field: json.dumps(bare)}), field) == expected


def test_quotes_that_are_not_a_json_string_belong_to_the_value() -> None:
    assert sample(hyper={"prompt": '"a" or "b"'}).prompt == '"a" or "b"'
    assert sample(hyper={"prompt": '"'}).prompt == '"'
    assert sample("--prompt", '"quoted"').prompt == '"quoted"'


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["verbose", "normalize", "resume"])
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--{}"], True),
        (["--{}", "true"], True),
        (["--{}=True"], True),
        (["--{}=1"], True),
        (["--{}=False"], False),
        (["--{}", "false"], False),
        (["--{}=0"], False),
        (["--{}", "--batch-size", "3"], True),
    ],
)
def test_a_switch_may_be_bare_or_say_true_or_false(name: str, argv: list[str], expected: bool) -> None:
    assert getattr(sample(*[item.format(name) for item in argv]), name) is expected


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("False", False), ('"true"', True), ("0", False)])
def test_a_switch_is_also_a_word_in_the_environment_and_the_hyperparameters(text: str, expected: bool) -> None:
    assert sample(hyper={"normalize": text}).normalize is expected
    assert sample(env={"ESTIBA_NORMALIZE": text}).normalize is expected


@pytest.mark.parametrize("text", ["none", "null", "None", " NULL ", ""])
def test_none_and_null_turn_an_optional_field_off(text: str) -> None:
    assert sample("--save-every-s", text).save_every_s is None
    assert sample(hyper={"save-every-s": text}).save_every_s is None


def test_none_is_a_plain_string_for_a_field_that_is_not_optional() -> None:
    assert sample("--text-column", "none").text_column == "none"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b", ["a", "b"]),
        (" a , b ,", ["a", "b"]),
        ("a", ["a"]),
        ('["a", "b"]', ["a", "b"]),
        (' ["a, b", "c"] ', ["a, b", "c"]),
        ("[]", []),
        ("[a],b", ["[a]", "b"]),
        ("none", None),
    ],
)
def test_a_list_is_json_or_separated_by_commas(text: str, expected: list[str] | None) -> None:
    assert sample("--columns", text).columns == expected
    assert sample(env={"ESTIBA_COLUMNS": text}).columns == expected
    assert sample(hyper={"columns": text}).columns == expected


def test_a_list_of_numbers_is_numbers() -> None:
    assert sample("--sizes", "3,4").sizes == [3, 4]
    assert sample(hyper={"sizes": "[3, 4]"}).sizes == [3, 4]
    [message] = mistakes("--sizes", "3,x")
    assert "--sizes" in message
    assert "'x'" in message or "3,x" in message


def test_a_value_may_begin_with_a_dash() -> None:
    assert sample("--prompt=-x").prompt == "-x"
    assert sample("--prompt=--text-column").prompt == "--text-column"
    assert sample("--prompt=--", "--text-column=a").prompt == "--"
    assert sample("--prompt", "- a list item").prompt == "- a list item"
    assert sample("--learning-rate", "-1").learning_rate == -1
    [message] = mistakes("--prompt", "-x", "--verbose")[:1]
    assert "--prompt" in message
    assert "=" in message  # the remedy


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "dijo: «hola»", 'a "quoted" word', "it's", "query: ", "a\nb\tc", "50 %", "a=b"]
)
def test_the_text_of_a_prompt_is_kept_to_the_letter(text: str) -> None:
    assert sample("--prompt", text).prompt == text
    assert sample(env={"ESTIBA_PROMPT": text}).prompt == text
    assert sample(hyper={"prompt": text}).prompt == text
    assert sample(hyper={"prompt": json.dumps(text)}).prompt == text
    assert sample(hyper={"prompt": json.dumps(text, ensure_ascii=False)}).prompt == text


def test_a_choice_of_numbers_takes_the_number_as_text() -> None:
    assert sample("--bits", "4").bits == 4
    [message] = mistakes("--bits", "5")
    assert "4 or 8" in message


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity"])
def test_a_number_that_does_not_parse_is_refused(text: str) -> None:
    [message] = mistakes(f"--learning-rate={text}")
    assert text in message
    assert "finite" in message


def test_a_configuration_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        sample().batch_size = 3


# --- refusals ------------------------------------------------------------------------------------------------------


def test_an_unknown_flag_is_refused_by_name_with_a_suggestion() -> None:
    assert mistakes("--text-colum", "x") == ["unknown flag '--text-colum'; did you mean --text-column?"]
    assert mistakes("--text-colum=x") == ["unknown flag '--text-colum'; did you mean --text-column?"]


def test_a_flag_is_never_guessed_from_its_beginning() -> None:
    [message] = mistakes("--text", "x")
    assert message.startswith("unknown flag '--text'")


def test_an_unknown_hyperparameter_is_refused_by_name_with_a_suggestion() -> None:
    assert mistakes(hyper={"batchsize": "1"}) == ["unknown hyperparameter 'batchsize'; did you mean batch-size?"]


def test_an_unknown_estiba_variable_is_refused_by_name_with_a_suggestion() -> None:
    assert mistakes(env={"ESTIBA_BATCH": "1"}) == [
        "unknown environment variable 'ESTIBA_BATCH'; did you mean ESTIBA_BATCH_SIZE?"
    ]


def test_a_name_without_a_close_match_gets_the_whole_list() -> None:
    [message] = mistakes("--0123456789=1")
    assert "--text-column, --batch-size" in message


def test_foreign_and_job_layer_variables_are_not_mistakes() -> None:
    others = {"SM_HP_UNKNOWN": "1", "SM_MODEL_DIR": "/opt/ml/model", "PATH": "/bin", "MODEL_DIR": "x"}
    assert sample(env={**others, **dict.fromkeys(RESERVED_ENV, "1")}) == sample()


def test_a_variable_of_the_job_layer_is_never_a_field_of_the_same_name() -> None:
    class Versioned(Config):
        version: str | None = None

    images_own = {"ESTIBA_VERSION": "0.1.0"}
    assert sample(env=images_own, cls=Versioned).version is None
    assert sample(env=images_own, hyper={"version": "v1"}, cls=Versioned).version == "v1"
    assert sample(env={**images_own, "SM_HP_VERSION": "v2"}, cls=Versioned).version == "v2"


def test_hyperparameters_of_sagemaker_itself_are_ignored() -> None:
    own = {"sagemaker_program": "x.py", "sagemaker_submit_directory": '"s3://b/x"', "_tuning_objective_metric": "loss"}
    assert sample(hyper=own) == sample()


def test_a_stray_argument_is_refused() -> None:
    [message] = mistakes("data.parquet")
    assert "'data.parquet'" in message
    [message] = mistakes("--text-column", "a", "b")
    assert "'b'" in message


def test_an_ill_typed_value_is_refused_with_its_origin_the_value_and_the_default() -> None:
    for message in (
        *mistakes("--batch-size", "many"),
        *mistakes(env={"ESTIBA_BATCH_SIZE": "many"}),
        *mistakes(hyper={"batch-size": "many"}),
    ):
        assert "'many'" in message
        assert "integer" in message
        assert message.endswith("leave it out for 0")
    assert mistakes("--batch-size", "many")[0].startswith("flag --batch-size is")
    assert mistakes(env={"BATCH_SIZE": "many"})[0].startswith("environment variable BATCH_SIZE is")
    assert mistakes(hyper={"batch_size": "many"})[0].startswith("hyperparameter 'batch_size' is")


def test_a_value_out_of_bounds_or_choices_is_refused_with_what_is_allowed() -> None:
    assert "greater than or equal to 0" in mistakes("--batch-size=-1")[0]
    assert "'auto' or 'float32'" in mistakes("--dtype", "int8")[0]


def test_a_missing_required_field_is_named_by_its_flag() -> None:
    with pytest.raises(ConfigError) as caught:
        sample("--epochs", "x", cls=Needy)
    missing, wrong = sorted(str(caught.value).splitlines())
    assert missing.startswith("--dataset: ")
    assert wrong.startswith("flag --epochs is 'x'")
    assert "Undefined" not in str(caught.value)


def test_every_mistake_is_reported_at_once() -> None:
    found = mistakes(
        "--text-colum=x",
        "--batch-size",
        "many",
        "--dtype",
        "--save-every-s=-1",
        "--prompt",
        env={"ESTIBA_NOPE": "1", "ESTIBA_LEARNING_RATE": "fast"},
        hyper={"bits": "5", "nope": "1", "text-column": "a", "text_column": "b"},
    )
    for word in (
        "--text-colum'",
        "--batch-size",
        "--dtype",
        "--save-every-s",
        "--prompt",
        "ESTIBA_NOPE",
        "ESTIBA_LEARNING_RATE",
        "'bits'",
        "'nope'",
        "'text-column'",
    ):
        assert [line for line in found if word in line] != [], word
    assert len(found) == 10


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["30", "80", "200"])
def test_help_shows_every_flag_with_its_docstring_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit) as caught:
        sample("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, info in Sample.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert (info.description or "?") in text
    assert "[texto]" in text
    with pytest.raises(SystemExit):
        sample("--help", cls=Needy)
    assert "Where the data is. [required]" in " ".join(capsys.readouterr().out.split())


def test_help_shows_the_other_ways_by_a_field_of_this_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    class Own(Config):
        """A tool's."""

        see_also = "Other commands: tool tidy-up"
        place: str = ""
        """Where."""
        lens_size: int = 1
        """How large."""

    def helped(**sources: Any) -> str:
        with pytest.raises(SystemExit):
            load(Own, argv=["--help"], prog="tool measure", **sources)
        return " ".join(capsys.readouterr().out.split())

    text = helped(environ={}, hyperparameters={})
    assert "an environment variable (ESTIBA_LENS_SIZE) and a hyperparameter (lens-size). Other commands: tool" in text
    assert text.startswith("usage: tool measure [-h]") and text.endswith("tidy-up")
    text = helped(environ=None, hyperparameters=None)
    assert "environment" not in text and "hyperparameter" not in text
    assert load(Own, argv=["--place", "a"], environ=None, hyperparameters=None).place == "a"


# --- the three routes ----------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
not_off = words.filter(lambda text: text.strip().lower() not in ("", "none", "null"))
settings_of = st.fixed_dictionaries(
    {},
    optional={
        "text_column": words,
        "prompt": st.none() | not_off,
        "batch_size": st.integers(0, 10**9),
        "learning_rate": st.floats(-1e6, 1e6),
        "save_every_s": st.none() | st.floats(0.001, 1e6),
        "verbose": st.booleans(),
        "normalize": st.booleans(),
        "resume": st.none() | st.booleans(),
        "columns": st.none() | st.lists(words, max_size=4),
        "sizes": st.lists(st.integers(), max_size=4),
        "bits": st.sampled_from([4, 8]),
        "dtype": st.sampled_from(["auto", "float32"]),
    },
)


def plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@settings(max_examples=100, deadline=None)
@given(settings_of, st.booleans())
def test_the_same_values_by_any_route_give_the_same_configuration(values: dict[str, Any], dashes: bool) -> None:
    expected = Sample(**values)
    spelled = {name.replace("_", "-") if dashes else name: value for name, value in values.items()}
    by_flags = [f"--{name}={plain(value)}" for name, value in spelled.items()]
    quoted = {name: json.dumps(value) for name, value in spelled.items()}
    in_environment = {f"ESTIBA_{name.upper()}": json.dumps(value) for name, value in values.items()}
    assert sample(*by_flags) == expected
    assert sample(hyper=quoted) == expected
    assert sample(env=in_environment) == expected
    bare = {name: plain(value) for name, value in spelled.items() if not plain(value).startswith('"')}
    assert sample(hyper=bare) == Sample(**{name.replace("-", "_"): spelled[name] for name in bare})
