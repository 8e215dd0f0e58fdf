"""The whole job: text in, a model out; stopped anywhere, it ends with the same bits."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsal import SMALL, Place, outcome, run, start, stopped_at, write_text

from aura.export import load_final_model
from aura.tokenizer import load_tokenizer
from estiba.errors import CheckpointError, ConfigError, Interrupted
from estiba.stop import Stop


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "a.txt")


@pytest.fixture(scope="session")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    run(root, text)
    return root


@pytest.fixture(scope="session")
def steps(whole: Path) -> int:
    found: int = json.loads((whole / "model/results.json").read_text())["steps"]
    return found


def an_epoch(steps: int) -> int:
    """The step at whose end the first epoch is over, or just about to be."""
    return steps // 3


# --- outputs -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_all_that_the_guide_names(whole: Path, steps: int) -> None:
    folder = whole / "model"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"training_log.csv", "final_model.pt", "model_config.json", "loss.png", "samples.txt"} <= names
    assert {"tokenizer/tokenizer.json", "hf/config.json", "hf/model.safetensors", "metrics/metrics.jsonl"} <= names
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert any(name.startswith("metrics/tensorboard/events.out.tfevents") for name in names)
    model, at = load_final_model(folder / "final_model.pt")
    assert at == steps
    assert set(torch.load(folder / "final_model.pt", weights_only=True)) == {"model_state_dict", "model_config", "step"}
    assert load_tokenizer(str(folder / "tokenizer")).vocab_size <= model.shape.vocab_size


def test_the_log_has_a_row_a_line_and_its_losses_fall(whole: Path) -> None:
    with open(whole / "model/training_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["epoch", "train_loss", "val_loss"]
    validation = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    training = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(validation) >= 4
    assert len(training) >= 6
    assert validation[-1] < validation[0] - 0.5
    assert training[-1] < training[0] - 0.5


def test_a_run_that_is_complete_only_writes_its_outputs_again(whole: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    run(tmp_path, text)
    assert outcome(tmp_path) == outcome(whole)


# --- stopped and resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(Place(step=3, poll=0), Place(step=16, poll=1), id="mid-epoch, then between two micro-batches"),
        pytest.param(Place(step=6, in_evaluation=True), Place(step=12, in_evaluation=True), id="in evaluations"),
        pytest.param(Place(step=-1), Place(step=-2), id="at the end of an epoch, and of the next"),
        pytest.param(Place(step=13, poll=0), Place(step=13, poll=0), id="twice in the same step"),
    ],
)
def test_a_run_stopped_twice_ends_with_the_same_bits(
    first: Place, second: Place, whole: Path, steps: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on a new host each time: of the first attempts only the checkpoint directory is left."""
    root = tmp_path / "0"
    for attempt, place in enumerate((first, second), start=1):
        if place.step < 0:
            place = Place(step=-place.step * an_epoch(steps), poll=0)
        error = stopped_at(place, root, text, monkeypatch)
        # A stop in the last of two micro-batches is seen when the step is done.
        assert f"step {place.step + place.poll} is saved" in str(error), str(error)
        shutil.copytree(root / "checkpoints", tmp_path / str(attempt) / "checkpoints")
        root = tmp_path / str(attempt)
    run(root, text)
    assert outcome(root) == outcome(whole)


def test_a_killed_run_on_a_new_host_ends_with_the_same_bits(whole: Path, text: Path, tmp_path: Path) -> None:
    root = tmp_path / "0"
    for attempt in (1, 2):
        process = start(root, text)
        enough = attempt * 7
        deadline = time.monotonic() + 60
        while not any(int(path.name[5:13]) >= enough for path in root.glob("checkpoints/step-*")):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.wait()
        shutil.copytree(root / "checkpoints", tmp_path / str(attempt) / "checkpoints")
        root = tmp_path / str(attempt)
    process = start(root, text)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    assert "resuming at step" in out
    assert outcome(root) == outcome(whole)


def test_two_processes_killed_and_resumed_end_with_the_bits_of_two_that_were_not(text: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"processes": 2, "epochs": 2, "sample_prompt": ""}
    process = start(tmp_path / "whole", text, **changes)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    process = start(tmp_path / "killed", text, **changes)
    while not list((tmp_path / "killed").glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been at its end already
        assert process.returncode == 143, out
        process = start(tmp_path / "killed", text, **changes)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_tokenizer_that_does_not_verify_is_made_again(whole: Path, text: Path, tmp_path: Path) -> None:
    """It lies beside the checkpoints, and what is copied about can be torn like them."""
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    (kept,) = (tmp_path / "checkpoints").glob("tokenizer-300-*")
    data = bytearray((kept / "tokenizer.json").read_bytes())
    data[len(data) // 2] ^= 1
    (kept / "tokenizer.json").write_bytes(data)
    run(tmp_path, text)
    assert outcome(tmp_path) == outcome(whole)
    assert (tmp_path / "checkpoints" / f"bad-{kept.name}").exists()
    assert kept.exists()


# --- resume_from ---------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_a_file_that_resume_from_takes(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = stopped_at(Place(step=10, signum=signal.SIGINT), tmp_path, text, monkeypatch)
    assert error.exit_code == 130
    (left,) = (tmp_path / "model").glob("interrupt-step-*.pt")
    content = torch.load(left, weights_only=True)
    assert {"step", "model_state_dict", "optimizer_state_dict"} <= set(content)
    assert left.name == f"interrupt-step-{content['step']}.pt"
    elsewhere = tmp_path / "elsewhere"
    run(elsewhere, text, resume_from=str(left))
    assert outcome(elsewhere) == outcome(whole)


def test_a_run_that_began_at_a_checkpoint_and_was_stopped_does_not_begin_there_again(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = sorted((whole / "checkpoints").glob("step-*"))[0]
    changes = {"resume_from": str(origin)}
    stopped_at(Place(step=int(origin.name[5:]) + 4), tmp_path, text, monkeypatch, **changes)
    seen: list[int] = []
    from aura.work import Pretraining

    batches = Pretraining.batches
    monkeypatch.setattr(Pretraining, "batches", lambda self, step: seen.append(step) or batches(self, step))
    run(tmp_path, text, **changes)
    assert min(seen) == int(origin.name[5:]) + 4
    assert outcome(tmp_path) == outcome(whole)


def test_resume_from_does_not_pass_over_newer_work(whole: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    older = sorted((whole / "checkpoints").glob("step-*"))[0]
    with pytest.raises(ConfigError, match=r"newer checkpoints of another run.*--checkpoint-path"):
        run(tmp_path, text, resume_from=str(older))


def test_weights_alone_begin_a_new_run(whole: Path, text: Path, tmp_path: Path) -> None:
    run(tmp_path, text, resume_from=str(whole / "model/final_model.pt"), max_steps=4, learning_rate=1e-5)
    rows = (tmp_path / "model/training_log.csv").read_text().splitlines()
    last = [float(line.split(",")[1]) for line in (whole / "model/training_log.csv").read_text().splitlines()[1:-1]
            if line.split(",")[1]][-1]  # fmt: skip
    assert float(rows[1].split(",")[1]) < last + 0.5


@pytest.mark.parametrize("what", ["nothing there", "not torch", "another model", "an empty directory"])
def test_what_cannot_be_resumed_from_is_refused(what: str, whole: Path, text: Path, tmp_path: Path) -> None:
    path, changes = tmp_path / "x.pt", {}
    if what == "not torch":
        path.write_bytes(b"not a checkpoint")
    elif what == "another model":
        path, changes = whole / "model/final_model.pt", {"embed_size": 64}
    elif what == "an empty directory":
        path = tmp_path / "empty"
        path.mkdir()
    with pytest.raises((ConfigError, CheckpointError), match=str(path.name)) as caught:
        run(tmp_path / "run", text, resume_from=str(path), **changes)
    assert "give" in str(caught.value) or "export it again" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": 0.001}, "schedule.peak"),
        ({"seed": 43}, "seed"),
        ({"batch_size": 8}, "sequences_per_step"),
        ({"dropout": 0.3}, "model.dropout"),
    ],
)
def test_a_changed_plan_is_refused_by_name(
    change: dict[str, Any], says: str, whole: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=rf"another plan.*{says}: saved .*now .*--accept-changed-plan"):
        run(tmp_path, text, **change)


def test_a_longer_run_goes_on_where_it_is_accepted(whole: Path, steps: int, text: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    run(tmp_path, text, epochs=4, accept_changed_plan=True)
    assert json.loads((tmp_path / "model/results.json").read_text())["steps"] > steps


# --- places --------------------------------------------------------------------------------------------------------


def test_everything_can_be_on_s3_and_a_new_host_goes_on(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3server import s3_server

    with s3_server() as s3:
        s3.make_bucket("aura")
        for name, value in s3.environ.items():
            monkeypatch.setenv(name, value)
        from estiba.store import open_store

        open_store("s3://aura/in").put_file("a.txt", text)
        places = {"checkpoint_path": "s3://aura/ck", "output_dir": "s3://aura/out"}
        for host in ("0", "1"):
            (tmp_path / host).mkdir()
            monkeypatch.setenv("TMPDIR", str(tmp_path / host))
            monkeypatch.setattr("tempfile.tempdir", None)
            if host == "0":
                stopped_at(Place(step=9), tmp_path / host, Path("s3://aura/in/"), monkeypatch,
                           dataset_path="s3://aura/in/a.txt", **places)  # fmt: skip
            else:
                run(tmp_path / host, Path(), dataset_path="s3://aura/in/a.txt", **places)
        model = open_store("s3://aura/out").read("final_model.pt")
    assert model == (whole / "model/final_model.pt").read_bytes()


def test_two_jobs_in_one_checkpoint_directory_are_refused(text: Path, tmp_path: Path) -> None:
    process = start(tmp_path, text, epochs=2000)
    try:
        while not list(tmp_path.glob("checkpoints/step-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        second = start(tmp_path, text)
        out, _ = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "another job is using this checkpoint directory" in out
    finally:
        process.kill()
        process.communicate()


def test_a_stop_before_the_first_step_says_so(text: Path, tmp_path: Path) -> None:
    stop = Stop()
    stop.request("the test")
    with pytest.raises(Interrupted, match="run the same command again"):
        run(tmp_path, text, stop)


# --- commands ------------------------------------------------------------------------------------------------------


def aura(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aura", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_checkpoint_can_be_exported_in_every_form(whole: Path, text: Path, tmp_path: Path) -> None:
    newest = sorted((whole / "checkpoints").glob("step-*"))[-1]
    for target in ("checkpoint-step-9.pt", "hf", "dcp"):
        form = ["--form", "dcp"] if target == "dcp" else []
        done = aura("export", "--checkpoint", whole / "checkpoints", "--to", tmp_path / target, *form)
        assert done.returncode == 0, done.stderr
    content = torch.load(tmp_path / "checkpoint-step-9.pt", weights_only=True)
    assert content["step"] == int(newest.name[5:])
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(20)[None] % 50
    model, _ = load_final_model(whole / "model/final_model.pt")
    torch.testing.assert_close(hf(tokens).logits, model(tokens), rtol=0, atol=1e-5)
    state: dict[str, Any] = {"model": {name: torch.zeros_like(value) for name, value in model.state_dict().items()}}
    import torch.distributed.checkpoint as dcp

    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, value in model.state_dict().items():
        assert torch.equal(state["model"][name], value)
    run(tmp_path / "again", text, resume_from=str(tmp_path / "checkpoint-step-9.pt"))
    assert outcome(tmp_path / "again") == outcome(whole)


def test_a_finished_model_writes_on(whole: Path) -> None:
    done = aura("sample", "--model-dir", whole / "model", "--prompt", "el barco", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("el barco")


def test_a_tokenizer_is_trained_by_command_and_used(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    done = aura("tokenizer", "train", "--dataset-path", text, "--vocab-size", "310", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(str(folder)).vocab_size <= 310
    run(tmp_path / "run", text, tokenizer_name_or_path=str(folder), vocab_size=None, max_steps=2)
    assert "tokenizer_name_or_path" not in SMALL


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plna",), "unknown command 'plna'"),
        (("sample", "--model-dir", "/nowhere"), "final_model.pt"),
        (("export", "--checkpoint", "/nowhere", "--to", "x.pt"), "no such directory"),
        (("tokenizer", "train", "--dataset-path", "/nowhere.txt", "--output-dir", "/tmp/never"), "no such file"),
    ],
)
def test_a_wrong_command_is_told_in_one_message(arguments: tuple[str, ...], says: str) -> None:
    done = aura(*arguments)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_guides_entry_point_is_the_same_job() -> None:
    """`train_tensordock.py` lies beside the package, in the image and in the checkout."""
    import aura as package

    script = Path(package.__file__).resolve().parents[1] / "train_tensordock.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dataset-path" in done.stdout
