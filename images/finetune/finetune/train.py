"""The job: read the data, load the base model, train, write the artifacts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from estiba.log import get_logger
from estiba.paths import local_output
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.training.fit import NOTHING_TRAINED, Run, TrainingSetup, fit
from estiba.training.precision import AmpContext
from estiba.training.schedule import Schedule
from finetune.answers import answer, held_out_questions
from finetune.artifacts.outputs import LOG_COLUMNS, write_artifacts, write_interrupt
from finetune.config import HIGH_LEARNING_RATE, FinetuneConfig
from finetune.inputs import Inputs, read_inputs
from finetune.introduction import introduce
from finetune.model.adapters import add_adapters, freeze_other_inputs, quantization_config
from finetune.model.memory import check_memory
from finetune.model.self_test import check_gradients, choose_attention
from finetune.task import FinetuneTask

logger = get_logger(__name__)


def train(config: FinetuneConfig, job: Job, stop: Stop) -> None:
    """Run the job. Raises EstibaError; Interrupted after a stop, whose message names what was saved."""
    output = local_output(config.output_dir, "--output-dir")
    fit(config, job, stop, output=output, setup=setup, finish=write_artifacts, on_interrupt=write_interrupt)


def setup(run: Run[FinetuneConfig]) -> TrainingSetup[FinetuneTask]:
    config, device = run.config, run.device
    inputs = read_inputs(run)
    amp = AmpContext(config.precision, device)
    check_memory(inputs, config, device, amp.dtype)
    model = run.stop.unless_stopped(lambda: _trained_model(inputs, config, device, amp), NOTHING_TRAINED)
    task = FinetuneTask(config, model, inputs, device=device, dist=run.dist)
    task.use_varlen = choose_attention(model, inputs.training.examples, amp, device)
    seconds_per_token = check_gradients(model, inputs.training.examples, amp, device, use_varlen=task.use_varlen)
    schedule = _schedule(config, len(inputs.training.examples), task.records_per_step)
    if run.dist.is_main:
        introduce(inputs, config, model, schedule, seconds_per_token, run.job.instance_type)
    restored = run.restore()
    if restored is None and run.dist.is_main:
        questions = held_out_questions(inputs.dataset.validation, inputs.encoder, config.answer_questions)

        def held_out_losses() -> dict[str, float]:
            with amp.forward():  # here, since autocast is a thread's own
                return task.held_out_losses(model)

        task.before = run.stop.unless_stopped(lambda: answer(model, inputs.encoder, questions), NOTHING_TRAINED)
        task.losses_before = run.stop.unless_stopped(held_out_losses, NOTHING_TRAINED)
    run.dist.barrier()  # its group waits for days; that of the first collective on GPUs for half an hour
    evaluate_every = config.eval_steps or max(1, schedule.steps // 4)
    trainer = config.trainer_config(
        schedule=schedule,
        clip=config.grad_clip,
        evaluate_every=evaluate_every,
        log_every=config.log_interval,
    )
    return TrainingSetup(task=task, trainer=trainer, restored=restored, log_columns=LOG_COLUMNS)


def _trained_model(inputs: Inputs, config: FinetuneConfig, device: torch.device, amp: AmpContext) -> torch.nn.Module:
    is_full = config.method == "full"
    model = inputs.base.load(
        dtype=torch.float32 if is_full or device.type == "cpu" else amp.dtype,
        quantization=quantization_config(config, device, amp.dtype),
        device=device,
    )
    model.config.use_cache = False
    _stop_at(model, inputs.encoder.end_tokens(inputs.training.examples))
    if is_full:
        freeze_other_inputs(model)
    trained: torch.nn.Module = model if is_full else add_adapters(model, config, inputs.base.name)
    if config.checkpoints_activations(device.type):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if config.neftune_alpha is not None:
        _add_embedding_noise(model.get_input_embeddings(), config.neftune_alpha)
    return trained.train()


def _stop_at(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Let generation stop where trained answers end. A base model's own end is often not its chat template's."""
    generation = model.generation_config
    assert generation is not None
    known = generation.eos_token_id
    own = known if isinstance(known, list) else [] if known is None else [known]
    if added := [token for token in tokens if token not in own]:
        generation.eos_token_id = [*own, *added]


def _add_embedding_noise(embedding: torch.nn.Module, alpha: float) -> None:
    """Uniform noise of alpha / sqrt(tokens * width) while training (NEFTune, arXiv:2310.05914, algorithm 1)."""

    def add_noise(module: torch.nn.Module, _: object, output_BTD: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output_BTD
        size = alpha / math.sqrt(output_BTD.shape[1] * output_BTD.shape[2])
        return output_BTD + torch.empty_like(output_BTD).uniform_(-size, size)

    embedding.register_forward_hook(add_noise)


def _schedule(config: FinetuneConfig, examples: int, records_per_step: int) -> Schedule:
    peak = config.resolved_learning_rate()
    if peak > HIGH_LEARNING_RATE[config.method]:
        logger.warning(
            f"--learning-rate {peak:g} is high for {config.method}; above {HIGH_LEARNING_RATE[config.method]:g} "
            "training often diverges or forgets. The default is lower"
        )
    steps = config.max_steps or max(1, math.ceil(config.epochs * examples / records_per_step))
    warmup_steps = min(round(config.warmup_ratio * steps), steps // 2)
    return Schedule(kind=config.lr_schedule, peak=peak, steps=steps, warmup_steps=warmup_steps)
