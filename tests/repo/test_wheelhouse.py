"""The wheelhouse selects wheels for the image's Python, not for its own, and never a CUDA package."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def wheelhouse(root: Path) -> ModuleType:
    pytest.importorskip(
        "pip", reason="markers are read with pip's own library; .build/tools has it, this environment may not"
    )
    spec = importlib.util.spec_from_file_location("wheelhouse", root / "scripts/wheelhouse.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


LOCK = """\
# a comment
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:aa \\
    --hash=sha256:ab
    # via scipy
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:ba
colorama==0.4.6 ; sys_platform == 'win32' \\
    --hash=sha256:ca
tqdm==4.70.1 \\
    --hash=sha256:da
"""


@pytest.mark.parametrize(("python", "numpy"), [("3.11", "2.4.6"), ("3.12", "2.5.5")])
def test_markers_are_evaluated_for_the_target_python(
    wheelhouse: ModuleType, tmp_path: Path, python: str, numpy: str
) -> None:
    lock = tmp_path / "requirements.txt"
    lock.write_text(LOCK)
    kept = wheelhouse.for_target(wheelhouse.requirements(lock), python)
    assert [line.split(" ")[0] for line in kept] == [f"numpy=={numpy}", "tqdm==4.70.1"]
    assert all("--hash=sha256:" in line for line in kept)


def test_a_torch_pin_without_the_cpu_tag_is_refused(wheelhouse: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(wheelhouse.WheelhouseError, match="does not name a CPU build"):
        wheelhouse.fetch_torch(tmp_path, "3.11", "torch==2.13.0")


def test_cuda_wheels_are_refused_by_name(wheelhouse: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "nvidia_nccl_cu13-2.29-py3-none-manylinux_2_18_x86_64.whl").touch()
    with pytest.raises(wheelhouse.WheelhouseError, match="nvidia_nccl_cu13"):
        wheelhouse.refuse_cuda(tmp_path)


def test_files_of_an_earlier_lock_are_deleted(wheelhouse: ModuleType, tmp_path: Path) -> None:
    names = [
        "tqdm-4.70.1-py3-none-any.whl",
        "tqdm-4.69.0-py3-none-any.whl",
        "inotify_simple-1.2.1.tar.gz",
        "gone-1.0.tar.gz",
    ]
    for name in names:
        (tmp_path / name).touch()
    wheelhouse.forget_unlocked(tmp_path, set(names), ["tqdm==4.70.1", "inotify-simple==1.2.1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "inotify_simple-1.2.1.tar.gz",
        "tqdm-4.70.1-py3-none-any.whl",
    ]


def test_a_name_without_a_lock_says_what_to_do(wheelhouse: ModuleType) -> None:
    with pytest.raises(wheelhouse.WheelhouseError, match="make lock"):
        wheelhouse.lock_of("no-such-image")


def test_files_are_taken_out_of_a_package_that_is_not_installed(
    wheelhouse: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(folder: Path, python: str, lines: list[str]) -> None:
        assert (python, lines) == ("3.11", ["palabras==1.0 --hash=sha256:aa"])
        with zipfile.ZipFile(folder / "palabras-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("palabras/data/words.txt", "barco")
            archive.writestr("palabras/__init__.py", "raise ImportError")

    monkeypatch.setattr(wheelhouse, "fetch_locked", fetch)
    listing = tmp_path / "data.txt"
    listing.write_text("# a comment\npalabras==1.0 --hash=sha256:aa palabras/data/words.txt\n")
    wheelhouse.fetch_data(tmp_path / "share", "3.11", listing)
    assert {path.name for path in (tmp_path / "share").rglob("*")} == {"palabras", "words.txt"}
    assert (tmp_path / "share/palabras/words.txt").read_text() == "barco"
