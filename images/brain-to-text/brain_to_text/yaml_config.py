"""Read and write `--config-file`: YAML in the format of upstream or the guide.

Sections are flattened: `model.input_network.input_layer_dropout` sets the field `input_layer_dropout`. A file may also
set any of our own fields. Names without effect here are listed in one log line; unknown names are an error.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from estiba.config import Config
from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.platform.contract import root_of

logger = get_logger(__name__)

PRESETS = Path(__file__).resolve().parent / "presets"
RENAMED = {"dataset.seed": "dataset_seed"}
MACHINE_SPECIFIC = frozenset({"gpu_number", "output_dir", "checkpoint_dir", "dataset.dataset_dir"})
"""Paths and devices of the machine that a file was written for. They are ignored; use flags, as in the guide."""
NO_EFFECT = frozenset(
    """mode model.input_network.n_input_layers model.input_network.input_layer_sizes batches_per_save log_val_skip_logs
    save_val_logits save_val_data save_val_metrics dataset.neural_dim dataset.max_seq_elements dataset.loader_shuffle
    dataset.test_percentage optimizer
    model.weight_reg model.subsample_factor model.output_size model.h0 model.input_network.activation
    dataset.nInputFeatures dataset.gaussian_smoothing_sigma dataset.use_gaussian_smoothing
    dataset.gaussian_smoothing_sigma_range dataset.use_random_time_warp dataset.time_warp_factor_range
    """.split()
)
"""Names in upstream's files that upstream itself does not read, or that do not apply to this decoder."""
UNSEEDED = -1
"""Upstream's value for "no seed". A run that can be resumed needs a seed."""
MAX_CHARACTERS, MAX_DEPTH = 1 << 20, 50
SECTION_BY_FIELD: dict[str, str] = {
    name: section
    for section, names in {
        "model": "n_input_features n_units n_layers bidirectional rnn_dropout rnn_trainable patch_size patch_stride",
        "model.input_network": "input_trainable input_layer_dropout",
        "dataset": "batch_size n_classes days_per_batch dataset_seed sessions dataset_probability_val feature_subset "
        "must_include_days bad_trials_dict num_dataloader_workers",
        "dataset.data_transforms": "white_noise_std constant_offset_std random_walk_std random_walk_axis "
        "static_gain_std random_cut smooth_data smooth_kernel_std smooth_kernel_size",
    }.items()
    for name in names.split()
}
"""The section of upstream's file that a field belongs to."""


def apply_config_file(cls: type[Config], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the file in `overrides["config_file"]`, updated with `overrides`. Raises ConfigError."""
    name = overrides.get("config_file")
    if not name:
        return dict(overrides)
    path = find_file(str(name))
    data = _bytes_of(path)
    values, unused = parse(data, path, cls)
    logger.info(f"--config-file: {path}, SHA-256 {hashlib.sha256(data).hexdigest()}")
    _check(path, cls, {field: value for field, value in values.items() if field not in overrides})
    if unused:
        logger.info(f"{_name(path)}: these names have no effect here: {', '.join(sorted(unused))}")
    return {**values, **overrides}


def find_file(name: str) -> Path | str:
    """Find a file by path, by its name in the channel `config`, or among those of the image; an s3:// address stays.

    Raises ConfigError.
    """
    if name.startswith("s3://"):
        return name
    for path in (Path(name), root_of() / "input/data/config" / name, root_of() / "code" / name, PRESETS / name):
        if path.is_file():
            return path
    presets = ", ".join(sorted(path.name for path in PRESETS.glob("*.yaml")))
    raise ConfigError(
        f"--config-file {name}: no such file; give a path, s3://BUCKET/KEY, or a file that comes with the image: "
        f"{presets}"
    )


def _bytes_of(path: Path | str) -> bytes:
    """Raises ConfigError, StoreError."""
    if isinstance(path, Path):
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"--config-file {path}: cannot be read ({error.strerror}); check the file") from None
    from estiba.storage import open_store  # imports the S3 client, which a file does not need

    folder, _, name = path.rpartition("/")
    return open_store(folder).read(name)


def _name(path: Path | str) -> str:
    return str(path).rpartition("/")[2]


def _refuse_bomb(text: str, path: Path | str) -> None:
    """A few lines of aliases unfold to more than any memory holds, and the library unfolds them first."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"--config-file {path}: {len(text)} characters, at most {MAX_CHARACTERS}; is this the file?")
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ConfigError(f"--config-file {path}:{line}: an alias (*name) or deep nesting; write plain values")


def read(path: Path, cls: type[Config]) -> tuple[dict[str, Any], list[str]]:
    """Return values by field, and the names that have no effect. Raises ConfigError for unknown names."""
    return parse(_bytes_of(path), path, cls)


def parse(data: bytes, path: Path | str, cls: type[Config]) -> tuple[dict[str, Any], list[str]]:
    """`read` for the content of a file. `path` is for messages."""
    try:
        text = data.decode("utf-8")
        _refuse_bomb(text, path)
        content = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config-file {path}: cannot be read as YAML ({error}); fix the file") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"--config-file {path}: is a {type(content).__name__}; write it as `name: value` lines")
    values: dict[str, Any] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for dotted, value in _leaves(content or {}):
        name = RENAMED.get(dotted, dotted.rpartition(".")[2])
        if dotted == "mode" and value != "train":
            raise ConfigError(f"{path}: mode is {value!r}; this command trains, `brain-to-text evaluate` evaluates")
        if dotted == "model.use_neural_decoder_model":
            if value:
                raise ConfigError(f"{path}: use_neural_decoder_model selects another decoder; set it to false")
            unused.append(dotted)
        elif dotted in MACHINE_SPECIFIC or dotted in NO_EFFECT:
            unused.append(dotted)
        elif name in cls.model_fields and name != "config_file":
            values[name] = None if value == "None" else value
        else:
            close = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.6)
            unknown.append(f"{dotted}{f' (did you mean {close[0]}?)' if close else ''}")
    if unknown:
        raise ConfigError(f"--config-file {path}: unknown {', '.join(unknown)}; remove or correct them")
    for name in ("seed", "dataset_seed"):
        if values.get(name) == UNSEEDED:
            logger.info(
                f"{_name(path)}: {name} is -1, but a resume needs a seed; using {cls.model_fields[name].default}"
            )
            del values[name]
    if "patch_stride" in values and not values["patch_stride"] and not values.get("patch_size"):
        del values["patch_stride"]  # upstream sets both to 0 to turn patches off
    return values, unused


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if dotted in SECTION_BY_FIELD.values() and isinstance(value, dict):
            yield from _leaves(value, f"{dotted}.")
        else:
            yield dotted, value


def _check(path: Path | str, cls: type[Config], values: Mapping[str, Any]) -> None:
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


def to_sections(settings: Mapping[str, Any], sessions: Sequence[str] | None) -> dict[str, Any]:
    """Nest settings and sessions in upstream's sections, as `read` accepts them."""
    content: dict[str, Any] = {"mode": "train"}
    for name, value in {**settings, "sessions": None if sessions is None else list(sessions)}.items():
        section = content
        for part in SECTION_BY_FIELD[name].split(".") if name in SECTION_BY_FIELD else ():
            section = section.setdefault(part, {})
        section["seed" if name == "dataset_seed" else name] = value
    return content
