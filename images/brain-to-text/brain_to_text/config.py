"""What a training run can be asked for. Names are upstream's (`rnn_args.yaml`) and the guide's, ours stand after them.

A value is a flag, an environment variable, a hyperparameter, or stands in `--config-file`, in that precedence.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from brain_to_text.arguments import with_file
from estiba.config import Config
from estiba.contract import checkpoint_dir, root_of

Std = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class BrainConfig(Config):
    """Train the brain-to-text decoder on HDF5 sessions. Run again after a stop, it goes on where it was."""

    see_also: ClassVar[str] = (
        "Other commands, each with a --help of its own: brain-to-text evaluate, brain-to-text generate, "
        "brain-to-text index, brain-to-text show-config"
    )

    config_file: str | None = None
    """A YAML in upstream's or the guide's form: a path, a name in the channel `config`, or one that comes with the
    image (rnn_args.yaml, rnn_args_diphone_sagemaker.yaml, rnn_args_small.yaml). Default is upstream's values."""
    s3_bucket: str | None = None
    """Bucket of the sessions; with --s3-data-prefix, instead of --dataset-dir."""
    s3_data_prefix: str | None = None
    """Prefix in that bucket, under which the sessions lie."""
    dataset_dir: str = Field(default_factory=lambda: str(root_of() / "input/data/dataset"))
    """Where the sessions lie (SESSION/data_train.hdf5 ...): a directory, file:// or s3://."""
    model_dir: str = Field(default_factory=lambda: str(root_of() / "model"))
    """For the best weights: checkpoint/best_checkpoint and checkpoint/args.yaml."""
    output_data_dir: str = Field(default_factory=lambda: str(root_of() / "output/data"))
    """For the log, metrics, predictions and plots."""

    # --- upstream: model
    n_input_features: Count = 512
    """Features of a bin."""
    n_units: Count = 768
    """Units of a GRU layer."""
    n_layers: Count = 5
    """GRU layers."""
    bidirectional: bool = False
    """Read trials in both directions: better, and not for use while somebody speaks."""
    rnn_dropout: Share = 0.4
    """Between GRU layers."""
    rnn_trainable: bool = True
    """Train the GRU layers."""
    patch_size: Annotated[int, Field(ge=0)] = 14
    """Bins in a patch; 0 takes single bins."""
    patch_stride: Count = 4
    """Bins from a patch to the next."""
    input_trainable: bool = True
    """Train the layers of days."""
    input_layer_dropout: Share = 0.2
    """Behind the layers of days."""

    # --- upstream: the run
    num_training_batches: Count = 120_000
    """Steps of the whole run."""
    gpu_number: Annotated[int, Field(ge=0)] | None = None
    """Which GPU; default is the first, or the CPU where there is none."""
    use_amp: bool = True
    """bfloat16 where the GPU has it, else float16 with a scaled loss; false is float32."""
    seed: Annotated[int, Field(ge=0)] = 10
    """Of weights, dropout and noise."""
    lr_scheduler_type: Literal["cosine", "linear", "step", "multistep", "wsd"] = "cosine"
    """Course of the learning rates."""
    lr_max: Rate = 0.005
    """Highest learning rate."""
    lr_min: Std = 0.0001
    """Lowest."""
    lr_decay_steps: Count | None = None
    """Step at which the lowest is reached; default is the last one."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps in which it rises from 0."""
    lr_max_day: Rate | None = None
    """Highest of the layers of days; default is --lr-max."""
    lr_min_day: Std | None = None
    """Lowest of the layers of days; default is --lr-min."""
    lr_decay_steps_day: Count | None = None
    """As --lr-decay-steps, of the layers of days."""
    lr_warmup_steps_day: Annotated[int, Field(ge=0)] | None = None
    """As --lr-warmup-steps, of the layers of days."""
    lr_step_size: Count = 50_000
    """Of --lr-scheduler-type step: steps between decays."""
    lr_milestones: list[int] = Field(default_factory=list)
    """Of multistep: the steps at which it decays."""
    lr_decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of step and multistep: what it is multiplied by."""
    beta0: Share = 0.9
    """First beta of AdamW."""
    beta1: Share = 0.999
    """Second beta of AdamW."""
    epsilon: Rate = 0.1
    """Epsilon of AdamW."""
    weight_decay: Std = 0.001
    """Of everything but biases and layers of days."""
    weight_decay_day: Std = 0.0
    """Of the layers of days."""
    grad_norm_clip_value: Std | None = 10.0
    """Largest norm of the gradients; none or 0 does not clip."""
    batches_per_train_log: Count = 200
    """Steps between lines of the log."""
    batches_per_val_step: Count = 2000
    """Steps between evaluations."""
    log_individual_day_val_PER: bool = True
    """Say the PER of each day at each evaluation."""
    early_stopping: bool = False
    """Stop when the PER has not become better for --early-stopping-val-steps evaluations."""
    early_stopping_val_steps: Count = 20
    """Evaluations to wait."""
    save_best_checkpoint: bool = True
    """Write the weights with the best PER at the end."""
    save_final_model: bool = False
    """Write the last weights as well."""
    save_all_val_steps: bool = False
    """Keep the checkpoint of each evaluation."""
    init_from_checkpoint: bool = False
    """Begin with the weights at --init-checkpoint-path."""
    init_checkpoint_path: str | None = None
    """Weights of upstream, the guide or here. Default is what lies in the channel `checkpoint`, if there is one."""

    # --- upstream: data
    batch_size: Count = 64
    """Trials of a step."""
    n_classes: Literal[41, 1681] = 41
    """41 phonemes, or 1681 diphones."""
    days_per_batch: Count = 4
    """Days that a batch is drawn from."""
    dataset_seed: Annotated[int, Field(ge=0)] = 1
    """Of the plan of batches (`seed` of upstream's section `dataset`)."""
    sessions: list[str] | None = None
    """Names of sessions; default is all that are there."""
    dataset_probability_val: list[Literal[0, 1]] | None = None
    """For each of --sessions, whether it is evaluated; default is all that have val trials."""
    feature_subset: list[int] | None = None
    """Numbers of the features to use; default is all."""
    must_include_days: list[int] | None = None
    """Days (places in --sessions) that every batch has trials of; default is none."""
    bad_trials_dict: dict[str, dict[str, list[int]]] | None = None
    """Trials to leave out, {session: {block: [trial, ...]}}; in --config-file alone."""
    num_dataloader_workers: Annotated[int, Field(ge=0)] = 4
    """Processes that read the index of new data, and with --reader h5py the trials as well; 0 reads in this one."""
    white_noise_std: Std = 1.0
    """Noise on each feature of each bin."""
    constant_offset_std: Std = 0.2
    """Noise on each feature of a trial."""
    random_walk_std: Std = 0.0
    """Noise that adds up along --random-walk-axis."""
    random_walk_axis: Literal[-1, 1, 2] = -1
    """1 is time; -1 and 2 are features, as upstream has it."""
    static_gain_std: Std = 0.0
    """Random mixing of features."""
    random_cut: Annotated[int, Field(ge=0)] = 3
    """Bins cut from the beginning of a batch: less than so many."""
    smooth_data: bool = True
    """Smooth features along time."""
    smooth_kernel_std: Rate = 2.0
    """Standard deviation of the smoothing, bins."""
    smooth_kernel_size: Count = 100
    """Length of the impulse that the kernel is made from, bins."""

    # --- the guide: loss over diphones and phonemes together
    use_composite_loss: bool = False
    """With 1681 classes: alpha * CTC of phonemes + (1 - alpha) * CTC of diphones."""
    composite_loss_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """That alpha."""
    use_alpha_schedule: bool = False
    """Let alpha rise in stairs."""
    alpha_schedule_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Alpha at the beginning."""
    alpha_schedule_end: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Alpha at the end."""
    alpha_schedule_step_size: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Height of a stair."""
    alpha_schedule_step_interval: Count = 3000
    """Steps of training on a stair."""

    # --- ours: accuracy
    time_masks: Count | None = None
    """Masks in time on each training trial; off as upstream has it. 20 is a good number."""
    time_mask_share: Annotated[float, Field(gt=0, le=1)] = 0.075
    """Longest mask, as a share of the trial."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Evaluate and deliver a running average of the weights, such as 0.999."""
    day_layers: bool = True
    """A layer for each day; false is one for all of them."""

    # --- ours: data path
    index_path: str | None = None
    """Where the byte index is kept when the data's own place cannot be written."""
    cache_gb: Annotated[float, Field(ge=0)] | None = None
    """Memory for trials; default is 40% of what is free."""
    device_cache_gb: Annotated[float, Field(ge=0)] | None = None
    """Memory of the GPU for trials, used when all of them fit; default is what is free but for 8 GB."""
    device_cache_dtype: Literal["float32", "float16"] = "float32"
    """How they lie there; float16 takes half and rounds features to 11 bits."""
    disk_cache_dir: str | None = None
    """A directory on a fast disk for trials that memory does not hold."""
    disk_cache_gb: Rate = 50.0
    """Most that may lie there."""
    reader: Literal["ranges", "h5py"] = "ranges"
    """Byte ranges by one engine in this process; or h5py, over s3fs for s3://, in --num-dataloader-workers processes:
    the same batches, slower by far."""
    ahead_batches: Count = 4
    """Batches whose trials are being read ahead of their step."""
    on_bad_trial: Literal["fail", "skip"] = "fail"
    """A trial that cannot be read or learnt from ends the run, or is counted and listed."""
    upstream_plan: bool = False
    """Draw batches as upstream's dataset.py does, all at the start, instead of one by one from seed and step."""

    # --- ours: the run
    gradient_accumulation_steps: Count = 1
    """Parts that a batch is computed in, for a small GPU."""
    length_bucket: Count | None = None
    """Batches are padded to a multiple of so many bins; default is 64 on a GPU or with --compile, so that there are
    few lengths to compile for, and else 1."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Instead of what --use-amp says."""
    compile: bool = False
    """torch.compile the decoder: a minute at the start, faster steps."""
    device: str | None = None
    """Torch device, before --gpu-number."""
    checkpoint_path: str = Field(default_factory=lambda: str(checkpoint_dir()))
    """Directory for checkpoints, or s3://. It outlives a spot host, the other places do not."""
    checkpoint_upload: str | None = None
    """An s3:// prefix that every checkpoint is also copied to, and restored from where the directory has none."""
    save_every_s: Rate | None = 600.0
    """Seconds between checkpoints, beside one at each evaluation; none saves at evaluations alone."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints that are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Also keep so many with the best PER."""
    accept_changed_plan: bool = False
    """Go on from a checkpoint though settings, data or seed are other than they were."""

    @model_validator(mode="before")
    @classmethod
    def _beneath(cls, values: Any) -> Any:
        """Lay the file's values beneath what was given. Raises ConfigError for what it cannot mean."""
        return with_file(cls, values) if isinstance(values, dict) else values

    @property
    def data_location(self) -> str:
        if self.s3_bucket is None:
            return self.dataset_dir
        return f"s3://{self.s3_bucket}/{(self.s3_data_prefix or '').strip('/')}".rstrip("/")


FREE = frozenset(
    """config_file s3_bucket s3_data_prefix dataset_dir model_dir output_data_dir gpu_number device use_amp precision
    num_training_batches batches_per_train_log log_individual_day_val_PER save_best_checkpoint save_final_model
    save_all_val_steps init_from_checkpoint init_checkpoint_path num_dataloader_workers index_path cache_gb
    device_cache_gb reader
    disk_cache_dir disk_cache_gb ahead_batches on_bad_trial compile checkpoint_path checkpoint_upload save_every_s
    keep_last keep_best accept_changed_plan sessions""".split()
)
"""What may be other after a stop: places, speed, what is kept. Length, rates and precision are in the loop's own plan,
and the data have an identity of theirs."""
