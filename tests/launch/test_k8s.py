"""The manifest for Kubernetes: valid by its schemas, with every value unchanged in the pod, and no secret."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.errors import LaunchError
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.request.options import HostOptions
from estiba_launch.targets import operations, registry
from estiba_launch.targets.k8s.manifest import object_name

EMBED = str(Path(__file__).parents[2] / "images/embed/job.yaml")
VERSIONS = ("1.29", "1.37")
AWKWARD = {
    "quotes": 'it\'s "so"',
    "spaces": "  two  ",
    "lines": "one\n two\n\n",
    "tab": "a\tb\rc",
    "dollars": "$HOME $(HOME) $$(HOME) $$ ${x}",
    "number": "1e3",
    "octal": "0o17",
    "yes": "yes",
    "null": "~",
    "empty": "",
    "accents": "ñandú # ? \u2028 \x85 😀",
    "colon": "a: b # c",
    "back": "\\n `date`",
}


def make(request: dict[str, Any], options: HostOptions | None = None) -> str:
    job = jobfile.check(Path("job.yaml"), request, registry.parse("k8s"))
    return operations.prepare(job, SubmitOptions(host=options or HostOptions())).render()


def documents(text: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def check(text: str) -> None:
    for document in yaml.safe_load_all(text):
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)


def expanded(text: str, variables: dict[str, str]) -> str:
    """What kubelet makes of an env value or an argument (k8s.io/kubernetes, third_party/forked/golang/expansion)."""
    return re.sub(
        r"\$(\$|\(([^)]*)\))",
        lambda match: "$" if match[1] == "$" else variables.get(match[2], match[0]),
        text,
    )


@pytest.fixture
def cluster(good) -> dict[str, Any]:
    good["ResourceConfig"]["InstanceCount"] = 3
    return good


def test_the_manifest_of_a_cluster_is_golden_and_valid(golden, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    text = make(cluster, HostOptions(gpus="all", gpus_if_any=True, memory="16g", cpus=3.5, env_file="/srv/tokens.env"))
    golden("cluster.k8s.yaml", text)
    check(text)


def test_folders_of_the_nodes_are_valid_too(cluster):
    source = cluster["InputDataConfig"][0]["DataSource"]["S3DataSource"]
    source["S3Uri"] = "file:///srv/my data, all"
    cluster["OutputDataConfig"]["S3OutputPath"] = "file:///srv/out"
    cluster["CheckpointConfig"]["S3Uri"] = "file:///srv/checkpoints"
    text = make(cluster)
    check(text)
    pod = documents(text)["Job"]["spec"]["template"]["spec"]
    paths = {one["name"]: one["hostPath"]["path"] for one in pod["volumes"] if "hostPath" in one}
    assert paths == {"results": "/srv/out", "checkpoints": "/srv/checkpoints", "channel-0": "/srv/my data, all"}
    assert [one["name"] for one in pod["initContainers"]] == ["config"]


def volume_and_mount(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first channel's volume, and where the job's container has it."""
    pod = documents(text)["Job"]["spec"]["template"]["spec"]
    volume = next(one for one in pod["volumes"] if one["name"] == "channel-0")
    return volume["hostPath"], next(one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "channel-0")


def test_one_file_is_mounted_in_the_channels_folder(good, tmp_path):
    (tmp_path / "dd.csv").write_text("1")
    good["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = f"file://{tmp_path}/dd.csv"
    text = make(good)
    check(text)
    volume, mount = volume_and_mount(text)
    assert volume == {"path": f"{tmp_path}/dd.csv", "type": "File"}
    assert mount["mountPath"] == "/opt/ml/input/data/dataset/dd.csv"


def test_a_folder_above_this_one_has_its_own_path(good, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    good["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = "file://../w"
    assert volume_and_mount(make(good))[0] == {"path": f"{tmp_path}/w", "type": "Directory"}


@pytest.mark.parametrize("name", ["part-", "a:b.csv"])
def test_files_that_no_mount_can_give_are_refused(good, tmp_path, name: str):
    for file in ("part-1", "a:b.csv"):
        (tmp_path / file).write_text("1")
    good["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = f"file://{tmp_path}/{name}"
    with pytest.raises(LaunchError, match=r"InputDataConfig\[0\]\.DataSource\.S3DataSource\.S3Uri = .*; (move|rename)"):
        make(good)


def test_folders_of_the_nodes_are_not_divided_among_pods(cluster):
    source = cluster["InputDataConfig"][0]["DataSource"]["S3DataSource"]
    source |= {"S3Uri": "file:///some/dir", "S3DataDistributionType": "ShardedByS3Key"}
    with pytest.raises(LaunchError, match=r"'ShardedByS3Key': .*; put the data on S3, or use FullyReplicated"):
        make(cluster)
    cluster["ResourceConfig"]["InstanceCount"] = 1
    check(make(cluster))


@pytest.mark.parametrize("place", ["/dev/shm", "/dev//shm/", "/opt/c:k"])
def test_a_checkpoint_path_that_a_pod_cannot_have_is_refused(cluster, place: str):
    cluster["CheckpointConfig"]["LocalPath"] = place
    with pytest.raises(LaunchError, match=r"CheckpointConfig.LocalPath = .*; use /opt/ml/checkpoints"):
        make(cluster)


def test_the_printed_command_makes_the_secret_as_docker_reads_the_file(good, tmp_path):
    secrets = tmp_path / "ok env's.env"
    secrets.write_text('# comment\nTOK="a b" # c\nexport B=2\n')
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words; cat > {tmp_path}/given\n')
    (tmp_path / "kubectl").chmod(0o755)
    text = make(good, HostOptions(env_file=str(secrets)))
    check(text)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["sh", "-c", "sed -n 's/^#   //p' | sh"], input=text, text=True, env=env, check=True)
    assert (tmp_path / "given").read_text() == "TOK=a b\nB=2\n"
    assert (tmp_path / "words").read_text().split() == [
        *("create", "secret", "generic", "embed-1-env", "--from-env-file=/dev/stdin")
    ]
    with pytest.raises(LaunchError, match=r"--env-file .*; rename the file"):
        make(good, HostOptions(env_file="a\nb"))


def test_one_host_needs_no_service(good):
    text = make(good)
    check(text)
    assert set(documents(text)) == {"ConfigMap", "Job"}
    assert "subdomain" not in documents(text)["Job"]["spec"]["template"]["spec"]


def test_pods_are_told_what_the_container_asks_of_them(cluster):
    found = documents(make(cluster))
    spec = found["Job"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    container = spec["template"]["spec"]["containers"][0]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment["ESTIBA_HOST_COUNT"] == "3"
    assert environment["ESTIBA_HOST_SERVICE"] == found["Service"]["metadata"]["name"]
    assert spec["template"]["spec"]["subdomain"] == found["Service"]["metadata"]["name"]
    assert found["Service"]["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": found["Job"]["metadata"]["name"]},
    }
    assert "resourceconfig.json" not in found["ConfigMap"]["data"]


def test_every_value_arrives_unchanged(cluster):
    # The API takes lines only in the environment.
    plain = {name: value for name, value in AWKWARD.items() if not re.search(r"[\r\n\u2028\x85]", value)}
    cluster["HyperParameters"] = plain
    cluster["Environment"] = {f"VALUE_{name}": value for name, value in AWKWARD.items() if value}
    words = ["-c", 'echo "$HOME" $(date) $$', *plain.values()]
    cluster["AlgorithmSpecification"]["ContainerEntrypoint"] = ["sh"]
    cluster["AlgorithmSpecification"]["ContainerArguments"] = [word for word in words if word]
    text = make(cluster)
    check(text)
    found = documents(text)
    assert json.loads(found["ConfigMap"]["data"]["hyperparameters.json"]) == plain
    container = found["Job"]["spec"]["template"]["spec"]["containers"][0]
    secrets = {"HOME": "expanded", "date": "expanded", "x": "expanded"}
    environment = {one["name"]: expanded(one["value"], secrets) for one in container["env"]}
    assert {name: environment[name] for name in cluster["Environment"]} == cluster["Environment"]
    assert [expanded(word, secrets) for word in container["args"]] == [word for word in words if word]


def test_text_that_other_readers_take_for_a_number_is_quoted(cluster):
    cluster["Environment"] = {"STEPS": "1e3", "MODE": "0o17"}
    text = make(cluster)
    assert 'value: "1e3"' in text
    assert 'value: "0o17"' in text


def test_scripts_in_the_manifest_parse_and_share_a_channel(cluster, tmp_path):
    source = cluster["InputDataConfig"][0]["DataSource"]["S3DataSource"]
    source |= {"S3Uri": "s3://bucket/da ta", "S3DataDistributionType": "ShardedByS3Key"}
    pod = documents(make(cluster))["Job"]["spec"]["template"]["spec"]
    for container in pod["initContainers"]:
        subprocess.run(["bash", "-n"], input=container["command"][2].replace("$$", "$"), text=True, check=True)
    script = next(one for one in pod["initContainers"] if one["name"] == "inputs")["command"][2].replace("$$", "$")
    fake = tmp_path / "aws"
    keys = "\\n".join(f"da ta/{name}" for name in ("a b", "b", "c", "d/", "d/e"))
    fake.write_text(
        f'#!/bin/sh\ncase "$1" in s3api) printf "{keys}\\n" ;; *) printf "%s\\n" "$*" >> {tmp_path}/log ;; esac\n'
    )
    fake.chmod(0o755)
    script = script.replace("/opt/ml", str(tmp_path / "ml"))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "0"}
    subprocess.run(["bash", "-c", script], env=env, check=True)
    copied = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("s3 cp")]
    folder = f"{tmp_path}/ml/input/data/dataset"
    assert copied == [
        f"s3 cp --only-show-errors s3://bucket/da ta/a b {folder}/a b",
        f"s3 cp --only-show-errors s3://bucket/da ta/d/e {folder}/d/e",
    ]


def test_results_have_time_to_reach_s3_and_folders_need_none(cluster):
    pod = documents(make(cluster))["Job"]["spec"]["template"]["spec"]
    uploads = pod["initContainers"][-1]
    assert (uploads["name"], uploads["restartPolicy"]) == ("uploads", "Always")
    assert pod["terminationGracePeriodSeconds"] == 120 + 3600


def test_a_preempted_pod_costs_no_retry_and_a_wrong_setting_ends_the_job(cluster):
    cluster["EnableManagedSpotTraining"] = True
    cluster["StoppingCondition"] = {"MaxRuntimeInSeconds": 100, "MaxWaitTimeInSeconds": 500}
    spec = documents(make(cluster))["Job"]["spec"]
    assert spec["activeDeadlineSeconds"] == 500
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["FailJob", "Ignore", "Ignore"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    # A host that lost another one ends with 75, one that was stopped with 143.
    assert spec["podFailurePolicy"]["rules"][2]["onExitCodes"]["values"] == [75, 143]


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("embed-1", "embed-1"),
        ("Embed-A", "embed-a"),
        ("1st", "job-1st"),
        ("a" * 63, "a" * 52 + "-7d3e74a0"),
    ],
)
def test_a_jobs_name_becomes_one_that_its_pods_can_have(job: str, expected: str):
    name = object_name(job, 3)
    assert name == expected
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{name}-2") and len(f"{name}-2") <= 63


def test_instance_groups_and_unknown_gpus_are_refused(good):
    good["ResourceConfig"]["InstanceType"] = "ml.p4d.24xlarge"
    text = make(good, HostOptions(gpus="all"))
    assert documents(text)["Job"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {
        "nvidia.com/gpu": 8
    }
    good["ResourceConfig"]["InstanceType"] = "ml.p6-b200.48xlarge"
    with pytest.raises(LaunchError, match="pass --gpus with a number"):
        make(good, HostOptions(gpus="all"))
    del good["ResourceConfig"]["InstanceType"], good["ResourceConfig"]["InstanceCount"]
    good["ResourceConfig"]["InstanceGroups"] = [
        {"InstanceGroupName": "a", "InstanceType": "ml.g5.xlarge", "InstanceCount": 1}
    ]
    with pytest.raises(LaunchError, match="starts hosts of one kind"):
        make(good)


def test_other_commands_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path))
    runner = CliRunner()
    refused = runner.invoke(app, ["run", EMBED, "--target", "k8s", "--yes"])
    assert refused.exit_code == 2
    assert refused.stderr.strip() == (
        "estiba: k8s: this target cannot start jobs; run `estiba plan JOB --target k8s | kubectl apply -f -`, or use "
        "another --target"
    )
    drilled = runner.invoke(app, ["drill", EMBED, "--target", "k8s"])
    assert (drilled.exit_code, len(drilled.stderr.splitlines())) == (2, 1)
    assert "kubectl delete pod" in drilled.stderr
    unknown = runner.invoke(app, ["logs", "embed-1"])
    assert (unknown.exit_code, "kubectl" in unknown.stderr) == (2, True)
