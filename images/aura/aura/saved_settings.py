"""The settings of a run, saved in its checkpoints: a resume takes those that it is not given from there.

The guide starts with `--epochs 3 --model_preset auto` and resumes without them. A default that decides the run would
otherwise differ from what the run started with. A setting that is given counts as given, and the run fingerprint
refuses it if it differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aura.config import AuraConfig
from aura.init_from import peek_start
from aura.planning import presets
from aura.resolve import ResolvedConfig, trained_vocab_size
from estiba.config import flag_of
from estiba.log import get_logger
from estiba.training.schedule import Schedule

logger = get_logger(__name__)

NOT_SAVED = frozenset(
    "dataset_path output_dir checkpoint_path resume_from accept_changed_plan device processes num_workers".split()
)
"""Where things are and how many processes work, which may differ on every host."""
SIZES = ("embed_size", "num_layers", "num_heads", "seq_length", "dropout", "tie_embeddings")
OF_PRESET = frozenset(
    (*SIZES, "batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "weight_decay")
) | {"save_steps", "eval_steps"}
REPLACES = {
    "epochs": "max_steps",
    "max_steps": "epochs",
    "tokenizer_name_or_path": "vocab_size",
    "vocab_size": "tokenizer_name_or_path",
}
"""A setting that is given replaces the other one, which is then not taken from the checkpoint."""


def settings_of(config: AuraConfig, resolved: ResolvedConfig, schedule: Schedule, precision: str) -> dict[str, Any]:
    """Return `values`, all settings with defaults filled in, and `given`, the names of those that were given."""
    values = config.model_dump(exclude=set(NOT_SAVED)) | {
        **{name: getattr(resolved.model, name) for name in SIZES},
        "model_preset": resolved.preset.name,
        "batch_size": resolved.batch_size,
        "gradient_accumulation_steps": resolved.accumulation_steps,
        "learning_rate": schedule.peak,
        "warmup_steps": schedule.warmup_steps,
        "weight_decay": resolved.weight_decay,
        "save_steps": resolved.save_steps,
        "eval_steps": config.eval_steps or resolved.save_steps,
        "vocab_size": trained_vocab_size(config, resolved.preset),
        "precision": precision,
    }
    return {"given": sorted(config.model_fields_set - NOT_SAVED), "values": values}


def hyperparameters(settings: Mapping[str, Any], resolved: ResolvedConfig, schedule: Schedule) -> dict[str, Any]:
    """Return the contents of model_config.json: the model's sizes and everything that it was trained with."""
    model = resolved.model
    return {
        **settings["values"],
        **dataclasses.asdict(model),
        "gradient_checkpointing": resolved.checkpointing is not None,
        "activation_checkpointing": resolved.checkpointing,
        "steps": schedule.steps,
        "world_size": resolved.world_size,
        "sequences_per_step": resolved.sequences_per_step,
        "tokens_per_step": resolved.tokens_per_step,
        "parameters": model.parameters,
        "parameters_without_embeddings": model.parameters_without_embeddings,
    }


def with_saved_settings(config: AuraConfig, folder: Path, upload: str | None) -> AuraConfig:
    """Return `config` with the settings that were not given taken from the checkpoint that the run resumes from."""
    found = peek_start(config.resume_from, folder, upload)
    saved = None if found is None else _saved_in(found[1])
    if found is None or saved is None:
        return config
    given = set(config.model_fields_set)
    if config.model_preset == "auto":
        given.discard("model_preset")  # auto chose when the run started
    left_out = given | {REPLACES[name] for name in given & set(REPLACES)}
    preset = saved["values"].get("model_preset")
    if "model_preset" in given and presets.find(config.model_preset, memory_bytes=None).name != preset:
        left_out |= OF_PRESET
    values = saved["values"]
    taken = {name: values[name] for name in values if name in AuraConfig.model_fields and name not in left_out}
    named = [name for name in saved["given"] if name in taken]
    if named:
        flags = " ".join(f"{flag_of(name)} {taken[name]}" for name in named)
        logger.info(f"{found[0]}: continuing with its settings {flags}")
    return AuraConfig.model_construct(_fields_set=config.model_fields_set | set(named), **{**dict(config), **taken})


def _saved_in(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings in a checkpoint's state. Earlier versions saved only the run fingerprint."""
    settings: dict[str, Any] | None = state.get("work", {}).get("settings")
    if settings is not None:
        return settings
    if "plan" not in state:  # weights alone
        model = state.get("model_config")
        return (
            None if model is None else {"given": [], "values": {name: model[name] for name in SIZES if name in model}}
        )
    plan = state["plan"]
    schedule, model = plan["schedule"], plan["model"]
    values = {name: model[name] for name in SIZES} | {
        "learning_rate": schedule["peak"],
        "warmup_steps": schedule["warmup_steps"],
        "lr_schedule": schedule["kind"],
        "max_steps": schedule["steps"],
        "seed": plan["seed"],
        "grad_clip": plan["clip"],
        "precision": plan["precision"],
        "optimizer": plan["optimizer"],
        "weight_decay": plan["weight_decay"],
    }
    return {"given": [], "values": values}
