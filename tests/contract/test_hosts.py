"""Several hosts, as SageMaker describes them in resourceconfig.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contract.checks import assert_same, results_of, tree_of
from contract.containers import Ended, Image, together
from contract.workloads import Prepared


def host(image: Image, prepared: Prepared, root: Path, name: str, hosts: list[str], distribution: str) -> Ended:
    """The quick job on one host of several. All of /opt/ml/input is read-only, as always here."""
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
    return image.run(["train"], tree=tree, hostname=name)


@pytest.fixture(scope="session")
def hosts(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Two hosts with a full copy each, and the second of two that have a share each."""
    if not prepared.splits_files_by_host:
        pytest.skip(f"hosts of {image.name} work on one model together; tests/images/{image.name} checks that")

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
    assert all(shares), "a host did nothing"
    assert shares[0].keys() & shares[1].keys() == set()
    assert_same(shares[0] | shares[1], results_of(plain, prepared.ignore))


def test_a_host_with_its_own_share_takes_all_it_has(hosts: dict[str, Ended], plain: Ended, prepared: Prepared) -> None:
    assert hosts["sharded"].code == 0, hosts["sharded"].log
    assert_same(results_of(hosts["sharded"], prepared.ignore), results_of(plain, prepared.ignore))


def test_hosts_do_not_overwrite_each_others_reports(hosts: dict[str, Ended], plain: Ended, prepared: Prepared) -> None:
    """SageMaker merges the hosts' output into one archive."""
    assert results_of(hosts["first"]).keys() & results_of(hosts["second"]).keys() == set()
