"""SAGEMAKER_SUBMIT_DIRECTORY: a folder, one file or an archive, at a path or on S3."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from estiba.errors import ConfigError
from estiba.platform.submit_directory import fetch
from shared.script_hosts import Hosts

FILES = {"finetune.py": "print('hola')", "requirements.txt": "", "lib/tools.py": "WORD = 1"}


def packed(files: dict[str, str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return raw.getvalue()


@pytest.fixture(params=["path", "file", "s3"])
def code(request: Any, tmp_path: Path) -> str:
    """The address of a folder with scripts/, one.py, code/sourcedir.tar.gz, broken.tar.gz and evil.tar.gz."""
    objects = {f"scripts/{name}": text.encode() for name, text in FILES.items()}
    objects |= {"one.py": b"print('one')", "code/sourcedir.tar.gz": packed(FILES), "broken.tar.gz": b"no archive"}
    objects |= {"evil.tar.gz": packed({"../evil": "x", **FILES})}
    if request.param == "s3":
        url: str = request.getfixturevalue("s3_url")
        bucket, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
        for key, data in objects.items():
            boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=data)
        return url.rstrip("/")
    for key, data in objects.items():
        path = tmp_path / "in" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/in"


def read(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["scripts", "scripts/", "code", "code/sourcedir.tar.gz"])
def test_a_folder_and_an_archive_are_brought_whole(place: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fetch(f"{code}/{place}", tmp_path / "out", "finetune.py")
    assert read(tmp_path / "out") == FILES


@pytest.mark.parametrize("place", ["code/sourcedir.tar.gz", "evil.tar.gz"])
def test_an_archive_is_unpacked_by_an_older_python_too(
    place: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tarfile, "data_filter")
    real = tarfile.TarFile.extractall
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path: real(self, path, filter="fully_trusted"))
    (tmp_path / "deep" / "out").mkdir(parents=True)
    if place == "evil.tar.gz":
        with pytest.raises(ConfigError, match="leads out of the folder"):
            fetch(f"{code}/{place}", tmp_path / "deep" / "out", "finetune.py")
        assert not list(tmp_path.rglob("evil"))
        return
    fetch(f"{code}/{place}", tmp_path / "deep" / "out", "finetune.py")
    assert read(tmp_path / "deep" / "out") == FILES


def test_one_file_is_the_program(code: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fetch(f"{code}/one.py", tmp_path / "out", "one.py")
    assert read(tmp_path / "out") == {"one.py": "print('one')"}


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nothing", "nothing: no such "),
        ("one.py", r"SAGEMAKER_PROGRAM=finetune.py: not in .*one\.py, which holds one\.py"),
        ("broken.tar.gz", r"broken\.tar\.gz: cannot be unpacked"),
        ("evil.tar.gz", r"evil\.tar\.gz: cannot be unpacked"),
    ],
)
def test_a_location_without_the_program_is_refused_by_name(place: str, says: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "deep" / "out").mkdir(parents=True)
    with pytest.raises(ConfigError, match=says) as error:
        fetch(f"{code}/{place}", tmp_path / "deep" / "out", "finetune.py")
    assert f"{code}/{place}" in str(error.value)
    assert not list(tmp_path.rglob("evil"))


def test_each_of_several_hosts_runs_the_archive_that_the_sdk_uploaded(hosts: Callable[..., Hosts], s3_url: str) -> None:
    """The SDK's estimators name program and archive in hyperparameters, encoded as JSON."""
    files = {"train.py": "import lib.tools, sys\nprint('trained', lib.tools.WORD, sys.argv[1:])", **FILES}
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/source/sourcedir.tar.gz", Body=packed(files))
    job = hosts("127.0.0.1", "127.0.0.2")
    for name in job.names:
        shutil.rmtree(job.root(name) / "code")
    archive = json.dumps(f"{s3_url}/source/sourcedir.tar.gz")
    settings = {"sagemaker_program": '"train.py"', "sagemaker_submit_directory": archive, "epochs": "2"}
    job.start("", hyperparameters=settings)
    assert job.end() == [0, 0], job.log("127.0.0.1")
    for name in job.names:
        assert "trained 1 ['--epochs', '2']" in job.log(name)
        assert (job.root(name) / "code/lib/tools.py").exists()
