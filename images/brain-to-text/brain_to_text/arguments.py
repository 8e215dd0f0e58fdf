"""A YAML of upstream's or the guide's, as values of the configuration's fields.

Its sections are made flat (`model.input_network.input_layer_dropout` is `input_layer_dropout`); every field of ours may
stand in it as well. What upstream's files hold and nothing depends on is named in one line, anything else is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from estiba.contract import root_of
from estiba.errors import ConfigError
from estiba.stop import say

if TYPE_CHECKING:
    from estiba.config import Config

PRESETS = Path(__file__).resolve().parent / "presets"
SECTIONS = frozenset({"model", "model.input_network", "dataset", "dataset.data_transforms"})
RENAMED = {"dataset.seed": "dataset_seed"}
NOT_TAKEN = frozenset({"gpu_number", "output_dir", "checkpoint_dir", "dataset.dataset_dir"})
"""Places of another machine, which the guide's command line replaces too."""
NO_EFFECT = frozenset(
    """mode model.input_network.n_input_layers model.input_network.input_layer_sizes batches_per_save log_val_skip_logs
    save_val_logits save_val_data save_val_metrics dataset.neural_dim dataset.max_seq_elements dataset.loader_shuffle
    dataset.test_percentage optimizer
    model.weight_reg model.subsample_factor model.output_size model.h0 model.input_network.activation
    dataset.nInputFeatures dataset.gaussian_smoothing_sigma dataset.use_gaussian_smoothing
    dataset.gaussian_smoothing_sigma_range dataset.use_random_time_warp dataset.time_warp_factor_range
    """.split()
)
"""Known upstream, and read by nothing there, or without effect on what is trained here."""
SEEDLESS = -1
"""Upstream's seed that is none; a run that is to be resumed has one."""


def with_file(cls: type[Config], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over the values of the file that it names. Raises ConfigError."""
    place = given.get("config_file")
    if not place:
        return dict(given)
    path = find_file(str(place))
    values, unused = read(path, cls)
    _check(path, cls, {name: value for name, value in values.items() if name not in given})
    if unused:
        say(f"{path.name}: has no effect here: {', '.join(sorted(unused))}")
    return {**values, **given}


def find_file(place: str) -> Path:
    """A path, or a name in the channel `config` or among those that come with the image. Raises ConfigError."""
    candidates = [Path(place), root_of() / "input/data/config" / place, root_of() / "code" / place, PRESETS / place]
    for path in candidates:
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in PRESETS.glob("*.yaml")))
    raise ConfigError(f"--config-file {place}: there is no such file, nor does one of these names come here: {known}")


def read(path: Path, cls: type[Config]) -> tuple[dict[str, Any], list[str]]:
    """Values by field, and the names of what has no effect. Raises ConfigError for what nobody knows."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config-file {path}: cannot be read as YAML ({error}); mend it") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"--config-file {path}: holds a {type(content).__name__}; it must be `name: value` lines")
    values: dict[str, Any] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for dotted, value in _leaves(content or {}):
        name = RENAMED.get(dotted, dotted.rpartition(".")[2])
        if dotted == "mode" and value != "train":
            raise ConfigError(f"{path}: mode is {value!r}; this trains, `brain-to-text evaluate` evaluates")
        if dotted == "model.use_neural_decoder_model":
            if value:
                raise ConfigError(
                    f"{path}: use_neural_decoder_model is another decoder, which is not here; set it false"
                )
            unused.append(dotted)
        elif dotted in NOT_TAKEN or dotted in NO_EFFECT:
            unused.append(dotted)
        elif name in cls.model_fields and name != "config_file":
            values[name] = None if value == "None" else value
        else:
            close = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.6)
            unknown.append(f"{dotted}{f' (did you mean {close[0]}?)' if close else ''}")
    if unknown:
        raise ConfigError(f"--config-file {path}: nobody knows {', '.join(unknown)}; take it out or spell it otherwise")
    for name in ("seed", "dataset_seed"):
        if values.get(name) == SEEDLESS:
            say(f"{path.name}: {name} is -1; {cls.model_fields[name].default} is taken, since a resume needs one")
            del values[name]
    if "patch_stride" in values and not values["patch_stride"] and not values.get("patch_size"):
        del values["patch_stride"]  # upstream's 0 of both: no patches
    return values, unused


def _leaves(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        dotted = f"{before}{key}"
        if dotted in SECTIONS and isinstance(value, dict):
            yield from _leaves(value, f"{dotted}.")
        else:
            yield dotted, value


def _check(path: Path, cls: type[Config], values: Mapping[str, Any]) -> None:
    problems = []
    for name, value in values.items():
        info = cls.model_fields[name]
        kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            problems.append(f"{path}: {name} is {value!r}: {message[:1].lower()}{message[1:]}")
    if problems:
        raise ConfigError("\n".join(problems))


def nested(config: Config, sessions: Sequence[str]) -> dict[str, Any]:
    """The configuration in upstream's form, without places and what one run alone is told; `read` takes it again."""
    from brain_to_text.config import FREE

    values = {**config.model_dump(mode="json"), "sessions": list(sessions)}
    content: dict[str, Any] = {"mode": "train"}
    for name, value in values.items():
        if name in FREE - WRITTEN:
            continue
        section, key = PLACE_OF.get(name, (None, name))
        inside = content
        for part in section.split(".") if section else ():
            inside = inside.setdefault(part, {})
        inside[key] = value
    return content


def of_this_run(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `nested` leaves out: what a file may say, and what it had better not, which is this machine's.

    Such are a GPU's number, which `read` does not take, and the places below ESTIBA_ROOT where none was given.
    """
    from brain_to_text.config import FREE

    values = config.model_dump(mode="json", include=set(FREE - WRITTEN - {"config_file"}))
    fields = type(config).model_fields
    own = {
        name: value
        for name, value in values.items()
        if name in NOT_TAKEN or ((usual := fields[name].default_factory) and value == usual())  # type: ignore[call-arg]
    }
    return {name: value for name, value in values.items() if name not in own}, own


WRITTEN = frozenset(
    "num_training_batches use_amp batches_per_train_log log_individual_day_val_PER num_dataloader_workers "
    "sessions".split()
)
"""Of what may change after a stop, this describes the training nevertheless."""
PLACE_OF: dict[str, tuple[str, str]] = {
    **{
        name: ("model", name)
        for name in "n_input_features n_units n_layers bidirectional rnn_dropout rnn_trainable patch_size "
        "patch_stride".split()
    },
    **{name: ("model.input_network", name) for name in ("input_trainable", "input_layer_dropout")},
    **{
        name: ("dataset", name)
        for name in "batch_size n_classes days_per_batch sessions dataset_probability_val feature_subset "
        "must_include_days bad_trials_dict num_dataloader_workers".split()
    },
    "dataset_seed": ("dataset", "seed"),
    **{
        name: ("dataset.data_transforms", name)
        for name in "white_noise_std constant_offset_std random_walk_std random_walk_axis static_gain_std random_cut "
        "smooth_data smooth_kernel_std smooth_kernel_size".split()
    },
}
"""Section and name of each field that upstream keeps in one."""
