"""Script mode: SAGEMAKER_PROGRAM runs as under AWS's sagemaker-training toolkit, with our signals and exit statuses."""

from __future__ import annotations

import json
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from contract.containers import Ended, Image, Running, Tree

SOON_S = 15.0
RESOURCES = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"}
KINDS = ["py", "sh"]
ARCHIVE = {"sagemaker_program": "train.py", "sagemaker_submit_directory": "/source/sourcedir.tar.gz"}
FLAGS = ["--epochs", "3", "--nombre", "barco azul"]

REPORTS_PY = """
import json, os, sys
with open("/opt/ml/model/received.json", "w") as file:
    json.dump({"argv": sys.argv[1:], "epochs": os.environ["SM_HP_EPOCHS"]}, file)
"""
REPORTS_SH = """#!/bin/bash
python -c 'import json, os, sys
json.dump({"argv": sys.argv[1:], "epochs": os.environ["SM_HP_EPOCHS"]}, open("/opt/ml/model/received.json", "w"))' "$@"
"""
SAVES_PY = """
import pathlib, signal, sys, time
def save(signum, frame):
    time.sleep(1)
    pathlib.Path("/opt/ml/model/saved").write_text("so far")
    sys.exit(int(sys.argv[sys.argv.index("--ends") + 1]))
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    time.sleep(0.05)  # short, since a signal just before a sleep is handled after it
"""
SAVES_SH = """#!/bin/bash
trap 'sleep 1; echo -n "so far" >/opt/ml/model/saved; exit "$2"' TERM
echo ready
sleep 600 &
wait
"""


def start(image: Image, tree: Tree, script: str, text: str, **hyperparameters: Any) -> Running:
    """Start with SAGEMAKER_PROGRAM in the environment, as `docker run -e` and version 3 of the SDK set it."""
    put(tree, script, text)
    tree.write_config(
        hyperparameters={name: json.dumps(value) for name, value in hyperparameters.items()},
        resources=RESOURCES,
        inputs={},
    )
    return launch(image, tree, environment={"SAGEMAKER_PROGRAM": script})


def launch(image: Image, tree: Tree, **options: Any) -> Running:
    """PID 1 waits until its host name resolves, so it needs a network."""
    return image.start(["train"], tree=tree, network="bridge", hostname="algo-1", **options)


def put(tree: Tree, script: str, text: str) -> None:
    tree.code.mkdir(exist_ok=True)
    (tree.code / script).write_text(text)


def received_by_script(tree: Tree) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((tree.model / "received.json").read_text())
    return value


@pytest.mark.parametrize(("script", "text"), [("train.py", REPORTS_PY), ("train.sh", REPORTS_SH)], ids=KINDS)
def test_hyperparameters_become_the_scripts_flags(script: str, text: str, image: Image, tree: Tree) -> None:
    ended = start(image, tree, script, text, epochs=3, nombre="barco azul").end()
    assert ended.code == 0, ended.log
    assert received_by_script(tree) == {"argv": FLAGS, "epochs": "3"}
    assert tree.failure is None


ASKS_THE_TOOLKIT = """
import json, os
from sagemaker_training import environment
theirs = environment.Environment().to_env_vars()
training, our_training = json.loads(theirs.pop("SM_TRAINING_ENV")), json.loads(os.environ["SM_TRAINING_ENV"])
report = {"differ": {name: [value, os.environ.get(name)] for name, value in theirs.items()
                     if os.environ.get(name) != value},
          "differ_in_json": {name: [value, our_training.get(name)] for name, value in training.items()
                             if our_training.get(name) != value}}
with open("/opt/ml/model/received.json", "w") as file:
    json.dump(report, file)
"""


def test_the_environment_is_that_of_awss_toolkit(image: Image, tree: Tree) -> None:
    put(tree, "train.py", ASKS_THE_TOOLKIT)
    hosts = ["algo-1"]
    groups = [{"instance_group_name": "g", "instance_type": "ml.m5.xlarge", "hosts": hosts}]
    group = {"instance_groups": groups, "current_group_name": "g", "current_instance_type": "ml.m5.xlarge"}
    tree.write_config(
        hyperparameters={
            "epochs": "3",
            "nombre": '"barco azul"',
            "rates": "[0.1, 2]",
            "sagemaker_region": '"eu-west-1"',
        },
        resources={**RESOURCES, **group},
        inputs={"train": {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated"}},
    )
    ended = launch(image, tree, environment={"SAGEMAKER_PROGRAM": "train.py"}).end()
    assert ended.code == 0, ended.log
    assert received_by_script(tree) == {"differ": {}, "differ_in_json": {}}


@pytest.mark.parametrize("encode", [json.dumps, str], ids=["json", "plain"])
def test_the_script_can_be_named_by_a_hyperparameter(encode: Any, image: Image, tree: Tree) -> None:
    """As AWS's SDKs send it. Names that begin with sagemaker_ are not passed to the script."""
    put(tree, "train.py", REPORTS_PY)
    values = {"sagemaker_program": "train.py", "sagemaker_region": "us-east-1", "epochs": 3, "nombre": "barco azul"}
    tree.write_config(
        hyperparameters={name: encode(value) for name, value in values.items()}, resources=RESOURCES, inputs={}
    )
    ended = launch(image, tree).end()
    assert ended.code == 0, ended.log
    assert received_by_script(tree) == {"argv": FLAGS, "epochs": "3"}


@pytest.mark.parametrize("code", [2, 143])
def test_a_failure_that_the_script_explains_is_kept_with_its_exit_code(code: int, image: Image, tree: Tree) -> None:
    """As the image's own program does when a script starts it."""
    text = f"import pathlib, sys\npathlib.Path('/opt/ml/output/failure').write_text('no column x')\nsys.exit({code})\n"
    ended = start(image, tree, "train.py", text).end()
    assert ended.code == code, ended.log
    assert (tree.failure or "").strip() == "no column x"


@pytest.mark.parametrize("way", ["hyperparameter", "environment"])
def test_the_script_can_come_in_an_archive(way: str, image: Image, tree: Tree, tmp_path: Path) -> None:
    """As AWS's SDKs send it, each SDK in one of the two ways: a tar.gz, on S3 there and in a local path here."""
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "train.py").write_text(REPORTS_PY)
    with tarfile.open(source / "sourcedir.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "train.py", "train.py")
    values: dict[str, Any] = {"epochs": 3, "nombre": "barco azul", **(ARCHIVE if way == "hyperparameter" else {})}
    tree.write_config(
        hyperparameters={name: json.dumps(value) for name, value in values.items()}, resources=RESOURCES, inputs={}
    )
    ended = launch(
        image,
        tree,
        environment={name.upper(): value for name, value in ARCHIVE.items()} if way == "environment" else {},
        volumes={str(source): {"bind": "/source", "mode": "ro"}},
    ).end()
    assert ended.code == 0, ended.log
    assert received_by_script(tree) == {"argv": FLAGS, "epochs": "3"}


@pytest.mark.parametrize("way", ["hyperparameter", "environment"])
def test_a_kept_code_directory_runs_the_code_of_now(way: str, image: Image, tree: Tree, tmp_path: Path) -> None:
    """A mounted /opt/ml outlives its container. What the script wrote beside its code stays."""
    source = tmp_path / "source"
    source.mkdir()
    tree.code.mkdir()
    tree.write_config(hyperparameters=ARCHIVE if way == "hyperparameter" else {}, resources=RESOURCES, inputs={})
    for version, files in ((1, ("train.py", "helper.py")), (2, ("train.py",))):
        with tarfile.open(source / "sourcedir.tar.gz", "w:gz") as archive:
            for name in files:
                text = f"import os; open('/opt/ml/model/v{version}', 'w'); open('own-{version}', 'w')"
                (tmp_path / name).write_text(text)
                archive.add(tmp_path / name, name)
        ended = launch(
            image,
            tree,
            environment={name.upper(): value for name, value in ARCHIVE.items()} if way == "environment" else {},
            volumes={str(source): {"bind": "/source", "mode": "ro"}},
        ).end()
        assert ended.code == 0, ended.log
        assert (tree.model / f"v{version}").exists()
    assert {"own-1", "own-2", "train.py"} <= {path.name for path in tree.code.iterdir()}
    assert not (tree.code / "helper.py").exists()


def test_code_that_the_user_put_there_is_kept_as_the_toolkit_keeps_it(image: Image, tree: Tree) -> None:
    put(tree, "train.py", "open('/opt/ml/model/mine', 'w')")
    tree.write_config(hyperparameters=ARCHIVE, resources=RESOURCES, inputs={})
    assert launch(image, tree).end().code == 0
    assert (tree.model / "mine").exists()


def test_a_kept_configuration_of_a_plain_run_does_not_name_the_container_before(
    image: Image, tree: Tree, tmp_path: Path
) -> None:
    """`docker run -v $PWD/ml:/opt/ml` twice: the second container has another host name."""
    code = tmp_path / "ml/code"
    code.mkdir(parents=True)
    (code / "train.py").write_text("import os; print('ran on', os.environ['SM_CURRENT_HOST'])")
    for host in ("first", "second"):
        ended = image.start(
            ["train"],
            network="bridge",
            hostname=host,
            environment={"SAGEMAKER_PROGRAM": "train.py"},
            volumes={str(tmp_path / "ml"): {"bind": "/opt/ml", "mode": "rw"}},
        ).end()
        assert ended.code == 0 and f"ran on {host}" in ended.log, ended.log


@pytest.mark.parametrize("way", ["hyperparameter", "environment"])
def test_a_missing_archive_is_named_in_the_first_line(way: str, image: Image, tree: Tree) -> None:
    tree.write_config(hyperparameters=ARCHIVE if way == "hyperparameter" else {}, resources=RESOURCES, inputs={})
    environment = {name.upper(): value for name, value in ARCHIVE.items()} if way == "environment" else {}
    ended = launch(image, tree, environment=environment).end()
    assert ended.code != 0, ended.log
    assert ARCHIVE["sagemaker_submit_directory"] in (tree.failure or "").splitlines()[0], tree.failure


@pytest.mark.parametrize(
    ("script", "text"), [("train.py", "raise SystemExit(7)"), ("train.sh", "#!/bin/sh\nexit 7\n")], ids=KINDS
)
def test_the_exit_status_of_the_script_is_kept(script: str, text: str, image: Image, tree: Tree) -> None:
    ended = start(image, tree, script, text).end()
    assert ended.code == 7, ended.log
    assert tree.failure


def test_the_scripts_exception_is_the_first_line_of_the_failure_file(image: Image, tree: Tree) -> None:
    text = "import sys\ndef leer():\n    raise ValueError('no hay datos en el puerto')\nleer()\n"
    ended = start(image, tree, "train.py", text).end()
    assert ended.code == 1, ended.log
    assert tree.failure is not None
    assert tree.failure.splitlines()[0] == "ValueError: no hay datos en el puerto"


@pytest.mark.parametrize("path", [".", "/opt/ml/code:/nowhere"])
def test_a_failure_behind_tee_is_one_for_a_script_that_sets_pythonpath_anew(
    path: str, image: Image, tree: Tree
) -> None:
    put(tree, "work.py", "raise ValueError('no hay datos')\n")
    ended = start(image, tree, "train.sh", f"#!/bin/bash\nPYTHONPATH={path} python work.py 2>&1 | tee log.txt\n").end()
    assert ended.code == 1, ended.log
    assert (tree.failure or "").startswith("ValueError: no hay datos")


@pytest.mark.parametrize(("script", "text"), [("train.py", SAVES_PY), ("train.sh", SAVES_SH)], ids=KINDS)
@pytest.mark.parametrize("code", [0, 5])
def test_docker_stop_lets_the_script_save_and_keeps_its_exit_status(
    code: int, script: str, text: str, image: Image, tree: Tree
) -> None:
    running = start(image, tree, script, text, ends=code)
    running.wait_for_line("ready")
    assert running.stop() < SOON_S
    ended = running.end()
    assert (tree.model / "saved").read_text() == "so far", ended.log
    assert ended.code == code, ended.log
    if code:
        assert (tree.failure or "").startswith("stopped by SIGTERM")


def test_a_script_that_ignores_term_is_stopped(image: Image, tree: Tree) -> None:
    running = start(image, tree, "train.py", "import time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    running.wait_for_line("ready")
    assert running.stop() < SOON_S
    assert running.end().code == 143
    assert (tree.failure or "").startswith("stopped by SIGTERM")


def test_a_script_that_does_not_exist_is_named(image: Image, tree: Tree) -> None:
    put(tree, "other.py", "")
    tree.write_config(hyperparameters={}, resources=RESOURCES, inputs={})
    ended = launch(image, tree, environment={"SAGEMAKER_PROGRAM": "train.py"}).end()
    assert_user_error(ended, "train.py")


def test_a_plain_docker_run_of_a_script_needs_no_platform_files(image: Image, tree: Tree) -> None:
    """A rented machine has no resourceconfig.json; either the script runs, or the error says what to mount."""
    put(tree, "train.py", "import sys; open('/opt/ml/model/ran', 'w').close()")
    started = time.monotonic()
    ended = image.run(["train"], tree=tree, network="bridge", environment={"SAGEMAKER_PROGRAM": "train.py"})
    assert time.monotonic() - started < SOON_S
    if ended.code == 0:
        assert (tree.model / "ran").exists()
    else:
        assert_user_error(ended, "resourceconfig.json")


def assert_user_error(ended: Ended, *says: str) -> None:
    """Check for status 2, the message first in the failure file, and no traceback."""
    assert ended.tree is not None
    assert ended.code == 2, ended.log
    first = (ended.tree.failure or "").splitlines()[0]
    for part in says:
        assert part in first
    assert not re.search("Traceback", ended.log), ended.log


def test_hosts_that_a_container_without_a_network_cannot_reach_are_named_at_once(image: Image, tree: Tree) -> None:
    put(tree, "train.py", REPORTS_PY)
    tree.write_config(hyperparameters={}, resources={**RESOURCES, "hosts": ["algo-1", "algo-2"]}, inputs={})
    ended = image.run(["train"], tree=tree, environment={"SAGEMAKER_PROGRAM": "train.py"})
    assert ended.code == 2
    assert "this container has no network, so algo-1, algo-2 of resourceconfig.json cannot be reached" in ended.err


@pytest.mark.parametrize("place", ["", "train.py", "packed"])
def test_the_code_may_be_a_folder_one_file_or_a_folder_with_an_archive(
    place: str, image: Image, tree: Tree, tmp_path: Path
) -> None:
    """As the fine-tuning document's request gives it: the address of the code's own channel, or of the program."""
    source = tmp_path / "source"
    (source / "packed").mkdir(parents=True)
    (source / "train.py").write_text(REPORTS_PY)
    with tarfile.open(source / "packed/sourcedir.tar.gz", "w:gz") as archive:
        archive.add(source / "train.py", "train.py")
    tree.write_config(hyperparameters={"epochs": "3", "nombre": "barco azul"}, resources=RESOURCES, inputs={})
    environment = {"SAGEMAKER_PROGRAM": "train.py", "SAGEMAKER_SUBMIT_DIRECTORY": f"/source/{place}"}
    mount = {str(source): {"bind": "/source", "mode": "ro"}}
    ended = launch(image, tree, environment=environment, volumes=mount).end()
    assert ended.code == 0, ended.log
    assert received_by_script(tree) == {"argv": FLAGS, "epochs": "3"}


def test_code_without_the_program_is_told_with_what_is_there(image: Image, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/other.py").write_text("")
    tree.write_config(hyperparameters={}, resources=RESOURCES, inputs={})
    environment = {"SAGEMAKER_PROGRAM": "train.py", "SAGEMAKER_SUBMIT_DIRECTORY": "/source"}
    mount = {str(tmp_path / "source"): {"bind": "/source", "mode": "ro"}}
    ended = launch(image, tree, environment=environment, volumes=mount).end()
    assert_user_error(ended, "train.py", "/source", "other.py")


@pytest.mark.parametrize(
    ("requirement", "says"),
    [
        ("numpy=1", "ERROR: Invalid requirement: 'numpy=1'"),
        ("no-such-package-of-estiba==9", "ERROR: No matching distribution found for no-such-package-of-estiba==9"),
    ],
)
@pytest.mark.parametrize("index", ["none", "unreachable"])
def test_requirements_that_cannot_be_installed_are_told_in_the_words_of_pip(
    index: str, requirement: str, says: str, image: Image, tree: Tree
) -> None:
    put(tree, "train.py", "")
    (tree.code / "requirements.txt").write_text(f"{requirement}\n")
    tree.write_config(hyperparameters={}, resources=RESOURCES, inputs={})
    pip = {"PIP_NO_INDEX": "1"} if index == "none" else {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "1"}
    ended = launch(image, tree, environment={"SAGEMAKER_PROGRAM": "train.py", **pip}).end()
    assert ended.code != 0
    shown = (tree.failure or "")[:1024]
    assert shown.startswith("ERROR: ") and says in shown, tree.failure
    if index == "unreachable" and "==" in requirement:
        assert "connection broken by" in shown
