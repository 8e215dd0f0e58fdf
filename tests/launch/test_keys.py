"""Local paths of objects' keys: no key leaves its folder, wherever one is made into a path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from estiba_launch.errors import HostError
from estiba_launch.jobs import artifacts, inputs
from estiba_launch.jobs.keys import path_below, paths_below
from estiba_launch.jobs.mirror import Stored
from estiba_launch.jobs.s3 import S3Store
from estiba_launch.jobs.store import FileStore
from estiba_launch.jobs.sync import CheckpointSync
from estiba_launch.request.contract import ChannelSource, Host
from estiba_launch.targets.local import channels
from estiba_launch.targets.ssh.script import AGENT

OUT = ["/abs/evil.txt", "../evil", "a/../../evil", "a//evil", "a/./evil", ".", "..", "", "a/", "evil\0.txt"]
HOST = Host(name="algo-1", instance_type="ml.m5.xlarge", group="g")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    with mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client


def channel(uri: str) -> ChannelSource:
    return ChannelSource(name="data", uri=uri, mode="File", sharded=False, groups=(), content_type=None)


@pytest.mark.parametrize("key", OUT)
def test_a_key_that_names_no_file_below_the_folder_is_refused(key, tmp_path):
    with pytest.raises(HostError, match=r"leads out of .*rename or remove") as error:
        path_below(tmp_path, key, "s3://bucket/x")
    assert "\0" not in str(error.value)


@pytest.mark.parametrize("key", ["a", "a/b", "a b/ñ", "C:\\windows", "..a/b..", "-rf", "a\\..\\b"])
def test_any_other_key_is_a_path_below_the_folder(key, tmp_path):
    assert path_below(tmp_path, key, "s3://bucket/x") == tmp_path / key


def test_a_link_in_the_folder_leads_no_key_out(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "away").symlink_to(tmp_path)
    (tmp_path / "in" / "file").symlink_to(tmp_path / "elsewhere")
    for key in ("away/evil", "file"):
        with pytest.raises(HostError, match="leads out"):
            path_below(tmp_path / "in", key, "s3://bucket/x")


@pytest.mark.parametrize("keys", [["a", "a/b"], ["a/b/c/d", "a/b"]])
def test_a_key_that_is_a_file_and_a_folder_is_refused_with_both_names(keys, tmp_path):
    short, long = sorted(keys)
    with pytest.raises(HostError, match=f"s3://bucket/x/{short}: a file, and the folder of {long}"):
        paths_below(tmp_path, keys, "s3://bucket/x")


def restore(uri: str, into: Path) -> None:
    CheckpointSync(into, S3Store(uri)).restore()


def place(uri: str, into: Path) -> None:
    channels.place(channel(uri), HOST, [HOST], into, copy=False)


def remote(uri: str, into: Path) -> None:
    store, found = S3Store(uri).matching()
    store.get_changed(found, into)


@pytest.mark.parametrize("take", [restore, place, remote, artifacts.download])
@pytest.mark.parametrize("key", ["/abs/evil.txt", "a/../../../evil.txt", "a/./evil.txt"])
def test_no_place_that_downloads_objects_writes_outside_its_folder(key, take, bucket, tmp_path):
    into = tmp_path / "deep" / "er" / "into"
    bucket.put_object(Bucket="bucket", Key=f"keys/{key}", Body=b"evil")
    bucket.put_object(Bucket="bucket", Key="keys/fine", Body=b"fine")
    with pytest.raises(HostError, match=r"evil\.txt: leads out"):
        take("s3://bucket/keys", into)
    assert not list(tmp_path.rglob("evil.txt"))
    assert not Path("/abs/evil.txt").exists()


@pytest.mark.parametrize("take", [restore, place, remote, artifacts.download])
def test_no_place_that_downloads_objects_takes_a_file_that_is_a_folder_too(take, bucket, tmp_path):
    for key in ("keys/a", "keys/a/b"):
        bucket.put_object(Bucket="bucket", Key=key, Body=b"x")
    with pytest.raises(HostError, match="a: a file, and the folder of a/b"):
        take("s3://bucket/keys", tmp_path / "into")


def test_a_channel_with_such_a_key_is_refused_before_the_job_starts(bucket):
    bucket.put_object(Bucket="bucket", Key="keys//abs/evil.txt", Body=b"evil")
    with pytest.raises(HostError, match=r"s3://bucket/keys//abs/evil\.txt: leads out"):
        inputs.check(channel("s3://bucket/keys"))


def test_a_file_store_is_read_by_the_same_rule(tmp_path):
    class Evil(FileStore):
        def objects(self) -> dict[str, Stored]:
            return {"a/../../evil": Stored(1, 1, "etag")}

    with pytest.raises(HostError, match="leads out"):
        CheckpointSync(tmp_path / "c", Evil(tmp_path)).restore()


@pytest.mark.parametrize("name", [".", ".."])
def test_a_channel_is_not_named_after_its_folder_or_the_one_above(name, good, problems_of):
    good["InputDataConfig"][0]["ChannelName"] = name
    (problem,) = problems_of(good, "local")
    assert problem.field == "InputDataConfig[0].ChannelName"


def test_the_agent_on_a_remote_host_runs_with_the_files_that_are_sent_there(tmp_path):
    package = Path(inputs.__file__).parents[1]
    for source, target in AGENT.items():
        path = tmp_path / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((package / source).read_text())
    words = [
        sys.executable,
        "-P",
        "-S",
        "-c",
        "import sys; sys.path.insert(0, '.'); import agent; print(agent.__file__)",
    ]
    done = subprocess.run(words, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tmp_path / "agent.py"), done.stderr
