"""AWS's own SDKs run our image, unmodified, in their local modes: the image is a plain SageMaker training image.

    ESTIBA_SLOW_TESTS=1 .venv/bin/python -m pytest tests/launch/test_sdks.py

Each SDK gets a venv below ~/.cache/estiba (400 MB each, made once). Version 2 calls `docker-compose`, version 3
`docker compose`; both make a network `sagemaker-local`, which the other trips over, so it is removed in between.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
IMAGE = os.environ.get("ESTIBA_EMBED_IMAGE", "estiba/embed:local")
NETWORK = "sagemaker-local"
SDKS = {"v2": "sagemaker==2.257.*", "v3": "sagemaker==3.27.*"}
TEXTS = ["el barco zarpa al alba", "la bodega va llena de trigo", "otro puerto espera"]


def _why_not() -> str | None:
    if not os.environ.get("ESTIBA_SLOW_TESTS"):
        return "installs 400 MB for each SDK; set ESTIBA_SLOW_TESTS=1 to run it"
    if not shutil.which("docker"):
        return "no docker; run `make engine`"
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, check=False).returncode:
        return f"no image {IMAGE}; run `make build/embed BASE=local`"
    return None


WHY_NOT = _why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.docker,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


def venv_of(sdk: str) -> Path:
    """The Python of an SDK's own environment, made when it is missing; skips the test when that fails."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "estiba"
    folder = base / f"{SDKS[sdk].replace('==', '-').rstrip('.*')}-py{sys.version_info[0]}.{sys.version_info[1]}"
    python, ready = folder / "bin/python", folder / "ready"
    if not ready.exists():
        base.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        words = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", SDKS[sdk]]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{SDKS[sdk]} cannot be installed here: {done.stderr.strip()[-300:]}")
        ready.touch()
    return python


def clean() -> None:
    """Remove the network both SDKs want for themselves, and what they left on it."""
    listed = subprocess.run(
        ["docker", "ps", "-aq", "--filter", f"network={NETWORK}"], capture_output=True, text=True, check=True
    )
    for container in listed.stdout.split():
        subprocess.run(["docker", "rm", "--force", container], capture_output=True, check=False)
    subprocess.run(["docker", "network", "rm", NETWORK], capture_output=True, check=False)


@pytest.fixture(autouse=True)
def own_network() -> Iterator[None]:
    clean()
    yield
    clean()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of one layer, made in the image itself."""
    folder = tmp_path_factory.mktemp("model")
    make = 'import pathlib, tiny_model; tiny_model.build(pathlib.Path("/made/tiny"))'
    words = ["docker", "run", "--rm", "--network", "none", "-v", f"{folder}:/made"]
    words += ["-v", f"{HERE.parents[0] / 'images/embed'}:/recipe:ro", "-e", "PYTHONPATH=/opt/estiba:/recipe"]
    words += ["-e", "PYTHONDONTWRITEBYTECODE=1", IMAGE, "sh", "-c", f"python -c '{make}' && chmod -R a+rX /made"]
    subprocess.run(words, check=True)
    return folder / "tiny"


@pytest.mark.parametrize("sdk", ["v2", "v3"])
def test_the_sdk_runs_our_image_as_it_is(sdk, model, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    if sdk == "v2" and not shutil.which("docker-compose"):
        pytest.skip("version 2 calls `docker-compose`, which is not here")
    python = venv_of(sdk)
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    pq.write_table(pa.table({"id": range(len(TEXTS)), "frase": TEXTS}), data / "a.parquet")
    # Nothing asks AWS: dummy keys, and what reports to AWS is turned off.
    quiet = tmp_path / "sagemaker.yaml"
    quiet.write_text(
        "SchemaVersion: '1.0'\nSageMaker:\n  PythonSDK:\n    Modules:\n      TelemetryOptOut: true\n", "utf-8"
    )
    env = {
        **os.environ,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "dummy",
        "AWS_SECRET_ACCESS_KEY": "dummy",
        "AWS_EC2_METADATA_DISABLED": "true",
        "SAGEMAKER_USER_CONFIG_OVERRIDE": str(quiet),
        "TMPDIR": str(tmp_path),
    }
    settings = {"model": "/opt/ml/input/data/model", "text-column": "frase", "embedding-column": "vector"}
    words = [
        str(python),
        str(HERE / "sdks" / f"{sdk}.py"),
        IMAGE,
        str(data),
        str(model),
        str(out),
        json.dumps(settings),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["version"].startswith(SDKS[sdk].partition("==")[2].rstrip(".*"))
    archives = Path(told["archives"])
    assert (archives / "model.tar.gz").exists()
    with tarfile.open(archives / "output.tar.gz") as tar:
        name = next(name for name in tar.getnames() if name.endswith("a.parquet"))
        stream = tar.extractfile(name)
        assert stream
        (tmp_path / "result.parquet").write_bytes(stream.read())
    vectors = pq.read_table(tmp_path / "result.parquet").column("vector").to_pylist()
    assert len(vectors) == len(TEXTS)
    for vector in vectors:
        assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-3)
    assert vectors[0] != vectors[1]
