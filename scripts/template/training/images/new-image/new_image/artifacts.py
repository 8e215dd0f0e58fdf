"""The results of a complete run: the model, its settings, results.json."""

from __future__ import annotations

import json
from typing import Any

from estiba import __version__
from estiba.checkpoint.exports import save_pt
from estiba.storage import FileStore
from estiba.training.fit import Run
from estiba.training.trainer import Trainer
from new_image.config import TextConfig
from new_image.task import LanguageTask


def write_artifacts(run: Run[TextConfig], task: LanguageTask, trainer: Trainer) -> None:
    """Write model.pt (a state dict), model_config.json and results.json, each of them whole or not at all."""
    config = run.config
    save_pt({name: tensor.cpu() for name, tensor in task.model.state_dict().items()}, run.output / "model.pt")
    architecture = {name: getattr(config, name) for name in ("hidden_size", "dropout", "seq_length")}
    _write_json(run, "model_config.json", architecture)
    results = {"status": "complete", "job": run.job.name, "version": __version__, "steps": trainer.step}
    _write_json(run, "results.json", results)


def _write_json(run: Run[TextConfig], name: str, content: dict[str, Any]) -> None:
    FileStore(run.output).write(name, (json.dumps(content, indent=2) + "\n").encode())
