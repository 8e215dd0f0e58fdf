"""Several hosts, as SageMaker describes them in resourceconfig.json: each works alone, or all train one model."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import docker
import pytest

from contract.checks import assert_same, results_of, tree_of
from contract.containers import Ended, Image, Tree, together
from contract.workloads import Prepared


def host(image: Image, prepared: Prepared, root: Path, name: str, hosts: list[str], distribution: str) -> Ended:
    """The quick job on one host of several. /opt/ml/input is read-only, as in all of these tests."""
    tree = _configured(prepared, root, name, hosts, distribution)
    return image.run(["train"], tree=tree, hostname=name)


def _configured(prepared: Prepared, root: Path, name: str, hosts: list[str], distribution: str) -> Tree:
    tree = tree_of(prepared.quick, root)
    inputs: dict[str, Any] = {
        channel: {"TrainingInputMode": "File", "S3DistributionType": distribution, "RecordWrapperType": "None"}
        for channel in prepared.quick.channels
    }
    resources = {
        "current_host": name,
        "current_instance_type": "ml.m5.xlarge",
        "current_group_name": "homogeneousCluster",
        "hosts": hosts,
        "instance_groups": [
            {"instance_group_name": "homogeneousCluster", "instance_type": "ml.m5.xlarge", "hosts": hosts}
        ],
        "network_interface_name": "ethwe",
    }
    tree.write_config(resources=resources, inputs=inputs)
    return tree


@pytest.fixture(scope="session")
def hosts(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Two hosts with the full input each, and the second host of two that have a shard each."""
    if not prepared.splits_files_by_host:
        pytest.skip(f"{image.name} does not divide its files among hosts")

    def run(name: str, distribution: str) -> Ended:
        root = tmp_path_factory.mktemp(f"hosts-{image.name}")
        return host(image, prepared, root, name, ["algo-1", "algo-2"], distribution)

    first, second, sharded = together(
        lambda: run("algo-1", "FullyReplicated"),
        lambda: run("algo-2", "FullyReplicated"),
        lambda: run("algo-2", "ShardedByS3Key"),
    )
    return {"first": first, "second": second, "sharded": sharded}


def test_hosts_with_a_full_copy_share_the_files(hosts: dict[str, Ended], plain: Ended, prepared: Prepared) -> None:
    shares = []
    for name in ("first", "second"):
        assert hosts[name].code == 0, hosts[name].log
        shares.append(results_of(hosts[name], prepared.ignore))
    assert all(shares), "a host wrote nothing"
    assert shares[0].keys() & shares[1].keys() == set()
    assert_same(shares[0] | shares[1], results_of(plain, prepared.ignore))


def test_a_host_with_a_sharded_channel_does_all_of_it(
    hosts: dict[str, Ended], plain: Ended, prepared: Prepared
) -> None:
    assert hosts["sharded"].code == 0, hosts["sharded"].log
    assert_same(results_of(hosts["sharded"], prepared.ignore), results_of(plain, prepared.ignore))


def test_hosts_do_not_overwrite_each_others_reports(hosts: dict[str, Ended], plain: Ended, prepared: Prepared) -> None:
    """SageMaker merges the hosts' output into one archive."""
    assert results_of(hosts["first"]).keys() & results_of(hosts["second"]).keys() == set()


def test_hosts_that_train_one_model_leave_it_once(
    image: Image, prepared: Prepared, client: docker.DockerClient, tmp_path: Path
) -> None:
    if not prepared.trains_across_hosts:
        pytest.skip(f"{image.name} trains on one host")
    names = ["algo-1", "algo-2"]
    network = client.networks.create(f"estiba-test-{uuid.uuid4().hex[:12]}")
    trees = [_configured(prepared, tmp_path / name, name, names, "FullyReplicated") for name in names]
    running = []
    try:
        for name, tree in zip(names, trees, strict=True):
            running.append(image.start(["train"], tree=tree, network=network.name, hostname=name))
        ended = [one.end() for one in running]
    finally:
        for one in running:
            one.container.remove(force=True)
        network.remove()
    assert [one.code for one in ended] == [0, 0], "\n".join(one.log for one in ended)
    assert "on each of 2 hosts" in ended[0].log and "sharded over 2 of 2 ranks" in ended[0].log
    assert (trees[0].model / "model.safetensors").exists()
    assert not list(trees[1].model.iterdir())
