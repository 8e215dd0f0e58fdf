"""The whole job, from text to a model. Stopped anywhere and resumed, it ends with the same bits."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsal import SMALL, Place, job_at, outcome, run, start, stopped_at, write_text

from aura import saved_settings
from aura.artifacts.export import load_final_model
from aura.config import AuraConfig
from aura.tokenizer.loading import load_tokenizer
from aura.tokenizer.training import train_tokenizer
from aura.train import train
from estiba.checkpoint.restore import load as load_checkpoint
from estiba.errors import CheckpointError, ConfigError, DataError, Interrupted
from estiba.platform.stop import Stop


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "a.txt")


@pytest.fixture(scope="session")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    run(root, text)
    return root


@pytest.fixture(scope="session")
def steps(whole: Path) -> int:
    found: int = json.loads((whole / "model/results.json").read_text())["steps"]
    return found


def an_epoch(steps: int) -> int:
    """The last step of the first epoch, or the step before it."""
    return steps // 3


# --- outputs -------------------------------------------------------------------------------------------------------


def test_a_run_writes_every_file_that_the_guide_promises(whole: Path, steps: int) -> None:
    folder = whole / "model"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"training_log.csv", "final_model.pt", "model_config.json", "loss.png", "samples.txt"} <= names
    assert {"tokenizer/tokenizer.json", "hf/config.json", "hf/model.safetensors", "metrics/metrics.jsonl"} <= names
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert any(name.startswith("metrics/tensorboard/events.out.tfevents") for name in names)
    model, at = load_final_model(folder / "final_model.pt")
    assert at == steps
    assert set(torch.load(folder / "final_model.pt", weights_only=True)) == {"model_state_dict", "model_config", "step"}
    assert load_tokenizer(str(folder / "tokenizer")).vocab_size <= model.config.vocab_size


def test_the_log_has_both_losses_and_they_fall(whole: Path) -> None:
    with open(whole / "model/training_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["epoch", "train_loss", "val_loss"]
    validation = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    training = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(validation) >= 4
    assert len(training) >= 6
    assert validation[-1] < validation[0] - 0.5
    assert training[-1] < training[0] - 0.5


def test_a_complete_run_only_writes_its_outputs_again(whole: Path, text: Path, tmp_path: Path) -> None:
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
    """Each attempt runs on a new host, where only the checkpoint directory survived."""
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


def test_two_ranks_stopped_and_resumed_end_with_the_same_bits(text: Path, tmp_path: Path) -> None:
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


def test_a_tokenizer_that_does_not_verify_is_trained_again(whole: Path, text: Path, tmp_path: Path) -> None:
    """It is stored beside the checkpoints, and copying may damage it too."""
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


def test_ctrl_c_leaves_a_file_that_resume_from_accepts(
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


def test_a_stopped_run_that_used_resume_from_resumes_from_its_own_checkpoint(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = sorted((whole / "checkpoints").glob("step-*"))[0]
    changes = {"resume_from": str(origin)}
    stopped_at(Place(step=int(origin.name[5:]) + 1), tmp_path, text, monkeypatch, **changes)
    seen: list[int] = []
    from aura.task import PretrainingTask

    batches = PretrainingTask.batches
    monkeypatch.setattr(PretrainingTask, "batches", lambda self, step: seen.append(step) or batches(self, step))
    run(tmp_path, text, **changes)
    assert min(seen) == int(origin.name[5:]) + 1
    assert outcome(tmp_path) == outcome(whole)


def test_resume_from_is_an_error_if_newer_checkpoints_of_another_run_exist(
    whole: Path, text: Path, tmp_path: Path
) -> None:
    run(tmp_path, text, seed=5)
    older = sorted((whole / "checkpoints").glob("step-*"))[0]
    with pytest.raises(ConfigError, match=r"newer checkpoints of another run.*--checkpoint-path"):
        run(tmp_path, text, resume_from=str(older))


@pytest.mark.parametrize("named", ["its folder", "the guide's file", "a copy elsewhere"])
def test_an_older_step_of_the_same_run_can_be_resumed_from_and_later_ones_are_kept(
    named: str, whole: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    names = sorted(path.name for path in (whole / "checkpoints").glob("step-*"))
    older = names[0]
    place = {
        "its folder": tmp_path / "checkpoints" / older,
        "the guide's file": tmp_path / f"model/checkpoint-step-{int(older[5:])}.pt",
        "a copy elsewhere": whole / "checkpoints" / older,
    }[named]
    run(tmp_path, text, resume_from=str(place))
    assert outcome(tmp_path) == outcome(whole)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("superseded-*"))
    assert kept == [f"superseded-{name}" for name in names[1:]]
    for name in names[1:]:
        before = (whole / "checkpoints" / name / "model.safetensors").read_bytes()
        assert (tmp_path / "checkpoints" / f"superseded-{name}/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 0.001}, {"embed_size": 64, "accept_changed_plan": True}],
    ids=["refused", "impossible"],
)
def test_a_refused_resume_from_an_older_step_changes_no_checkpoint_and_no_output(
    changes: dict[str, Any], whole: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    older = next(name for name in names if name.startswith("step-"))
    with pytest.raises(ConfigError, match=r"schedule.peak|model.embed_size"):
        run(tmp_path, text, resume_from=str(tmp_path / "checkpoints" / older), **changes)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert outcome(tmp_path) == outcome(whole)


def test_a_step_that_is_not_kept_is_an_error_that_names_those_that_are(whole: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    steps = sorted(int(path.name[5:]) for path in (whole / "checkpoints").glob("step-*"))
    with pytest.raises(
        ConfigError, match=f"no checkpoint of step 3; kept are those of steps {', '.join(map(str, steps))}"
    ):
        run(tmp_path, text, resume_from=str(tmp_path / "model/checkpoint-step-3.pt"))


def test_weights_alone_start_a_new_run(whole: Path, text: Path, tmp_path: Path) -> None:
    run(tmp_path, text, resume_from=str(whole / "model/final_model.pt"), max_steps=4, learning_rate=1e-5)
    rows = (tmp_path / "model/training_log.csv").read_text().splitlines()
    last = [float(line.split(",")[1]) for line in (whole / "model/training_log.csv").read_text().splitlines()[1:-1]
            if line.split(",")[1]][-1]  # fmt: skip
    assert float(rows[1].split(",")[1]) < last + 0.5


@pytest.mark.parametrize("what", ["nothing there", "not torch", "another model", "an empty directory"])
def test_invalid_values_of_resume_from_are_errors(what: str, whole: Path, text: Path, tmp_path: Path) -> None:
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
    assert any(remedy in str(caught.value) for remedy in ("give", "export it again", "save it again"))


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"learning_rate": 0.001}, "schedule.peak"),
        ({"seed": 43}, "seed"),
        ({"batch_size": 8}, "sequences_per_step"),
        ({"dropout": 0.3}, "model.dropout"),
    ],
)
def test_a_changed_setting_is_an_error_that_names_it(
    change: dict[str, Any], setting: str, whole: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=rf"made with other settings.*{setting}: saved .*now .*--accept-changed-plan"):
        run(tmp_path, text, **change)


def test_a_longer_run_continues_with_accept_changed_plan(whole: Path, steps: int, text: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    run(tmp_path, text, epochs=4, accept_changed_plan=True)
    assert json.loads((tmp_path / "model/results.json").read_text())["steps"] > steps


def test_a_setting_that_is_not_given_on_a_resume_comes_from_the_checkpoint(
    whole: Path, text: Path, tmp_path: Path
) -> None:
    """Sizes, schedule, batch, seed, tokenizer and intervals: only the paths are given again."""
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    older = sorted((whole / "checkpoints").glob("step-*"))[0]
    config = AuraConfig(
        dataset_path=str(text),
        output_dir=str(tmp_path / "model"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        resume_from=str(tmp_path / "checkpoints" / older.name),
    )
    train(config, job_at(tmp_path), Stop())
    assert outcome(tmp_path) == outcome(whole)


def test_a_setting_that_is_given_again_may_be_the_same_in_other_words(
    whole: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    places = {"output_dir": str(tmp_path / "model"), "checkpoint_path": str(tmp_path / "checkpoints")}
    train(AuraConfig(dataset_path=str(text), model_preset="auto", epochs=3.0, **places), job_at(tmp_path), Stop())
    assert outcome(tmp_path) == outcome(whole)
    assert "--embed-size 32" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"model.embed_size: saved 32, now 192"):
        train(AuraConfig(dataset_path=str(text), model_preset="aura-tiny", **places), job_at(tmp_path), Stop())


def test_a_checkpoint_of_an_earlier_version_gives_what_its_fingerprint_has(whole: Path) -> None:
    state = load_checkpoint(sorted((whole / "checkpoints").glob("step-*"))[-1]).state
    del state["work"]["settings"]
    values = saved_settings._saved_in(state)["values"]
    wanted = {name: SMALL[name] for name in ("embed_size", "num_layers", "num_heads", "seq_length", "learning_rate")}
    assert {name: values[name] for name in wanted} == wanted
    assert (values["max_steps"], values["seed"], values["optimizer"]) == (43, 42, "adamw")


def test_sizes_and_vocabulary_cannot_be_accepted_and_a_dropout_can(whole: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    for change, name in (
        ({"embed_size": 64}, "model.embed_size"), ({"vocab_size": 310}, "tokenizer"),
        ({"num_heads": 4}, "model.num_heads"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"cannot continue with .*{name}: saved .*even by --accept-changed-plan"):
            run(tmp_path, text, accept_changed_plan=True, **change)
    run(tmp_path, text, accept_changed_plan=True, dropout=0.3)


def test_the_text_of_a_changed_digest_is_described(whole: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    more = write_text(tmp_path / "more.txt", lines=140)
    with pytest.raises(ConfigError, match=r"data: saved .*documents: saved 130, now 140; .*text_bytes: saved"):
        run(tmp_path, more)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_the_validation_loss_does_not_depend_on_the_micro_batch(
    batch_size: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    from aura.task import PretrainingTask

    evaluate = PretrainingTask.evaluate

    def counted(self: PretrainingTask, model: torch.nn.Module) -> Any:
        for sums in evaluate(self, model):
            seen.append(sums["val_loss"][1] // 32)
            yield sums

    monkeypatch.setattr(PretrainingTask, "evaluate", counted)
    settings = {"batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size, "eval_batches": 1}
    run(tmp_path, text, max_steps=1, epochs=1.0, validation_split=0.3, **settings)
    assert sum(seen) == 8


def test_what_is_held_out_and_not_seen_is_remarked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = write_text(tmp_path / "few.txt", lines=60)
    with pytest.raises(DataError, match=r"--validation-split 0.999 holds out all 60 documents.*--validation-split 0"):
        run(tmp_path / "all", few, validation_split=0.999)
    run(tmp_path / "warm", few, batch_size=16, gradient_accumulation_steps=2, epochs=1.0, warmup_steps=9)
    said = capfd.readouterr().err
    assert "--warmup-steps 9: the run has 1 steps" in said
    assert re.search(r"--epochs 1: 1 whole steps of 32 sequences see 0\.[5-8]\d epochs of \d+ windows", said), said


# --- places --------------------------------------------------------------------------------------------------------


def test_everything_can_be_on_s3_and_a_new_host_resumes(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3server import s3_server

    with s3_server() as s3:
        s3.make_bucket("aura")
        for name, value in s3.environ.items():
            monkeypatch.setenv(name, value)
        from estiba.storage import open_store

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


def test_two_jobs_in_one_checkpoint_directory_are_an_error(text: Path, tmp_path: Path) -> None:
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


def test_a_stop_before_the_first_step_says_how_to_resume(text: Path, tmp_path: Path) -> None:
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


def test_a_finished_model_generates_text(whole: Path) -> None:
    done = aura("sample", "--model-dir", whole / "model", "--prompt", "el barco", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("el barco")


def test_a_tokenizer_trained_by_the_command_can_be_used(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    done = aura("tokenizer", "train", "--dataset-path", text, "--vocab-size", "310", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(str(folder)).vocab_size <= 310
    run(tmp_path / "run", text, tokenizer_name_or_path=str(folder), vocab_size=None, max_steps=2)
    assert "tokenizer_name_or_path" not in SMALL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plna",), "unknown command 'plna'"),
        (("sample", "--model-dir", "/nowhere"), "final_model.pt"),
        (("export", "--checkpoint", "/nowhere", "--to", "x.pt"), "no such directory"),
        (("tokenizer", "train", "--dataset-path", "/nowhere.txt", "--output-dir", "/tmp/never"), "no such file"),
    ],
)
def test_a_wrong_command_ends_in_one_message(arguments: tuple[str, ...], message: str) -> None:
    done = aura(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_guides_command_trains_word_for_word(text: Path, tmp_path: Path) -> None:
    """The program is beside the package, and in the image also at the guide's path."""
    import aura as package

    folder = Path(package.__file__).resolve().parents[1]
    program = tmp_path / "AuraLLM/train_tensordock/train_tensordock.py"
    in_image = folder / "AuraLLM/train_tensordock/train_tensordock.py"
    program.parent.mkdir(parents=True)
    shutil.copy(in_image if folder == Path("/opt/estiba") else folder / "train_tensordock.py", program)
    shutil.copy(text, tmp_path / "corpus.txt")
    train_tokenizer(text.read_text().splitlines(), vocab_size=300, folder=tmp_path / "spanish-tokenizer")
    command = """AuraLLM/train_tensordock/train_tensordock.py \
        --dataset_path corpus.txt --output_dir aura_spanish \
        --tokenizer_name_or_path spanish-tokenizer --epochs 3 --model_preset auto \
        --gradient_checkpointing --log_interval 100"""
    done = subprocess.run(
        [sys.executable, *command.replace("\\\n", " ").split()],
        cwd=tmp_path,
        env={**os.environ, "ESTIBA_ROOT": str(tmp_path / "ml"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    output = tmp_path / "aura_spanish"
    names = {path.relative_to(output).as_posix() for path in output.rglob("*")}
    assert {"final_model.pt", "model_config.json", "training_log.csv", "tokenizer/tokenizer.json"} <= names
    assert json.loads((output / "model_config.json").read_text())["embed_size"] > 0


# --- the version before --------------------------------------------------------------------------------------------


def test_shards_and_checkpoints_keep_the_names_of_the_previous_version(whole: Path) -> None:
    """Otherwise its runs could not resume. The values come from running that version on the same text."""
    (shard,) = (whole / "checkpoints/tokens").glob("text-*/*.tokens")
    assert shard.name == "2499a26362b6a8b0c14107bd12a629b4.51fd10024308fbdf48c8f38651e58e43.tokens"
    state = load_checkpoint(sorted((whole / "checkpoints").glob("step-*"))[-1]).state
    assert set(state) == {"loop", "meter", "model", "optimizer", "plan", "random", "scaler", "work"}
    assert set(state["work"]) == {"origin", "samples", "settings"}  # the last is new, and an old one lacks it
    assert {name: value for name, value in state["plan"].items() if name not in ("tokenizer", "details")} == {
        "schedule": {"kind": "linear", "peak": 0.005, "steps": 43, "warmup_steps": 10, "floor": 0.0},
        "seed": 42, "clip": 1.0, "precision": "float32", "data": "8d562914be7c903c", "sequences_per_step": 8,
        "model": {
            "vocab_size": 320, "embed_size": 32, "num_layers": 1, "num_heads": 2, "seq_length": 32, "ff_size": 256,
            "dropout": 0.1, "rope_theta": 10000.0, "tie_embeddings": False,
        },
        "optimizer": "adamw", "weight_decay": 0.01,
    }  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in state["model"].items()} == {
        "embedding": (320, 32), "head": (320, 32), "norm.weight": (32,), "layers.0.qkv": (96, 32),
        "layers.0.out": (32, 32), "layers.0.gate_up": (512, 32), "layers.0.down": (32, 256),
        "layers.0.attention_norm.weight": (32,), "layers.0.ff_norm.weight": (32,),
    }  # fmt: skip
