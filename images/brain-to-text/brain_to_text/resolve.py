"""Resolve a configuration on this machine: device, sizes, schedules, data sets, memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from brain_to_text.config import BrainConfig
from brain_to_text.data import opening
from brain_to_text.data.augment import Augment, NoiseConfig
from brain_to_text.data.batches import MicroBatcher
from brain_to_text.data.collate import PaddingSpec
from brain_to_text.data.dataset import TrialDataset
from brain_to_text.data.schema import Split
from brain_to_text.model import DecoderShape
from brain_to_text.optimizer import LearningRateSchedule
from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.platform.stop import Stop
from estiba.training.config import TrainerConfig
from estiba.training.fit import select_device

logger = get_logger(__name__)

GPU_LENGTH_BUCKET = 64
"""In bins. Trials of about 950 bins then come in a handful of lengths, at the price of 3% more work."""
STEP_BYTES = 8 * 10**9
"""GPU memory left free for the decoder and its training step, which take about 5 GB with upstream's settings."""


def device(name: str | None, gpu_number: int | None = None) -> torch.device:
    """Return the device. Raises ConfigError if it does not exist; a wrong `gpu_number` only warns, as in the guide."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is not None or not count or gpu_number is None:
        return select_device(name)
    if gpu_number >= count:
        logger.warning(f"--gpu-number {gpu_number}: this host has {count} GPUs, numbered from 0; using 0")
        gpu_number = 0
    return torch.device("cuda", gpu_number)


def decoder_shape(config: BrainConfig, n_days: int) -> DecoderShape:
    names = {"n_units", "n_layers", "n_classes", "patch_size", "patch_stride", "rnn_dropout", "bidirectional"}
    return DecoderShape(
        n_features=config.n_input_features if config.feature_subset is None else len(config.feature_subset),
        n_days=n_days if config.day_layers else 1,
        input_dropout=config.input_layer_dropout,
        **config.model_dump(include=names),
    )


def augment(config: BrainConfig) -> Augment:
    return Augment(
        NoiseConfig(**config.model_dump(include=set(NoiseConfig.__dataclass_fields__))),
        smooth_std=config.smooth_kernel_std if config.smooth_data else None,
        smooth_size=config.smooth_kernel_size,
    )


def micro_batcher(
    config: BrainConfig,
    shape: DecoderShape,
    trained_sessions: Sequence[str],
    sessions: Sequence[str],
    device: torch.device,
) -> MicroBatcher:
    """Return a micro-batcher for trials of `sessions`, and a model with input layers for `trained_sessions`."""
    layers = {name: index for index, name in enumerate(trained_sessions)}
    session_layers = [layers.get(name, 0) if config.day_layers else 0 for name in sessions]
    return MicroBatcher(
        shape,
        seed=config.dataset_seed,
        random_cut=config.random_cut,
        length_bucket=length_bucket(config, device),
        layer_of_day=session_layers.__getitem__,
    )


def length_bucket(config: BrainConfig, device: torch.device) -> int:
    """Return the number of bins to whose multiples batches are padded."""
    return config.length_bucket or (GPU_LENGTH_BUCKET if device.type == "cuda" or config.compile else 1)


def compiles(config: BrainConfig, device: torch.device) -> bool:
    """Return whether to torch.compile the decoder."""
    return device.type == "cuda" if config.compile is None else config.compile


def schedules(config: BrainConfig) -> tuple[LearningRateSchedule, LearningRateSchedule]:
    """Return the schedules of the per-day input layers (second) and of all other parameters (first)."""
    peak, low = config.lr_max, config.lr_min
    peak_day = config.lr_max_day or peak
    low_day = low if config.lr_min_day is None else config.lr_min_day
    for lr_min, lr_max, suffix in ((low, peak, ""), (low_day, peak_day, "-day")):
        if lr_min > lr_max:
            raise ConfigError(f"--lr-min{suffix} {lr_min} is above --lr-max{suffix} {lr_max}; give a lower one")
    if config.lr_scheduler_type == "linear":  # upstream has one end factor for all groups
        low_day = peak_day * low / peak
    schedule = LearningRateSchedule(
        course=config.lr_scheduler_type,
        peak=peak,
        floor=low / peak,
        steps=config.num_training_batches,
        warmup_steps=config.lr_warmup_steps,
        decay_steps=config.lr_decay_steps or config.num_training_batches,
        every=config.lr_step_size,
        milestones=tuple(config.lr_milestones),
        factor=config.lr_decay_factor,
    )
    changes = {"decay_steps": config.lr_decay_steps_day, "warmup_steps": config.lr_warmup_steps_day}
    changes = {name: value for name, value in changes.items() if value is not None}
    return schedule, schedule.model_copy(update={"peak": peak_day, "floor": low_day / peak_day, **changes})


def trainer_config(config: BrainConfig) -> TrainerConfig:
    return config.trainer_config(
        schedule=schedules(config)[0],
        clip=config.grad_norm_clip_value or None,
        precision=config.precision or ("auto" if config.use_amp else "float32"),
        compile=False,  # the task compiles the decoder itself, without the selection of days
        evaluate_every=config.batches_per_val_step,
        log_every=config.batches_per_train_log,
    )


def open_trials(
    config: BrainConfig, split: Split, stop: Stop, *, sessions: list[str] | None, device: torch.device
) -> TrialDataset:
    """Open a split, padded as steps on this device need. Raises DataError, ConfigError, StoreError, Interrupted."""
    max_cut = max(0, config.random_cut - 1) if split == "train" else 0
    padding = PaddingSpec(
        multiple_of=length_bucket(config, device), min_steps=max(1, config.patch_size), extra_steps=max_cut
    )
    on_cpu = device.type == "cpu"
    return opening.open_trials(config, split, stop, sessions=sessions, padding=padding, on_cpu=on_cpu)


def open_val(config: BrainConfig, train: TrialDataset, stop: Stop, device: torch.device) -> TrialDataset | None:
    """Open the val trials of the training sessions. Returns None if no session is to be evaluated."""
    names = list(train.sessions)
    if config.sessions is not None and config.dataset_probability_val is not None:
        flags = zip(config.sessions, config.dataset_probability_val, strict=True)
        evaluated = {name for name, is_evaluated in flags if is_evaluated}
        names = [name for name in names if name in evaluated]
    return open_trials(config, "val", stop, sessions=names, device=device) if names else None


def keep_on_device(config: BrainConfig, trials: TrialDataset, device: torch.device) -> None:
    """Cache training trials on the device if all fit. Raises ConfigError if float16 was requested and they do not."""
    is_half = config.device_cache_dtype == "float16"
    limit_bytes = 0
    if config.device_cache_gb is not None:
        limit_bytes = int(config.device_cache_gb * 1e9)
    elif device.type == "cuda":
        limit_bytes = max(0, torch.cuda.mem_get_info(device)[0] - STEP_BYTES)
    dtype = torch.float16 if is_half else torch.float32
    if limit_bytes and trials.keep_on(device, limit_bytes=limit_bytes, dtype=dtype):
        logger.info(f"caching all {trials.n_trials:,} training trials on {device}, each when it is first read")
    elif is_half:
        raise ConfigError(
            f"--device-cache-dtype float16: {device} has {limit_bytes / 1e9:.1f} GB for trials, and they do not fit, "
            "so none would be cached; raise --device-cache-gb, or remove --device-cache-dtype"
        )
