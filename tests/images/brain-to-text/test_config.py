"""Upstream's files, the guide's flags, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from brain_to_text.arguments import PRESETS, nested, read
from brain_to_text.choices import check
from brain_to_text.commands import COMMANDS
from brain_to_text.config import FREE, BrainConfig
from estiba.config import load
from estiba.contract import checkpoint_dir
from estiba.errors import ConfigError

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
"""Every name that upstream's rnn_args.yaml has, with its values; of the sessions, two."""


def given(*argv: str, **hyperparameters: str) -> BrainConfig:
    return load(BrainConfig, argv=argv, environ={}, hyperparameters=hyperparameters)


def file(tmp_path: Path, content: dict) -> str:
    path = tmp_path / "rnn_args.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_upstreams_file_is_taken_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = given("--config-file", file(tmp_path, UPSTREAM))
    assert config.sessions == ["t15.2023.08.11", "t15.2023.08.13"]
    assert (config.seed, config.dataset_seed) == (10, 1)
    assert config.gpu_number is None
    assert config.init_checkpoint_path is None
    check(config)
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert "has no effect here" in said and "dataset.max_seq_elements" in said and "output_dir" in said


def test_the_defaults_are_upstreams_values(tmp_path: Path) -> None:
    here, upstream = BrainConfig(), given("--config-file", file(tmp_path, UPSTREAM))
    derived = {"config_file", "sessions", "dataset_probability_val", "lr_decay_steps", "lr_max_day", "lr_min_day",
               "lr_decay_steps_day", "lr_warmup_steps_day"}  # fmt: skip
    for name in set(BrainConfig.model_fields) - derived:
        assert getattr(here, name) == getattr(upstream, name), name


def test_the_guides_hyperparameters_stand_over_the_file(tmp_path: Path) -> None:
    config = given(
        **{"s3-bucket": "bucket", "s3-data-prefix": "data/hdf5_data_diphone_encoded/", "gpu-number": "0",
           "config-file": "rnn_args_diphone_sagemaker.yaml", "num-training-batches": "150000", "batch-size": "48"}
    )  # fmt: skip
    assert config.data_location == "s3://bucket/data/hdf5_data_diphone_encoded"
    assert (config.n_classes, config.n_units, config.batch_size, config.epsilon) == (1681, 1024, 48, 1e-8)
    assert given("--config-file", "rnn_args_diphone_sagemaker.yaml", "--n-units", "64").n_units == 64


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_that_comes_with_the_image_has_no_idle_line(path: Path) -> None:
    _, unused = read(path, BrainConfig)
    assert unused == []
    check(given("--config-file", path.name))


def test_the_composite_loss_of_the_guide_is_taken(tmp_path: Path) -> None:
    content = {"use_composite_loss": True, "use_alpha_schedule": True, "alpha_schedule_end": 0.6,
               "dataset": {"n_classes": 1681}}  # fmt: skip
    config = given("--config-file", file(tmp_path, content))
    assert config.use_composite_loss and config.use_alpha_schedule
    check(config)


def test_what_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nobody knows model\.n_unitz \(did you mean n_units\?\)"):
        given("--config-file", file(tmp_path, {"model": {"n_unitz": 4}}))


def test_a_wrong_value_is_refused_with_the_files_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rnn_args\.yaml: n_classes is 40.*\n.*lr_max is 'fast'"):
        given("--config-file", file(tmp_path, {"lr_max": "fast", "dataset": {"n_classes": 40}}))


def test_a_wrong_value_that_a_flag_replaces_does_no_harm(tmp_path: Path) -> None:
    assert given("--config-file", file(tmp_path, {"lr_max": "fast"}), "--lr-max", "0.1").lr_max == 0.1


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n"])
def test_a_file_that_is_no_yaml_of_names_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        given("--config-file", str(path))


def test_a_missing_file_names_those_that_come_here() -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: there is no such file.*rnn_args\.yaml"):
        given("--config-file", "nothing.yaml")


def test_the_file_lies_in_the_channel_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "input/data/config"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text("model: {n_units: 77}\n")
    monkeypatch.setenv("ESTIBA_ROOT", str(tmp_path))
    assert given("--config-file", "own.yaml").n_units == 77


def test_evaluation_and_another_architecture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"brain-to-text evaluate"):
        given("--config-file", file(tmp_path, {"mode": "eval"}))
    with pytest.raises(ConfigError, match=r"another decoder"):
        given("--config-file", file(tmp_path, {"model": {"use_neural_decoder_model": True}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s3_bucket": "b"}, "needs --s3-data-prefix"),
        ({"s3_data_prefix": "b"}, "needs --s3-bucket"),
        ({"use_composite_loss": True}, "needs --n-classes 1681"),
        ({"dataset_probability_val": [1]}, "dataset_probability_val has 1 values"),
        ({"sessions": ["a", "a"]}, "sessions a are listed twice"),
        ({"feature_subset": [0, 512]}, r"feature_subset: \[512\]"),
        ({"init_from_checkpoint": True}, "needs --init-checkpoint-path"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(BrainConfig(**changes))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    COMMANDS["show-config"](list(arguments))
    return capsys.readouterr().out


def test_show_config_honours_and_refuses_what_training_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ESTIBA_ROOT", str(tmp_path))
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/config/hyperparameters.json").write_text('{"n-units": "33", "batch-size": "6"}')
    monkeypatch.setenv("ESTIBA_BATCH_SIZE", "7")
    values = yaml.safe_load(shown(capsys))
    assert (values["dataset"]["batch_size"], values["model"]["n_units"]) == (7, 33)
    monkeypatch.setenv("ESTIBA_BATCH_SIZE", "seven")
    monkeypatch.setenv("ESTIBA_BATCH_SZE", "7")
    with pytest.raises(ConfigError, match=r"'ESTIBA_BATCH_SZE'; did you mean ESTIBA_BATCH_SIZE\?\n.*'seven'"):
        shown(capsys)


def test_show_config_prints_every_setting_and_config_file_takes_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ESTIBA_ROOT", str(tmp_path))
    flags = ["--reader", "h5py", "--on-bad-trial", "skip", "--save-every-s", "5", "--dataset-dir", "/d", "--seed", "3"]
    text = shown(capsys, *flags)
    for name in set(BrainConfig.model_fields) - {"config_file", "dataset_seed"}:
        assert f"{name}: " in text or f"{name}:\n" in text, name
    assert f"# checkpoint_path: {checkpoint_dir()}\n" in text and f"# model_dir: {tmp_path}/model\n" in text
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert given("--config-file", str(path)).model_copy(update={"config_file": None}) == given(*flags)
    assert shown(capsys, "--config-file", str(path)) == text


def test_help_names_the_other_commands_and_every_file_that_comes_along(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        given("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name in COMMANDS:
        assert f"brain-to-text {name}" in text
    for path in PRESETS.glob("*.yaml"):
        assert path.name in text
    assert "ESTIBA_CONFIG_FILE" in text


def test_what_is_written_beside_weights_reads_back_the_same(tmp_path: Path) -> None:
    config = BrainConfig(n_units=12, time_masks=4, ema_decay=0.9, feature_subset=[1, 2], dataset_seed=7, lr_max_day=0.1)
    values, unused = read(Path(file(tmp_path, nested(config, ["a", "b"]))), BrainConfig)
    again = BrainConfig.model_validate(values)
    assert unused == ["mode"]
    assert again.sessions == ["a", "b"]
    for name in set(BrainConfig.model_fields) - FREE:
        assert getattr(again, name) == getattr(config, name), name
