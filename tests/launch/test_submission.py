"""What `plan` prints is what `run` starts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.errors import LaunchError
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import contract, jobfile
from estiba_launch.request.options import HostOptions
from estiba_launch.targets import operations, registry
from estiba_launch.targets.docker_command import Mount, docker_run, here_document, render, work_path
from estiba_launch.targets.local.script import local_container
from estiba_launch.targets.sagemaker import client
from fake_ssh import FakeSsh

HOST = "ssh://user@203.0.113.7"
SECRET = "s3cr3t-value-of-a-token"


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def write_job(tmp_path: Path, good: dict[str, Any], **changes: Any) -> Path:
    """A job whose data is a folder of this machine."""
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/a").write_text("a")
    good["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = f"file://{tmp_path}/data"
    good["CheckpointConfig"]["S3Uri"] = f"file://{tmp_path}/checkpoints"
    good["OutputDataConfig"]["S3OutputPath"] = f"file://{tmp_path}/out"
    (tmp_path / "job.yaml").write_text(json.dumps({**good, **changes}))
    return tmp_path / "job.yaml"


def words_of(command: str, work: str) -> list[str]:
    """The words that a shell makes of a command."""
    shown = 'for word; do printf "%s\\0" "$word"; done'
    done = subprocess.run(
        ["sh", "-c", f"work={shlex.quote(work)}; set -- {command}\n{shown}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


# ---- docker run


def test_the_command_of_a_local_host_has_every_limit_mount_and_variable(good):
    good["AlgorithmSpecification"]["ContainerEntrypoint"] = ["sh", "-c"]
    good["AlgorithmSpecification"]["ContainerArguments"] = ['echo "$HOME"']
    host = contract.hosts(good)[0]
    options = SubmitOptions(host=HostOptions(gpus="2", shm_size="1g", memory="16g", cpus=2.5))
    mounts = [
        Mount(source=Path("$work/algo-1/input"), target="/opt/ml/input"),
        Mount(source=Path("/my data, all"), target="/opt/ml/input/data/dataset", read_only=True),
    ]
    container = local_container(good, host, options, mounts, attempt=3)
    assert words_of(render(docker_run(container, env_file="a b.env")), "/w $ork") == [
        *("docker", "run", "--detach", "--name", "estiba-embed-1-algo-1-3", "--hostname", "algo-1"),
        *("--label", "estiba.job=embed-1", "--label", "estiba.attempt=3", "--label", "estiba.host=algo-1"),
        *("--stop-timeout", "120", "--shm-size", "1g", "--network", "estiba-embed-1", "--network-alias", "algo-1"),
        *("--gpus", "2", "--memory", "16g", "--memory-swap", "16g", "--cpus", "2.5"),
        *("--env", "TRAINING_JOB_NAME=embed-1"),
        *("--env", "TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-1"),
        *("--env", "HF_HUB_OFFLINE=1", "--env-file", "a b.env"),
        *("--mount", "type=bind,source=/w $ork/algo-1/input,target=/opt/ml/input"),
        *("--mount", 'type=bind,"source=/my data, all",target=/opt/ml/input/data/dataset,readonly'),
        *("--entrypoint", "sh", good["AlgorithmSpecification"]["TrainingImage"], "-c", 'echo "$HOME"'),
    ]


def test_a_value_of_the_user_is_never_read_as_shell(good, tmp_path):
    values = {"A": "$work/x", "B": '"; touch broken; "', "C": "two\nlines", "D": "`touch broken`"}
    good["Environment"] = values
    good["AlgorithmSpecification"]["ContainerArguments"] = ["$work/y", "$(touch broken)"]
    container = local_container(good, contract.hosts(good)[0], SubmitOptions(), [], attempt=1)
    words = words_of(render(docker_run(container)), str(tmp_path))
    assert words[-2:] == ["$work/y", "$(touch broken)"]
    assert {f"{name}={value}" for name, value in values.items()} <= set(words)
    assert not (tmp_path / "broken").exists()


def test_no_line_of_a_text_ends_its_here_document(tmp_path):
    text = "a\nESTIBA_FILE\n$HOME `date`\nESTIBA_FILE_\nend\n"
    script = here_document(work_path(tmp_path / "it's here"), text)
    assert subprocess.run(["sh"], input=script + "\n", text=True, check=False).returncode == 0
    assert (tmp_path / "it's here").read_text() == text


@pytest.mark.parametrize("target", ["local", HOST])
def test_the_script_of_a_sharded_cluster_on_s3_parses(good, target):
    good["ResourceConfig"]["InstanceCount"] = 2
    good["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3DataDistributionType"] = "ShardedByS3Key"
    options = SubmitOptions(host=HostOptions(gpus="all", gpus_if_any=True, env_file="a b"))
    script = operations.prepare(jobfile.check(Path("job.yaml"), good, registry.parse(target)), options).render()
    assert "s3://bucket/data" in script and "s3://bucket/checkpoints" in script
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize("target", ["local", HOST])
def test_more_hosts_than_a_network_has_addresses_are_refused(good, target):
    def prepared() -> str:
        job = jobfile.check(Path("job.yaml"), good, registry.parse(target))
        return operations.prepare(job, SubmitOptions()).render()

    good["ResourceConfig"]["InstanceCount"] = 253
    assert "+ 254))" in prepared()
    good["ResourceConfig"]["InstanceCount"] = 254
    with pytest.raises(LaunchError, match=r"254 hosts, but .* use at most 253, or the target sagemaker, k8s or slurm"):
        prepared()


# ---- the three targets


class RemoteEngine:
    """A remote host with a `docker` that notes how it was called and what it was given."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ssh = FakeSsh(tmp_path / "remote", monkeypatch)
        self.log = tmp_path / "docker.log"
        self.absent, self.loaded = tmp_path / "absent", tmp_path / "loaded"
        self.fail_run(False)
        self.ssh.tool("nvidia-smi", "#!/bin/sh\nexit 1\n")

    def fail_run(self, fails: bool) -> None:
        self.ssh.tool(
            "docker",
            f'#!/bin/sh\necho "$@" >> {self.log}\ncase "$1 $2" in\n'
            f"run*) cat >> {self.log}; exit {int(fails)} ;;\n"
            f'"image inspect") [ ! -e {self.absent} ] || exit 1; printf \'%s\' \'[{{"Id": "sha256:1"}}]\' ;;\n'
            f'"network inspect") echo 10.0.0.0/24 ;;\ninspect*) exit 1 ;;\nload*) cat > {self.loaded} ;;\nesac\n',
        )

    def gpu(self) -> None:
        self.ssh.tool("nvidia-smi", "#!/bin/sh\nexit 0\n")
        self.ssh.tool("nvidia-container-runtime-hook", "#!/bin/sh\nexit 0\n")

    @property
    def runs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("run ")]


@pytest.fixture
def remote(ssh_client, tmp_path, monkeypatch) -> RemoteEngine:
    # The image is on the remote host, and not here.
    monkeypatch.setattr("estiba_launch.targets.ssh.provision.local_image", lambda _: None)
    # The watcher would wait for containers that never end.
    made = RemoteEngine(tmp_path, monkeypatch)
    made.ssh.tool("setsid", "#!/bin/sh\nexit 0\n")
    return made


def estiba(*words: str) -> Any:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.stderr + done.stdout
    return done


def test_plan_prints_the_script_that_run_executes_on_a_remote_host(remote, good, tmp_path):
    job = str(write_job(tmp_path, good))
    printed = estiba("plan", job, "--target", HOST).stdout
    estiba("run", job, "--target", HOST, "--yes", "--detach")
    executed = (remote.ssh.home / "estiba/jobs/embed-1/start.sh").read_text()
    assert printed == executed
    assert "sh estiba/jobs/embed-1/start.sh start" in remote.ssh.calls
    assert json.loads(estiba("plan", job, "--target", HOST, "--json").stdout)["script"] == executed


@pytest.mark.parametrize("gpu", [False, True])
def test_the_script_finds_out_on_the_host_whether_there_are_gpus(remote, good, tmp_path, gpu):
    if gpu:
        remote.gpu()
    estiba("run", str(write_job(tmp_path, good)), "--target", HOST, "--yes", "--detach")
    (run,) = remote.runs
    assert ("--gpus all" in run) is gpu
    assert "$gpus" in (remote.ssh.home / "estiba/jobs/embed-1/start.sh").read_text()


def test_secrets_reach_docker_through_stdin_and_are_in_no_script(remote, good, tmp_path):
    (tmp_path / "token.env").write_text(f"HUB_TOKEN={SECRET}\n")
    job = str(write_job(tmp_path, good))
    printed = estiba("plan", job, "--target", HOST, "--env-file", "token.env").stdout
    estiba("run", job, "--target", HOST, "--yes", "--detach", "--env-file", "token.env")
    assert SECRET not in printed and SECRET not in "".join(remote.runs)
    assert f"HUB_TOKEN={SECRET}" in remote.log.read_text().splitlines()
    for path in remote.ssh.home.rglob("*"):
        assert not path.is_file() or SECRET not in path.read_text(), path
    assert (remote.ssh.home / "estiba/jobs/embed-1/had-secrets").exists()


def test_a_start_that_fails_removes_containers_which_hold_secrets(remote, good, tmp_path):
    remote.fail_run(True)
    done = CliRunner().invoke(app, ["run", str(write_job(tmp_path, good)), "--target", HOST, "--yes", "--detach"])
    assert done.exit_code == 1
    calls = remote.log.read_text().splitlines()
    started = next(index for index, line in enumerate(calls) if line.startswith("run "))
    # By the script itself, before it returned.
    assert calls[started + 2 :][:2] == ["rm --force embed-1 embed-1-sync", "network rm estiba-embed-1"]
    assert operations.status("embed-1").status == "Failed"


def test_a_second_start_by_hand_leaves_the_running_job_alone(remote, good, tmp_path):
    estiba("run", str(write_job(tmp_path, good)), "--target", HOST, "--yes", "--detach")
    remote.log.unlink()
    remote.ssh.tool("docker", f'#!/bin/sh\necho "$@" >> {remote.log}\n[ "$1" != network ]\n')
    work = remote.ssh.home / "estiba/jobs/embed-1"
    env = {"HOME": str(remote.ssh.home), "PATH": f"{remote.ssh.bin}:/usr/bin:/bin"}
    done = subprocess.run(["sh", str(work / "start.sh"), "start"], env=env, input="", text=True, check=False)
    assert done.returncode != 0
    assert "rm --force" not in remote.log.read_text()


def by_hand(remote, job: str, tmp_path: Path, *words: str, here: str = "exit 1") -> subprocess.CompletedProcess[str]:
    """Run the printed script. `here` is what this machine's docker does."""
    (tmp_path / "here").mkdir(exist_ok=True)
    (tmp_path / "here/docker").write_text(f"#!/bin/sh\n{here}\n")
    (tmp_path / "here/docker").chmod(0o755)
    (tmp_path / "job.sh").write_text(estiba("plan", job, "--target", HOST, *words).stdout)
    env = {"PATH": f"{tmp_path}/here:{os.environ['PATH']}", "HOME": str(remote.ssh.home)}
    env["ESTIBA_SSH"] = str(tmp_path / "remote/ssh")
    return subprocess.run(["sh", "job.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)


def files_of(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_script_run_by_hand_sends_the_data_and_starts_the_same_job(remote, good, tmp_path):
    data = tmp_path / "my: data"
    for name in ("folder/a", "folder/b/c", "one.csv", "one.csv.old", "tr-1", "train/x"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-1").write_text("1")
    job = str(write_job(tmp_path, good))
    good["InputDataConfig"] = [
        {
            "ChannelName": name,
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"file://{data}/{key}"}},
        }
        for name, key in (("folder", "folder"), ("one", "one.csv"), ("start", "tr"))
    ]
    good["ResourceConfig"]["InstanceCount"] = 2
    Path(job).write_text(json.dumps(good))
    estiba("run", job, "--target", HOST, "--yes", "--detach")
    work = remote.ssh.home / "estiba/jobs/embed-1"
    by_run, runs = files_of(work), remote.runs
    subprocess.run(["rm", "-r", str(remote.ssh.home / "estiba"), str(remote.log)], check=True)
    done = by_hand(remote, job, tmp_path)
    assert done.returncode == 0, done.stderr
    assert remote.runs == runs
    seen = files_of(work)
    # The time of the start is in it.
    assert seen.pop("deadline") and by_run.pop("deadline")
    assert seen == by_run
    assert {
        "data/one/one.csv",
        "data/start/train/x",
        "data/start/tr-1",
        "data/folder/b/c",
        "checkpoints/step-1",
    } <= set(by_run)
    assert "data/one/one.csv.old" not in by_run


def test_a_missing_input_ends_the_script_before_anything_starts(remote, good, tmp_path):
    job = str(write_job(tmp_path, good))
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "job.sh").write_text(CliRunner().invoke(app, ["plan", job, "--target", HOST]).stdout)
    env = {"PATH": os.environ["PATH"], "HOME": str(remote.ssh.home), "ESTIBA_SSH": str(tmp_path / "remote/ssh")}
    done = subprocess.run(["sh", "job.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and str(tmp_path / "data") in done.stderr
    assert not any(line.startswith("run ") for line in remote.log.read_text().splitlines())


SENDS = """case "$1" in image) echo here ;; save) echo saved ;; esac"""
OURS, THEIRS = "estiba/embed:local", "registry.example/embed:1"


@pytest.mark.parametrize(
    ("image", "there", "here", "pulled", "sent"),
    [
        (OURS, True, "exit 1", False, False),
        (OURS, True, SENDS, False, True),
        (OURS, False, SENDS, False, True),
        (THEIRS, True, "exit 1", False, False),
        (THEIRS, False, "exit 1", True, False),
    ],
)
def test_the_script_pulls_only_a_name_with_a_registry_that_is_not_there(
    image, there, here, pulled, sent, remote, good, tmp_path
):
    good["AlgorithmSpecification"]["TrainingImage"] = image
    if not there:
        remote.absent.touch()
    done = by_hand(remote, str(write_job(tmp_path, good)), tmp_path, here=here)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("pull ") for line in remote.log.read_text().splitlines()) is pulled
    assert remote.loaded.exists() is sent


def test_an_image_that_is_nowhere_and_names_no_registry_is_not_looked_for_on_docker_hub(remote, good, tmp_path):
    good["AlgorithmSpecification"]["TrainingImage"] = OURS
    remote.absent.touch()
    job = str(write_job(tmp_path, good))
    done = by_hand(remote, job, tmp_path)
    assert done.returncode == 1 and "names no registry" in done.stderr and "docker.io/" in done.stderr
    run = CliRunner().invoke(app, ["run", job, "--target", HOST, "--yes", "--detach"])
    assert run.exit_code == 1 and "names no registry" in run.stderr and "docker.io/" in run.stderr
    assert "pull" not in remote.log.read_text()


def test_gpus_that_the_host_lacks_end_the_script_before_a_container_starts(remote, good, tmp_path):
    done = by_hand(remote, str(write_job(tmp_path, good)), tmp_path, "--gpus", "1")
    assert done.returncode == 1 and "--gpus 1: this host has no GPU" in done.stderr
    assert remote.runs == []


def test_a_job_that_was_started_by_hand_is_known_to_status_and_list(remote, good, tmp_path):
    done = by_hand(remote, str(write_job(tmp_path, good)), tmp_path)
    assert f"estiba status embed-1 --target {HOST}" in done.stderr
    assert "embed-1" in estiba("list", "--target", HOST).stdout
    assert "embed-1: InProgress" in estiba("status", "embed-1", "--target", HOST).stdout
    # Recorded now, so every command knows it.
    assert str(registry.target_of_job("embed-1")) == HOST
    assert operations.status("embed-1").document["ResourceConfig"] == good["ResourceConfig"]
    missing = CliRunner().invoke(app, ["status", "embed-2", "--target", HOST])
    assert missing.exit_code == 2 and "embed-2: no such job on" in missing.stderr


def test_the_request_that_is_printed_is_the_one_that_sagemaker_is_sent(good, monkeypatch):
    job = jobfile.check(Path("job.yaml"), good, registry.parse("sagemaker"))
    submission = operations.prepare(job)
    sent: list[dict[str, Any]] = []

    class SageMaker:
        def create_training_job(self, **request: Any) -> dict[str, str]:
            sent.append(request)
            return {"TrainingJobArn": "arn"}

    made = client.Clients(region="us-east-1", sagemaker=SageMaker(), logs=None, iam=None)
    monkeypatch.setattr(client, "connect", lambda _=None: made)
    operations.start(submission)
    assert json.loads(submission.render()) == sent[0] == submission.to_json()["request"]
