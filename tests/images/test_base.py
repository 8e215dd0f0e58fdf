"""In every image: the base's packages are unchanged, and any user can work."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BASE_FREEZE = Path("/opt/estiba/base-freeze.txt")
# torch and everything below it: CUDA, NCCL, cuDNN, kernels compiled against this very torch.
ACCELERATOR = re.compile(r"torch|triton|nvidia|cuda|nccl|cudnn|flash[-_.]attn|transformer[-_.]engine|deepspeed")
STRANGER_UID = 54321


def held() -> dict[str, str]:
    """The packages of the base's Python before the image added its own, with versions."""
    return dict(line.split("==") for line in BASE_FREEZE.read_text().split())


def test_torch_and_cuda_are_the_bases_own() -> None:
    before = {name: version for name, version in held().items() if ACCELERATOR.match(name)}
    now = {d.name.lower(): d.version for d in importlib.metadata.distributions() if ACCELERATOR.match(d.name.lower())}
    assert "torch" in before
    assert now == before


def test_torch_computes() -> None:
    import torch

    assert (torch.ones(2, 3) @ torch.ones(3, 2)).sum().item() == 12.0


def test_nothing_of_the_base_is_missing() -> None:
    now = {d.name.lower() for d in importlib.metadata.distributions()}
    assert set(held()) - now == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize(
    "folder",
    ["/opt/ml/model", "/opt/ml/checkpoints", "/opt/ml/output", "/opt/ml/output/data", "$HOME", "$HF_HOME", "/tmp"],
)
def test_a_user_without_an_account_can_write(folder: str) -> None:
    code = "import os, sys, tempfile; tempfile.TemporaryFile(dir=os.path.expandvars(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, folder], user=STRANGER_UID, group=STRANGER_UID, check=False)
    assert done.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_user_without_an_account_has_a_name() -> None:
    """torch's compile cache and the hub's client need one."""
    code = "import getpass; print(getpass.getuser())"
    done = subprocess.run(
        [sys.executable, "-c", code], user=STRANGER_UID, group=STRANGER_UID, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip()


def test_the_sagemaker_toolkit_is_there() -> None:
    assert importlib.metadata.version("sagemaker-training")
