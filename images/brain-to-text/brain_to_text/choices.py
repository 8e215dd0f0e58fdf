"""What a configuration comes to on this machine: device, sizes, rates, places."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from brain_to_text.augment import Noise
from brain_to_text.config import BrainConfig
from brain_to_text.model import Shape
from brain_to_text.optimizer import Course
from brain_to_text.reading.collate import Room
from estiba.contract import root_of
from estiba.errors import ConfigError
from estiba.loop.settings import Precision, Settings
from estiba.stop import say

if TYPE_CHECKING:
    from brain_to_text.data import Trials
    from estiba.stop import Stop

BUCKET = 64
"""Bins; a handful of lengths for trials of some 950, and 3% more work."""
STEP_BYTES = 8 * 10**9
"""Left free on a GPU for the decoder and its step: some 5 GB by count of its tensors at upstream's sizes."""
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def device_of(name: str | None, gpu_number: int | None = None) -> torch.device:
    """Raises ConfigError for a device that is not here. A GPU's number is a wish, as in the guide."""
    if name is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            return torch.device("cpu")
        if gpu_number is not None and gpu_number >= count:
            say(f"warning: --gpu-number {gpu_number}: there are {count} GPUs here, numbered from 0; taking 0")
            gpu_number = 0
        return torch.device("cuda", gpu_number or 0)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}; leave it out, or give cpu") from None
    return device


def shape_of(config: BrainConfig, n_days: int) -> Shape:
    return Shape(
        n_features=config.n_input_features if config.feature_subset is None else len(config.feature_subset),
        n_units=config.n_units,
        n_layers=config.n_layers,
        n_classes=config.n_classes,
        n_days=n_days if config.day_layers else 1,
        patch_size=config.patch_size,
        patch_stride=config.patch_stride,
        rnn_dropout=config.rnn_dropout,
        input_dropout=config.input_layer_dropout,
        bidirectional=config.bidirectional,
    )


def bucket_of(config: BrainConfig, device: torch.device) -> int:
    """Bins that lengths are a multiple of."""
    return config.length_bucket or (BUCKET if device.type == "cuda" or config.compile else 1)


def noise_of(config: BrainConfig) -> Noise:
    return Noise(
        white_noise_std=config.white_noise_std,
        constant_offset_std=config.constant_offset_std,
        random_walk_std=config.random_walk_std,
        random_walk_axis=config.random_walk_axis,
        static_gain_std=config.static_gain_std,
        time_masks=config.time_masks,
        time_mask_share=config.time_mask_share,
    )


def courses_of(config: BrainConfig) -> tuple[Course, Course]:
    """Of the learning rate of most parameters, and of the layers of days."""
    peak, least = config.lr_max, config.lr_min
    peak_day = config.lr_max_day or peak
    least_day = least if config.lr_min_day is None else config.lr_min_day
    warmup, warmup_day = config.lr_warmup_steps, config.lr_warmup_steps_day
    decay = config.lr_decay_steps or config.num_training_batches
    for low, high, flag in ((least, peak, ""), (least_day, peak_day, "-day")):
        if low > high:
            raise ConfigError(f"--lr-min{flag} {low} is above --lr-max{flag} {high}; give a lower one")
    if config.lr_scheduler_type == "linear":  # upstream's has one end factor for all groups
        least_day = peak_day * least / peak

    def course(peak: float, least: float, decay_steps: int, warmup_steps: int) -> Course:
        return Course(
            course=config.lr_scheduler_type,
            peak=peak,
            floor=least / peak,
            steps=config.num_training_batches,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            every=config.lr_step_size,
            milestones=tuple(config.lr_milestones),
            factor=config.lr_decay_factor,
        )

    days = course(peak_day, least_day, config.lr_decay_steps_day or decay, warmup if warmup_day is None else warmup_day)
    return course(peak, least, decay, warmup), days


def settings_of(config: BrainConfig) -> Settings:
    precision: Precision = "auto" if config.use_amp else "float32"
    return Settings(
        schedule=courses_of(config)[0],
        seed=config.seed,
        clip=config.grad_norm_clip_value or None,
        precision=config.precision or precision,
        evaluate_every=config.batches_per_val_step,
        save_every=config.batches_per_val_step,
        save_every_s=config.save_every_s,
        log_every=config.batches_per_train_log,
        accept_changed_plan=config.accept_changed_plan,
    )


def check(config: BrainConfig) -> None:
    """What fields cannot know of each other. Raises ConfigError."""
    if config.s3_bucket is not None and not config.s3_data_prefix:
        raise ConfigError(f"--s3-bucket {config.s3_bucket} needs --s3-data-prefix, under which the sessions lie")
    if config.s3_bucket is None and config.s3_data_prefix is not None:
        raise ConfigError(f"--s3-data-prefix {config.s3_data_prefix} needs --s3-bucket; or give --dataset-dir s3://…")
    if config.use_composite_loss and config.n_classes == 41:
        raise ConfigError("--use-composite-loss is of diphones and phonemes together; it needs --n-classes 1681")
    probabilities, sessions = config.dataset_probability_val, config.sessions
    if probabilities is not None and (sessions is None or len(sessions) != len(probabilities)):
        count = "none" if sessions is None else len(sessions)
        raise ConfigError(
            f"dataset_probability_val has {len(probabilities)} values, and there are {count} sessions beside it; "
            "give one for each"
        )
    if sessions is not None and len(set(sessions)) != len(sessions):
        twice = sorted({name for name in sessions if sessions.count(name) > 1})
        raise ConfigError(f"sessions {', '.join(twice)} are listed twice; list each once")
    if config.feature_subset is not None:
        wrong = [number for number in config.feature_subset if not 0 <= number < config.n_input_features]
        if wrong or not config.feature_subset:
            raise ConfigError(f"feature_subset: {wrong or 'nothing'} is not among 0 to {config.n_input_features - 1}")
    if config.init_from_checkpoint and not config.init_checkpoint_path and not checkpoint_channel().exists():
        raise ConfigError("--init-from-checkpoint needs --init-checkpoint-path, or a channel `checkpoint`")


def checkpoint_channel() -> Path:
    """Where the guide looks for weights to begin with."""
    return root_of() / "input/data/checkpoint"


def room_of(config: BrainConfig, device: torch.device, split: str) -> Room:
    """All that Preparation pads a batch to."""
    cut = max(0, config.random_cut - 1) if split == "train" else 0
    return Room(multiple_of=bucket_of(config, device), least=max(1, config.patch_size), spare=cut)


def open_trials(
    config: BrainConfig, split: str, stop: Stop, *, sessions: list[str] | None, device: torch.device
) -> Trials:
    """Raises DataError, ConfigError, StoreError: everything that the index can know, before the first step."""
    from brain_to_text.data import Trials

    disk = None if config.disk_cache_dir is None else (Path(config.disk_cache_dir), int(config.disk_cache_gb * 1e9))
    return Trials.open(
        config.data_location,
        sessions=sessions,
        split=split,  # type: ignore[arg-type]
        stop=stop,
        seed=config.dataset_seed,
        batch_size=config.batch_size,
        days_per_batch=config.days_per_batch,
        cache_bytes=cache_bytes(config.cache_gb, 0.4 if split == "train" else 0.1),
        disk_cache=disk,
        ahead_batches=config.ahead_batches,
        n_classes=config.n_classes,
        n_features=config.n_input_features,
        on_bad_trial=config.on_bad_trial,
        workers=config.num_dataloader_workers,
        read_by=config.reader,
        index_path=config.index_path,
        upstream_plan=config.upstream_plan,
        feature_subset=config.feature_subset,
        must_include_days=config.must_include_days,
        bad_trials=config.bad_trials_dict,
        room=room_of(config, device, split),
    )


def keep_on_device(config: BrainConfig, trials: Trials, device: torch.device) -> None:
    """Let the device hold all training trials where they fit. Raises ConfigError where they do not and must."""
    is_half = config.device_cache_dtype == "float16"
    limit_bytes = 0
    if config.device_cache_gb is not None:
        limit_bytes = int(config.device_cache_gb * 1e9)
    elif device.type == "cuda":
        limit_bytes = max(0, torch.cuda.mem_get_info(device)[0] - STEP_BYTES)
    if limit_bytes and trials.keep_on(
        device, limit_bytes=limit_bytes, dtype=torch.float16 if is_half else torch.float32
    ):
        say(f"each of the {trials.n_trials:,} training trials stays on {device} once it is read")
    elif is_half:
        raise ConfigError(
            f"--device-cache-dtype float16: {device} has {limit_bytes / 1e9:.1f} GB for trials and they do not fit, so "
            "that nothing would be rounded; leave it out, or give more with --device-cache-gb"
        )


def cache_bytes(limit_gb: float | None, share: float) -> int:
    """What trials may hold of memory: as given, or a share of what is free in this container."""
    if limit_gb is not None:
        return int(limit_gb * 1e9)
    free = psutil.virtual_memory().available
    for path in CGROUP_LIMITS:
        try:
            free = min(free, int(path.read_text()))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return int(free * share)
