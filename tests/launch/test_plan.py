"""Plans: the golden artefact of each target from one job file, and the budget."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path

import botocore.session
import pytest
from botocore.validate import ParamValidator
from click.testing import Result
from typer.testing import CliRunner

import finetune_request
from estiba_launch.cli.app import app
from estiba_launch.errors import BudgetError, LaunchError
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import contract, jobfile, prices
from estiba_launch.request.estimate import estimate, refuse_over
from estiba_launch.request.forecast import Assumptions
from estiba_launch.request.options import HostOptions, read_options
from estiba_launch.request.validation import service_model
from estiba_launch.targets import operations, registry, script_mode
from estiba_launch.targets.local import script as local_script
from estiba_launch.targets.local.channels import place
from estiba_launch.targets.local.target import with_absolute_paths

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
OPTIONS = HostOptions()


@pytest.fixture(autouse=True)
def no_user_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def embed(target: str, values: dict[str, str] | None = None) -> jobfile.JobFile:
    settings = values or (AWS_VALUES if target == "sagemaker" else LOCAL_VALUES)
    return jobfile.load(EMBED, registry.parse(target), settings, {})


def artefact(job: jobfile.JobFile, options: HostOptions) -> str:
    return operations.prepare(job, SubmitOptions(host=options)).render()


def cluster_job(good: dict, count: int) -> jobfile.JobFile:
    good["ResourceConfig"]["InstanceCount"] = count
    good["EnableNetworkIsolation"] = True
    good["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3DataDistributionType"] = "ShardedByS3Key"
    good["AlgorithmSpecification"]["ContainerEntrypoint"] = ["sh", "-c"]
    good["AlgorithmSpecification"]["ContainerArguments"] = ['echo "$HOME" && exec train']
    good["HyperParameters"]["note"] = "it's $HOME `date`"
    return jobfile.check(Path("job.yaml"), good, registry.parse("local"))


def test_the_request_of_embed_is_golden_and_passes_botocores_own_validator(golden):
    job = embed("sagemaker")
    golden("embed.sagemaker.json", artefact(job, OPTIONS))
    shape = (
        botocore.session.get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    )
    report = ParamValidator().validate(json.loads(artefact(job, OPTIONS)), shape)
    assert not report.has_errors(), report.generate_report()


def test_embed_starts_from_the_limits_of_its_original_launcher():
    request = embed("sagemaker").request
    assert request["EnableManagedSpotTraining"] is True
    assert request["ResourceConfig"] == {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 10800}
    assert request["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert request["InputDataConfig"][0]["ContentType"] == "application/x-parquet"


def test_the_local_script_of_embed_is_golden(golden):
    golden("embed.local.sh", artefact(embed("local"), OPTIONS))


def test_the_ssh_script_of_embed_is_golden(golden):
    options = HostOptions(gpus="all")
    golden("embed.ssh.sh", artefact(embed("ssh://user@203.0.113.7:2222"), options))


def test_the_local_script_of_a_cluster_is_golden(golden, good):
    options = HostOptions(gpus="1", memory="16g", cpus=4, encoding="json")
    golden("cluster.local.sh", artefact(cluster_job(good, 2), options))


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "golden").glob("*.sh")), ids=lambda path: path.name)
def test_a_script_parses(path):
    assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0


def test_a_printed_script_passes_every_word_unchanged(tmp_path, good):
    """Run the script with a `docker` that records its arguments."""
    job = cluster_job(good, 2)
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    note = 'for word in "$@"; do printf "%s\\n" "$word"; done >> "$LOG"'
    answers = 'case "$1 $2" in wait*) echo 0 ;; "network inspect") echo 10.1.2.128/25 ;; inspect*) exit 1 ;; esac'
    fake.write_text(f"#!/bin/sh\n{note}\n{answers}\n")
    fake.chmod(0o755)
    (tmp_path / "bin" / "aws").symlink_to("/bin/true")
    work = tmp_path / "my work"
    env = {"PATH": f"{fake.parent}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "WORK": str(work)}
    text = artefact(job, HostOptions())
    assert subprocess.run(["sh"], input=text, text=True, env=env, check=False).returncode == 0
    words = (tmp_path / "log").read_text().splitlines()
    subnet = words.index("--subnet")
    assert words[subnet - 5 : subnet] == ["network", "create", "--internal", "--label", "estiba.job=embed-1"]
    assert words[subnet + 1 : subnet + 4] == ["10.1.2.128/25", "estiba-embed-1", "run"]
    assert [words[at + 1] for at, word in enumerate(words) if word == "--ip"] == ["10.1.2.130", "10.1.2.131"]
    hosts = [words[at + 1] for at, word in enumerate(words) if word == "--add-host"]
    assert hosts == ["algo-2:10.1.2.131", "algo-1:10.1.2.130"]
    assert 'echo "$HOME" && exec train' in words
    assert f"type=bind,source={work}/algo-2/input,target=/opt/ml/input" in words
    read = json.loads((work / "algo-2/input/config/hyperparameters.json").read_text())
    assert read == job.request["HyperParameters"]
    assert json.loads((work / "algo-2/input/config/resourceconfig.json").read_text())["current_host"] == "algo-2"


def test_the_local_script_mounts_the_same_files_as_run_on_each_host(tmp_path, good):
    """One file, a name prefix and a folder, in paths with colons and spaces, whole and sharded."""
    data = tmp_path / "my: data"
    for name in ("folder/a", "folder/b/c", "folder/d e", "one.csv", "one.csv.old", "tr-1", "train/x"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    channels = [("folder", "folder", {}), ("one", "one.csv", {}), ("start", "tr", {})]
    channels += [("share", "folder", {"S3DataDistributionType": "ShardedByS3Key"})]
    good["InputDataConfig"] = [
        {
            "ChannelName": name,
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"file://{data}/{key}", **more}},
        }
        for name, key, more in channels
    ]
    good["ResourceConfig"]["InstanceCount"] = 2
    good["CheckpointConfig"]["S3Uri"] = f"file://{tmp_path}/checkpoints"
    job = jobfile.check(Path("job.yaml"), good, registry.parse("local"))
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\ncase "$1 $2" in wait*) echo 0 ;; "network inspect") echo 10.0.0.0/24 ;; inspect*) exit 1 ;; esac\n'
    )
    fake.chmod(0o755)
    work = tmp_path / "work"
    env = {"PATH": f"{fake.parent}:/usr/bin:/bin", "WORK": str(work)}
    assert subprocess.run(["sh"], input=artefact(job, OPTIONS), text=True, env=env, check=False).returncode == 0
    cluster = contract.hosts(job.request)
    for host in cluster:
        for channel in contract.channels(job.request):
            by_run = place(channel, host, cluster, tmp_path / "run", copy=False).source
            mounts = local_script._mounts(job.request, host, SubmitOptions())
            (mount,) = [one for one in mounts if one.target == f"/opt/ml/input/data/{channel.name}"]
            by_hand = Path(str(mount.source).replace("$work", str(work)))
            assert files_of(by_hand) == files_of(by_run) != {}, (host.name, channel.name)


def files_of(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_hosts_are_listed_in_lexicographic_order(good):
    job = cluster_job(good, 11)
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
    job = jobfile.check(Path("job.yaml"), good, registry.parse("local"))
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


def test_the_rendered_price_is_golden(golden):
    cost = estimate(embed("sagemaker"), prices.load(), today=DAY)
    golden("embed.price.txt", cost.render())
    assert cost.ceiling_usd == pytest.approx(0.7364)
    assert cost.warnings == []


def test_an_estimate_as_json_holds_price_and_assumptions():
    document = estimate(embed("sagemaker"), prices.load(), today=DAY).to_json()
    assert json.loads(json.dumps(document))["cost"]["assumptions"]["interruptions_per_hour"] == 0.15
    assert document["hosts"][0]["date"] == "2026-09-27"


def test_a_budget_is_compared_with_the_ceiling():
    cost = estimate(embed("sagemaker"), prices.load(), today=DAY)
    refuse_over(cost, 0.74)
    refuse_over(cost, None)
    with pytest.raises(BudgetError, match=r"0\.74 USD.*--max-cost 0\.73"):
        refuse_over(cost, 0.73)


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0])
def test_a_budget_that_is_no_amount_is_refused(limit):
    with pytest.raises(LaunchError, match=r"--max-cost (nan|inf|-1\.0): not an amount"):
        refuse_over(estimate(embed("sagemaker"), prices.load(), today=DAY), limit)


@pytest.mark.parametrize("name", ["usd_per_h", "sync_every_s", "stop_grace_s", "capacity_wait_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_options_from_python_are_finite_amounts(name, value):
    with pytest.raises(LaunchError, match=f"{name} {value}: must be"):
        SubmitOptions(**{name: value})


def aws_job(good: dict, **resources: object) -> jobfile.JobFile:
    good["EnableManagedSpotTraining"] = False
    good["StoppingCondition"].pop("MaxWaitTimeInSeconds", None)
    good["ResourceConfig"] = {"VolumeSizeInGB": 30, **resources}
    return jobfile.check(Path("job.yaml"), good, registry.parse("sagemaker"))


def test_the_most_expensive_preference_times_its_count_is_the_ceiling(good):
    preferred = [
        {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 4},
        {"InstanceType": "ml.g5.12xlarge", "InstanceCount": 1},
        {"InstanceType": "ml.g5.xlarge", "InstanceCount": 3},
    ]
    cost = estimate(aws_job(good, InstancePreferences=preferred), prices.load(), today=DAY)
    assert cost.ceiling_usd == pytest.approx(7.09)
    with pytest.raises(BudgetError):
        refuse_over(cost, 7.0)
    assert "1 x ml.g5.12xlarge" in cost.render() and "4 x ml.g4dn.xlarge" not in cost.render()
    assert "most expensive of 3" in cost.render()


def test_a_warm_pools_wait_is_part_of_the_ceiling(good):
    job = aws_job(good, InstanceType="ml.g5.xlarge", InstanceCount=1, KeepAlivePeriodInSeconds=1800)
    cost = estimate(job, prices.load(), today=DAY)
    assert cost.ceiling_usd == pytest.approx(1.41 * 1.5)
    assert cost.forecast and cost.forecast.ceiling_usd == cost.ceiling_usd


def test_a_shared_count_applies_to_each_preference(good):
    preferred = [{"InstanceType": "ml.g4dn.xlarge"}, {"InstanceType": "ml.g5.xlarge"}]
    cost = estimate(aws_job(good, InstancePreferences=preferred, InstanceCount=3), prices.load(), today=DAY)
    assert cost.ceiling_usd == pytest.approx(3 * 1.41)
    selected = {"InstancePreferences": preferred, "InstanceCount": 3}
    selected |= {"SelectedInstanceType": "ml.g5.xlarge", "SelectedInstanceCount": 3}
    assert prices.hosts_of({"ResourceConfig": selected}) == [("ml.g5.xlarge", 3)]


@pytest.mark.parametrize(
    "resources",
    [
        {"InstanceType": "ml.r7i.2xlarge", "InstanceCount": 1},
        {
            "InstancePreferences": [
                {"InstanceType": f"ml.{kind}", "InstanceCount": 1} for kind in ("g5.xlarge", "r7i.large")
            ]
        },
    ],
)
def test_a_type_without_a_price_is_a_warning_and_an_error_only_with_a_budget(good, resources):
    cost = estimate(aws_job(good, **resources), prices.load(), today=DAY)
    assert cost.usd_per_h is None and cost.to_json()["cost"] is None
    (warning,) = cost.warnings
    assert "ml.r7i" in warning and "no price known" in warning and "estiba prices refresh" in warning
    assert "price unknown" in cost.render()
    refuse_over(cost, None)
    with pytest.raises(LaunchError, match=r"--max-cost: .*ml\.r7i.*--usd-per-h"):
        refuse_over(cost, 100.0)
    known = estimate(aws_job(good, **resources), prices.load(), today=DAY, usd_per_h=2.0)
    assert known.ceiling_usd == pytest.approx(2.0) and known.to_json()["cost"]["usd_per_h"] == 2.0


def test_a_spot_plan_shows_its_discount_and_keeps_the_full_price_as_its_ceiling():
    assumptions = Assumptions(spot_discount=0.75)
    cost = estimate(embed("sagemaker"), prices.load(), today=DAY, assumptions=assumptions)
    assert cost.forecast and cost.ceiling_usd == pytest.approx(0.7364)
    assert cost.forecast.expected_usd == pytest.approx(cost.forecast.usd["p50"] * 0.25)
    (line,) = [line for line in cost.render().splitlines() if "expected" in line]
    assert f"{cost.forecast.expected_usd:.2f} USD" in line and "75%" in line and "--spot-discount" in line
    with pytest.raises(LaunchError, match=r"spot_discount 1\.5"):
        Assumptions(spot_discount=1.5)


def test_a_job_on_demand_expects_no_discount(good):
    job = aws_job(good, InstanceType="ml.g5.xlarge", InstanceCount=1)
    cost = estimate(job, prices.load(), today=DAY)
    assert cost.forecast and cost.forecast.expected_usd == cost.forecast.usd["p50"]
    assert "discount" not in cost.render()


@pytest.mark.parametrize("target", ["sagemaker", "local", "ssh://user@203.0.113.7"])
def test_a_price_from_the_user_sets_the_ceiling_on_every_target(target):
    cost = estimate(embed(target), prices.load(), today=DAY, usd_per_h=2.5)
    assert cost.ceiling_usd == pytest.approx(2.5)
    assert "2.5 USD/h" in cost.render()
    with pytest.raises(BudgetError, match=r"2\.50 USD"):
        refuse_over(cost, 2.49)


def test_this_machine_is_free_and_another_needs_a_price():
    refuse_over(estimate(embed("local"), prices.load()), 0.0)
    rented = estimate(embed("ssh://user@203.0.113.7"), prices.load())
    refuse_over(rented, None)
    with pytest.raises(LaunchError, match="--usd-per-h"):
        refuse_over(rented, 100.0)


@pytest.mark.parametrize(
    "wrong",
    [{"gpus": "two"}, {"encoding": "yaml"}, {"shm_size": "lots"}, {"memory": "-1g"}, {"cpus": 0.0}, {"env_file": "no"}],
)
def test_an_invalid_host_flag_is_refused_by_name(wrong):
    flags = {"gpus": "none", "shm_size": "8g", "memory": None, "cpus": None, "encoding": "plain", "env_file": None}
    with pytest.raises(LaunchError, match="--" + next(iter(wrong)).replace("_", "-")):
        read_options(**{**flags, **wrong}, like=None, remote=False)


@pytest.mark.parametrize("cpus", [0.0, 5000.0])
def test_the_range_of_cpus_is_named(cpus):
    with pytest.raises(LaunchError, match=rf"--cpus {cpus}: not from 0.01 to 4096"):
        read_options(cpus=cpus)


def test_hosts_can_be_limited_like_their_instance_type():
    flags = {"gpus": "none", "shm_size": "8g", "memory": None, "cpus": None, "encoding": "plain", "env_file": None}
    like = prices.load().get("ml.g4dn.xlarge")
    options = read_options(**flags, like=like, remote=False)
    assert (options.memory, options.cpus) == ("16384m", 4)


def test_the_fine_tuning_documents_request_gets_its_missing_data_type_and_a_note(tmp_path):
    values = {
        "IMAGE": AWS_VALUES["IMAGE"],
        "DATA": "s3://bucket/data",
        "SCRIPTS": "s3://bucket/scripts/",
        "OUT": "s3://bucket/out",
    }
    path = finetune_request.write(tmp_path / "job.yaml", **values)
    path.write_text(path.read_text() + f"RoleArn: {AWS_VALUES['ROLE_ARN']}\n")
    result = CliRunner().invoke(app, ["plan", str(path), "--target", "sagemaker"])
    assert result.exit_code == 0, result.stderr
    sources = [one["DataSource"]["S3DataSource"] for one in json.loads(result.stdout)["InputDataConfig"]]
    assert sources == [
        {"S3Uri": "s3://bucket/data", "S3DataType": "S3Prefix"},
        {"S3Uri": "s3://bucket/scripts/", "S3DataType": "S3Prefix"},
    ]
    for number in (0, 1):
        field = f"InputDataConfig[{number}].DataSource.S3DataSource.S3DataType"
        assert f"note: {field}: not set, so S3Prefix is used" in result.stderr


@pytest.mark.parametrize("scheme", ["s3", "file"])
@pytest.mark.parametrize("rest", ["", "/", "/sourcedir.tar.gz", "/lib/x"])
def test_code_in_a_channel_is_read_from_the_channel_wherever_the_job_runs(scheme, rest, good, tmp_path):
    address = "s3://bucket/scripts" if scheme == "s3" else f"file://{tmp_path}/scripts"
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{address}/"}
    good["InputDataConfig"].append({"ChannelName": "code", "DataSource": {"S3DataSource": source}})
    good["Environment"]["SAGEMAKER_SUBMIT_DIRECTORY"] = f"{address}{rest}"
    good["HyperParameters"]["sagemaker_submit_directory"] = f'"{address}{rest}"'
    request = jobfile.check(Path("job.yaml"), good, registry.parse("local")).request
    place = f"/opt/ml/input/data/code{rest.rstrip('/')}"
    assert contract.environment(request)["SAGEMAKER_SUBMIT_DIRECTORY"] == place
    assert contract.hyperparameters(request)["sagemaker_submit_directory"] == f'"{place}"'
    assert request["Environment"]["SAGEMAKER_SUBMIT_DIRECTORY"] == f"{address}{rest}", "the request itself is unchanged"


def test_code_outside_every_channel_keeps_its_address(good):
    for location in ("s3://bucket/other", "s3://bucket/data-2", "/opt/ml/input/data/code/code.tar.gz"):
        good["Environment"]["SAGEMAKER_SUBMIT_DIRECTORY"] = location
        assert contract.environment(good)["SAGEMAKER_SUBMIT_DIRECTORY"] == location


@pytest.mark.parametrize(
    "name", ["Environment.SAGEMAKER_SUBMIT_DIRECTORY", "HyperParameters.sagemaker_submit_directory"]
)
@pytest.mark.parametrize(
    ("target", "message"),
    [("local", "no channel brings it"), ("ssh://h", "no channel brings it"), ("sagemaker", "not on S3")],
)
def test_code_on_this_machine_that_no_channel_brings_is_refused(target, message, name, good, problems_of):
    block, _, key = name.partition(".")
    good[block][key] = "file:///srv/scripts"
    (problem,) = problems_of(good, target)
    assert (problem.field, message in problem.rule) == (name, True)


def test_a_relative_code_address_becomes_absolute_for_the_supervisor(good, tmp_path):
    source = {"S3DataType": "S3Prefix", "S3Uri": "file://scripts"}
    good["InputDataConfig"].append({"ChannelName": "code", "DataSource": {"S3DataSource": source}})
    good["Environment"]["SAGEMAKER_SUBMIT_DIRECTORY"] = "file://scripts/train.py"
    request = with_absolute_paths(good)
    assert request["Environment"]["SAGEMAKER_SUBMIT_DIRECTORY"] == f"file://{tmp_path}/scripts/train.py"


@pytest.mark.parametrize(
    ("name", "effect"),
    [
        ("sagemaker_torch_distributed_enabled", "runs one process on each host"),
        ("sagemaker_distributed_dataparallel_enabled", "runs one process on each host"),
        ("sagemaker_mpi_enabled", "ends with an error, as there is no mpirun"),
    ],
)
@pytest.mark.parametrize("value", ["true", '"true"'])
def test_plan_notes_a_launcher_that_the_image_lacks(value, name, effect, monkeypatch, good):
    good["HyperParameters"][name] = value
    job = jobfile.check(Path("job.yaml"), good, registry.parse("local"))
    monkeypatch.setattr(script_mode, "image_settings", lambda _: {"ESTIBA_WORKLOAD": "embed"})
    (note,) = operations.prepare(job).job.notes
    assert f"HyperParameters.{name}" in note and effect in note
    monkeypatch.setattr(script_mode, "image_settings", lambda _: {"SAGEMAKER_TRAINING_MODULE": "x:main"})
    assert operations.prepare(job).job.notes == ()


def test_plan_notes_a_script_on_an_image_without_script_mode(monkeypatch, good):
    good["HyperParameters"]["sagemaker_program"] = '"train.py"'
    job = jobfile.check(Path("job.yaml"), good, registry.parse("local"))
    monkeypatch.setattr(script_mode, "image_settings", lambda _: {"PATH": "/bin"})
    (note,) = operations.prepare(job).job.notes
    assert "may not run train.py" in note
    monkeypatch.setattr(script_mode, "image_settings", lambda _: None)
    assert operations.prepare(job).job.notes == (), "an image that is not here is not checked"


@pytest.mark.docker
def test_the_launchers_of_a_local_image_are_known(embed_image):
    settings = script_mode.image_settings(embed_image)
    assert settings is not None
    assert settings["ESTIBA_WORKLOAD"] == "embed"
    assert script_mode.image_settings("estiba/no-such-image:local") is None


def test_the_job_file_of_the_tensordock_guide_is_the_guides_command(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/tensordock.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    for name in ("spanish_corpus", "spanish-tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("hola\n")
    (tmp_path / "spanish.yaml").write_text(text.replace("file:///datasets/", f"file://{tmp_path}/"))
    words = ["plan", "spanish.yaml", "--target", "ssh://user@203.0.113.7", "--usd-per-h", "1.80", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    request = json.loads(done.stdout)["request"]
    assert request["HyperParameters"] == {
        "tokenizer_name_or_path": "/opt/ml/input/data/tokenizer",
        "epochs": "3",
        "model_preset": "auto",
        "gradient_checkpointing": "true",
        "log_interval": "100",
    }
    assert request["StoppingCondition"]["MaxRuntimeInSeconds"] == 72 * 3600
    assert "129.60" in CliRunner().invoke(app, words[:-1]).stderr


def spot_job(good: dict, target: str) -> jobfile.JobFile:
    good["StoppingCondition"] = {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 86400}
    return jobfile.check(Path("job.yaml"), good, registry.parse(target))


def test_the_ceiling_on_kubernetes_is_that_of_the_manifests_deadline(good):
    job = spot_job(good, "k8s")
    assert "activeDeadlineSeconds: 86400" in artefact(job, OPTIONS)
    cost = estimate(job, prices.load(), usd_per_h=5.0)
    assert cost.ceiling_usd == pytest.approx(120.0)
    assert "at most 120.00 USD (24 h x 5 USD/h" in cost.render() and "MaxWaitTimeInSeconds" in cost.render()
    good["EnableManagedSpotTraining"] = False
    del good["StoppingCondition"]["MaxWaitTimeInSeconds"]
    cost = estimate(jobfile.check(Path("job.yaml"), good, registry.parse("k8s")), prices.load(), usd_per_h=5.0)
    assert cost.ceiling_usd == pytest.approx(5.0) and "MaxWaitTimeInSeconds" not in cost.render()


def test_the_ceiling_on_slurm_is_that_of_each_start(good):
    text = estimate(spot_job(good, "slurm"), prices.load(), usd_per_h=5.0).render()
    assert "each start at most 5.00 USD" in text and "counts the time anew after each interruption" in text


def test_the_ceiling_says_that_storage_is_not_in_it(good):
    good["ResourceConfig"]["VolumeSizeInGB"] = 16384
    job = aws_job(good, InstanceType="ml.m5.xlarge", InstanceCount=10, VolumeSizeInGB=16384)
    (line,) = [one for one in estimate(job, prices.load(), today=DAY).render().splitlines() if "ceiling" in one]
    assert "without storage: 10 x 16384 GB of EBS" in line


IGNORED = {
    "RemoteDebugConfig": {"EnableRemoteDebug": True},
    "EnableInterContainerTrafficEncryption": True,
    "TensorBoardOutputConfig": {"S3OutputPath": "s3://bucket/tb"},
    "RetryStrategy": {"MaximumRetryAttempts": 2},
}


@pytest.mark.parametrize(
    ("target", "honoured"),
    [("local", True), ("k8s", True), ("slurm", False), ("ssh://user@203.0.113.7", False), ("sagemaker", None)],
)
def test_one_note_lists_what_a_target_ignores(target, honoured, good):
    good |= IGNORED
    good["OutputDataConfig"]["KmsKeyId"] = "key"
    good["InputDataConfig"][0]["ShuffleConfig"] = {"Seed": 1}
    job = jobfile.check(Path("job.yaml"), good, registry.parse(target))
    notes = [one for one in operations.prepare(job, SubmitOptions(host=OPTIONS)).job.notes if "no effect on" in one]
    if honoured is None:
        assert notes == []
        return
    (note,) = notes
    names = set(note.partition(": ")[2].split(", "))
    expected = IGNORED.keys() | {"OutputDataConfig.KmsKeyId", "InputDataConfig[0].ShuffleConfig"}
    assert names == (expected - {"RetryStrategy"} if honoured else expected)


def plan_on_sagemaker(good: dict, path: Path, *words: str) -> Result:
    path.write_text(json.dumps(good))
    return CliRunner().invoke(app, ["plan", str(path), "--target", "sagemaker", *words])


def test_a_read_only_type_does_not_replace_the_price(good, tmp_path):
    good["ResourceConfig"] |= {"InstanceType": "ml.p5.48xlarge", "SelectedInstanceType": "ml.m5.xlarge"}
    done = plan_on_sagemaker(good, tmp_path / "job.yaml")
    assert done.exit_code == 2 and "ResourceConfig.SelectedInstanceType" in done.stderr
    assert "USD" not in done.stderr


@pytest.mark.parametrize("in_file", [True, False])
def test_a_plan_takes_a_roles_name_and_leaves_its_arn_to_the_run(in_file, good, tmp_path):
    good["RoleArn"] = "MyRole"
    words = () if in_file else ("--role", good.pop("RoleArn"))
    done = plan_on_sagemaker(good, tmp_path / "job.yaml", *words)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["RoleArn"] == "MyRole"
    assert "note: RoleArn MyRole: a role's name" in done.stderr


@pytest.mark.parametrize("by", ["settings", "image"])
def test_a_plan_warns_of_a_price_from_another_region_wherever_the_region_is_set(by, good, tmp_path, monkeypatch):
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "aws").write_text("[default]\nregion = ap-southeast-2\n" if by == "settings" else "")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
    image = good["AlgorithmSpecification"]["TrainingImage"]
    good["AlgorithmSpecification"]["TrainingImage"] = image.replace("us-east-1", "ap-southeast-2")
    done = plan_on_sagemaker(good, tmp_path / "job.yaml")
    assert "price is for us-east-1, not ap-southeast-2" in done.stderr


def test_a_profile_that_does_not_exist_stops_no_plan(good, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    service_model.create_training_job.cache_clear()
    assert plan_on_sagemaker(good, tmp_path / "job.yaml").exit_code == 0
