"""Plans: the artefact of each target, golden, from one job file; and the budget."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path

import botocore.session
import pytest
from botocore.validate import ParamValidator

from estiba_launch import contract, jobfile, plan, prices, scripts
from estiba_launch.errors import BudgetError, LaunchError
from estiba_launch.target import Target

EMBED = Path(__file__).parents[2] / "images/embed/job.yaml"
DAY = datetime.date(2026, 10, 1)
LOCAL_VALUES = {
    "JOB_NAME": "embed-golden",
    "DATASET_URI": "file:///srv/my data",
    "MODEL_URI": "file:///srv/model",
    "OUTPUT_URI": "file:///srv/out",
    "CHECKPOINT_URI": "file:///srv/checkpoints",
}
AWS_VALUES = {
    "JOB_NAME": "embed-golden",
    "IMAGE": "210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1",
    "ROLE_ARN": "arn:aws:iam::210987654321:role/Estiba",
    "DATASET_URI": "s3://bucket/data",
    "MODEL_URI": "s3://bucket/model",
    "OUTPUT_URI": "s3://bucket/out",
    "CHECKPOINT_URI": "s3://bucket/checkpoints",
}
OPTIONS = scripts.HostOptions()


@pytest.fixture(autouse=True)
def no_user_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def embed(target: str, values: dict[str, str] | None = None) -> jobfile.JobFile:
    chosen = values or (AWS_VALUES if target == "sagemaker" else LOCAL_VALUES)
    return jobfile.load(EMBED, Target.parse(target), chosen, {})


def many(good: dict, count: int) -> jobfile.JobFile:
    good["ResourceConfig"]["InstanceCount"] = count
    good["EnableNetworkIsolation"] = True
    good["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3DataDistributionType"] = "ShardedByS3Key"
    good["AlgorithmSpecification"]["ContainerEntrypoint"] = ["sh", "-c"]
    good["AlgorithmSpecification"]["ContainerArguments"] = ['echo "$HOME" && exec train']
    good["HyperParameters"]["note"] = "it's $HOME `date`"
    return jobfile.check(Path("job.yaml"), good, Target.parse("local"))


def test_the_request_of_embed_is_golden_and_passes_botocores_own_validator(golden):
    job = embed("sagemaker")
    golden("embed.sagemaker.json", scripts.artefact(job, OPTIONS))
    shape = (
        botocore.session.get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    )
    report = ParamValidator().validate(json.loads(scripts.artefact(job, OPTIONS)), shape)
    assert not report.has_errors(), report.generate_report()


def test_embed_starts_from_the_limits_of_its_original_launcher():
    request = embed("sagemaker").request
    assert request["EnableManagedSpotTraining"] is True
    assert request["ResourceConfig"] == {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 10800}
    assert request["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert request["InputDataConfig"][0]["ContentType"] == "application/x-parquet"


def test_the_local_script_of_embed_is_golden(golden):
    golden("embed.local.sh", scripts.artefact(embed("local"), OPTIONS))


def test_the_ssh_script_of_embed_is_golden(golden):
    options = scripts.HostOptions(gpus="all")
    golden("embed.ssh.sh", scripts.artefact(embed("ssh://user@203.0.113.7:2222"), options))


def test_the_local_script_of_a_cluster_is_golden(golden, good):
    options = scripts.HostOptions(gpus="1", memory="16g", cpus=4, encoding="json")
    golden("cluster.local.sh", scripts.artefact(many(good, 2), options))


@pytest.mark.parametrize("name", ["embed.local.sh", "embed.ssh.sh", "cluster.local.sh"])
def test_a_script_parses(name):
    path = Path(__file__).parent / "golden" / name
    assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0


def test_a_pasted_script_hands_over_every_word_as_it_was(tmp_path, good):
    """Run the script with a `docker` that writes down its arguments."""
    job = many(good, 2)
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done >> "$LOG"\n')
    fake.chmod(0o755)
    (tmp_path / "bin" / "aws").symlink_to("/bin/true")
    work = tmp_path / "my work"
    env = {"PATH": f"{fake.parent}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "WORK": str(work)}
    script = scripts.artefact(job, scripts.HostOptions())
    assert subprocess.run(["sh"], input=script, text=True, env=env, check=False).returncode == 0
    words = (tmp_path / "log").read_text().splitlines()
    assert words[:5] == ["network", "create", "--internal", "estiba-embed-1", "run"]
    assert 'echo "$HOME" && exec train' in words
    assert f"{work}/algo-2/input:/opt/ml/input" in words
    read = json.loads((work / "algo-2/input/config/hyperparameters.json").read_text())
    assert read == job.request["HyperParameters"]
    assert json.loads((work / "algo-2/input/config/resourceconfig.json").read_text())["current_host"] == "algo-2"


def test_hosts_are_listed_in_lexicographic_order(good):
    job = many(good, 11)
    cluster = contract.hosts(job.request)
    config = contract.resource_config(job.request, cluster[1])
    assert config["hosts"][:4] == ["algo-1", "algo-10", "algo-11", "algo-2"]
    assert config["current_host"] == "algo-2"
    assert config["network_interface_name"] == "eth0"


def test_instance_groups_get_their_own_hosts(good):
    good["ResourceConfig"] = {
        "VolumeSizeInGB": 30,
        "InstanceGroups": [
            {"InstanceGroupName": "gpu", "InstanceType": "ml.g5.xlarge", "InstanceCount": 2},
            {"InstanceGroupName": "cpu", "InstanceType": "ml.m5.xlarge", "InstanceCount": 1},
        ],
    }
    job = jobfile.check(Path("job.yaml"), good, Target.parse("local"))
    config = contract.resource_config(job.request, contract.hosts(job.request)[2])
    assert config["current_group_name"] == "cpu"
    assert config["current_instance_type"] == "ml.m5.xlarge"
    assert [group["hosts"] for group in config["instance_groups"]] == [["algo-1", "algo-2"], ["algo-3"]]


def test_hyperparameters_come_in_both_encodings():
    request = {"HyperParameters": {"model": "m", "n": "3", "on": "true", "list": "[1]", "path": '"quoted"'}}
    assert contract.hyperparameters(request) == request["HyperParameters"]
    assert contract.hyperparameters(request, "json") == {
        "model": '"m"', "n": "3", "on": "true", "list": "[1]", "path": '"quoted"',
    }  # fmt: skip


def test_arguments_replace_train_and_an_entrypoint_keeps_its_tail():
    assert contract.command({"AlgorithmSpecification": {}}) == (None, ["train"])
    both = {"ContainerEntrypoint": ["sh", "-c"], "ContainerArguments": ["x y"]}
    assert contract.command({"AlgorithmSpecification": both}) == ("sh", ["-c", "x y"])


def test_the_price_in_words_is_golden(golden):
    planned = plan.make(embed("sagemaker"), prices.load(), today=DAY)
    golden("embed.price.txt", plan.describe(planned))
    assert planned.ceiling_usd == pytest.approx(0.7364)
    assert planned.warnings == []


def test_a_plan_as_json_holds_request_price_and_assumptions():
    document = plan.make(embed("sagemaker"), prices.load(), today=DAY).to_json()
    assert json.loads(json.dumps(document))["cost"]["assumptions"]["interruptions_per_hour"] == 0.15
    assert document["request"]["TrainingJobName"] == "embed-golden"
    assert document["hosts"][0]["date"] == "2026-09-27"


def test_a_budget_is_held_against_the_ceiling():
    planned = plan.make(embed("sagemaker"), prices.load(), today=DAY)
    plan.refuse_over(planned, 0.74)
    plan.refuse_over(planned, None)
    with pytest.raises(BudgetError, match=r"0\.74 USD.*--max-cost 0\.73"):
        plan.refuse_over(planned, 0.73)


@pytest.mark.parametrize(
    "wrong",
    [{"gpus": "two"}, {"encoding": "yaml"}, {"shm_size": "lots"}, {"memory": "-1g"}, {"cpus": 0.0}, {"env_file": "no"}],
)
def test_a_host_flag_without_meaning_is_refused_by_name(wrong):
    flags = {"gpus": "none", "shm_size": "8g", "memory": None, "cpus": None, "encoding": "plain", "env_file": None}
    with pytest.raises(LaunchError, match="--" + next(iter(wrong)).replace("_", "-")):
        scripts.read_options(**{**flags, **wrong}, like=None, has_gpu_instance=False)


def test_hosts_can_be_limited_like_their_instance_type():
    flags = {"gpus": "none", "shm_size": "8g", "memory": None, "cpus": None, "encoding": "plain", "env_file": None}
    like = prices.load().get("ml.g4dn.xlarge")
    options = scripts.read_options(**flags, like=like, has_gpu_instance=False)
    assert (options.memory, options.cpus) == ("16384m", 4)
