"""Mistakes in the settings are told before the model is loaded, with the value seen and what to pass instead."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from whole_job import run, write

from embed.config import EmbedConfig
from embed.job import embed
from embed.model import Encoder
from estiba.config import load
from estiba.errors import ConfigError, EstibaError, StoreError
from estiba.platform.contract import Job
from estiba.platform.stop import Stop


@pytest.fixture
def unloaded(monkeypatch) -> None:
    monkeypatch.setattr(Encoder, "__init__", lambda *_: pytest.fail("the model was loaded"))


def mistakes(*argv: str, environ: dict[str, str] | None = None, hyperparameters: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(EmbedConfig, argv=argv, environ=environ or {}, hyperparameters=hyperparameters or {})
    return str(caught.value)


SETTINGS = ["embedding-column", "status-column", "columns", "output-path", "input-path", "checkpoint-path", "model"]


@pytest.mark.parametrize("name", [*SETTINGS, "text-column"])
def test_an_empty_setting_is_called_empty(name):
    assert f"flag --{name} is" in mistakes(f"--{name}=") and "is empty" in mistakes(f"--{name}=")
    assert "is empty" in mistakes(hyperparameters={name: ""})
    if name != "columns":
        assert "is empty" in mistakes(f"--{name}", "  ")


def test_none_still_turns_an_optional_setting_off():
    config = load(EmbedConfig, argv=["--columns", "none", "--prompt="], environ={}, hyperparameters={})
    assert config.columns is None and config.prompt is None


@pytest.mark.parametrize("name", ["input-path", "output-path", "checkpoint-path", "model"])
def test_an_address_with_one_slash_is_corrected(name):
    assert "write s3://b/x" in mistakes(f"--{name}", "s3:/b/x")
    assert "write file:///b/x" in mistakes(f"--{name}", "file:/b/x")
    assert "names no bucket" in mistakes(f"--{name}", "s3://")

    assert "write s3://b/x" in mistakes(f"--{name}", "s3//b/x")
    assert "write s3://b/x" in mistakes(f"--{name}", "s3a://b/x")
    assert "names no bucket" in mistakes(f"--{name}", "S3:///x")


@pytest.mark.parametrize("name", ["input-path", "output-path", "checkpoint-path", "model"])
def test_a_path_that_cannot_exist_is_told(name):
    assert "NUL" in mistakes(f"--{name}", "/tmp/a\0b")
    assert "longer than a path can be" in mistakes(f"--{name}", "/tmp/" + "x" * 300)


def test_a_scheme_may_be_in_capitals():
    config = load(EmbedConfig, argv=["--input-path", "S3://Cubo/X"], environ={}, hyperparameters={})
    assert config.input_path == "s3://Cubo/X"


def test_a_column_to_keep_is_named_once():
    assert "names 'a' twice" in mistakes("--columns", "a,b,a")


@pytest.mark.parametrize(
    ("output", "checkpoints"),
    [
        ("out", "out-checkpoints"),
        ("./out//", "./out-checkpoints"),
        (".", "/w/here-checkpoints"),
        ("..", "/w-checkpoints"),
        ("./out/.", "/w/here/out-checkpoints"),
        ("s3://b/out/", "s3://b/out-checkpoints"),
        ("file:///out", "file:///out-checkpoints"),
        ("s3://b/", None),
        ("/", None),
    ],
)
def test_checkpoints_lie_beside_the_output_and_never_in_it_or_in_another_bucket(monkeypatch, output, checkpoints):
    monkeypatch.setenv("ESTIBA_ROOT", "/absent")
    monkeypatch.setattr(os, "getcwd", lambda: "/w/here")
    config = load(EmbedConfig, argv=["--output-path", output], environ={}, hyperparameters={})
    assert config.checkpoint_path == (checkpoints or "/absent/checkpoints")


@pytest.mark.parametrize("device", ["mps", "gpu", "xpu", "cuda:x"])
def test_a_device_that_the_image_does_not_have_is_told(device):
    assert "pass cpu, cuda or cuda:N" in mistakes("--device", device)


def test_a_flag_that_is_like_no_other_gets_no_suggestion():
    assert "did you mean" not in mistakes("--foo", "1")
    assert "did you mean --model?" in mistakes("--modle", "1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ESTIBA_LOG_INTERVAL_S", "soon"),
        ("ESTIBA_LOG_INTERVAL_S", "-1"),
        ("ESTIBA_MAX_RUNTIME_S", "1h"),
        ("ESTIBA_PRICE_USD_PER_H", "cheap"),
        ("ESTIBA_PRICE_USD_PER_H", "nan"),
    ],
)
def test_the_job_layers_variables_are_checked_before_the_model_is_loaded(
    root, inputs, tiny_model, unloaded, monkeypatch, name, value
):
    write(inputs / "a.parquet", ["hola"])
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} is '{value}'"):
        run(tiny_model)


@pytest.mark.parametrize("setting", ["input_path", "output_path", "checkpoint_path", "model"])
def test_a_bucket_that_does_not_exist_is_found_at_the_start(root, inputs, tiny_model, s3, unloaded, setting):
    write(inputs / "a.parquet", ["hola"])
    with pytest.raises(EstibaError, match=r"bucket 'no-such-bucket' cannot be used.*NoSuchBucket") as caught:
        run(**{"model": tiny_model, setting: "s3://no-such-bucket/x"})
    assert caught.value.exit_code == 2


def test_missing_credentials_are_found_at_the_start(root, inputs, tiny_model, unloaded, monkeypatch, tmp_path):
    write(inputs / "a.parquet", ["hola"])
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(EstibaError, match=r"--output-path s3://un-cubo/x: bucket 'un-cubo'.*credentials") as caught:
        run(tiny_model, output_path="s3://un-cubo/x")
    assert caught.value.exit_code == 2


def test_an_empty_prefix_is_the_addresss_fault_and_not_a_mounts(root, tiny_model, s3, unloaded):
    with pytest.raises(ConfigError, match=r"s3://prueba/nada: no objects.*correct the bucket or the prefix") as caught:
        run(tiny_model, input_path=f"s3://{s3.bucket}/nada")
    assert "mount" not in str(caught.value)


def test_every_key_that_cannot_be_used_is_named(root, tiny_model, s3, unloaded):
    client = s3.client()
    for key in ("in/a.parquet", "in//b.parquet", "in/./c.parquet", "in/x/../d.parquet", "in/e//f.parquet"):
        client.put_object(Bucket=s3.bucket, Key=key, Body=b"x")
    with pytest.raises(StoreError) as caught:
        run(tiny_model, input_path=f"s3://{s3.bucket}/in")
    named = [key for key in ("//b", "/./c", "/../d", "e//f") if key in str(caught.value)]
    assert named == ["//b", "/./c", "/../d", "e//f"] and "a.parquet" not in str(caught.value)


def test_a_prefix_without_a_model_is_named_by_its_address(root, inputs, s3):
    write(inputs / "a.parquet", ["hola"])
    s3.client().put_object(Bucket=s3.bucket, Key="m/notes.txt", Body=b"x")
    config = EmbedConfig(model=f"s3://{s3.bucket}/m")
    with pytest.raises(ConfigError, match=r"s3://prueba/m.*modules\.json") as caught:
        embed(config, Job.read(), Stop())
    assert "estiba-model-" not in str(caught.value)


@pytest.mark.parametrize("setting", ["output_path", "checkpoint_path"])
@pytest.mark.parametrize("below", ["", "x/y"])
def test_an_output_path_that_is_a_file_is_told(root, inputs, tiny_model, unloaded, setting, below):
    write(inputs / "a.parquet", ["hola"])
    (root / "file").write_text("x")
    with pytest.raises(ConfigError, match="file is a file, and a directory is needed"):
        run(tiny_model, **{setting: str(root / "file" / below)})


# --- the tokenizer guide ---------------------------------------------------------------------------------------------


def guide(folder: Path, program: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the guide's program as a user who set nothing up: no PYTHONPATH, no /opt/ml."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ESTIBA_ROOT")}
    command = [sys.executable, program, *words]
    return subprocess.run(
        command, cwd=folder, env={**kept, "HF_HUB_OFFLINE": "1", **environ}, capture_output=True, text=True
    )


def program_of(name: str) -> Path:
    package = Path(inspect.getfile(EmbedConfig)).parent
    return next(path for path in (package.parent / "src" / name, package.parent / name) if path.is_file())


@pytest.mark.parametrize("program", ["tokenizer.py", "run.py"])
def test_the_guides_command_runs_without_opt_ml_and_checkpoints_lie_beside_the_output(tmp_path, tiny_model, program):
    write(tmp_path / "samples/parquet/a.parquet", ["hola", None, "mar"])
    words = "--input-path ./samples/parquet --output-path ./output --batch-size 0 --model".split()
    done = guide(tmp_path, str(program_of(program)), *words, str(tiny_model), ESTIBA_ROOT=str(tmp_path / "absent"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output/a.parquet").is_file() and not (tmp_path / "absent").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "output-checkpoints", "samples"]
    assert "--batch-size 0" in done.stderr and "1536 tokens" in done.stderr and "cpu" in done.stderr
    again = guide(tmp_path, str(program_of(program)), *words, str(tiny_model), ESTIBA_ROOT=str(tmp_path / "absent"))
    assert "1 files already complete" in again.stderr


def test_results_state_what_batch_size_0_chose(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    assert run(tiny_model)["batch"] == {"rows": None, "tokens": 1536, "device": "cpu"}
    assert run(tiny_model, batch_size=4)["batch"] == {"rows": 4, "tokens": 1536, "device": "cpu"}


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "workers", "threads"),
    [
        ("max 100000", 1, 8),
        ("max 100000", 2, 4),
        ("max 100000", 16, 1),
        ("50000 100000", 1, 1),
        ("300000 100000", 2, 2),
    ],
)
def test_workers_share_the_cores_that_the_container_may_use(monkeypatch, tmp_path, limit, workers, threads):
    from embed import pool

    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(pool, "CGROUP_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(pool.torch, "get_num_threads", lambda: 8)
    chosen: list[int] = []
    monkeypatch.setattr(pool.torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    pool.limit_threads(workers)
    assert chosen == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pool.limit_threads(workers)
    assert chosen == [threads]


def test_idle_threads_sleep_soon_without_the_images_entry_point(tmp_path, monkeypatch):
    """OpenMP's default is 300,000 spins, during which a neighbour on the same core cannot compute."""
    script = (
        "import os, sys; sys.argv = ['x', '--help']; from estiba.platform import workload; from embed.config import *\n"
    )
    script += (
        "try: workload.main(EmbedConfig, 'embed.job:embed')\nfinally: print('spins', os.environ['GOMP_SPINCOUNT'])"
    )
    environ = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True)
    assert "spins 3000" in done.stdout, done.stderr
