"""What a valid request may cost its author is said before the job starts: the network, paths, limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.errors import LaunchError
from estiba_launch.request import advice, jobfile
from estiba_launch.request.build import ORIGIN, build_job, build_request
from estiba_launch.targets import registry


def notes_of(request: dict[str, Any], target: str = "sagemaker") -> str:
    return "\n".join(jobfile.check(Path("job.yaml"), request, registry.parse(target)).notes)


@pytest.fixture
def pair(good) -> dict[str, Any]:
    good["ResourceConfig"] |= {"InstanceType": "ml.p4de.24xlarge", "InstanceCount": 2}
    return good


# --- the network ---------------------------------------------------------------------------------------------------


def test_hosts_with_efa_are_told_what_is_set_and_why(pair):
    text = notes_of(pair)
    assert "network: 2 x ml.p4de.24xlarge, EFA on 4 interfaces, 400 Gbit/s" in text
    assert "FI_EFA_USE_HUGE_PAGE=0, since huge pages fail in data loaders that fork" in text


def test_hosts_without_efa_and_unknown_ones_are_told_apart(pair):
    pair["ResourceConfig"]["InstanceType"] = "ml.c5.2xlarge"
    assert "network: 2 x ml.c5.2xlarge, no EFA, up to 10 Gbit/s: NCCL and gloo use TCP" in notes_of(pair)
    pair["ResourceConfig"]["InstanceType"] = "ml.p3.16xlarge"
    assert "not known here whether with EFA" in notes_of(pair)


@pytest.mark.parametrize("name", ["NCCL_PROTO", "FI_PROVIDER", "FI_EFA_USE_DEVICE_RDMA", "RDMAV_FORK_SAFE"])
def test_settings_of_older_libraries_are_named_with_the_reason(pair, name: str):
    pair["Environment"][name] = "1"
    assert re.search(rf"Environment\.{name}=1: .* \(libfabric 1\.18, aws-ofi-nccl 1\.7\); remove it", notes_of(pair))
    pair["ResourceConfig"]["InstanceType"] = "ml.g5.xlarge"
    assert name not in notes_of(pair)


def test_one_host_has_no_network(good):
    assert notes_of(good) == ""


def test_the_table_holds_instance_types_of_sagemaker():
    table = advice.networks()
    assert table["ml.p5.48xlarge"] == {"efa_interfaces": 32, "gbit_per_s": 3200}
    assert table["ml.g5.12xlarge"]["efa_interfaces"] == 1
    assert table["ml.g5.xlarge"] == {"efa_interfaces": 0, "gbit_per_s": 10, "burst": True}


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoints_in_a_folder_that_nothing_keeps_are_named(good):
    good["HyperParameters"] |= {"checkpoint_dir": "/tmp/check points", "save_to": "/tmp/x"}
    good["Environment"]["CKPT_PATH"] = "/opt/ml/model/checkpoint"
    first, second = notes_of(good).splitlines()
    assert first.startswith("HyperParameters.checkpoint_dir /tmp/check points: a folder that nothing keeps")
    assert second.startswith("Environment.CKPT_PATH /opt/ml/model/checkpoint: reaches S3 only after the end")
    assert first.endswith("save below /opt/ml/checkpoints") and second.endswith("save below /opt/ml/checkpoints")


@pytest.mark.parametrize("path", ["/opt/ml/checkpoints/run-1", '"/opt/ml/checkpoints"', "s3://bucket/x", "5", "true"])
def test_checkpoints_that_are_kept_need_no_word(good, path: str):
    good["HyperParameters"]["checkpoint_path"] = path
    assert notes_of(good) == ""


def test_without_checkpoint_config_nothing_is_kept(pair):
    del pair["CheckpointConfig"], pair["EnableManagedSpotTraining"]
    pair["StoppingCondition"] = {"MaxRuntimeInSeconds": 3600}
    assert "CheckpointConfig: not set, so what the job saves in /opt/ml/checkpoints is lost" in notes_of(pair)
    pair["HyperParameters"]["checkpoint-path"] = "/opt/ml/checkpoints"
    assert "add CheckpointConfig with an S3Uri, and save below /opt/ml/checkpoints" in notes_of(pair)


# --- limits and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep_alive_s", "is_said"), [(3600, False), (3601, True), (21_600, True)])
def test_a_warm_pool_of_more_than_an_hour_is_allowed_with_a_word(good, keep_alive_s: int, is_said: bool):
    del good["EnableManagedSpotTraining"]
    good["StoppingCondition"] = {"MaxRuntimeInSeconds": 3600}
    good["ResourceConfig"]["KeepAlivePeriodInSeconds"] = keep_alive_s
    assert (f"KeepAlivePeriodInSeconds {keep_alive_s}:" in notes_of(good)) == is_said


@pytest.mark.parametrize(("days", "is_said"), [(2, False), (5, False), (28, True)])
def test_a_run_of_up_to_28_days_is_allowed_and_the_quota_named(good, days: int, is_said: bool):
    del good["EnableManagedSpotTraining"]
    good["StoppingCondition"] = {"MaxRuntimeInSeconds": days * 86_400}
    assert ("Longest run time for a training job" in notes_of(good)) == is_said


@pytest.mark.parametrize(
    ("base", "stem"),
    [("Mi señal #1? v2:3/a", "Mi-senal-1-v2-3-a"), ("训练", "job"), ("some-job-name", "some-job-name"), ("  ", "job")],
)
def test_any_base_job_name_becomes_a_name_that_the_api_takes(base: str, stem: str):
    name = build_request(image_uri="x/y:1", output_path="file://out", base_job_name=base).body["TrainingJobName"]
    assert re.fullmatch(rf"{re.escape(stem)}-2[\d-]+", name)


@pytest.mark.parametrize("target", ["local", "ssh://user@host", "k8s", "slurm"])
def test_folders_with_any_name_are_planned_on_every_target(tmp_path, monkeypatch, target: str):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    folder = tmp_path / "mis datos #1? ñ"
    folder.mkdir()
    (folder / "entrenar #1? ñ.sh").write_text("echo")
    job = build_job(
        registry.parse(target),
        image_uri="estiba/multinode:local",
        source_dir=folder,
        entry_point="entrenar #1? ñ.sh",
        channels={"train": f"file://{folder}"},
        output_path=f"file://{tmp_path}/salida #1? ñ",
    )
    assert job.request["Environment"]["SAGEMAKER_PROGRAM"] == "entrenar #1? ñ.sh"
    assert "mis datos #1? ñ" in registry.target_of(job.target).prepare(job, _options()).render()


def _options() -> Any:
    from estiba_launch.jobs.options import SubmitOptions

    return SubmitOptions()


# --- instance groups and the command -------------------------------------------------------------------------------


class InstanceGroup:
    """As in the SDK (sagemaker.instance_group)."""

    def __init__(self, name: str, kind: str, count: int) -> None:
        self.instance_group_name, self.instance_type, self.instance_count = name, kind, count


def test_instance_groups_of_the_sdk_replace_type_and_count():
    groups = [InstanceGroup("data", "ml.c5.2xlarge", 1), InstanceGroup("gpus", "ml.g5.xlarge", 2)]
    arguments: dict[str, Any] = {"image_uri": "x:1", "output_path": "file://out", "instance_groups": groups}
    body = build_request(**arguments, environment={"NODE_NUMBER": "3"}).body
    assert body["ResourceConfig"] == {
        "InstanceGroups": [
            {"InstanceGroupName": "data", "InstanceType": "ml.c5.2xlarge", "InstanceCount": 1},
            {"InstanceGroupName": "gpus", "InstanceType": "ml.g5.xlarge", "InstanceCount": 2},
        ],
        "VolumeSizeInGB": 30,
    }
    jobfile.check(ORIGIN, body, registry.parse("local"))
    with pytest.raises(LaunchError, match="not together with instance_groups"):
        build_request(**arguments, instance_count=2)
    with pytest.raises(LaunchError, match="pass the SDK's InstanceGroup"):
        build_request(**{**arguments, "instance_groups": ["gpus"]})


def test_the_plan_prints_the_reason(tmp_path, monkeypatch, pair):
    import json

    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(pair))
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["plan", str(path), "--target", "sagemaker"])
    assert shown.exit_code == 0, shown.stderr
    assert "note: network: 2 x ml.p4de.24xlarge, EFA on 4 interfaces" in shown.stderr
    pair["Environment"]["NODE_NUMBER"] = "3"
    path.write_text(json.dumps(pair))
    refused = CliRunner().invoke(app, ["plan", str(path), "--target", "sagemaker"])
    assert refused.exit_code == 2
    assert (
        "Environment.NODE_NUMBER = '3': the job has 2 hosts (ResourceConfig.InstanceCount); set it to 2"
        in refused.stderr
    )
