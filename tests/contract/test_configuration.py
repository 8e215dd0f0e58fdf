"""A job is the same however it is started and configured; mistakes are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contract.checks import NewTree, assert_refused, assert_same, results_of, tree_of
from contract.containers import Ended, Image, Tree, together
from contract.workloads import Job, Prepared, as_environment, as_flags, as_json_strings, as_plain_strings


@pytest.fixture(scope="session")
def other_ways(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The quick job, started in every way except that of `plain`, which sends no command."""

    def new_tree() -> Tree:
        return Tree(root=tmp_path_factory.mktemp(f"ways-{image.name}"), channels=prepared.quick.channels).make()

    settings = prepared.quick.settings
    as_json = new_tree().write_config(hyperparameters=as_json_strings(settings))
    return dict(
        zip(
            ("train", "flags", "environment"),
            together(
                lambda: image.run(["train"], tree=as_json),
                lambda: image.run(as_flags(settings), tree=new_tree()),
                lambda: image.run(tree=new_tree(), environment=as_environment(settings)),
            ),
            strict=True,
        )
    )


@pytest.mark.parametrize("way", ["train", "flags", "environment"])
def test_every_way_to_start_a_job_gives_the_same_bytes(
    way: str, other_ways: dict[str, Ended], plain: Ended, prepared: Prepared
) -> None:
    """`plain` has no command and plain strings; `train` has hyperparameters in JSON, as AWS's older SDK sends them."""
    assert other_ways[way].code == 0, other_ways[way].log
    assert_same(results_of(other_ways[way], prepared.ignore), results_of(plain, prepared.ignore))


def test_a_flag_beats_a_variable_and_a_variable_beats_a_hyperparameter(
    image: Image, prepared: Prepared, new_tree: NewTree
) -> None:
    """The error shows which value was used."""
    name, value = prepared.ill_typed
    good = {name: prepared.quick.settings[name]}
    weak = new_tree().write_config(hyperparameters=as_json_strings({name: f"{value}-1"}))
    ended = image.run(tree=weak, environment=as_environment({name: f"{value}-2"}))
    assert_refused(ended, f"{value}-2")
    assert f"{value}-1" not in ended.log
    ended = image.run(as_flags({name: f"{value}-3"}), tree=weak, environment=as_environment(good))
    assert_refused(ended, f"{value}-3")


def test_a_hyperparameter_that_does_not_exist_is_refused_by_name(image: Image, prepared: Prepared, tree: Tree) -> None:
    misspelt, meant = prepared.misspelt
    tree.write_config(hyperparameters=as_plain_strings({**prepared.quick.settings, misspelt: "1"}))
    assert_refused(image.run(["train"], tree=tree), misspelt.replace("-", "_"), f"did you mean {meant}?")


def test_a_flag_that_does_not_exist_is_refused_by_name(image: Image, prepared: Prepared, tree: Tree) -> None:
    misspelt, meant = prepared.misspelt
    assert_refused(image.run([f"--{misspelt}", "1"], tree=tree), f"--{misspelt}", f"did you mean --{meant}?")


def test_a_variable_that_does_not_exist_is_refused_by_name(image: Image, prepared: Prepared, tree: Tree) -> None:
    (variable,), (meant,) = (as_environment({name: ""}) for name in prepared.misspelt)
    assert_refused(image.run(tree=tree, environment={variable: "1"}), variable, f"did you mean {meant}?")


@pytest.mark.parametrize("way", ["hyperparameter", "environment", "flag"])
def test_a_value_of_the_wrong_type_is_refused_with_what_to_do(
    way: str, image: Image, prepared: Prepared, tree: Tree
) -> None:
    name, value = prepared.ill_typed
    if way == "hyperparameter":
        ended = image.run(tree=tree.write_config(hyperparameters={name: value}))
    elif way == "environment":
        ended = image.run(tree=tree, environment=as_environment({name: value}))
    else:
        ended = image.run(as_flags({name: value}), tree=tree)
    spelt = next(iter(as_environment({name: ""}))) if way == "environment" else name
    assert_refused(ended, spelt, repr(value), "give another value or leave it out")


def test_all_mistakes_are_reported_at_once(image: Image, prepared: Prepared, tree: Tree) -> None:
    (name, value), (misspelt, _) = prepared.ill_typed, prepared.misspelt
    assert_refused(image.run([*as_flags({name: value}), f"--{misspelt}", "1"], tree=tree), repr(value), f"--{misspelt}")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("hyperparameters", "is not JSON"),
        ("resourceconfig", "'algo-9'"),
        ("grace", "ESTIBA_STOP_GRACE_S"),
        ("serve", "does not serve"),
        ("script and flags", "SAGEMAKER_PROGRAM"),
    ],
)
def test_a_request_that_no_platform_sends_is_refused(what: str, says: str, image: Image, tree: Tree) -> None:
    if what == "hyperparameters":
        ended = image.run(tree=tree.write_config(hyperparameters="{'model': 1}"))
    elif what == "resourceconfig":
        ended = image.run(tree=tree.write_config(resources={"current_host": "algo-9", "hosts": ["algo-1", "algo-2"]}))
    elif what == "grace":
        ended = image.run(tree=tree, environment={"ESTIBA_STOP_GRACE_S": "two minutes"})
    elif what == "serve":
        ended = image.run(["serve"], tree=tree)
    else:
        ended = image.run(["train", "--x", "1"], tree=tree, environment={"SAGEMAKER_PROGRAM": "train.py"})
    assert_refused(ended, says)


def test_a_job_that_cannot_be_done_is_refused(image: Image, prepared: Prepared, tmp_path: Path) -> None:
    """Mistakes specific to an image: no channel, no model. Without a network they fail in seconds, without retries."""

    def run(index: int) -> Ended:
        refusal = prepared.refusals[index]
        missing = refusal.without_channels
        job = Job(
            channels={name: path for name, path in prepared.quick.channels.items() if name not in missing},
            settings={**prepared.quick.settings, **refusal.settings},
        )
        return image.run(tree=tree_of(job, tmp_path / str(index)))

    assert prepared.refusals, "the image's contract.py lists no refusals"
    endings = together(*[lambda index=index: run(index) for index in range(len(prepared.refusals))])
    for refusal, ended in zip(prepared.refusals, endings, strict=True):
        print(refusal.what, f"{ended.seconds:.1f} s")
        assert_refused(ended, *refusal.says, code=refusal.code)
        assert ended.seconds < 60


def test_help_lists_every_setting(image: Image, prepared: Prepared, tree: Tree) -> None:
    ended = image.run(["--help"], tree=tree)
    assert ended.code == 0
    for name in prepared.quick.settings:
        assert f"--{name}" in ended.out
    assert tree.failure is None


def test_the_failure_file_of_an_earlier_attempt_is_removed(image: Image, prepared: Prepared, tree: Tree) -> None:
    """On the same host the file still exists, and would be reported as this attempt's."""
    assert image.run([f"--{prepared.misspelt[0]}", "1"], tree=tree).code == 2
    assert tree.failure
    assert image.run(["bash", "-c", "true"], tree=tree).code == 0
    assert tree.failure is None


def test_the_platforms_own_variables_are_not_settings(image: Image, tree: Tree) -> None:
    """SageMaker sets variables whose names resemble settings."""
    platform = {
        "TRAINING_JOB_NAME": "embed-1",
        "TRAINING_JOB_ARN": "arn:aws:sagemaker:us-east-1:210987654321:training-job/embed-1",
        "AWS_REGION": "us-east-1",
        "SAGEMAKER_REGION": "us-east-1",
        "SM_CURRENT_HOST": "algo-1",
    }
    (tree.config / "trainingjobconfig.json").write_text(json.dumps({"TrainingJobName": "embed-1"}))
    ended = image.run(["--help"], tree=tree, environment=platform)
    assert ended.code == 0, ended.log
