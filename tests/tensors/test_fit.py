"""A training image in thirty lines: `fit` trains it, interrupted and resumed, to the bits of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba.checkpoint import format as ckpt_format

TOY = '''
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from estiba.platform import workload
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.config import MultiProcessTrainingConfig
from estiba.training.fit import Run, TrainingSetup, fit
from estiba.training.schedule import Schedule
from estiba.training.task import Sums, TrainTask
from estiba.training.trainer import Trainer


class ToyConfig(MultiProcessTrainingConfig):
    """Fit a line."""

    steps: int = 30
    """Steps to train."""
    pause_s: float = 0.0
    """Seconds to sleep in each step."""


class LineTask(TrainTask[torch.Tensor]):
    unit = "points"

    def __init__(self, config: ToyConfig, rank: int) -> None:
        torch.manual_seed(config.seed)
        self.config, self.rank = config, rank
        self.model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def batches(self, step: int) -> list[torch.Tensor]:
        return [torch.rand(16, 1, generator=torch.Generator().manual_seed(100 * step + self.rank))]

    def units_in(self, batch: torch.Tensor) -> int:
        return len(batch)

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        time.sleep(self.config.pause_s)
        return (model(batch) - 2 * batch).square().sum()

    def evaluate(self, model: torch.nn.Module) -> Iterator[Sums]:
        points = torch.linspace(0, 1, 32)[:, None]
        yield {"val_loss": ((model(points) - 2 * points).square().sum(), 32)}


def setup(run: Run[ToyConfig]) -> TrainingSetup[LineTask]:
    config = run.config
    trainer = config.trainer_config(schedule=Schedule(peak=0.01, steps=config.steps), evaluate_every=10, log_every=5)
    return TrainingSetup(task=LineTask(config, run.dist.rank), trainer=trainer, restored=run.restore())


def finish(run: Run[ToyConfig], task: LineTask, trainer: Trainer) -> None:
    weights = {name: tensor.tolist() for name, tensor in task.model.state_dict().items()}
    (run.output / "weights.json").write_text(json.dumps({"step": trainer.step, **weights}))


def train(config: ToyConfig, job: Job, stop: Stop) -> None:
    torch.set_num_threads(1)
    describe = lambda run, task, trainer: [f"a line in {trainer.amp.name}, {run.dist.world_size} ranks"]
    fit(config, job, stop, output=job.output_dir, setup=setup, finish=finish, describe=describe)


if __name__ == "__main__":
    workload.main(ToyConfig, "line.__main__:train")
'''


class Image:
    """The toy as an image's package, run as `python -m line` below one root."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "ml"
        self.output = self.root / "output/data"
        self.failure = self.root / "output/failure"
        package = folder / "code/line"
        package.mkdir(parents=True, exist_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(TOY)
        path = [str(package.parent), *(path for path in sys.path if path)]
        self.environ = {**os.environ, "ESTIBA_ROOT": str(self.root), "PYTHONPATH": os.pathsep.join(path)}

    def start(self, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "line", *flags],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *flags: str) -> tuple[int, str]:
        process = self.start(*flags)
        _, err = process.communicate(timeout=120)
        return process.returncode, err

    def weights(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "weights.json").read_text())
        return found

    def rows(self) -> list[dict[str, Any]]:
        lines = (self.output / "metrics/metrics.jsonl").read_text().splitlines()
        steady = ("step", "train_loss", "val_loss", "lr", "points")
        return [{name: row[name] for name in steady if name in row} for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Image:
    image = Image(tmp_path_factory.mktemp("undisturbed"))
    code, err = image.run()
    assert (code, err) == (0, "a line in float32, 1 ranks\n")
    return image


def test_a_run_that_is_stopped_and_killed_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, undisturbed: Image, until: Callable[[Callable[[], Any]], Any]
) -> None:
    image = Image(tmp_path)
    checkpoints = image.root / "checkpoints"
    slow = ("--pause-s", "0.05", "--save-steps", "4")

    process = image.start(*slow)
    until(lambda: checkpoints.exists() and ckpt_format.checkpoint_names(checkpoints))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM: everything up to step" in err
    assert image.failure.read_text().startswith("stopped by SIGTERM: everything up to step")
    first = ckpt_format.checkpoint_names(checkpoints)[0]

    process = image.start(*slow)
    until(lambda: ckpt_format.checkpoint_names(checkpoints)[0] > first)
    process.kill()
    process.communicate(timeout=60)
    assert not (image.output / "weights.json").exists()

    image.failure.unlink()  # as PID 1 does at its start
    code, err = image.run("--save-steps", "4")
    step = int(ckpt_format.checkpoint_names(checkpoints)[1].split("-")[1])
    assert code == 0 and "a line in float32, 1 ranks\nresuming at step " in err and step > 0, err
    assert image.weights() == undisturbed.weights()
    assert image.rows() == undisturbed.rows()
    assert not image.failure.exists()


def test_a_complete_run_that_is_started_again_writes_its_artifacts_again(undisturbed: Image) -> None:
    before = undisturbed.weights()
    (undisturbed.output / "weights.json").unlink()
    code, err = undisturbed.run()
    assert code == 0 and "resuming at step 30 of 30" in err
    assert undisturbed.weights() == before


def test_settings_of_every_training_image_are_flags_of_this_one(tmp_path: Path, undisturbed: Image) -> None:
    code, err = Image(tmp_path).run("--save-steps", "10", "--keep-last", "2", "--keep-best", "1", "--seed", "7")
    assert code == 0, err
    names = ckpt_format.checkpoint_names(tmp_path / "ml/checkpoints")
    assert names[0] == "step-00000030" and ckpt_format.verify(tmp_path / "ml/checkpoints" / names[0]).kind == "final"
    assert Image(tmp_path).weights() != undisturbed.weights()

    code, err = Image(tmp_path).run("--seed", "8")
    assert code == 2 and "seed: saved 7, now 8" in err and "--accept-changed-plan" in err
    code, err = Image(tmp_path).run("--device", "cuda:63")
    assert code == 2 and err.startswith("error: --device cuda:63: ")


def test_two_processes_train_one_model_and_one_writes_its_artifacts(tmp_path: Path) -> None:
    image = Image(tmp_path)
    code, err = image.run("--processes", "2", "--device", "cpu")
    assert code == 0, err
    assert err.splitlines()[0] == "2 processes, one for each device"
    assert [line for line in err.splitlines() if "line in" in line] == ["a line in float32, 2 ranks"]
    assert image.weights()["step"] == 30
    manifest = ckpt_format.verify(image.root / "checkpoints/step-00000030")
    assert manifest.ranks == 2
    assert [row["points"] for row in image.rows() if "points" in row] == [32 * step for step in range(5, 31, 5)]


def test_a_job_of_several_hosts_is_refused_with_the_remedy(tmp_path: Path) -> None:
    image = Image(tmp_path)
    (image.root / "input/config").mkdir(parents=True)
    hosts = {"hosts": ["algo-1", "algo-2"], "current_host": "algo-1"}
    (image.root / "input/config/resourceconfig.json").write_text(json.dumps(hosts))
    code, err = image.run()
    assert code == 2 and "2 hosts: this image trains on the GPUs of one host; set InstanceCount to 1" in err


def test_a_second_job_in_one_output_directory_is_refused(
    tmp_path: Path, until: Callable[[Callable[[], Any]], Any]
) -> None:
    """With checkpoint directories of their own, two runs interleaved their logs."""
    image = Image(tmp_path)
    first = image.start("--pause-s", "5")
    try:
        until(lambda: (image.output / "metrics").exists())
        code, err = image.run("--checkpoint-path", str(tmp_path / "other"))
        assert code == 1 and "output/data: another job is writing its outputs there" in err and "--output-dir" in err
    finally:
        first.kill()
        first.communicate()
    code, err = image.run("--steps", "2")
    assert code == 0, err
    assert not [path for path in image.output.iterdir() if path.name.startswith(".")]
