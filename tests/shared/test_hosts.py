"""Each scheduler's own variables name the hosts of a job, in the order of their ranks; a contradiction is refused."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from estiba.errors import ConfigError
from estiba.platform import hosts as hosts_module
from estiba.platform.contract import Job
from estiba.platform.entry import command_for
from estiba.platform.hosts import Hosts, expand_nodes, find_hosts

SLURM = {"SLURM_STEP_NODELIST": "gpu[01-03,07]", "SLURM_NODEID": "3", "SLURM_TASK_PID": "9"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "1", "ESTIBA_HOST_COUNT": "3", "HOSTNAME": "embed-1"}
BATCH = {
    "AWS_BATCH_JOB_NODE_INDEX": "2",
    "AWS_BATCH_JOB_NUM_NODES": "3",
    "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0",
    "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.7",
}
TORCHRUN = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}


def find(environ: dict[str, str], **resources: Any) -> Hosts:
    return find_hosts(environ, resources, "resourceconfig.json")


def test_nothing_is_one_host_and_nobody_is_waited_for():
    assert find({}) == Hosts()
    assert (find({}).names, find({}).current, find({}).resolvable) == (("algo-1",), "algo-1", ())


# --- SageMaker -----------------------------------------------------------------------------------------------------


def test_ranks_follow_the_files_order_and_the_jobs_hosts_their_numbers(tmp_path: Path):
    (tmp_path / "input/config").mkdir(parents=True)
    resources = {"current_host": "algo-10", "hosts": ["algo-1", "algo-10", "algo-2"]}
    (tmp_path / "input/config/resourceconfig.json").write_text(json.dumps(resources))
    job = Job.read({"ESTIBA_ROOT": str(tmp_path)})
    assert (job.cluster.names, job.cluster.index) == (("algo-1", "algo-10", "algo-2"), 1)
    assert (job.hosts, job.host_index) == (("algo-1", "algo-2", "algo-10"), 2)


def test_sagemakers_file_comes_before_every_variable():
    found = find({**SLURM, **KUBERNETES, **BATCH, **TORCHRUN}, hosts=["algo-2", "algo-1"], current_host="algo-1")
    assert (found.names, found.current, found.main_address) == (("algo-2", "algo-1"), "algo-1", "algo-2")


def test_a_host_that_is_listed_twice_is_refused():
    with pytest.raises(ConfigError, match="names a host twice"):
        find({}, hosts=["algo-1", "algo-1"], current_host="algo-1")


def test_the_file_that_an_earlier_container_wrote_names_nobody():
    stale = {"hosts": ["a1b2c3"], "current_host": "a1b2c3", "written_by": "estiba"}
    assert find({}, **stale) == Hosts()
    assert find(SLURM, **stale).source == "Slurm"


# --- Slurm ---------------------------------------------------------------------------------------------------------


def test_slurms_step_names_its_nodes_in_the_order_of_their_ids():
    found = find(SLURM)
    assert found.names == ("gpu01", "gpu02", "gpu03", "gpu07")
    assert (found.current, found.index, found.main_address) == ("gpu07", 3, "gpu01")
    assert found.resolvable == found.names


def test_a_batch_script_without_srun_runs_on_one_node_of_its_allocation():
    batch_script = {"SLURM_JOB_NODELIST": "gpu[01-04]", "SLURM_NODEID": "0", "SLURM_TASK_PID": "16360"}
    assert find(batch_script) == Hosts()
    shell_of_salloc = {"SLURM_JOB_NODELIST": "gpu[01-04]", "SLURM_NNODES": "4"}
    assert find(shell_of_salloc) == Hosts()


def test_the_jobs_node_list_counts_where_it_was_handed_into_the_container():
    assert find({"SLURM_JOB_NODELIST": "gpu[01-04]", "SLURM_NODEID": "2"}).current == "gpu03"


def test_a_node_id_beyond_the_node_list_is_refused():
    with pytest.raises(ConfigError, match=r"SLURM_NODEID is 4, and the node list 'gpu\[01-03,07\]' has 4"):
        find({**SLURM, "SLURM_NODEID": "4"})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[01-03,07]", ["gpu01", "gpu02", "gpu03", "gpu07"]),
        ("gpu[8-11]", ["gpu8", "gpu9", "gpu10", "gpu11"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("login1,gpu[3,1],big", ["login1", "gpu3", "gpu1", "big"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("gpu[1-2].example.org", ["gpu1.example.org", "gpu2.example.org"]),
        ("ip-10-0-0-[4-5]", ["ip-10-0-0-4", "ip-10-0-0-5"]),
    ],
)
def test_a_node_list_is_expanded_as_scontrol_does(text: str, names: list[str]):
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["gpu[1-", "gpu[3-1]", "gpu[a-b]", "gpu[]", "a,,b", "a,a", "", "gpu[1-99999]", "a b"])
def test_what_is_no_node_list_is_refused(text: str):
    with pytest.raises(ConfigError, match="is not a node list of Slurm"):
        expand_nodes(text)


# --- Kubernetes ----------------------------------------------------------------------------------------------------


def test_an_indexed_jobs_pods_find_each_other_through_the_headless_service():
    found = find({**KUBERNETES, "ESTIBA_HOST_SERVICE": "embed"})
    assert found.names == ("embed-0.embed", "embed-1.embed", "embed-2.embed")
    assert (found.current, found.main_address) == ("embed-1.embed", "embed-0.embed")


def test_the_pods_own_full_name_tells_the_service_too(monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", lambda name: f"{name}.run.ns.svc.cluster.local")
    jobset = {**KUBERNETES, "HOSTNAME": "run-workers-0-1"}
    assert find(jobset).main_address == "run-workers-0-0.run.ns.svc.cluster.local"


def test_an_index_without_a_count_is_refused_since_each_pod_would_do_all_of_the_work():
    with pytest.raises(ConfigError, match="set ESTIBA_HOST_COUNT to the Job's completions"):
        find({"JOB_COMPLETION_INDEX": "0", "HOSTNAME": "embed-0"})


def test_a_pod_whose_name_is_not_its_jobs_is_refused():
    with pytest.raises(ConfigError, match="host name is 'node7'; in an Indexed Job it ends with -1"):
        find({**KUBERNETES, "HOSTNAME": "node7"})


def test_one_pod_is_one_host():
    assert len(find({"JOB_COMPLETION_INDEX": "5", "ESTIBA_HOST_COUNT": "1"}).names) == 1


# --- AWS Batch and torchrun ----------------------------------------------------------------------------------------


def test_batch_tells_the_main_nodes_address_and_nothing_else():
    found = find(BATCH)
    assert (found.names, found.index) == (("node-0", "node-1", "node-2"), 2)
    assert (found.main_address, found.resolvable) == ("10.0.0.7", ("10.0.0.7",))


def test_batchs_main_node_has_rank_0_and_every_rank_is_one_nodes(monkeypatch):
    monkeypatch.setattr(hosts_module, "_own_address", lambda: "10.0.0.9")
    job = {"AWS_BATCH_JOB_NUM_NODES": "3", "AWS_BATCH_JOB_MAIN_NODE_INDEX": "2"}
    nodes = [find({**job, "AWS_BATCH_JOB_NODE_INDEX": str(node)}) for node in range(3)]
    assert [one.index for one in nodes] == [2, 1, 0]
    assert nodes[2].main_address == "10.0.0.9"


def test_torchruns_workers_know_their_host_and_the_main_address():
    found = find(TORCHRUN)
    assert (found.current, len(found.names), found.main_address) == ("node-1", 2, "10.0.0.1")
    kubeflow = {"PET_NODE_RANK": "0", "PET_NNODES": "2", "PET_MASTER_ADDR": "trainer-node-0-0.trainer"}
    assert find(kubeflow).main_address == "trainer-node-0-0.trainer"
    assert find({"PET_NODE_RANK": "0", "PET_NNODES": "1:4"}) == Hosts()


def test_torchrun_on_one_node_of_an_allocation_is_one_host():
    assert len(find({**SLURM, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}).names) == 1


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**TORCHRUN, "GROUP_RANK": "2"}, "GROUP_RANK is 2 and GROUP_WORLD_SIZE is 2; the first must be from 0 to 1"),
        ({**BATCH, "AWS_BATCH_JOB_NODE_INDEX": "3"}, "AWS_BATCH_JOB_NODE_INDEX is 3"),
        ({**KUBERNETES, "JOB_COMPLETION_INDEX": "3", "HOSTNAME": "embed-3"}, "JOB_COMPLETION_INDEX is 3"),
        ({**SLURM, "SLURM_NODEID": "-1"}, "SLURM_NODEID is '-1'; it must be a whole number"),
        ({**KUBERNETES, "ESTIBA_HOST_COUNT": "two"}, "ESTIBA_HOST_COUNT is 'two'"),
        ({**KUBERNETES, "ESTIBA_HOST_COUNT": "0"}, "ESTIBA_HOST_COUNT is '0'"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_name(environ: dict[str, str], message: str):
    with pytest.raises(ConfigError) as caught:
        find(environ)
    assert message in str(caught.value)


# --- what uses them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [SLURM, {**KUBERNETES, "ESTIBA_HOST_SERVICE": "embed"}, BATCH, TORCHRUN])
def test_a_job_has_the_schedulers_hosts_and_its_own_share(tmp_path: Path, environ: dict[str, str]):
    job = Job.read({"ESTIBA_ROOT": str(tmp_path), **environ})
    assert (job.hosts, job.host_index) == (job.cluster.names, job.cluster.index)
    assert job.host_count > 1


def test_the_toolkit_reads_the_schedulers_hosts(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("estiba.platform.entry.wait_for_hosts", lambda names, _: waited.extend(names))
    monkeypatch.setattr("signal.pthread_sigmask", lambda *_: set())
    waited: list[str] = []
    command_for(["train"], {"ESTIBA_ROOT": str(tmp_path), "SAGEMAKER_PROGRAM": "start.py", **SLURM})
    written = json.loads((tmp_path / "input/config/resourceconfig.json").read_text())
    assert (written["hosts"], written["current_host"]) == (["gpu01", "gpu02", "gpu03", "gpu07"], "gpu07")
    assert waited == written["hosts"]
