"""The settings of a training run. Settings from upstream and the guide come first and keep their names.

Upstream is the reference trainer, github.com/Neuroprosthetics-Lab/nejm-brain-to-text; its settings file is
`rnn_args.yaml`. The guide is a version of it that trains on SageMaker with data on S3. Flags override environment
variables, which override hyperparameters, which override `--config-file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from brain_to_text.yaml_config import MACHINE_SPECIFIC, apply_config_file
from estiba.errors import ConfigError
from estiba.platform.contract import root_of
from estiba.training.config import Precision, TrainingConfig

if TYPE_CHECKING:
    from estiba.checkpoint.retention import Retention

Fraction = Annotated[float, Field(ge=0, le=1)]
OnForGpu = Annotated[bool | None, BeforeValidator(lambda value: None if value == "auto" else value)]
FractionBelow1 = Annotated[float, Field(ge=0, lt=1)]


class BrainConfig(TrainingConfig):
    """Train the brain-to-text decoder on HDF5 sessions. The same command resumes a run that was stopped."""

    best_metric: ClassVar[str] = "val_per"
    see_also: ClassVar[str] = (
        "Other commands, each with its own --help: brain-to-text evaluate, brain-to-text generate, "
        "brain-to-text index, brain-to-text show-config"
    )

    config_file: str | None = None
    """YAML file in the format of upstream or the guide: a path, the name of a file in the channel `config`, or a file
    that comes with the image (rnn_args.yaml, rnn_args_diphone_sagemaker.yaml, rnn_args_small.yaml). Without one,
    defaults are upstream's values."""
    s3_bucket: str | None = None
    """Bucket that holds the sessions. With --s3-data-prefix, replaces --dataset-dir."""
    s3_data_prefix: str | None = None
    """Prefix of the sessions in --s3-bucket."""
    dataset_dir: str = Field(default_factory=lambda: str(root_of() / "input/data/dataset"))
    """Where the sessions are (SESSION/data_train.hdf5, ...): a directory, file:// or s3://."""
    model_dir: str = Field(default_factory=lambda: str(root_of() / "model"))
    """Output directory for the best weights: checkpoint/best_checkpoint and checkpoint/args.yaml."""
    output_data_dir: str = Field(default_factory=lambda: str(root_of() / "output/data"))
    """Output directory for the training log, metrics, predictions and plots."""

    # --- upstream: model
    n_input_features: PositiveInt = 512
    """Features per 20 ms bin; with --feature-subset, which decides the decoder's width, it has no effect."""
    n_units: PositiveInt = 768
    """Units per GRU layer."""
    n_layers: PositiveInt = 5
    """Number of GRU layers."""
    bidirectional: bool = False
    """Use a bidirectional GRU: more accurate, but it cannot decode while the person is still speaking."""
    rnn_dropout: FractionBelow1 = 0.4
    """Dropout between GRU layers."""
    rnn_trainable: bool = True
    """Train the GRU layers."""
    patch_size: NonNegativeInt = 14
    """Bins per patch; 0 turns patches off."""
    patch_stride: PositiveInt = 4
    """Bins from the start of one patch to the start of the next."""
    input_trainable: bool = True
    """Train the per-day input layers."""
    input_layer_dropout: FractionBelow1 = 0.2
    """Dropout after the per-day input layers."""

    # --- upstream: the run
    num_training_batches: PositiveInt = 120_000
    """Number of training steps."""
    gpu_number: NonNegativeInt | None = None
    """Which GPU to use; default is the first one, or the CPU if there is no GPU."""
    use_amp: bool = True
    """Mixed precision: bfloat16 if the GPU supports it, else float16 with loss scaling. false trains in float32."""
    seed: NonNegativeInt = 10
    """Seed for weights, dropout and noise."""
    lr_scheduler_type: Literal["cosine", "linear", "step", "multistep", "wsd"] = "cosine"
    """Learning-rate schedule."""
    lr_max: PositiveFloat = 0.005
    """Peak learning rate."""
    lr_min: NonNegativeFloat = 0.0001
    """Final learning rate."""
    lr_decay_steps: PositiveInt | None = None
    """Step at which --lr-min is reached; default is the last step."""
    lr_warmup_steps: NonNegativeInt = 1000
    """Warm-up steps, starting from a learning rate of 0."""
    lr_max_day: PositiveFloat | None = None
    """Peak learning rate of the per-day input layers; default is --lr-max."""
    lr_min_day: NonNegativeFloat | None = None
    """Final learning rate of the per-day input layers; default is --lr-min."""
    lr_decay_steps_day: PositiveInt | None = None
    """--lr-decay-steps for the per-day input layers."""
    lr_warmup_steps_day: NonNegativeInt | None = None
    """--lr-warmup-steps for the per-day input layers."""
    lr_step_size: PositiveInt = 50_000
    """With --lr-scheduler-type step: training steps between decays."""
    lr_milestones: list[int] = Field(default_factory=list)
    """With --lr-scheduler-type multistep: the training steps at which the rate decays."""
    lr_decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """With step and multistep: the factor that each decay multiplies the rate by."""
    beta0: FractionBelow1 = 0.9
    """AdamW's first beta."""
    beta1: FractionBelow1 = 0.999
    """AdamW's second beta."""
    epsilon: PositiveFloat = 0.1
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.001
    """Weight decay for everything except biases and the per-day input layers."""
    weight_decay_day: NonNegativeFloat = 0.0
    """Weight decay for the per-day input layers."""
    grad_norm_clip_value: NonNegativeFloat | None = 10.0
    """Max gradient norm; none or 0 turns clipping off."""
    batches_per_train_log: PositiveInt = 200
    """Steps between log lines."""
    batches_per_val_step: PositiveInt = 2000
    """Steps between evaluations."""
    log_individual_day_val_PER: bool = True
    """Log the phoneme error rate (PER) of every day at each evaluation."""
    early_stopping: bool = False
    """Stop when the PER has not improved for --early-stopping-val-steps evaluations."""
    early_stopping_val_steps: PositiveInt = 20
    """Evaluations without improvement before stopping."""
    save_best_checkpoint: bool = True
    """At the end, write the weights that had the best PER."""
    save_final_model: bool = False
    """At the end, also write the final weights."""
    save_all_val_steps: bool = False
    """Keep the checkpoint of every evaluation."""
    init_from_checkpoint: bool = False
    """Start from the weights in --init-checkpoint-path."""
    init_checkpoint_path: str | None = None
    """Weights from upstream, the guide or this image; default is the file in the channel `checkpoint`, if any."""

    # --- upstream: data
    batch_size: PositiveInt = 64
    """Trials per step."""
    n_classes: Literal[41, 1681] = 41
    """41 phonemes, or 1681 diphones."""
    days_per_batch: PositiveInt = 4
    """Number of days that each batch is drawn from."""
    dataset_seed: NonNegativeInt = 1
    """Seed of the sampler (`dataset.seed` in upstream's file)."""
    sessions: list[str] | None = None
    """Names of the sessions to use; default is all."""
    dataset_probability_val: list[Literal[0, 1]] | None = None
    """For each of --sessions, 1 to evaluate it, 0 to skip it; default is to evaluate all that have val trials."""
    feature_subset: list[int] | None = None
    """Indices of the features to use, from 0 to the width of the files less 1; default is all."""
    must_include_days: list[int] | None = None
    """Days (positions in --sessions) that every batch includes; default is none."""
    bad_trials_dict: dict[str, dict[str, list[int]]] | None = None
    """Trials to exclude, {session: {block: [trial, ...]}}; only in --config-file."""
    num_dataloader_workers: NonNegativeInt = 4
    """Worker processes that index new data and, with --reader h5py, read trials; 0 does both in this process."""
    white_noise_std: NonNegativeFloat = 1.0
    """Standard deviation of noise added to every value."""
    constant_offset_std: NonNegativeFloat = 0.2
    """Standard deviation of an offset added to each feature for a whole trial."""
    random_walk_std: NonNegativeFloat = 0.0
    """Standard deviation of the steps of a random walk along --random-walk-axis."""
    random_walk_axis: Literal[-1, 1, 2] = -1
    """Axis of the random walk: 1 is time; -1 (upstream's default) and 2 are features."""
    static_gain_std: NonNegativeFloat = 0.0
    """Standard deviation of a random matrix that mixes the features of a trial."""
    random_cut: NonNegativeInt = 3
    """Cut fewer than this many bins, drawn at random, from the start of a batch."""
    smooth_data: bool = True
    """Smooth features along time."""
    smooth_kernel_std: PositiveFloat = 2.0
    """Standard deviation of the smoothing kernel, in bins."""
    smooth_kernel_size: PositiveInt = 100
    """Number of bins in the impulse that the smoothing kernel is computed from."""

    # --- the guide: composite loss over diphones and phonemes
    use_composite_loss: bool = False
    """With 1681 classes: alpha * CTC of phonemes + (1 - alpha) * CTC of diphones."""
    composite_loss_alpha: Fraction = 0.5
    """Alpha of the composite loss."""
    use_alpha_schedule: bool = False
    """Raise alpha in steps during training; replaces --composite-loss-alpha."""
    alpha_schedule_start: Fraction = 0.0
    """Alpha at the start."""
    alpha_schedule_end: Fraction = 0.6
    """Alpha at the end."""
    alpha_schedule_step_size: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Size of each increase of alpha."""
    alpha_schedule_step_interval: PositiveInt = 3000
    """Training steps between increases of alpha."""

    # --- ours: accuracy
    time_masks: PositiveInt | None = None
    """Number of time masks per training trial, such as 20. Off by default, as in upstream."""
    time_mask_share: Annotated[float, Field(gt=0, le=1)] = 0.075
    """Maximum length of a time mask, as a fraction of the trial."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Evaluate and output an exponential moving average of the weights with this decay, such as 0.999."""
    day_layers: bool = True
    """Use one input layer per day; false shares one between all days."""

    # --- ours: reading data
    index_path: str | None = None
    """Where to keep the byte index; default is next to the data on S3, or a local cache directory."""
    cache_gb: NonNegativeFloat | None = None
    """Host memory for caching trials; default is 40% of the free memory."""
    device_cache_gb: NonNegativeFloat | None = None
    """GPU memory for caching trials, used only if all of them fit; default is the free memory less 8 GB."""
    device_cache_dtype: Literal["float32", "float16"] = "float32"
    """Data type of trials cached on the GPU; float16 takes half the memory and rounds features to 11 bits."""
    disk_cache_dir: str | None = None
    """Directory on a fast disk for trials that do not fit in memory; default is no disk cache."""
    disk_cache_gb: PositiveFloat = 50.0
    """Maximum size of the disk cache."""
    reader: Literal["ranges", "h5py"] = "ranges"
    """ranges reads byte ranges in this process. h5py reads the same batches, far more slowly, with h5py (over s3fs for
    s3://) in --num-dataloader-workers processes."""
    ahead_batches: PositiveInt = 4
    """Number of batches to read ahead."""
    on_bad_trial: Literal["fail", "skip"] = "fail"
    """What to do with a trial that cannot be read or trained on: end the run, or skip it and list it in the results."""
    upstream_plan: bool = False
    """Draw exactly the batches that upstream's dataset.py draws, instead of deriving each from seed and step."""

    # --- ours: the run
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per step; more than 1 saves GPU memory."""
    length_bucket: PositiveInt | None = None
    """Pad batches to a multiple of this many bins. Default is 64 on a GPU or with --compile, so that there are only a
    few different lengths to compile for, and 1 otherwise."""
    precision: Precision | None = None  # type: ignore[assignment]
    """Overrides --use-amp."""
    compile: OnForGpu = None  # type: ignore[assignment]
    """torch.compile the decoder: costs a minute at the start, makes steps faster. The default, auto, is on for a GPU,
    as in the guide, and off on a CPU."""
    keep_best: NonNegativeInt = 1
    """Also keep this many checkpoints with the best PER."""

    @model_validator(mode="before")
    @classmethod
    def _apply_config_file(cls, values: Any) -> Any:
        """Fill in values from --config-file. Raises ConfigError."""
        return apply_config_file(cls, values) if isinstance(values, dict) else values

    @property
    def data_location(self) -> str:
        if self.s3_bucket is None:
            return self.dataset_dir
        return f"s3://{self.s3_bucket}/{(self.s3_data_prefix or '').strip('/')}".rstrip("/")

    def preflight(self) -> None:
        """Check that the settings fit together. Raises ConfigError."""
        if self.s3_bucket is not None and not self.s3_data_prefix:
            raise ConfigError(f"--s3-bucket {self.s3_bucket} needs --s3-data-prefix, the prefix of the sessions in it")
        if self.s3_bucket is None and self.s3_data_prefix is not None:
            raise ConfigError(
                f"--s3-data-prefix {self.s3_data_prefix} needs --s3-bucket; or give --dataset-dir s3://..."
            )
        if self.use_composite_loss and self.n_classes == 41:
            raise ConfigError("--use-composite-loss combines diphones and phonemes; it needs --n-classes 1681")
        evaluated, sessions = self.dataset_probability_val, self.sessions
        if evaluated is not None and (sessions is None or len(sessions) != len(evaluated)):
            count = "no" if sessions is None else len(sessions)
            raise ConfigError(
                f"dataset_probability_val has {len(evaluated)} values for {count} sessions; give one for each"
            )
        if sessions is not None and len(set(sessions)) != len(sessions):
            repeated = sorted({name for name in sessions if sessions.count(name) > 1})
            raise ConfigError(f"sessions {', '.join(repeated)} are listed more than once; list each once")
        if self.feature_subset is not None:
            wrong = [index for index in self.feature_subset if index < 0]
            if wrong or not self.feature_subset:
                raise ConfigError(
                    f"feature_subset: {wrong or 'an empty list'} is not valid; give indices from 0 to the width of "
                    "the files less 1"
                )
        if self.init_from_checkpoint and not self.init_checkpoint_path and not checkpoint_channel().exists():
            raise ConfigError("--init-from-checkpoint needs --init-checkpoint-path, or a channel `checkpoint`")

    def retention(self) -> Retention:
        every = self.batches_per_val_step if self.save_all_val_steps else self.keep_every
        return super().retention().model_copy(update={"keep_every": every})

    def fingerprint_settings(self) -> dict[str, Any]:
        """Return the settings that a resume must not change."""
        return {name: value for name, value in sorted(self.model_dump(mode="json").items()) if name not in MAY_CHANGE}

    def training_settings(self) -> dict[str, Any]:
        """Return the settings that describe the training itself, without paths and other settings of a single run."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in BrainConfig.__annotations__ if name in values and name not in RUN_ONLY}

    def run_settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the other settings: those that are valid anywhere, and those specific to this machine.

        Machine-specific are the GPU number, which a file cannot set, and default paths below ESTIBA_ROOT.
        """
        values = self.model_dump(mode="json", include=set(RUN_ONLY - {"config_file"}))
        defaults = {name: info.default_factory for name, info in type(self).model_fields.items()}
        machine_specific = {
            name: value
            for name, value in values.items()
            if name in MACHINE_SPECIFIC or ((default := defaults[name]) and value == default())  # type: ignore[call-arg]
        }
        return {name: value for name, value in values.items() if name not in machine_specific}, machine_specific


def checkpoint_channel() -> Path:
    """Return the channel in which the guide puts initial weights."""
    return root_of() / "input/data/checkpoint"


MAY_CHANGE = frozenset(
    """config_file s3_bucket s3_data_prefix dataset_dir model_dir output_data_dir gpu_number device use_amp precision
    num_training_batches batches_per_train_log log_individual_day_val_PER save_best_checkpoint save_final_model
    save_all_val_steps init_from_checkpoint init_checkpoint_path num_dataloader_workers index_path cache_gb
    device_cache_gb reader disk_cache_dir disk_cache_gb ahead_batches on_bad_trial compile deterministic
    checkpoint_path checkpoint_upload save_steps save_every_s keep_last keep_every keep_best accept_changed_plan
    sessions""".split()
)
"""Settings that a resume may change: paths, speed, which checkpoints to keep. The trainer's own fingerprint covers the
number of steps, the learning rates and the precision; the data set has its own identity."""
RUN_ONLY = MAY_CHANGE - set(
    "num_training_batches use_amp batches_per_train_log log_individual_day_val_PER num_dataloader_workers "
    "sessions".split()
)
