"""`estiba doctor`: each check's verdicts, and that nothing it asks can make it hang."""

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
from botocore.stub import Stubber
from moto import mock_aws
from typer.testing import CliRunner

from estiba_launch import cuda, doctor
from estiba_launch.check import Check, worst
from estiba_launch.cli import app
from estiba_launch.sagemaker import ready

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


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


def driver(version: str, carries: str, brand: str = "Tesla") -> cuda.Driver:
    found = cuda.read_driver(SMI.format(driver=version, cuda=carries, brand=brand))
    assert found
    return found


def test_a_driver_is_read_from_nvidia_smi():
    found = driver("550.54.15", "12.4")
    assert (found.version, found.cuda, found.brand) == ("550.54.15", "12.4", "tesla")
    assert found.gpus == ("NVIDIA A100-SXM4-80GB",) * 2
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
def test_an_image_is_held_against_the_driver(settings, on, status):
    check = cuda.verdict("some/image:1", settings, on)
    assert check.status == status, check
    assert (status == "ok") == (check.remedy == "")


def test_environment_and_labels_of_an_image_are_read():
    inspected = {"Config": {"Env": ["CUDA_VERSION=12.4.1", "A=b=c"], "Labels": {"x": "y"}}}
    assert cuda.settings_of(inspected) == {"CUDA_VERSION": "12.4.1", "A": "b=c", "x": "y"}
    assert cuda.settings_of({"Config": {"Env": None, "Labels": None}}) == {}


def test_a_broken_nvidia_smi_is_a_warning_not_an_end(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\necho "couldn\'t communicate with the NVIDIA driver"; exit 9\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = cuda.driver()
    assert isinstance(found, Check)
    assert found.status == "warn"
    assert "communicate" in found.seen


class Dated(http.server.BaseHTTPRequestHandler):
    """Answers every question with 403 and a date, as AWS does to strangers."""

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


def test_the_clock_is_read_off_a_refusal_too(dated):
    assert ready.clock(dated).status == "ok"
    late = ready.clock(dated, now=lambda: time.time() - 600)
    assert late.status == "fail"
    assert "timedatectl" in late.remedy
    assert ready.clock("http://127.0.0.1:9/").status == "unknown"


def quotas(*answers: dict[str, Any]) -> Any:
    made = boto3.client("service-quotas", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    stub = Stubber(made)
    for answer in answers:
        if "code" in answer:
            stub.add_client_error("list_service_quotas", answer["code"])
        else:
            stub.add_response("list_service_quotas", answer)
    stub.activate()
    return made


def page(name: str, value: float, token: str | None = None) -> dict[str, Any]:
    return {"Quotas": [{"QuotaName": name, "Value": value}], **({"NextToken": token} if token else {})}


def test_the_quota_of_the_instance_type_is_found_on_any_page():
    name = "ml.g4dn.xlarge for spot training job usage"
    other = page("ml.g4dn.xlarge for training job usage", 9.0, "more")
    assert ready.quota("ml.g4dn.xlarge", 1, True, quotas(other, page(name, 1.0))).status == "ok"
    short = ready.quota("ml.g4dn.xlarge", 2, True, quotas(other, page(name, 0.0)))
    assert short.status == "fail"
    assert name in short.remedy
    assert ready.quota("ml.x.large", 2, True, quotas(page("y", 1.0))).status == "unknown"
    denied = ready.quota("ml.g4dn.xlarge", 1, True, quotas({"code": "AccessDeniedException"}))
    assert denied.status == "unknown"
    assert "servicequotas:ListServiceQuotas" in denied.remedy


def test_login_and_role_against_moto(monkeypatch, dated):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setattr(ready, "endpoint", lambda _: dated)
    with mock_aws():
        trust = {"Statement": {"Effect": "Allow", "Principal": {"Service": ["sagemaker.amazonaws.com"]}}}
        iam = boto3.client("iam", region_name="us-east-1")
        iam.create_role(RoleName="Good", AssumeRolePolicyDocument=json.dumps(trust))
        iam.create_role(RoleName="Other", AssumeRolePolicyDocument=json.dumps({"Statement": []}))
        seen = {}
        for role in ("Good", "Other", "Nobody"):
            about = doctor.Subject(role=role, region="us-east-1")
            seen[role] = {check.name: check for check in ready.checks(about, network=True)}
    assert [seen[role]["aws role"].status for role in seen] == ["ok", "fail", "fail"]
    assert seen["Good"]["aws credentials"].status == "ok"
    assert seen["Good"]["clock"].status == "ok"


def test_a_check_that_hangs_is_given_up_and_the_others_are_told(monkeypatch):
    def hang() -> Iterator[Check]:
        time.sleep(60)
        yield Check(name="docker", status="ok", seen="")

    monkeypatch.setattr(doctor, "CHECK_S", 0.3)
    monkeypatch.setattr(doctor, "docker", hang)
    started = time.monotonic()
    found = {check.name: check for check in doctor.run(network=False)}
    assert time.monotonic() - started < 20
    assert found["docker"].status == "unknown"
    assert "no answer" in found["docker"].seen
    assert found["python"].status == "ok"


def test_a_check_that_breaks_is_unknown_not_a_traceback(monkeypatch):
    def broken() -> Check:
        raise RuntimeError("odd machine")

    monkeypatch.setattr(doctor, "disk", broken)
    found = {check.name: check for check in doctor.run(network=False)}
    assert found["disk"].status == "unknown"
    assert "odd machine" in found["disk"].seen


def test_with_a_job_its_image_is_looked_at_and_json_is_one_document(monkeypatch):
    done = CliRunner().invoke(app, ["doctor", EMBED, "--offline", "--json", "--set", "IMAGE=nowhere.example/embed:1"])
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["image"]["status"] == "warn"
    assert "docker login nowhere.example" in found["image"]["remedy"]
    assert {check["status"] for check in found.values()} <= {"ok", "warn", "fail", "unknown"}


def test_an_ecr_image_is_logged_in_to_by_the_aws_command():
    image = "210987654321.dkr.ecr.eu-west-1.amazonaws.com/estiba/embed:1"
    check = doctor.registry(image, network=False)
    assert "aws ecr get-login-password --region eu-west-1" in check.remedy


def test_the_gravest_status_decides():
    made = [Check(name=status, status=status, seen="") for status in ("ok", "unknown", "warn", "fail")]
    assert [worst(made[: n + 1]) for n in range(4)] == ["ok", "unknown", "warn", "fail"]
    assert worst([]) == "ok"
