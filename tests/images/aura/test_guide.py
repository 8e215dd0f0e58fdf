"""The guide's commands, word for word: a start, Ctrl+C, a resume, and the files that are left.

They run as an ordinary user without Docker: no /opt/ml, no PYTHONPATH, only the script in its folder.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import aura as package
from aura.tokenizer.training import train_tokenizer

WORDS = "el barco zarpa al alba con la bodega llena de trigo y vino hacia otro puerto del mar".split()
START = """python AuraLLM/train_tensordock/train_tensordock.py \
    --dataset_path /datasets/spanish_corpus/corpus.txt --output_dir /workspace/aura_runs/aura_spanish \
    --tokenizer_name_or_path spanish-tokenizer --epochs 3 --model_preset auto \
    --gradient_checkpointing --log_interval 100"""
RESUME = """python AuraLLM/train_tensordock/train_tensordock.py \
    --dataset_path /datasets/spanish_corpus/corpus.txt --output_dir /workspace/aura_runs/aura_spanish \
    --tokenizer_name_or_path spanish-tokenizer \
    --resume_from /workspace/aura_runs/aura_spanish/checkpoint-step-{step}.pt"""
SMALL = ("--save_steps", "3", "--validation_split", "0.05")
"""The only flags that the guide's lines do not have, for a run of a dozen steps."""
BLOCKED = """
import importlib.metadata, runpy, sys
real = importlib.metadata.version

def version(name):
    if name in ("obstore", "backports.zstd", "pydantic"):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

importlib.metadata.version = version
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CODE = Path(package.__file__).resolve().parents[1]


class Box:
    """A machine with the guide's folders below one of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "workspace/aura_runs/aura_spanish"
        if Path("/opt/estiba") == CODE:
            self.home, self.program = CODE, "AuraLLM/train_tensordock/train_tensordock.py"
        else:
            self.home, self.program = CODE, "train_tensordock.py"  # only the script's folder differs
        corpus = folder / "datasets/spanish_corpus/corpus.txt"
        corpus.parent.mkdir(parents=True)
        dice = random.Random(0)
        corpus.write_text("".join(" ".join(dice.choices(WORDS, k=dice.randint(4, 30))) + ".\n" for _ in range(350)))
        train_tokenizer(corpus.read_text().splitlines(), vocab_size=300, folder=folder / "spanish-tokenizer")
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "ESTIBA_"))},
            "ESTIBA_ROOT": "/proc/1/opt/ml",  # not there, and nobody can make it
            "OMP_NUM_THREADS": "1",
        }
        if self.home == Path("/opt/estiba"):
            self.environ["PYTHONPATH"] = os.environ["PYTHONPATH"]

    def start(self, command: str, *more: str) -> subprocess.Popen[str]:
        words = command.replace("AuraLLM/train_tensordock/train_tensordock.py", str(self.home / self.program)).split()
        words = [str(self.folder) + word if word.startswith(("/datasets", "/workspace")) else word for word in words]
        return subprocess.Popen(
            [sys.executable, *words[1:], *more],
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str, *more: str) -> str:
        process = self.start(command, *more)
        out, _ = process.communicate(timeout=280)
        assert process.returncode == 0, out
        return out

    def interrupt_after(self, step: int, command: str, *more: str) -> str:
        """Press Ctrl+C after a save at or behind `step`."""
        process = self.start(command, *more)
        deadline = time.monotonic() + 200
        while not any(step <= int(path.name[5:13]) for path in self.output.glob("checkpoints/step-*")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=100)
        assert process.returncode == 130, out
        return out

    def steps(self) -> list[int]:
        return sorted(int(path.name[5:13]) for path in self.output.glob("checkpoints/step-*"))

    def outcome(self) -> dict[str, bytes]:
        names = (
            "final_model.pt",
            "training_log.csv",
            "model_config.json",
            "tokenizer.json",
            "vocab.json",
            "samples.txt",
        )
        return {name: (self.output / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Box:
    box = Box(tmp_path_factory.mktemp("undisturbed"))
    box.run(START, *SMALL)
    return box


def test_the_guides_lines_run_from_start_over_ctrl_c_to_resume_and_final_files(
    undisturbed: Box, tmp_path: Path
) -> None:
    box = Box(tmp_path)
    out = box.interrupt_after(3, START, *SMALL)
    (left,) = box.output.glob("interrupt-step-*.pt")
    step = int(left.stem.rpartition("-")[2])
    assert {"step", "model_state_dict", "optimizer_state_dict"} <= set(torch.load(left, weights_only=True))
    assert f"{box.output}/checkpoint-step-N.pt names the one of step N" in out
    for name in ("tokenizer.json", "vocab.json", "model_config.json"):  # after Ctrl+C too
        assert (box.output / name).exists()
    assert 3 in box.steps() and step in box.steps()
    out = box.run(RESUME.format(step=3))  # an older step than the one that Ctrl+C saved
    assert "means the verified checkpoint of step 3" in out
    assert "--epochs 3.0" in out and "--gradient-checkpointing True" in out and "--log-interval 100" in out
    assert f"superseded-step-{step:08d}" in out and "resuming at step 3 of" in out
    assert box.outcome() == undisturbed.outcome()


@pytest.mark.slow
def test_the_last_checkpoint_of_an_interrupted_run_is_resumed_from_by_its_name(
    undisturbed: Box, tmp_path: Path
) -> None:
    box = Box(tmp_path)
    box.interrupt_after(3, START, *SMALL)
    assert box.steps()[-1] < 9
    box.interrupt_after(9, RESUME.format(step=box.steps()[-1]))
    box.run(RESUME.format(step=box.steps()[-1]))
    assert box.outcome() == undisturbed.outcome()


def test_the_files_are_the_guides(undisturbed: Box) -> None:
    output = undisturbed.output
    config = json.loads((output / "model_config.json").read_text())
    used = {
        "model_preset": "aura-tiny", "embed_size": 192, "epochs": 3.0, "batch_size": 8, "learning_rate": 0.002,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": True, "weight_decay": 0.01, "dropout": 0.0,
        "grad_clip": 1.0, "seed": 42, "lr_schedule": "linear", "log_interval": 100, "save_steps": 3,
        "validation_split": 0.05, "optimizer": "adamw", "precision": "float32",
        "tokenizer_name_or_path": "spanish-tokenizer",
    }  # fmt: skip
    assert {name: config[name] for name in used} == used
    assert config["warmup_steps"] == config["steps"] // 2
    assert config["vocab_size"] == 320 and config["steps"] >= 12
    vocabulary = json.loads((output / "vocab.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert vocabulary["</s>"] == tokenizer.eos_token_id and len(vocabulary) == len(tokenizer) == 300
    with open(output / "training_log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"] and row["val_loss"]]
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3]
    losses = [float(row["train_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True) and float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    assert not (output / "tokenizer.model").exists() and (output / "final_model.pt").exists()


def test_a_setting_that_is_given_on_resume_and_differs_is_refused(undisturbed: Box, tmp_path: Path) -> None:
    box = Box(tmp_path)
    shutil.copytree(undisturbed.output, box.output)
    process = box.start(RESUME.format(step=box.steps()[0]), "--learning_rate", "0.001", "--epochs", "3")
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert re.search(r"other settings: schedule.peak: saved 0.002, now 0.001\. Use", out), out


@pytest.mark.skipif(Path("/opt/estiba") == CODE, reason="an image has everything that the program needs")
def test_the_program_names_one_pip_command_for_what_is_missing(tmp_path: Path) -> None:
    """After the guide's installs: torch transformers datasets tqdm sentencepiece bitsandbytes."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(CODE / "train_tensordock.py"), "--epochs", "1"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr == "error: packages are missing; install them: pip install backports.zstd obstore 'pydantic>=2'\n"
    )
