"""The /opt/ml tree is read once, whole or in part, moved or not; what is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba.errors import ConfigError
from estiba.platform.contract import Job, root_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "input/config").mkdir(parents=True)
    return tmp_path


def put(root: Path, name: str, content: Any) -> Path:
    path = root / "input/config" / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(root: Path, **environ: str) -> Job:
    return Job.read({"ESTIBA_ROOT": str(root), **environ})


def test_an_empty_tree_is_one_host_with_nothing_configured(tmp_path: Path) -> None:
    job = read(tmp_path / "absent")
    assert job.hyperparameters == {}
    assert job.channels == {}
    assert (job.hosts, job.current_host, job.host_index, job.host_count) == (("algo-1",), "algo-1", 0, 1)
    assert (job.name, job.instance_type, job.network_interface) == (None, None, "eth0")


def test_the_root_is_opt_ml_unless_it_was_moved(tmp_path: Path) -> None:
    assert root_of({}) == Path("/opt/ml")
    assert root_of({"ESTIBA_ROOT": ""}) == Path("/opt/ml")
    job = read(tmp_path)
    assert job.root == tmp_path
    assert job.input_dir == tmp_path / "input/data"
    assert job.model_dir == tmp_path / "model"
    assert job.output_dir == tmp_path / "output/data"
    assert job.failure_path == tmp_path / "output/failure"
    assert job.checkpoint_dir == tmp_path / "checkpoints"


def test_what_sagemaker_writes_is_read(root: Path) -> None:
    put(root, "hyperparameters", {"model": '"BAAI/bge-m3"', "text-column": "texto"})
    put(
        root,
        "resourceconfig",
        {
            "current_host": "algo-2",
            "current_instance_type": "ml.g5.xlarge",
            "current_group_name": "homogeneousCluster",
            "hosts": ["algo-1", "algo-2"],
            "instance_groups": [{"instance_group_name": "homogeneousCluster", "hosts": ["algo-1", "algo-2"]}],
            "network_interface_name": "eth7",
        },
    )
    job = read(root, TRAINING_JOB_NAME="embed-1")
    assert job.hyperparameters == {"model": '"BAAI/bge-m3"', "text-column": "texto"}
    assert (job.name, job.instance_type, job.network_interface) == ("embed-1", "ml.g5.xlarge", "eth7")
    assert (job.host_index, job.host_count) == (1, 2)


def test_hosts_are_counted_as_numbers_not_as_words(root: Path) -> None:
    names = sorted(f"algo-{number}" for number in range(1, 13))  # algo-1, algo-10, … as SageMaker lists them
    put(root, "resourceconfig", {"current_host": "algo-10", "hosts": names})
    job = read(root)
    assert job.hosts == tuple(f"algo-{number}" for number in range(1, 13))
    assert job.host_index == 9


def test_hosts_without_numbers_keep_one_order(root: Path) -> None:
    put(root, "resourceconfig", {"current_host": "b", "hosts": ["c", "a", "b"]})
    assert read(root).hosts == ("a", "b", "c")


def test_a_current_host_that_is_not_among_the_hosts_is_refused(root: Path) -> None:
    path = put(root, "resourceconfig", {"current_host": "algo-3", "hosts": ["algo-1", "algo-2"]})
    with pytest.raises(ConfigError) as caught:
        read(root)
    assert str(path) in str(caught.value)
    assert "'algo-3'" in str(caught.value)


@pytest.mark.parametrize("hosts", ["algo-1", [1, 2], {"algo-1": 1}])
def test_hosts_that_are_no_list_of_names_are_refused(root: Path, hosts: object) -> None:
    path = put(root, "resourceconfig", {"current_host": "algo-1", "hosts": hosts})
    with pytest.raises(ConfigError) as caught:
        read(root)
    assert str(path) in str(caught.value)
    assert repr(hosts) in str(caught.value)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_local_path_below_opt_ml_moves_with_the_root(root: Path) -> None:
    put(root, "checkpointconfig", {"LocalPath": "/opt/ml/checkpoints/run-7"})
    assert read(root).checkpoint_dir == root / "checkpoints/run-7"


@pytest.mark.parametrize("path", ["/mnt/checkpoints", "/opt/mlx/checkpoints"])
def test_a_local_path_elsewhere_stays_where_it_is(root: Path, path: str) -> None:
    put(root, "checkpointconfig", {"LocalPath": path})
    assert read(root).checkpoint_dir == Path(path)


# --- channels ------------------------------------------------------------------------------------------------------


def test_channels_have_their_mode_and_distribution(root: Path) -> None:
    put(
        root,
        "inputdataconfig",
        {
            "dataset": {
                "TrainingInputMode": "FastFile",
                "S3DistributionType": "ShardedByS3Key",
                "RecordWrapperType": "None",
                "ContentType": "application/x-parquet",
            },
            "model": {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated"},
            "bare": {},
            "nulls": {"TrainingInputMode": None, "S3DistributionType": None, "ContentType": None},
        },
    )
    channels = read(root).channels
    assert channels["dataset"].path == root / "input/data/dataset"
    assert (channels["dataset"].mode, channels["dataset"].content_type) == ("FastFile", "application/x-parquet")
    assert channels["dataset"].is_sharded
    for name in ("model", "bare", "nulls"):
        assert (channels[name].mode, channels[name].is_sharded) == ("File", False)


def test_a_directory_mounted_by_hand_is_a_channel_too(root: Path) -> None:
    put(root, "inputdataconfig", {"dataset": {"S3DistributionType": "ShardedByS3Key"}})
    for name in ("dataset", "extra"):
        (root / "input/data" / name).mkdir(parents=True)
    (root / "input/data/loose-file").touch()
    channels = read(root).channels
    assert sorted(channels) == ["dataset", "extra"]
    assert channels["dataset"].is_sharded
    assert (channels["extra"].mode, channels["extra"].is_sharded) == ("File", False)


def test_a_path_belongs_to_the_channel_that_holds_it(root: Path) -> None:
    put(root, "inputdataconfig", {"data": {}, "dataset": {}})
    job = read(root)
    assert job.channel_of(root / "input/data/dataset/a/b.parquet") == job.channels["dataset"]
    assert job.channel_of(root / "input/data/data") == job.channels["data"]
    assert job.channel_of(root / "input/data/dataset2") is None
    assert job.channel_of(Path("/elsewhere")) is None


@pytest.mark.parametrize("given", ["File", ["File"], None, 3])
def test_a_channel_that_is_not_an_object_is_refused_by_name(root: Path, given: object) -> None:
    put(root, "inputdataconfig", {"dataset": given})
    with pytest.raises(ConfigError) as caught:
        read(root)
    assert "inputdataconfig.json" in str(caught.value)
    assert "'dataset'" in str(caught.value)


# --- files ---------------------------------------------------------------------------------------------------------


def test_values_that_are_not_strings_become_json_strings(root: Path) -> None:
    put(root, "hyperparameters", {"a": 1, "b": True, "c": None, "d": [1, "x"], "e": 0.5, "f": "1"})
    assert read(root).hyperparameters == {"a": "1", "b": "true", "c": "null", "d": '[1, "x"]', "e": "0.5", "f": "1"}


FILES = ["hyperparameters", "resourceconfig", "inputdataconfig", "checkpointconfig"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "not JSON"),
        ("[1]", "list"),
        ('"text"', "str"),
        ("null", "NoneType"),
        ("{'a': 1}", "not JSON"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_broken_file_is_an_error_and_not_a_default(root: Path, name: str, content: str, word: str) -> None:
    path = put(root, name, content)
    with pytest.raises(ConfigError) as caught:
        read(root)
    assert str(caught.value).startswith(f"{path}: ")
    assert word in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n", "{}"])
def test_an_empty_file_counts_as_missing(root: Path, content: str) -> None:
    for name in FILES:
        put(root, name, content)
    assert read(root) == read(root / "absent", ESTIBA_ROOT=str(root))


def test_a_file_that_is_not_utf8_is_named(root: Path) -> None:
    path = root / "input/config/hyperparameters.json"
    path.write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ConfigError, match="UTF-8") as caught:
        read(root)
    assert str(path) in str(caught.value)


def test_a_directory_in_place_of_a_file_is_named(root: Path) -> None:  # `docker run -v` of an absent file makes one
    path = root / "input/config/hyperparameters.json"
    path.mkdir()
    with pytest.raises(ConfigError) as caught:
        read(root)
    assert str(path) in str(caught.value)


def test_input_that_this_user_may_not_read_is_named(
    open_dir: Path, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    (open_dir / "input/data").mkdir(parents=True, mode=0o700)
    with pytest.raises(ConfigError, match=f"{open_dir}/input/data: cannot be read .* by user 65534"):
        as_nobody(lambda: read(open_dir))
    (open_dir / "input/data").chmod(0o755)
    (open_dir / "input/config").mkdir()
    path = put(open_dir, "hyperparameters", {"a": "b"})
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"{path}: cannot be read"):
        as_nobody(lambda: read(open_dir))


def test_the_process_environment_is_read_by_default(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESTIBA_ROOT", str(root))
    monkeypatch.setenv("TRAINING_JOB_NAME", "embed-2")
    monkeypatch.setenv("ESTIBA_INSTANCE_TYPE", "ml.g4dn.xlarge")
    job = Job.read()
    assert (job.root, job.name, job.instance_type) == (root, "embed-2", "ml.g4dn.xlarge")
