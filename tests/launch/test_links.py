"""Links in what a job is given and in what it leaves: followed, kept or named, never dropped in silence."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from estiba_launch.errors import HostError
from estiba_launch.jobs import artifacts, inputs, links
from estiba_launch.jobs.links import InContainer, follow
from estiba_launch.request.contract import ChannelSource, Host
from estiba_launch.targets.local import channels

HOST = Host(name="algo-1", instance_type="ml.m5.xlarge", group="g")


def channel(path: Path, **changes: object) -> ChannelSource:
    values = {"name": "data", "mode": "File", "sharded": False, "groups": (), "content_type": None}
    return ChannelSource(uri=f"file://{path}", **{**values, **changes})


def read(folder: Path) -> dict[str, str]:
    """Every file as a container sees it that has only this folder: by its own bytes, with no link leading out."""
    found = {}
    for above, folders, names in os.walk(folder, followlinks=True):
        for path in (Path(above, name) for name in (*folders, *names)):
            real = Path(os.path.realpath(path))
            assert real.exists() and real.is_relative_to(os.path.realpath(folder)), f"{path} dangles in the container"
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_text()
    return found


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A model as the Hugging Face hub's cache holds it."""
    model = tmp_path / "hub" / "models--a--b"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots" / "rev" / "sub").mkdir(parents=True)
    for name, place in (("config.json", "."), ("model.safetensors", "."), ("tokenizer.json", "sub")):
        (model / "blobs" / f"sha-{name}").write_text(name)
        link = model / "snapshots" / "rev" / place / name
        link.symlink_to(os.path.relpath(model / "blobs" / f"sha-{name}", link.parent))
    return model / "snapshots" / "rev"


SNAPSHOT = {name.rpartition("/")[2]: name for name in ("config.json", "model.safetensors", "sub/tokenizer.json")}
EXPECTED = {key: name for name, key in SNAPSHOT.items()}


@pytest.mark.parametrize("copy", [False, True], ids=["mounted", "copied"])
@pytest.mark.parametrize("mode", ["File", "FastFile"])
def test_a_snapshot_of_the_hub_is_given_to_the_job_as_files(mode, copy, snapshot, tmp_path):
    given = channel(snapshot, mode=mode)
    inputs.check(given)
    assert set(inputs.objects(given)) == set(EXPECTED)
    mount = channels.place(given, HOST, [HOST], tmp_path / "in", copy=copy)
    assert read(mount.source) == EXPECTED


def test_the_files_behind_the_links_are_not_copied_on_one_disk(snapshot, tmp_path):
    mount = channels.place(channel(snapshot), HOST, [HOST], tmp_path / "in", copy=False)
    assert (mount.source / "config.json").samefile(snapshot / "config.json")
    assert not (mount.source / "config.json").is_symlink()


def test_a_mixed_folder_is_given_whole(snapshot, tmp_path):
    mixed = tmp_path / "mixed"
    (mixed / "own").mkdir(parents=True)
    (mixed / "own" / "a").write_text("a")
    (mixed / "inner").symlink_to("own")
    (mixed / "absolute").symlink_to(mixed / "own" / "a")
    (mixed / "model").symlink_to(snapshot)
    # Out of the folder and back in: nothing of that name exists in the container.
    (mixed / "round").symlink_to("../mixed/own/a")
    mount = channels.place(channel(mixed), HOST, [HOST], tmp_path / "in", copy=False)
    models = {f"model/{key}": text for key, text in EXPECTED.items()}
    assert read(mount.source) == {"own/a": "a", "inner/a": "a", "absolute": "a", "round": "a", **models}


def test_a_folder_whose_links_stay_inside_is_mounted_where_it_is(tmp_path):
    folder = tmp_path / "folder"
    (folder / "step-2").mkdir(parents=True)
    (folder / "step-2" / "a").write_text("a")
    (folder / "latest").symlink_to("step-2")
    mount = channels.place(channel(folder), HOST, [HOST], tmp_path / "in", copy=False)
    assert mount.source == folder
    assert read(mount.source) == {"step-2/a": "a", "latest/a": "a"}


def test_shards_count_what_links_lead_to(snapshot, tmp_path):
    cluster = [Host(name=f"algo-{n}", instance_type="ml.m5.xlarge", group="g") for n in (1, 2)]
    given = channel(snapshot, sharded=True)
    seen = [read(channels.place(given, host, cluster, tmp_path / "in", copy=False).source) for host in cluster]
    assert [len(part) for part in seen] == [2, 1]
    assert seen[0] | seen[1] == EXPECTED


def test_one_linked_file_and_a_prefix_of_links_are_given_too(snapshot, tmp_path):
    one = channels.place(channel(snapshot / "config.json"), HOST, [HOST], tmp_path / "one", copy=False)
    assert read(one.source) == {"config.json": "config.json"}
    many = channels.place(channel(snapshot / "s"), HOST, [HOST], tmp_path / "many", copy=False)
    assert read(many.source) == {"sub/tokenizer.json": "tokenizer.json"}


@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("gone", "nothing", "gone is a link to nothing, which is not there"),
        ("sub/self", "self", "sub/self is a link to self, which is not there"),
        ("sub/around", "..", r"sub/around is a link to \.\., a folder around it"),
        ("away", "../ring", "away/back is a link to .*, a folder around it"),
    ],
)
def test_a_link_of_an_input_that_leads_nowhere_or_in_a_circle_is_named(name, target, says, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("x")
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "back").symlink_to(folder)
    (folder / name).symlink_to(target)
    with pytest.raises(HostError, match=rf"channel data: .*{says}.*; remove such links"):
        inputs.check(channel(folder))


def test_a_broken_link_beside_a_name_prefix_concerns_nobody(tmp_path):
    (tmp_path / "train-1").write_text("1")
    (tmp_path / "other").symlink_to("nothing")
    assert inputs.objects(channel(tmp_path / "train")) == {"train-1": 1}


def test_folders_of_links_to_each_other_are_bounded(tmp_path):
    for level in range(40):
        (tmp_path / f"d{level}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"d{level}" / name).symlink_to(tmp_path / f"d{level + 1}")
    (tmp_path / "d40").mkdir()
    with pytest.raises(HostError, match="more than 10000 links to folders"):
        inputs.check(channel(tmp_path / "d0"))


# ---- what a job leaves


@pytest.fixture
def host(tmp_path: Path) -> dict[str, Path]:
    """The folders of a container, filled with links as it saw them."""
    root = tmp_path / "host"
    mounts = {
        "/opt/ml/model": root / "model",
        "/opt/ml/output": root / "output",
        "/opt/ml/output/data": root / "output" / "data",
        "/opt/ml/checkpoints": root / "checkpoints",
        "/opt/ml/input/data/base": tmp_path / "base",
    }
    for folder in mounts.values():
        folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("of the machine")
    (root / "model" / "step-2").mkdir()
    (root / "model" / "step-2" / "weights").write_text("two")
    (root / "checkpoints" / "best").write_text("best")
    (tmp_path / "base" / "tokenizer").write_text("words")
    return mounts


LINKS = {
    "latest": "step-2",
    "last.ckpt": "/opt/ml/model/step-2/weights",
    "sub/up": "../latest/weights",
    "best": "/opt/ml/checkpoints/best",
    "tokenizer": "/opt/ml/input/data/base/tokenizer",
    "odd": "/opt/ml/output/data/../../model/step-2/weights",
}
NAMED = {
    "tmp": "/tmp/gone",
    "passwd": "/etc/passwd",
    "up": "../../../../../../../../../../../../etc/passwd",
    "neighbour": "../../secret",
    "self": "self",
}


def leave(mounts: dict[str, Path], names: dict[str, str]) -> None:
    for name, target in names.items():
        path = mounts["/opt/ml/model"] / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target)


def request(out: Path, **changes: str) -> dict[str, object]:
    return {"TrainingJobName": "j", "OutputDataConfig": {"S3OutputPath": f"file://{out}", **changes}}


BYTES = {
    "step-2/weights": "two", "latest/weights": "two", "last.ckpt": "two", "sub/up": "two", "best": "best",
    "tokenizer": "words", "odd": "two",
}  # fmt: skip


@pytest.mark.parametrize("compression", ["GZIP", "NONE"])
def test_a_link_that_a_job_left_arrives_as_what_it_led_to(compression, host, tmp_path):
    leave(host, LINKS)
    said: list[str] = []
    wanted = request(tmp_path / "out", CompressionType=compression)
    address = artifacts.upload(wanted, "model", [host], tmp_path / "scratch", said.append)
    assert artifacts.download(address, tmp_path / "got")
    assert read(tmp_path / "got") == BYTES
    assert said == []


def test_a_link_inside_the_model_stays_a_link_in_its_archive(host, tmp_path):
    leave(host, LINKS)
    artifacts.upload(request(tmp_path / "out"), "model", [host], tmp_path / "scratch")
    with tarfile.open(tmp_path / "out" / "j" / "output" / "model.tar.gz") as tar:
        kept = {member.name: member.linkname for member in tar if member.issym()}
    inside = "step-2/weights"
    assert kept == {"latest": "step-2", "last.ckpt": inside, "sub/up": f"../{inside}", "odd": inside}


@pytest.mark.parametrize("compression", ["GZIP", "NONE"])
def test_a_link_to_what_was_not_kept_is_named_and_reads_no_file_of_this_machine(compression, host, tmp_path):
    leave(host, NAMED)
    said: list[str] = []
    wanted = request(tmp_path / "out", CompressionType=compression)
    address = artifacts.upload(wanted, "model", [host], tmp_path / "scratch", said.append)
    artifacts.download(address, tmp_path / "got")
    assert read(tmp_path / "got") == {"step-2/weights": "two"}
    assert sorted(text.partition(" ")[0] for text in said) == sorted(NAMED)
    assert "tmp is a link to /tmp/gone, which is not there" in said


def test_a_circle_of_links_is_kept_in_an_archive_and_named_elsewhere(host, tmp_path):
    leave(host, {"step-2/around": ".."})
    said: list[str] = []
    artifacts.upload(request(tmp_path / "out"), "model", [host], tmp_path / "scratch", said.append)
    assert said == []
    plain = request(tmp_path / "plain", CompressionType="NONE")
    artifacts.upload(plain, "model", [host], tmp_path / "scratch", said.append)
    assert said == ["step-2/around is a link to .., a folder around it"]


def test_a_file_of_one_host_and_a_folder_of_another_do_not_spoil_the_archive(host, tmp_path):
    other = tmp_path / "other"
    (other / "best").mkdir(parents=True)
    (other / "best" / "x").write_text("x")
    (other / "new").write_text("new")
    leave(host, {"best": "/opt/ml/checkpoints/best"})
    said: list[str] = []
    hosts = [host, {"/opt/ml/model": other}]
    address = artifacts.upload(request(tmp_path / "out"), "model", hosts, tmp_path / "scratch", said.append)
    artifacts.download(address, tmp_path / "got")
    assert read(tmp_path / "got") == {"best": "best", "new": "new", "step-2/weights": "two"}
    assert said == ["best/x is a file on one host and a folder on another"]


def test_a_device_or_socket_that_a_job_left_is_named(host, tmp_path):
    os.mkfifo(host["/opt/ml/model"] / "pipe")
    said: list[str] = []
    artifacts.upload(request(tmp_path / "out"), "model", [host], tmp_path / "scratch", said.append)
    assert said == ["pipe is neither a file nor a folder"]


def test_a_long_chain_of_links_ends(tmp_path):
    for number in range(100):
        (tmp_path / f"l{number}").symlink_to(f"l{number + 1}")
    broken: list[str] = []
    assert list(follow(tmp_path, broken.append, resolve=InContainer({"/m": tmp_path}))) == []
    assert len(broken) == 100
    assert links.MAX_CHAIN == 40
