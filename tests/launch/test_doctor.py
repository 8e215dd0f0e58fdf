"""`estiba doctor`: the status of each check, and that none can make it hang."""

from __future__ import annotations

import email.utils
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.doctor import cuda, doctor, machine
from estiba_launch.jobs.check import Check, Requirements, worst
from estiba_launch.targets.sagemaker import ready

EMBED = str(Path(__file__).parents[2] / "images/embed/job.yaml")
SMI = """
==============NVSMI LOG==============
Driver Version                            : {driver}
CUDA Version                              : {cuda}
Attached GPUs                             : 2
GPU 00000000:00:1E.0
    Product Name                          : NVIDIA A100-SXM4-80GB
    Product Brand                         : {brand}
GPU 00000000:00:1F.0
    Product Name                          : NVIDIA A100-SXM4-80GB
    Product Brand                         : {brand}
"""
REQUIRE = "cuda>=12.4 brand=tesla,driver>=470,driver<471 brand=tesla,driver>=535,driver<536"


pytestmark = pytest.mark.usefixtures("no_account")


def driver(version: str, cuda_version: str, brand: str = "Tesla") -> cuda.Driver:
    parsed = cuda.read_driver(SMI.format(driver=version, cuda=cuda_version, brand=brand))
    assert parsed
    return parsed


def test_a_driver_is_read_from_nvidia_smi():
    parsed = driver("550.54.15", "12.4")
    assert (parsed.version, parsed.cuda, parsed.brand) == ("550.54.15", "12.4", "tesla")
    assert parsed.gpus == ("NVIDIA A100-SXM4-80GB",) * 2
    assert cuda.read_driver("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.") is None


@pytest.mark.parametrize(
    ("settings", "on", "status"),
    [
        ({"NVIDIA_REQUIRE_CUDA": REQUIRE}, driver("550.54.15", "12.4"), "ok"),
        ({"NVIDIA_REQUIRE_CUDA": REQUIRE}, driver("535.183.01", "12.2"), "ok"),  # the third alternative
        ({"NVIDIA_REQUIRE_CUDA": REQUIRE}, driver("535.183.01", "12.2", "GeForce"), "warn"),
        ({"NVIDIA_REQUIRE_CUDA": REQUIRE}, driver("520.61.05", "11.8"), "fail"),
        ({"CUDA_VERSION": "13.0.1"}, driver("580.65.06", "13.0"), "ok"),
        ({"CUDA_VERSION": "13.0.1"}, driver("550.54.15", "12.4"), "fail"),
        ({"CUDA_VERSION": "12.8.0"}, driver("550.54.15", "12.4"), "warn"),
        ({"com.nvidia.cuda.version": "12.1"}, driver("550.54.15", "12.4"), "ok"),
        ({}, driver("550.54.15", "12.4"), "ok"),
    ],
)
def test_an_image_is_compared_with_the_driver(settings, on, status):
    check = cuda.compatibility("some/image:1", settings, on)
    assert check.status == status, check
    assert (status == "ok") == (check.remedy == "")


def test_environment_and_labels_of_an_image_are_read():
    inspected = {"Config": {"Env": ["CUDA_VERSION=12.4.1", "A=b=c"], "Labels": {"x": "y"}}}
    assert cuda.settings_of(inspected) == {"CUDA_VERSION": "12.4.1", "A": "b=c", "x": "y"}
    assert cuda.settings_of({"Config": {"Env": None, "Labels": None}}) == {}


def test_a_broken_nvidia_smi_is_a_warning(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\necho "couldn\'t communicate with the NVIDIA driver"; exit 9\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    check = cuda.find_driver()
    assert isinstance(check, Check)
    assert check.status == "warn"
    assert "communicate" in check.seen


class Dated(http.server.BaseHTTPRequestHandler):
    """Answers every request with 403 and a date, as AWS does without credentials."""

    skew_s = 0.0

    def do_HEAD(self) -> None:
        self.send_response_only(403)
        self.send_header("Date", email.utils.formatdate(time.time() + self.skew_s, usegmt=True))
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def dated() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Dated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_the_clock_is_checked_even_when_access_is_denied(dated):
    assert ready.clock(dated).status == "ok"
    late = ready.clock(dated, now=lambda: time.time() - 600)
    assert late.status == "fail"
    assert "timedatectl" in late.remedy
    assert ready.clock("http://127.0.0.1:9/").status == "unknown"


def test_login_and_role_against_moto(monkeypatch, dated):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setattr(ready, "endpoint", lambda _: dated)
    with mock_aws():
        trust = {"Statement": {"Effect": "Allow", "Principal": {"Service": ["sagemaker.amazonaws.com"]}}}
        iam = boto3.client("iam", region_name="us-east-1")
        iam.create_role(RoleName="Good", AssumeRolePolicyDocument=json.dumps(trust))
        iam.create_role(RoleName="Other", AssumeRolePolicyDocument=json.dumps({"Statement": []}))
        by_role = {}
        for role in ("Good", "Other", "Nobody"):
            needs = Requirements(role=role, region="us-east-1")
            by_role[role] = {check.name: check for check in ready.checks(needs, network=True)}
    assert [by_role[role]["aws role"].status for role in by_role] == ["ok", "fail", "fail"]
    assert by_role["Good"]["aws credentials"].status == "ok"
    assert by_role["Good"]["clock"].status == "ok"


def test_a_hanging_check_times_out_and_the_others_are_reported(monkeypatch):
    def hang() -> Iterator[Check]:
        time.sleep(60)
        yield Check(name="docker", status="ok", seen="")

    monkeypatch.setattr(doctor, "CHECK_S", 0.3)
    monkeypatch.setattr(machine, "docker", hang)
    started = time.monotonic()
    checks = {check.name: check for check in doctor.run(network=False)}
    assert time.monotonic() - started < 20
    assert checks["docker"].status == "unknown"
    assert "no answer" in checks["docker"].seen
    assert checks["python"].status == "ok"


def test_a_check_that_raises_is_unknown(monkeypatch):
    def broken() -> Check:
        raise RuntimeError("odd machine")

    monkeypatch.setattr(machine, "disk", broken)
    checks = {check.name: check for check in doctor.run(network=False)}
    assert checks["disk"].status == "unknown"
    assert "odd machine" in checks["disk"].seen


def test_doctor_checks_a_jobs_image_and_prints_one_json_document(monkeypatch):
    done = CliRunner().invoke(app, ["doctor", EMBED, "--offline", "--json", "--set", "IMAGE=nowhere.example/embed:1"])
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["image"]["status"] == "warn"
    assert "docker login nowhere.example" in checks["image"]["remedy"]
    assert {check["status"] for check in checks.values()} <= {"ok", "warn", "fail", "unknown"}


def test_the_remedy_for_an_ecr_image_is_the_aws_login_command():
    image = "210987654321.dkr.ecr.eu-west-1.amazonaws.com/estiba/embed:1"
    check = machine.image(image, network=False)
    assert "aws ecr get-login-password --region eu-west-1" in check.remedy


def test_the_worst_status_counts():
    checks = [Check(name=status, status=status, seen="") for status in ("ok", "unknown", "warn", "fail")]
    assert [worst(checks[: n + 1]) for n in range(4)] == ["ok", "unknown", "warn", "fail"]
    assert worst([]) == "ok"
