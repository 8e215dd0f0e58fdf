"""The training run: text to tokens to steps, with what is said and written on the way."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aura.choices import Choices, choose, device_of, preset_of, schedule_of, sizes_of, tokenizer_of
from aura.config import AuraConfig
from aura.data import Corpus, prepare
from aura.model import Aura
from aura.optimizer import make_optimizer
from aura.origin import find_origin
from aura.outcome import finish, interrupted, sample_lines
from aura.sample import sample
from aura.tokenizer import Tokenizer
from estiba.checkpoint.retention import Retention
from estiba.checkpoint.saver import Checkpoints
from estiba.contract import Job
from estiba.errors import ConfigError, Interrupted
from estiba.gpus import find_device
from estiba.loop.history import History
from estiba.loop.loop import Loop
from estiba.loop.settings import Settings
from estiba.loop.work import Sums, Work
from estiba.places import checkpoint_places, writable
from estiba.ranks import Ranks
from estiba.stop import Stop, say
from estiba.store import FileStore, open_store

LOG_COLUMNS = ("epoch", "train_loss", "val_loss", "step", "lr", "grad_norm", "tokens")
"""Of training_log.csv: what is the same however often the run was interrupted. metrics/ has the rest."""


class Pretraining(Work[torch.Tensor]):
    """Next-token prediction on windows of packed text. A batch is int64[B, T + 1]."""

    unit = "tokens"

    def __init__(
        self,
        config: AuraConfig,
        choices: Choices,
        corpus: Corpus,
        tokenizer: Tokenizer,
        device: torch.device,
        rank: int,
        origin: str | None,
    ) -> None:
        self.config, self.choices, self.corpus, self.tokenizer = config, choices, corpus, tokenizer
        self.rank, self.device, self.origin = rank, device, origin
        self.aura = Aura(choices.shape, seed=config.seed, checkpointing=choices.checkpointing).to(device)
        self.model = self.aura
        self.optimizer = make_optimizer(
            self.aura,
            config.optimizer,
            lr=choices.learning_rate,
            weight_decay=choices.weight_decay,
            device=device,
        )
        self.flops_per_unit = choices.shape.flops_per_token()
        self.samples: list[list[Any]] = []
        """[step, text] of every evaluation."""

    def batches(self, step: int) -> Sequence[torch.Tensor]:
        share = self.choices.batch_size * self.choices.micro_batches
        first = step * self.choices.sequences_per_step + self.rank * share
        return self.corpus.train.take(first, share).split(self.choices.batch_size)

    def count(self, batch: torch.Tensor) -> int:
        return batch.shape[0] * (batch.shape[1] - 1)

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(batch[:, :-1], batch[:, 1:])
        return loss

    def evaluation(self, model: torch.nn.Module) -> Iterator[Sums]:
        del model  # without a wrapper: ranks may hold different numbers of batches
        size, count = self.choices.batch_size, self.choices.processes
        windows = self.corpus.validation
        for index in range(self.rank, min(-(-len(windows) // size), self.config.eval_batches), count):
            first = index * size
            batch = windows.take(first, min(size, len(windows) - first)).to(self.device)
            yield {"val_loss": (self.aura.loss(batch[:, :-1], batch[:, 1:]), self.count(batch))}

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        del metrics
        if self.config.sample_prompt:
            text = sample(
                self.aura, self.tokenizer, self.config.sample_prompt, max_new_tokens=self.config.sample_tokens
            )
            self.samples.append([step, text])
            say(sample_lines(step, text))
        return {}

    def fields(self, step: int) -> Mapping[str, Any]:
        return {"epoch": round(step * self.choices.sequences_per_step / len(self.corpus.train), 4)}

    def plan(self) -> Mapping[str, Any]:
        return {
            "data": self.corpus.identity,
            "tokenizer": self.tokenizer.identity,
            "sequences_per_step": self.choices.sequences_per_step,
            "model": dataclasses.asdict(self.choices.shape),
            "optimizer": self.config.optimizer,
            "weight_decay": self.choices.weight_decay,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"origin": self.origin, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]


def train(config: AuraConfig, job: Job, stop: Stop) -> None:
    """Run the job. Raises EstibaError: Interrupted when asked to stop, with everything that is safe in its message."""
    kept = "nothing was trained in this attempt, and what earlier ones saved is kept"
    device = device_of(config, _local_rank())
    ranks = Ranks.join(device.type)
    if job.host_count > 1:
        raise ConfigError(
            f"{job.host_count} hosts: aura trains on the GPUs of one; set InstanceCount to 1 and take a larger instance"
        )
    folder, upload = checkpoint_places(config.checkpoint_path, config.checkpoint_upload)
    output = _output_folder(config)
    checkpoints = Checkpoints(
        folder,
        retention=Retention(
            keep_last=config.keep_last, keep_every=config.keep_every, keep_best=config.keep_best, metric="val_loss"
        ),
        upload=upload,
        ranks=ranks,
    )
    preset = preset_of(config, device)
    sizes_of(config, preset, vocab_size=config.vocab_size or 512)  # what cannot be is told before text is read
    if not ranks.is_first:
        ranks.wait()  # for the first one's tokenizer and tokens
    tokenizer = stop.unless_stopped(lambda: tokenizer_of(config, preset, folder, may_train=ranks.is_first), kept)
    choices = choose(config, preset, tokenizer, device, ranks.count)
    corpus = prepare(
        config.dataset_path,
        tokenizer=tokenizer,
        folder=folder / "tokens",
        seq_length=choices.shape.seq_length,
        validation_split=config.validation_split,
        text_format=config.text_format,
        workers=config.num_workers,
        stop=stop,
        seed=config.seed,
    )
    if ranks.is_first:
        ranks.wait()
    settings = _settings(config, choices, corpus)
    found, weights, origin = stop.unless_stopped(lambda: find_origin(checkpoints, config.resume_from), kept)
    work = Pretraining(config, choices, corpus, tokenizer, device, ranks.rank, origin)
    if weights is not None:
        _load_weights(work.aura, weights, config.resume_from)
    history = History(
        output / "metrics" if ranks.is_first else None, csv_path=output / "training_log.csv", columns=LOG_COLUMNS
    )
    loop = Loop(work, settings, checkpoints=checkpoints, history=history, stop=stop, device=device, ranks=ranks)
    loop.resume(found)
    if ranks.is_first:
        say(_introduction(work, settings, loop, ranks))
    try:
        loop.run()
    except Interrupted as error:
        if error.signum == signal.SIGINT and ranks.is_first and loop.step:
            interrupted(loop, output, stop)
        raise
    finally:
        checkpoints.close(stop.seconds_left())
    if ranks.is_first:
        finish(work, loop, output, config.output_dir)
    ranks.leave()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _settings(config: AuraConfig, choices: Choices, corpus: Corpus) -> Settings:
    return Settings(
        schedule=schedule_of(config, choices, len(corpus.train)),
        seed=config.seed,
        clip=config.grad_clip,
        precision=config.precision,
        compile=config.compile,
        deterministic=config.deterministic,
        evaluate_every=config.eval_steps or choices.save_steps,
        save_every=choices.save_steps,
        save_every_s=config.save_every_s,
        log_every=config.log_interval,
        accept_changed_plan=config.accept_changed_plan,
    )


def _output_folder(config: AuraConfig) -> Path:
    """Where outputs are written; those for S3 go there at the end."""
    store = open_store(config.output_dir)
    folder = store.root if isinstance(store, FileStore) else Path(tempfile.mkdtemp(prefix="estiba-aura-"))
    return writable(folder, "--output-dir")


def _load_weights(model: Aura, weights: Mapping[str, torch.Tensor], place: str | None) -> None:
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ConfigError(
            f"--resume-from {place}: these are weights of another model ({lines[0][:300]}); give the same sizes and "
            "tokenizer, or leave --resume-from out"
        ) from None


def _introduction(work: Pretraining, settings: Settings, loop: Loop, ranks: Ranks) -> str:
    choices, shape, corpus = work.choices, work.choices.shape, work.corpus
    device = work.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        sheet = find_device(name)
        peak = f", {sheet.peak_flops / 1e12:.0f} TFLOP/s at best" if sheet else ""
        machine = f"{ranks.count} x {name}, {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB{peak}"
    else:
        machine = f"no GPU; CPU with {torch.get_num_threads()} threads" + (
            f" x {ranks.count}" if ranks.count > 1 else ""
        )
    total = settings.schedule.steps * choices.tokens_per_step
    how = "kept" if choices.checkpointing is None else f"computed again ({choices.checkpointing})"
    sizes = f"{choices.batch_size} x {choices.micro_batches} x {choices.processes} sequences"
    lines = [machine]
    lines.append(
        f"preset {choices.preset.name}: {shape.parameters / 1e6:.1f}M parameters, width {shape.embed_size}, "
        f"{shape.num_layers} layers, {shape.num_heads} heads, context {shape.seq_length}, "
        f"vocabulary {work.tokenizer.vocab_size}, {loop.mixed.name}, activations {how}"
    )
    lines.append(
        f"text: {corpus.documents:,} documents, {corpus.tokens:,} tokens, {corpus.tokens_per_word:.2f} a word; "
        f"{len(corpus.train):,} windows to train on, {len(corpus.validation):,} held out"
    )
    lines.append(
        f"{choices.tokens_per_step:,} tokens a step ({sizes}), {settings.schedule.steps:,} steps, "
        f"{total / shape.parameters:.2g} tokens a parameter"
    )
    if loop.step:
        lines.append(f"resuming at step {loop.step} of {settings.schedule.steps}")
    return "\n".join(lines)
