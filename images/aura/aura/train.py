"""The training job: prepare the text, train, write the artifacts."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from aura.artifacts.export import write_json
from aura.artifacts.outputs import LOG_COLUMNS, write_artifacts, write_interrupt, write_tokenizer_files
from aura.config import AuraConfig
from aura.data.corpus import prepare
from aura.data.mirror import Mirror
from aura.init_from import find_start, load_weights, supersede_later
from aura.paths import with_checkpoint_path
from aura.planning import presets
from aura.resolve import gpu_memory_bytes, resolve, resolve_model, resolve_schedule, resolve_tokenizer
from aura.saved_settings import hyperparameters, settings_of, with_saved_settings
from aura.task import PretrainingTask
from estiba.checkpoint.restore import peek
from estiba.gpus import find_device
from estiba.paths import checkpoint_locations, local_output
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.storage import open_store
from estiba.training.fit import NOTHING_TRAINED, Run, TrainingSetup, fit
from estiba.training.precision import dtype_for
from estiba.training.trainer import Trainer


def train(config: AuraConfig, job: Job, stop: Stop) -> None:
    """Run the job. Raises EstibaError; Interrupted after a stop, whose message names what was saved."""
    config = with_checkpoint_path(config)
    folder, upload = checkpoint_locations(config.checkpoint_path, config.checkpoint_upload)
    if upload is not None:
        open_store(upload).answers()
    if upload == config.checkpoint_path:
        folder = folder / "unused"  # a copy of S3 may be of another history; S3 itself counts
    config = with_saved_settings(config, folder, upload)
    output = local_output(config.output_dir, "--output-dir")
    fit(
        config, job, stop, output=output, setup=setup, describe=describe, finish=write_artifacts,
        on_interrupt=write_interrupt,
    )  # fmt: skip


def setup(run: Run[AuraConfig]) -> TrainingSetup[PretrainingTask]:
    config, stop, folder = run.config, run.stop, run.checkpoints.folder
    preset = presets.find(config.model_preset, memory_bytes=gpu_memory_bytes(run.device))
    resolve_model(config, preset, vocab_size=config.vocab_size or 512)  # report impossible sizes before reading text
    with ExitStack() as kept, run.dist.main_first():
        if run.dist.is_main:
            mirror = Mirror(folder, run.checkpoints.upload)
            stop.unless_stopped(mirror.fetch, NOTHING_TRAINED)
            kept.callback(mirror.send)  # after a stop too: what is packed is kept
        tokenizer = stop.unless_stopped(
            lambda: resolve_tokenizer(config, preset, folder, saved_tokenizer(run)), NOTHING_TRAINED
        )
        resolved = resolve(
            config, preset, vocab_size=tokenizer.vocab_size, device=run.device, world_size=run.dist.world_size
        )
        corpus = prepare(
            config.dataset_path,
            tokenizer=tokenizer,
            folder=folder / "tokens",
            seq_length=resolved.model.seq_length,
            validation_split=config.validation_split,
            text_format=config.text_format,
            workers=config.num_workers,
            stop=stop,
            seed=config.seed,
        )
    schedule = resolve_schedule(config, resolved, len(corpus.train))
    precision = str(dtype_for(config.precision, run.device)).removeprefix("torch.")
    settings = settings_of(config, resolved, schedule, precision)
    trainer = config.trainer_config(
        schedule=schedule,
        clip=config.grad_clip,
        evaluate_every=config.eval_steps or resolved.save_steps,
        save_every=resolved.save_steps,
        log_every=config.log_interval,
    )
    start = stop.unless_stopped(lambda: find_start(run.checkpoints, config.resume_from), NOTHING_TRAINED)
    task = PretrainingTask(
        config, resolved, corpus, tokenizer, device=run.device, rank=run.dist.rank, origin=start.origin,
        settings=settings, total_steps=schedule.steps,
    )  # fmt: skip
    if start.weights is not None:
        load_weights(task.aura, start.weights, config.resume_from)

    def on_resumed() -> None:
        """Do what a run that is refused must not do, before the first step."""
        if run.dist.is_main:  # they are there however the run ends
            write_tokenizer_files(tokenizer, run.output)
            write_json(run.output / "model_config.json", hyperparameters(settings, resolved, schedule))
        if start.supersedes_later:
            assert start.restored is not None
            supersede_later(run.checkpoints, start.restored.step)

    return TrainingSetup(
        task=task, trainer=trainer, restored=start.restored, on_resumed=on_resumed, log_columns=LOG_COLUMNS
    )


def saved_tokenizer(run: Run[AuraConfig]) -> str | None:
    """Return the identity of the tokenizer that the run's newest checkpoint was trained with, or None."""
    found = peek(run.checkpoints.folder)
    return None if found is None else found[1]["plan"]["tokenizer"]


def describe(run: Run[AuraConfig], task: PretrainingTask, trainer: Trainer) -> list[str]:
    """Return the lines that introduce the run in the log."""
    resolved, model, corpus, world_size = task.resolved, task.resolved.model, task.corpus, run.dist.world_size
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name(run.device)
        spec = find_device(name)
        peak = f", peak {spec.peak_flops / 1e12:.0f} TFLOP/s" if spec else ""
        memory_bytes = torch.cuda.get_device_properties(run.device).total_memory
        machine = f"{world_size} x {name}, {memory_bytes / 1e9:.0f} GB{peak}"
    else:
        machine = f"no GPU; CPU with {torch.get_num_threads()} threads" + (f" x {world_size}" if world_size > 1 else "")
    steps = trainer.config.schedule.steps
    activations = "kept" if resolved.checkpointing is None else f"recomputed ({resolved.checkpointing})"
    size = (
        f"{model.parameters / 1e6:.1f}M parameters ({model.parameters_without_embeddings / 1e6:.1f}M without "
        f"embeddings), "
        f"width {model.embed_size}, {model.num_layers} layers, "
        f"{model.num_heads} heads, context {model.seq_length}"
    )
    words = f"{corpus.stats.documents:,} documents, {corpus.tokens:,} tokens, {corpus.tokens_per_word:.2f} a word"
    sequences = f"{resolved.batch_size} x {resolved.accumulation_steps} x {world_size} sequences"
    coverage = steps * resolved.tokens_per_step / model.parameters
    numerics = f"vocabulary {task.tokenizer.vocab_size}, {trainer.amp.name}, activations {activations}"
    checkpoints, output = run.checkpoints.upload or run.checkpoints.folder, run.config.output_dir.rstrip("/")
    return [
        machine,
        f"preset {resolved.preset.name}: {size}, {numerics}",
        f"text: {words}; {len(corpus.train):,} windows to train on, {len(corpus.validation):,} held out",
        f"checkpoints: {checkpoints}; --resume-from {output}/checkpoint-step-N.pt names the one of step N",
        f"{resolved.tokens_per_step:,} tokens a step ({sequences}), {steps:,} steps, {coverage:.2g} tokens a parameter",
    ]
