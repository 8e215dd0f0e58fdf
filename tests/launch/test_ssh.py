"""The ssh target against a machine of its own: a Debian container with sshd and an engine (tests/remote_host.py)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.errors import LaunchError
from estiba_launch.jobs import directory as state
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile
from estiba_launch.request.options import HostOptions
from estiba_launch.targets import operations as jobs
from estiba_launch.targets import registry
from estiba_launch.targets.ssh import bootstrap, provision
from estiba_launch.targets.ssh.connection import HostUnreachable, RemoteHost
from estiba_launch.targets.ssh.target import check_gpus
from ssh_job import IMAGE

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]  # the first test waits for a machine with an engine


def test_a_job_sees_its_contract_and_its_files_come_back(work, remote, tmp_path):
    (tmp_path / "checkpoints/old").write_text("5")
    value = work.run(
        "cd /opt/ml; cat input/config/hyperparameters.json; cat input/data/data/a.txt 'input/data/data/sub/b c.txt'\n"
        "echo colour=$COLOUR host=$(hostname) job=$TRAINING_JOB_NAME old=$(cat checkpoints/old) loss=0.25\n"
        "touch input/data/data/x 2>/dev/null || echo read-only; echo 6 > checkpoints/new\n"
        "mkdir -p model/deep; echo weights > model/deep/w; echo result > output/data/r\n"
        "umask 077; echo s > output/data/s\n"
    )
    name = value["TrainingJobName"]
    log = "\n".join(value["log"])
    assert value["TrainingJobStatus"] == "Completed", (value, log)
    assert "it's $HOME" in log and "hola" in log and "mundo" in log
    assert f"colour=blue green host=algo-1 job={name} old=5" in log
    assert "read-only" in log
    assert [(m["MetricName"], m["Value"]) for m in value["FinalMetricDataList"]] == [("loss", 0.25)]
    assert jobs.download(name, tmp_path / "got") == {"model": 1, "output": 2}
    assert (tmp_path / "got/model/deep/w").read_text() == "weights\n"
    assert (tmp_path / "got/output/s").read_text() == "s\n"
    assert (tmp_path / "checkpoints/new").read_text() == "6\n"
    assert (state.job_dir(name) / "job.log").read_text().splitlines() == value["log"]


def test_links_that_a_job_left_are_fetched_as_what_they_led_to_or_named(work, tmp_path, caplog):
    value = work.run(
        "mkdir -p /opt/ml/model/step-2 /opt/ml/checkpoints/step-2; cd /opt/ml/model\n"
        "echo two > step-2/weights; echo best > /opt/ml/checkpoints/step-2/best; echo gone > /tmp/gone\n"
        "ln -s step-2 latest; ln -s /opt/ml/model/step-2/weights last.ckpt; ln -s ../latest/weights step-2/up\n"
        "ln -s /opt/ml/checkpoints/step-2 best; ln -s /opt/ml/input/data/data/a.txt input; ln -s /tmp/gone tmp\n"
        "ln -s /etc/passwd passwd; ln -s .. step-2/around; cd /opt/ml/checkpoints; ln -s step-2 latest; ln -s no no\n"
        "ln -s .. step-2/around"
    )
    assert value["TrainingJobStatus"] == "Completed", value
    for _ in range(2):
        caplog.clear()
        jobs.download(value["TrainingJobName"], tmp_path / "got")
        model = tmp_path / "got" / "model"
        for name in ("step-2/weights", "latest/weights", "last.ckpt", "step-2/up"):
            assert (model / name).read_text() == "two\n", name
        assert os.readlink(model / "last.ckpt") == "step-2/weights"
        assert (model / "best" / "best").read_text() == "best\n"
        assert not (model / "best").is_symlink()
        assert (model / "input").read_text() == "hola\n"
        assert not (model / "passwd").exists() and not (model / "tmp").exists()
        assert (tmp_path / "checkpoints/latest/best").read_text() == "best\n"
        assert not (tmp_path / "checkpoints/latest").is_symlink()
        named = {message.split()[1].removeprefix("/opt/ml/") for message in caplog.messages}
        assert named >= {"checkpoints/no", "checkpoints/step-2/around", "model/passwd", "model/tmp"}


def test_the_command_runs_follows_and_fetches_with_the_same_line_as_elsewhere(work, remote, tmp_path):
    request = work.request("echo uno; sleep 1; echo dos; echo out > /opt/ml/output/data/o")
    name = request["TrainingJobName"]
    (tmp_path / "job.yaml").write_text(json.dumps(request))
    done = CliRunner().invoke(app, ["run", "job.yaml", "--target", remote.target, "--yes"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == ["uno", "dos"]
    assert f"estiba fetch {name}" in done.stderr
    assert "Completed" in CliRunner().invoke(app, ["status", name]).stdout
    assert name in CliRunner().invoke(app, ["list"]).stdout
    assert CliRunner().invoke(app, ["logs", name]).stdout.splitlines() == ["uno", "dos"]
    assert CliRunner().invoke(app, ["fetch", name, "--into", "got"]).exit_code == 0
    assert (tmp_path / "got/output/o").read_text() == "out\n"


def test_a_job_that_fails_says_why_and_exits_1(work, remote, tmp_path):
    request = work.request("echo 'no column texto' > /opt/ml/output/failure; exit 3")
    (tmp_path / "job.yaml").write_text(json.dumps(request))
    done = CliRunner().invoke(app, ["run", "job.yaml", "--target", remote.target, "--yes"])
    assert done.exit_code == 1, done.stderr
    assert "no column texto" in done.stderr


def test_stop_sends_term_and_what_the_job_saves_then_is_there(work, tmp_path):
    name = work.start(
        "trap 'echo saved > /opt/ml/model/m; echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    )
    work.wait_for(name, "up")
    jobs.stop(name)
    value = jobs.wait(name, 30).to_json()
    assert (value["TrainingJobStatus"], value["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert "bye" in list(jobs.log_lines(name, follow=False))
    jobs.download(name, tmp_path / "got")
    assert (tmp_path / "got/model/m").read_text() == "saved\n"
    with pytest.raises(LaunchError, match="already ended"):
        jobs.stop(name)


def test_the_host_itself_ends_a_job_at_its_time_limit(work):
    value = work.run(
        "trap 'exit 0' TERM; while :; do sleep 0.1; done",
        StoppingCondition={"MaxRuntimeInSeconds": 3, "MaxWaitTimeInSeconds": 9},
    )
    assert (value["TrainingJobStatus"], value["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")


def test_hosts_of_one_machine_find_each_other_and_get_their_share(work, tmp_path):
    value = work.run(
        "until getent hosts algo-2 >/dev/null; do sleep 0.1; done\n"
        "echo $(hostname) sees $(getent hosts algo-2 | wc -l) and $(find /opt/ml/input/data/data -type f)\n"
        "echo $(hostname) > /opt/ml/model/$(hostname); echo $(hostname) > /opt/ml/model/both",
        ResourceConfig={"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 1},
    )
    assert value["TrainingJobStatus"] == "Completed", value
    log = sorted(value["log"])
    assert log == [
        "[algo-1] algo-1 sees 1 and /opt/ml/input/data/data/a.txt",
        "[algo-2] algo-2 sees 1 and /opt/ml/input/data/data/sub/b c.txt",
    ]
    assert jobs.download(value["TrainingJobName"], tmp_path / "got")["model"] == 3
    assert (tmp_path / "got/model/both").read_text() == "algo-1\n"


def test_a_second_job_sends_only_what_changed_and_the_first_keeps_its_own(work, remote):
    first = work.run("cat /opt/ml/input/data/data/a.txt")
    (work.tmp / "data/a.txt").write_text("otra\n")
    second = work.run("cat /opt/ml/input/data/data/a.txt")
    assert (first["log"], second["log"]) == (["hola"], ["otra"])
    folders = [f"{remote.job_folder(v['TrainingJobName'])}/data/data" for v in (first, second)]
    assert remote.sh(f"cat {folders[0]}/a.txt") == "hola\n"
    unchanged = remote.sh("stat -c %i " + " ".join(f"'{folder}/sub/b c.txt'" for folder in folders)).split()
    assert unchanged[0] == unchanged[1]


def test_the_printed_script_starts_the_job_by_hand(work, remote, tmp_path):
    (tmp_path / "job.yaml").write_text(
        json.dumps(work.request("cat /opt/ml/input/data/data/a.txt; echo $HUB_TOKEN | wc -c"))
    )
    (tmp_path / "token.env").write_text("HUB_TOKEN=12345678\n")
    words = ["plan", "job.yaml", "--target", remote.target, "--env-file", "token.env"]
    (tmp_path / "job.sh").write_text(CliRunner().invoke(app, words).stdout)
    done = subprocess.run(["sh", "job.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["hola", "9"]
    name = json.loads((tmp_path / "job.yaml").read_text())["TrainingJobName"]
    folder = remote.job_folder(name)
    assert " exited 0 " in remote.sh(f"until [ -e {folder}/end ]; do sleep 0.1; done; cat {folder}/end")
    assert remote.containers(name) == []


def test_a_watcher_that_died_is_started_again_by_who_waits(work, remote):
    name = work.start("echo up; sleep 4")
    work.wait_for(name, "up")
    folder = remote.job_folder(name)
    remote.sh(f"pkill -KILL -f '{folder}/[w]atch.sh'")
    remote.sh(f"until flock --nonblock {folder}/watch.lock true; do sleep 0.1; done")
    assert jobs.status(name).is_orphaned
    assert jobs.wait(name, 60).status == "Completed"


def test_secrets_reach_the_container_and_stay_nowhere_on_the_host(work, remote, tmp_path):
    secret = "s3cr3t-value-of-a-token"
    (tmp_path / "token.env").write_text(f"HUB_TOKEN={secret}\n")
    name = work.start(
        '[ -n "$HUB_TOKEN" ] && echo length=${#HUB_TOKEN}', HostOptions(env_file=str(tmp_path / "token.env"))
    )
    value = jobs.wait(name, 60).to_json()
    assert list(jobs.log_lines(name, follow=False)) == [f"length={len(secret)}"], value
    for path in state.job_dir(name).rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes().decode("utf-8", "replace"), path
    # Docker keeps the environment with the container, so the container is gone.
    assert remote.containers(name) == []
    assert remote.sh(f"grep -rl {secret} ~user /tmp /var/lib/docker/containers || :") == ""


def test_an_s3_job_without_credentials_is_refused_before_anything_is_sent(work, remote, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    with pytest.raises(LaunchError, match="no AWS credentials"):
        work.start("true", CheckpointConfig={"S3Uri": "s3://bucket/checkpoints"})
    assert state.job_names() == []


def test_an_image_is_streamed_only_when_the_host_has_another(remote, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(provision, "stream", lambda *words: said.append(f"streamed {words[1]}"))
    there = RemoteHost(registry.parse(remote.target))
    provision.image(there, IMAGE, said.append)
    assert said == [f"{IMAGE}: on the host already"]
    monkeypatch.setattr(provision, "remote_image", lambda *_: {"Id": "sha256:other", "RootFS": {"Layers": ["x"]}})
    provision.image(there, IMAGE, said.append)
    assert said[-1] == f"streamed {IMAGE}"


def test_a_streamed_image_arrives_whole(remote, tmp_path):
    (tmp_path / "hello").write_bytes(os.urandom(3_000_000))
    name = f"estiba-test/stream:{os.getpid()}"
    subprocess.run(f"tar -C {tmp_path} -c hello | docker import - {name}", shell=True, check=True, capture_output=True)
    there, said = RemoteHost(registry.parse(remote.target)), []
    try:
        here = provision.local_image(name)
        provision.stream(there, name, here["Size"], said.append)
        assert provision.same_image(here, provision.remote_image(there, name))
        assert "sending 3 MB" in said[0]
    finally:
        subprocess.run(["docker", "image", "rm", name], check=True, capture_output=True)
        remote.sh(f"docker image rm {name}", check=False)


def test_a_host_that_is_not_there_or_unknown_is_named_with_what_to_try(remote, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(HostUnreachable, match=r"cannot be reached.*refused.*connects without a question"):
            RemoteHost(registry.parse(f"ssh://127.0.0.1:{free.getsockname()[1]}")).run("true")
    monkeypatch.setenv("ESTIBA_SSH", f"ssh -F none -i {remote.folder}/key -o UserKnownHostsFile=/dev/null")
    with pytest.raises(HostUnreachable, match=r"compare the host key"):
        RemoteHost(registry.parse(remote.target)).run("true")


def test_a_broken_connection_costs_no_line_of_the_log(work, remote):
    name = work.start("for i in 1 2 3 4 5 6 7 8; do echo line $i; sleep 0.5; done")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(jobs.log_lines(name, follow=True)))
    reader.start()
    time.sleep(1.5)
    remote.disconnect()
    time.sleep(1)
    remote.connect()
    reader.join(60)
    assert [line for line in lines if line.startswith("line ")] == [f"line {i}" for i in range(1, 9)]
    assert jobs.wait(name, 30).status == "Completed"


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(work, remote, tmp_path):
    request = work.request("echo up; sleep 4; echo end")
    (tmp_path / "job.yaml").write_text(json.dumps(request))
    words = [sys.executable, "-m", "estiba_launch.cli.app", "run", "job.yaml", "--target", remote.target, "--yes"]
    env = {**os.environ, "PYTHONPATH": str(Path(jobfile.__file__).parents[2])}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    assert process.stdout
    first = process.stdout.readline()
    assert first == "up\n", process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 4, said
    assert f"estiba stop {request['TrainingJobName']}" in said and "Traceback" not in said
    assert jobs.wait(request["TrainingJobName"], 30).status == "Completed"


def test_a_gpu_that_is_asked_for_and_not_there_is_refused():
    found = bootstrap.Equipment(docker=True, gpu=False, gpu_in_docker=False, rsync=True)
    said: list[str] = []
    check_gpus(SubmitOptions(host=HostOptions(gpus="all", gpus_if_any=True)), found, said.append)
    assert said == ["the host has no GPU: the job runs on its CPU"]
    with pytest.raises(LaunchError, match="no GPU"):
        check_gpus(SubmitOptions(host=HostOptions(gpus="1")), found, said.append)


def test_the_host_itself_moves_s3_data_and_checkpoints(work, remote, monkeypatch):
    pytest.importorskip("ministack", reason="the S3 test server is not installed: run `make env`")
    from s3server import s3_server

    with s3_server(host=remote.gateway) as s3:
        s3.make_bucket("estiba")
        client = s3.client()
        for key, body in (
            ("in/a.txt", b"hola\n"),
            ("in/deep/b.txt", b"mundo\n"),
            ("ck/old", b"5\n"),
            ("ck/gone", b"x"),
        ):
            client.put_object(Bucket="estiba", Key=key, Body=body)
        for name, value in s3.environ.items():
            monkeypatch.setenv(name, value)
        request = work.request(
            "cat /opt/ml/input/data/far/a.txt /opt/ml/input/data/far/deep/b.txt /opt/ml/checkpoints/old\n"
            '[ -n "$AWS_SECRET_ACCESS_KEY" ] && echo has-login\n'
            "echo 6 > /opt/ml/checkpoints/new; rm /opt/ml/checkpoints/gone; sleep 1",
            CheckpointConfig={"S3Uri": "s3://estiba/ck"},
        )
        source = {"S3DataType": "S3Prefix", "S3Uri": "s3://estiba/in"}
        request["InputDataConfig"].append({"ChannelName": "far", "DataSource": {"S3DataSource": source}})
        job = jobfile.check(work.tmp / "job.yaml", request, registry.parse(remote.target))
        said: list[str] = []
        jobs.start(jobs.prepare(job), said.append)
        name = job.name
        value = jobs.wait(name, 90).to_json()
        assert value["TrainingJobStatus"] == "Completed", value
        assert list(jobs.log_lines(name, follow=False)) == ["hola", "mundo", "5", "has-login"]
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="estiba", Prefix="ck/")["Contents"]]
        assert keys == ["ck/new", "ck/old"]
        secret = s3.environ["AWS_SECRET_ACCESS_KEY"]
        assert remote.containers(name) == []
        assert remote.sh(f"grep -rl {secret} ~user /tmp /var/lib/docker/containers || :") == ""
