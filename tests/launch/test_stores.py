"""Stores, channels, checkpoint sync and the record: what the local host is built of, without a container."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import boto3
import pytest
from botocore import exceptions
from moto import mock_aws

from estiba_launch.errors import AwsUnavailable, HostError
from estiba_launch.jobs import artifacts, inputs, logs
from estiba_launch.jobs.logs import (
    LINE_BYTES,
    LOG,
    JobLog,
    Metrics,
    copy_bars,
    copy_output,
    last_stamp,
    stamped_lines,
    to_unix,
)
from estiba_launch.jobs.record import Record
from estiba_launch.jobs.s3 import S3Store
from estiba_launch.jobs.store import FileStore, open_store
from estiba_launch.request.contract import ChannelSource, Host
from estiba_launch.targets.local import channels

CLUSTER = [Host(name=f"algo-{n}", instance_type="ml.m5.xlarge", group="a" if n < 3 else "b") for n in (1, 2, 3)]


def test_what_is_put_can_be_listed_got_and_deleted(store, local, tmp_path):
    assert store.list() == {}
    store.put(local / "deep" / "b", "x/ñ b")
    assert store.list() == {"x/ñ b": 2}
    store.get("x/ñ b", tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_text() == "bb"
    store.delete("x/ñ b")
    store.delete("x/ñ b")
    assert store.list() == {}


def test_a_file_store_never_shows_half_a_file(tmp_path, local, monkeypatch):
    store = FileStore(tmp_path / "store")
    store.put(local / "a", "k")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(HostError, match=r"No space left.*make room"):
        store.put(local / "deep" / "b", "k")
    assert (tmp_path / "store" / "k").read_text() == "a"
    assert store.list() == {"k": 1}
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["k"]


def test_an_unreachable_bucket_is_named_with_a_remedy(monkeypatch, tmp_path):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(HostError, match=r"s3://bucket/x: .*AWS_ENDPOINT_URL"):
        open_store("s3://bucket/x").list()


@pytest.mark.parametrize("kind", ["ReadTimeoutError", "ConnectTimeoutError", "SSLError", "ProxyConnectionError"])
@pytest.mark.parametrize("verb", ["list", "head", "get", "put", "delete"])
def test_a_network_that_fails_is_neither_the_disks_fault_nor_the_objects(kind, verb, tmp_path):
    class Client:
        def __getattr__(self, _: str) -> Any:
            raise getattr(exceptions, kind)(endpoint_url="http://s3", proxy_url="http://proxy", error="cut")

    store = S3Store("s3://bucket/x")
    store.client = Client()
    (tmp_path / "file").write_text("a")
    calls = {
        "list": store.list,
        "head": lambda: store.head("k"),
        "get": lambda: store.get("k", tmp_path / "new"),
        "put": lambda: store.put(tmp_path / "file", "k"),
        "delete": lambda: store.delete("k"),
    }
    # Only this error is waited out, for minutes; a KeyRefused is given up after seconds.
    with pytest.raises(AwsUnavailable, match=r"check the address, the login and AWS_ENDPOINT_URL"):
        calls[verb]()


def source(uri: str, **changes: object) -> ChannelSource:
    values = {"name": "data", "uri": uri, "mode": "File", "sharded": False, "groups": (), "content_type": None}
    return ChannelSource(**{**values, **changes})


def test_a_directory_is_mounted_where_it_is(tmp_path, local):
    mount = channels.place(source(f"file://{local}"), CLUSTER[0], CLUSTER, tmp_path / "in", copy=False)
    assert (mount.source, mount.read_only, mount.target) == (local, True, "/opt/ml/input/data/data")


def test_one_file_and_a_prefix_become_directories(tmp_path, local):
    one = channels.place(source(f"file://{local}/a"), CLUSTER[0], CLUSTER, tmp_path / "in", copy=False)
    assert [path.name for path in one.source.iterdir()] == ["a"]
    (local / "train-1").write_text("1")
    prefix = channels.place(source(f"file://{local}/tra", name="p"), CLUSTER[0], CLUSTER, tmp_path / "in", copy=False)
    assert [path.name for path in prefix.source.iterdir()] == ["train-1"]


def test_shards_cover_everything_once(tmp_path, local):
    for number in range(7):
        (local / f"part-{number}").write_text("x")
    seen = []
    for host in CLUSTER:
        mount = channels.place(source(f"file://{local}", sharded=True), host, CLUSTER, tmp_path / "in", copy=False)
        names = sorted(str(path.relative_to(mount.source)) for path in mount.source.rglob("*") if path.is_file())
        assert 2 <= len(names) <= 4
        seen += names
    assert sorted(seen) == sorted(inputs.objects(source(f"file://{local}")))


def test_a_channel_of_one_group_is_shared_among_that_group_only(tmp_path, local):
    shared = source(f"file://{local}", sharded=True, groups=("a",))
    names = []
    for host in CLUSTER[:2]:
        mount = channels.place(shared, host, CLUSTER, tmp_path / "in", copy=False)
        names.append([path.name for path in mount.source.rglob("*") if path.is_file()])
    assert sorted(names) == [["a"], ["b"]]


def test_copies_are_each_hosts_own(tmp_path, local):
    mounts = [channels.place(source(f"file://{local}"), host, CLUSTER, tmp_path / "in", copy=True) for host in CLUSTER]
    (mounts[0].source / "a").write_text("spoilt")
    assert (mounts[1].source / "a").read_text() == "a"
    assert (local / "a").read_text() == "a"
    assert not mounts[0].read_only


def test_fast_file_is_read_only_even_when_copies_are_asked_for(tmp_path, local):
    mount = channels.place(source(f"file://{local}", mode="FastFile"), CLUSTER[0], CLUSTER, tmp_path / "in", copy=True)
    assert mount.read_only


@pytest.mark.parametrize(
    ("address", "keys"),
    [("s3://bucket/data", ["a", "sub/b"]), ("s3://bucket/data/", ["a", "sub/b"]), ("s3://bucket/data/a", ["a"]),
     ("s3://bucket/da", ["data/a", "data/sub/b"]), ("s3://bucket", ["data/a", "data/sub/b", "other"])],
)  # fmt: skip
def test_a_channel_from_s3_takes_what_its_prefix_names(address, keys, tmp_path, monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for key in ("data/a", "data/sub/b", "data/folder/", "other"):
            client.put_object(Bucket="bucket", Key=key, Body=b"x")
        assert sorted(inputs.objects(source(address))) == keys
        mount = channels.place(source(address), CLUSTER[0], CLUSTER, tmp_path / "in", copy=False)
        found = sorted(str(path.relative_to(mount.source)) for path in mount.source.rglob("*") if path.is_file())
        assert found == keys
        assert S3Store(address).bucket == "bucket"


def test_models_of_all_hosts_are_merged_and_the_first_keeps_a_name(tmp_path, store):
    for host, names in (("algo-1", ["same", "one"]), ("algo-2", ["same", "two"])):
        (tmp_path / host).mkdir()
        for name in names:
            (tmp_path / host / name).write_text(host)
    request = {"TrainingJobName": "j", "OutputDataConfig": {"S3OutputPath": store.uri}}
    hosts = [{"/opt/ml/model": tmp_path / host} for host in ("algo-1", "algo-2")]
    address = artifacts.upload(request, "model", hosts, tmp_path / "scratch")
    assert address == f"{store.uri}/j/output/model.tar.gz"
    assert artifacts.download(address, tmp_path / "got") == 3
    assert (tmp_path / "got" / "same").read_text() == "algo-1"
    assert not list((tmp_path / "scratch").iterdir())


def test_a_record_is_whole_at_every_moment(tmp_path):
    record = Record.create(tmp_path, {"TrainingJobName": "j"})
    stop = threading.Event()
    broken: list[str] = []

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads((tmp_path / "describe.json").read_text())
            except ValueError as error:
                broken.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        record.to("Training" if number % 2 else "Interrupted", str(number))
    stop.set()
    reader.join()
    assert broken == []
    transitions = Record.load(tmp_path).value["SecondaryStatusTransitions"]
    assert len(transitions) == 51
    assert all("EndTime" in entry for entry in transitions[:-1])


def test_a_failure_reason_is_cut_at_1024_characters(tmp_path):
    record = Record.create(tmp_path, {"TrainingJobName": "j"})
    record.to("Failed", "ñ" * 2000)
    assert len(Record.load(tmp_path).value["FailureReason"]) == 1024
    assert Record.load(tmp_path).status == "Failed"


def test_stamped_lines_are_put_together_however_they_are_cut():
    stamp = b"2026-09-27T12:30:05.123456789Z "
    whole = stamp + b"uno\r\n" + stamp + "dós\n".encode() + stamp + b"no newline"
    for size in (1, 3, 7, 1000):
        chunks = [whole[i : i + size] for i in range(0, len(whole), size)]
        assert [text for _, text in stamped_lines(chunks)] == ["uno", "dós", "no newline"]


def test_what_the_engine_cut_into_messages_is_one_line_again():
    stamp = b"2026-09-27T12:30:05.123456789Z "
    whole = stamp + b"a" * 16384 + stamp + b"b" * 16384 + stamp + b"c\n" + stamp + b"d" * 16384 + stamp + b"\n"
    for size in (1, 16384, 16415, 1 << 20):
        chunks = [whole[i : i + size] for i in range(0, len(whole), size)]
        assert list(stamped_lines(chunks)) == [
            (stamp.decode().strip(), "a" * 16384 + "b" * 16384 + "c"),
            (stamp.decode().strip(), "d" * 16384),
        ]
    # An engine that does not cut.
    assert [text for _, text in stamped_lines([stamp + b"e" * 40000 + b"\n"])] == ["e" * 40000]


def test_a_line_without_an_end_is_cut_before_it_fills_the_memory():
    stamp = b"2026-09-27T12:30:05.123456789Z "
    for piece in (stamp + b"x" * 16384, b"x" * 16384):
        lines = list(stamped_lines([stamp + b"x" * 16384, *[piece] * 100]))
        assert {one for one, _ in lines} == {stamp.decode().strip()}
        assert max(len(text) for _, text in lines) <= LINE_BYTES + 16384
        assert "".join(text for _, text in lines) == "x" * 16384 * 101


def test_a_progress_bar_is_one_line_in_the_log_and_all_of_it_is_searched_for_metrics(tmp_path):
    request = {"AlgorithmSpecification": {"MetricDefinitions": [{"Name": "n", "Regex": "loss=([0-9.]+)"}]}}
    kept: list[Any] = []
    metrics = Metrics(request, kept.append)
    line = b"2026-09-27T12:30:05.123456789Z \r 10% loss=3\r100% done\n"
    copy_output("algo-1", tmp_path / "own", JobLog(tmp_path, many=False), metrics, lambda _: [line])
    assert (tmp_path / LOG).read_text() == "100% done\n"
    assert kept[-1][0]["Value"] == 3


def test_a_progress_bar_is_shown_before_its_newline_and_not_at_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "BAR_EVERY_S", 0)
    log = JobLog(tmp_path, many=False)
    copy_bars("algo-1", log, [b"plain line\nhalf a ", b"line\n", b"\r 10%", b"\r 20%\r", b"\r 30", b"%", b"\nend\n"])
    assert log.path.read_text().splitlines() == [" 10%", " 20%", " 30", " 30%"]
    monkeypatch.setattr(logs, "BAR_EVERY_S", 1e9)
    copy_bars("algo-1", log, [b"\r 40%"] * 100)
    assert "40%" not in log.path.read_text()


def test_the_last_stamp_says_where_to_go_on(tmp_path):
    path = tmp_path / "algo-1.log"
    assert last_stamp(path) is None
    path.write_text("2026-09-27T12:30:05.000000001Z a\n2026-09-27T12:30:06.123456789Z b\n")
    assert last_stamp(path) == "2026-09-27T12:30:06.123456789Z"
    assert to_unix("2026-09-27T12:30:06.123456789Z") == pytest.approx(1790512206.123456, abs=1e-6)
