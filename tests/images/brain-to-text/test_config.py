"""Upstream's files and the guide's flags are accepted; mistakes are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml
from bucket import bucket_for

from brain_to_text.commands import COMMANDS
from brain_to_text.config import MAY_CHANGE, BrainConfig
from brain_to_text.yaml_config import PRESETS, read, to_sections
from estiba.config import load
from estiba.errors import ConfigError, StoreError
from estiba.platform.contract import checkpoint_dir

UPSTREAM: dict = {
    "model": {
        "n_input_features": 512, "n_units": 768, "rnn_dropout": 0.4, "rnn_trainable": True, "n_layers": 5,
        "patch_size": 14, "patch_stride": 4,
        "input_network": {"n_input_layers": 1, "input_layer_sizes": [512], "input_trainable": True,
                          "input_layer_dropout": 0.2},
    },
    "gpu_number": "1", "mode": "train", "use_amp": True, "output_dir": "trained_models/x",
    "checkpoint_dir": "trained_models/x/checkpoint", "init_from_checkpoint": False, "init_checkpoint_path": "None",
    "save_best_checkpoint": True, "save_all_val_steps": False, "save_final_model": False, "save_val_metrics": True,
    "early_stopping": False, "early_stopping_val_steps": 20, "num_training_batches": 120000,
    "lr_scheduler_type": "cosine", "lr_max": 0.005, "lr_min": 0.0001, "lr_decay_steps": 120000,
    "lr_warmup_steps": 1000, "lr_max_day": 0.005, "lr_min_day": 0.0001, "lr_decay_steps_day": 120000,
    "lr_warmup_steps_day": 1000, "beta0": 0.9, "beta1": 0.999, "epsilon": 0.1, "weight_decay": 0.001,
    "weight_decay_day": 0, "seed": 10, "grad_norm_clip_value": 10, "batches_per_train_log": 200,
    "batches_per_val_step": 2000, "batches_per_save": 0, "log_individual_day_val_PER": True,
    "log_val_skip_logs": False, "save_val_logits": True, "save_val_data": False,
    "dataset": {
        "data_transforms": {
            "white_noise_std": 1.0, "constant_offset_std": 0.2, "random_walk_std": 0.0, "random_walk_axis": -1,
            "static_gain_std": 0.0, "random_cut": 3, "smooth_kernel_size": 100, "smooth_data": True,
            "smooth_kernel_std": 2,
        },
        "neural_dim": 512, "batch_size": 64, "n_classes": 41, "max_seq_elements": 500, "days_per_batch": 4, "seed": 1,
        "num_dataloader_workers": 4, "loader_shuffle": False, "must_include_days": None, "test_percentage": 0.1,
        "feature_subset": None, "dataset_dir": "../data/hdf5_data_final", "bad_trials_dict": None,
        "sessions": ["t15.2023.08.11", "t15.2023.08.13"], "dataset_probability_val": [0, 1],
    },
}  # fmt: skip
"""Every name in upstream's rnn_args.yaml, with its value, but only two of the sessions."""


def config_from(*argv: str, **hyperparameters: str) -> BrainConfig:
    return load(BrainConfig, argv=argv, environ={}, hyperparameters=hyperparameters)


def file(tmp_path: Path, content: dict) -> str:
    path = tmp_path / "rnn_args.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_upstreams_file_is_accepted_unchanged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = config_from("--config-file", file(tmp_path, UPSTREAM))
    assert config.sessions == ["t15.2023.08.11", "t15.2023.08.13"]
    assert (config.seed, config.dataset_seed) == (10, 1)
    assert config.gpu_number is None
    assert config.init_checkpoint_path is None
    config.preflight()
    printed = capfd.readouterr().err
    assert printed.count("\n") == 2, printed
    assert "no effect here" in printed and "dataset.max_seq_elements" in printed and "output_dir" in printed


def test_the_defaults_are_upstreams_values(tmp_path: Path) -> None:
    here, upstream = BrainConfig(), config_from("--config-file", file(tmp_path, UPSTREAM))
    derived = {"config_file", "sessions", "dataset_probability_val", "lr_decay_steps", "lr_max_day", "lr_min_day",
               "lr_decay_steps_day", "lr_warmup_steps_day"}  # fmt: skip
    for name in set(BrainConfig.model_fields) - derived:
        assert getattr(here, name) == getattr(upstream, name), name


def test_the_guides_hyperparameters_override_the_file(tmp_path: Path) -> None:
    config = config_from(
        **{"s3-bucket": "bucket", "s3-data-prefix": "data/hdf5_data_diphone_encoded/", "gpu-number": "0",
           "config-file": "rnn_args_diphone_sagemaker.yaml", "num-training-batches": "150000", "batch-size": "48"}
    )  # fmt: skip
    assert config.data_location == "s3://bucket/data/hdf5_data_diphone_encoded"
    assert (config.n_classes, config.n_units, config.batch_size, config.epsilon) == (1681, 1024, 48, 1e-8)
    assert config_from("--config-file", "rnn_args_diphone_sagemaker.yaml", "--n-units", "64").n_units == 64


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_setting_in_the_files_of_the_image_has_an_effect(path: Path) -> None:
    _, unused = read(path, BrainConfig)
    assert unused == []
    config_from("--config-file", path.name).preflight()


def test_the_guides_composite_loss_is_accepted(tmp_path: Path) -> None:
    content = {"use_composite_loss": True, "use_alpha_schedule": True, "alpha_schedule_end": 0.6,
               "dataset": {"n_classes": 1681}}  # fmt: skip
    config = config_from("--config-file", file(tmp_path, content))
    assert config.use_composite_loss and config.use_alpha_schedule
    config.preflight()


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown model\.n_unitz \(did you mean n_units\?\)"):
        config_from("--config-file", file(tmp_path, {"model": {"n_unitz": 4}}))


def test_a_wrong_value_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rnn_args\.yaml: n_classes is 40.*\n.*lr_max is 'fast'"):
        config_from("--config-file", file(tmp_path, {"lr_max": "fast", "dataset": {"n_classes": 40}}))


def test_a_wrong_value_that_a_flag_overrides_does_no_harm(tmp_path: Path) -> None:
    assert config_from("--config-file", file(tmp_path, {"lr_max": "fast"}), "--lr-max", "0.1").lr_max == 0.1


MERGE_BOMB = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)
)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", MERGE_BOMB, "a: " + "[" * 500_000])
def test_a_file_that_is_not_a_yaml_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        config_from("--config-file", str(path))


def test_the_error_for_a_missing_file_names_those_of_the_image() -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file.*rnn_args\.yaml"):
        config_from("--config-file", "nothing.yaml")


def test_a_file_is_found_in_the_channel_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "input/data/config"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text("model: {n_units: 77}\n")
    monkeypatch.setenv("ESTIBA_ROOT", str(tmp_path))
    assert config_from("--config-file", "own.yaml").n_units == 77


def test_evaluation_and_another_architecture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"brain-to-text evaluate"):
        config_from("--config-file", file(tmp_path, {"mode": "eval"}))
    with pytest.raises(ConfigError, match=r"another decoder"):
        config_from("--config-file", file(tmp_path, {"model": {"use_neural_decoder_model": True}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s3_bucket": "b"}, "needs --s3-data-prefix"),
        ({"s3_data_prefix": "b"}, "needs --s3-bucket"),
        ({"use_composite_loss": True}, "needs --n-classes 1681"),
        ({"dataset_probability_val": [1]}, "dataset_probability_val has 1 values"),
        ({"sessions": ["a", "a"]}, "sessions a are listed more than once"),
        ({"feature_subset": [0, -1]}, r"feature_subset: \[-1\]"),
        ({"feature_subset": []}, "feature_subset: an empty list"),
        ({"init_from_checkpoint": True}, "needs --init-checkpoint-path"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BrainConfig(**changes).preflight()


def show_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    COMMANDS["show-config"](list(arguments))
    return capsys.readouterr().out


def test_show_config_accepts_and_refuses_what_training_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ESTIBA_ROOT", str(tmp_path))
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/config/hyperparameters.json").write_text('{"n-units": "33", "batch-size": "6"}')
    monkeypatch.setenv("ESTIBA_BATCH_SIZE", "7")
    values = yaml.safe_load(show_config(capsys))
    assert (values["dataset"]["batch_size"], values["model"]["n_units"]) == (7, 33)
    monkeypatch.setenv("ESTIBA_BATCH_SIZE", "seven")
    monkeypatch.setenv("ESTIBA_BATCH_SZE", "7")
    with pytest.raises(ConfigError, match=r"'ESTIBA_BATCH_SZE'; did you mean ESTIBA_BATCH_SIZE\?\n.*'seven'"):
        show_config(capsys)


def test_show_config_prints_every_setting_in_a_form_that_config_file_accepts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ESTIBA_ROOT", str(tmp_path))
    flags = ["--reader", "h5py", "--on-bad-trial", "skip", "--save-every-s", "5", "--dataset-dir", "/d", "--seed", "3"]
    text = show_config(capsys, *flags)
    for name in set(BrainConfig.model_fields) - {"config_file", "dataset_seed"}:
        assert f"{name}: " in text or f"{name}:\n" in text, name
    assert f"# checkpoint_path: {checkpoint_dir()}\n" in text and f"# model_dir: {tmp_path}/model\n" in text
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert config_from("--config-file", str(path)).model_copy(update={"config_file": None}) == config_from(*flags)
    assert show_config(capsys, "--config-file", str(path)) == text


def test_help_names_the_other_commands_and_every_file_of_the_image(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        config_from("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name in COMMANDS:
        assert f"brain-to-text {name}" in text
    for path in PRESETS.glob("*.yaml"):
        assert path.name in text
    assert "ESTIBA_CONFIG_FILE" in text


def test_settings_written_with_weights_are_read_back_unchanged(tmp_path: Path) -> None:
    config = BrainConfig(n_units=12, time_masks=4, ema_decay=0.9, feature_subset=[1, 2], dataset_seed=7, lr_max_day=0.1)
    values, unused = read(Path(file(tmp_path, to_sections(config.training_settings(), ["a", "b"]))), BrainConfig)
    again = BrainConfig.model_validate(values)
    assert unused == ["mode"]
    assert again.sessions == ["a", "b"]
    for name in set(BrainConfig.model_fields) - MAY_CHANGE:
        assert getattr(again, name) == getattr(config, name), name


def test_a_file_on_s3_is_read_and_the_log_names_it_with_its_digest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b"model:\n  n_units: 77\n"
    digest = hashlib.sha256(content).hexdigest()
    with bucket_for(monkeypatch) as bucket:
        bucket.objects["settings/rnn_args.yaml"] = content
        assert config_from("--config-file", "s3://brain/settings/rnn_args.yaml").n_units == 77
        assert f"s3://brain/settings/rnn_args.yaml, SHA-256 {digest}" in capsys.readouterr().err
        with pytest.raises(StoreError, match=r"s3://brain/settings/rnn_argz.yaml"):
            config_from("--config-file", "s3://brain/settings/rnn_argz.yaml")
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert config_from("--config-file", str(path)).n_units == 77
    assert f"{path}, SHA-256 {digest}" in capsys.readouterr().err
