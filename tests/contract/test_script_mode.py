"""Bring a script: SAGEMAKER_PROGRAM through the real sagemaker-training toolkit, under the same care for signals."""

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

TELLS_PY = """
import json, os, sys
with open("/opt/ml/model/told.json", "w") as file:
    json.dump({"argv": sys.argv[1:], "epochs": os.environ["SM_HP_EPOCHS"]}, file)
"""
TELLS_SH = """#!/bin/bash
python -c 'import json, os, sys
json.dump({"argv": sys.argv[1:], "epochs": os.environ["SM_HP_EPOCHS"]}, open("/opt/ml/model/told.json", "w"))' "$@"
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
    time.sleep(0.05)  # short: a signal just before a sleep is seen after it
"""
SAVES_SH = """#!/bin/bash
trap 'sleep 1; echo -n "so far" >/opt/ml/model/saved; exit "$2"' TERM
echo ready
sleep 600 &
wait
"""


def start(image: Image, tree: Tree, script: str, text: str, **hyperparameters: Any) -> Running:
    """SAGEMAKER_PROGRAM in the environment, as `docker run -e` and AWS's newer SDK give it."""
    put(tree, script, text)
    tree.write_config(
        hyperparameters={name: json.dumps(value) for name, value in hyperparameters.items()},
        resources=RESOURCES,
        inputs={},
    )
    return launch(image, tree, environment={"SAGEMAKER_PROGRAM": script})


def launch(image: Image, tree: Tree, **options: Any) -> Running:
    """The toolkit looks up its host's name until the network knows it, so it needs one."""
    return image.start(["train"], tree=tree, network="bridge", hostname="algo-1", **options)


def put(tree: Tree, script: str, text: str) -> None:
    tree.code.mkdir(exist_ok=True)
    (tree.code / script).write_text(text)


def told(tree: Tree) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((tree.model / "told.json").read_text())
    return value


@pytest.mark.parametrize(("script", "text"), [("train.py", TELLS_PY), ("train.sh", TELLS_SH)], ids=KINDS)
def test_hyperparameters_become_the_scripts_flags(script: str, text: str, image: Image, tree: Tree) -> None:
    ended = start(image, tree, script, text, epochs=3, nombre="barco azul").end()
    assert ended.code == 0, ended.log
    assert told(tree) == {"argv": FLAGS, "epochs": "3"}
    assert tree.failure is None


@pytest.mark.parametrize("encode", [json.dumps, str], ids=["json", "plain"])
def test_the_script_can_be_named_by_a_hyperparameter(encode: Any, image: Image, tree: Tree) -> None:
    """As AWS's SDKs send it; what begins with sagemaker_ is theirs, not the script's."""
    put(tree, "train.py", TELLS_PY)
    values = {"sagemaker_program": "train.py", "sagemaker_region": "us-east-1", "epochs": 3, "nombre": "barco azul"}
    tree.write_config(
        hyperparameters={name: encode(value) for name, value in values.items()}, resources=RESOURCES, inputs={}
    )
    ended = launch(image, tree).end()
    assert ended.code == 0, ended.log
    assert told(tree) == {"argv": FLAGS, "epochs": "3"}


@pytest.mark.parametrize("way", ["hyperparameter", "environment"])
def test_the_script_can_come_in_an_archive(way: str, image: Image, tree: Tree, tmp_path: Path) -> None:
    """As AWS's SDKs bring it, one in each way: a tar.gz, on S3 there, and a path here."""
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "train.py").write_text(TELLS_PY)
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
    assert told(tree) == {"argv": FLAGS, "epochs": "3"}


@pytest.mark.parametrize("way", ["hyperparameter", "environment"])
def test_an_archive_that_is_not_there_is_named_first(way: str, image: Image, tree: Tree) -> None:
    tree.write_config(hyperparameters=ARCHIVE if way == "hyperparameter" else {}, resources=RESOURCES, inputs={})
    environment = {name.upper(): value for name, value in ARCHIVE.items()} if way == "environment" else {}
    ended = launch(image, tree, environment=environment).end()
    assert ended.code != 0, ended.log
    assert ARCHIVE["sagemaker_submit_directory"] in (tree.failure or "").splitlines()[0], tree.failure


@pytest.mark.parametrize(
    ("script", "text"), [("train.py", "raise SystemExit(7)"), ("train.sh", "#!/bin/sh\nexit 7\n")], ids=KINDS
)
def test_the_scripts_exit_status_survives(script: str, text: str, image: Image, tree: Tree) -> None:
    ended = start(image, tree, script, text).end()
    assert ended.code == 7, ended.log
    assert tree.failure


def test_the_scripts_exception_is_the_first_line_of_the_failure_file(image: Image, tree: Tree) -> None:
    text = "import sys\ndef leer():\n    raise ValueError('no hay datos en el puerto')\nleer()\n"
    ended = start(image, tree, "train.py", text).end()
    assert ended.code == 1, ended.log
    assert tree.failure is not None
    assert tree.failure.splitlines()[0] == "ValueError: no hay datos en el puerto"


@pytest.mark.parametrize(("script", "text"), [("train.py", SAVES_PY), ("train.sh", SAVES_SH)], ids=KINDS)
@pytest.mark.parametrize("code", [0, 5])
def test_docker_stop_lets_the_script_save_and_its_exit_status_counts(
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


def test_a_script_that_does_not_heed_term_is_stopped(image: Image, tree: Tree) -> None:
    running = start(image, tree, "train.py", "import time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    running.wait_for_line("ready")
    assert running.stop() < SOON_S
    assert running.end().code == 143
    assert (tree.failure or "").startswith("stopped by SIGTERM")


def test_a_script_that_is_not_there_is_said_so(image: Image, tree: Tree) -> None:
    put(tree, "other.py", "")
    tree.write_config(hyperparameters={}, resources=RESOURCES, inputs={})
    ended = launch(image, tree, environment={"SAGEMAKER_PROGRAM": "train.py"}).end()
    assert_told_plainly(ended, "train.py")


def test_a_plain_docker_run_of_a_script_needs_no_platform_files(image: Image, tree: Tree) -> None:
    """A rented box has no resourceconfig.json; either the script runs, or the job layer says what to mount."""
    put(tree, "train.py", "import sys; open('/opt/ml/model/ran', 'w').close()")
    started = time.monotonic()
    ended = image.run(["train"], tree=tree, network="bridge", environment={"SAGEMAKER_PROGRAM": "train.py"})
    assert time.monotonic() - started < SOON_S
    if ended.code == 0:
        assert (tree.model / "ran").exists()
    else:
        assert_told_plainly(ended, "resourceconfig.json")


def assert_told_plainly(ended: Ended, *says: str) -> None:
    """A person's mistake: status 2, the message first in the failure file, no traceback."""
    assert ended.tree is not None
    assert ended.code == 2, ended.log
    first = (ended.tree.failure or "").splitlines()[0]
    for part in says:
        assert part in first
    assert not re.search("Traceback", ended.log), ended.log
