"""`estiba doctor` on an AWS account: quotas, the role's rights, buckets, and responses that are not from AWS."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber
from typer.testing import CliRunner

from estiba_launch.cli.app import app
from estiba_launch.doctor import doctor
from estiba_launch.errors import AwsUnavailable, HostError
from estiba_launch.jobs.check import Check, Requirements
from estiba_launch.jobs.s3 import S3Store
from estiba_launch.targets.sagemaker import access, quotas, ready
from estiba_launch.targets.sagemaker.role import arn_of
from estiba_launch.targets.ssh import credentials

pytestmark = pytest.mark.usefixtures("no_account")


def stubbed(service: str) -> tuple[Any, Stubber]:
    """A client whose calls and responses are checked against botocore's service model."""
    client = boto3.client(service, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    stub = Stubber(client)
    stub.activate()
    return client, stub


def quota_page(token: str | None = None, **values: float) -> dict[str, Any]:
    page = [{"QuotaName": name.replace("_", " "), "Value": value} for name, value in values.items()]
    return {"Quotas": page, **({"NextToken": token} if token else {})}


def quota_checks(needs: Requirements, applied: list[dict[str, Any]], defaults: list[dict[str, Any]]) -> list[Check]:
    client, stub = stubbed("service-quotas")
    for answer in applied:
        stub.add_response("list_service_quotas", answer)
    for answer in defaults:
        stub.add_response("list_aws_default_service_quotas", answer)
    checks = list(quotas.checks(needs, client))
    stub.assert_no_pending_responses()
    return checks


G4DN = "ml.g4dn.xlarge"


def test_a_jobs_hosts_are_compared_with_the_quota_on_any_page():
    name = f"{G4DN} for spot training job usage"
    other = quota_page("more", **{f"{G4DN} for training job usage": 9.0})
    needs = Requirements(instances=((G4DN, 1),))
    assert [one.status for one in quota_checks(needs, [other, quota_page(**{name: 1.0})], [])] == ["ok"]
    (short,) = quota_checks(Requirements(instances=((G4DN, 1), (G4DN, 1))), [quota_page(**{name: 1.0})], [])
    assert short.status == "fail" and "the job needs 2" in short.seen and name in short.remedy
    (unknown,) = quota_checks(Requirements(instances=(("ml.x.large", 2),)), [quota_page(y=1.0)], [quota_page(z=1.0)])
    assert unknown.status == "unknown"


@pytest.mark.parametrize(("limit_s", "status"), [(432_000, "ok"), (432_001, "fail")])
def test_the_time_limit_is_compared_with_its_quota_or_the_default_quota(limit_s, status):
    defaults = quota_page(**{"Longest run time for a training job": 432_000.0})
    (check,) = quota_checks(Requirements(max_run_s=limit_s), [quota_page()], [defaults])
    assert check.status == status and f"432000 s, the job needs {limit_s} s" in check.seen
    raised = quota_page(**{"Longest run time for a training job": 2_419_200.0})
    assert quota_checks(Requirements(max_run_s=limit_s), [raised], [])[0].status == "ok"


def test_a_warm_pool_has_its_own_quota():
    needs = Requirements(instances=((G4DN, 2),), spot=False, keep_alive_s=600)
    applied = quota_page(**{f"{G4DN} for training job usage": 2.0, f"{G4DN} for training warm pool usage": 0.0})
    hosts, pool = quota_checks(needs, [applied], [])
    assert (hosts.status, pool.status) == ("ok", "fail")
    assert f"'{G4DN} for training warm pool usage'" in pool.remedy


def test_without_permission_to_read_quotas_the_check_is_unknown_and_names_the_permission():
    client, stub = stubbed("service-quotas")
    stub.add_client_error("list_service_quotas", "AccessDeniedException")
    (denied,) = quotas.checks(Requirements(instances=((G4DN, 1),)), client)
    assert denied.status == "unknown"
    assert "servicequotas:ListServiceQuotas" in denied.remedy


ROLE = "arn:aws:iam::210987654321:role/Train"


def simulated(uri: str, field: str, *denied: str, role: str = ROLE) -> tuple[Check, dict[str, Any]]:
    """The check of one address, with some actions denied, and the parameters sent to AWS."""
    client, stub = stubbed("iam")
    call: dict[str, Any] = {}
    client.meta.events.register("before-parameter-build.iam", lambda params, **_: call.update(params))
    actions = ["s3:GetObject", "s3:ListBucket", "s3:PutObject", "s3:DeleteObject"]
    partition = role.split(":")[1]
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    place = f"arn:{partition}:s3:::{bucket}"
    results = [
        {
            "EvalActionName": action,
            "EvalResourceName": place if action == "s3:ListBucket" else f"{place}/{key}/object",
            "EvalDecision": "implicitDeny" if action in denied else "allowed",
        }
        for action in actions
    ]
    stub.add_response(
        "simulate_principal_policy", {"EvaluationResults": results[:2], "IsTruncated": True, "Marker": "m"}
    )
    stub.add_response("simulate_principal_policy", {"EvaluationResults": results[2:], "IsTruncated": False})
    return access.rights(role, field, uri, client), call


@pytest.mark.parametrize(
    ("field", "needed"),
    [
        ("InputDataConfig[0].DataSource.S3DataSource.S3Uri", {"s3:GetObject", "s3:ListBucket"}),
        ("OutputDataConfig.S3OutputPath", {"s3:PutObject"}),
        ("CheckpointConfig.S3Uri", {"s3:GetObject", "s3:ListBucket", "s3:PutObject", "s3:DeleteObject"}),
    ],
)
def test_the_role_needs_the_right_actions_on_each_address(field, needed):
    good, call = simulated("s3://bucket/some/data", field)
    assert good.status == "ok"
    assert set(call["ActionNames"]) == needed and call["PolicySourceArn"] == ROLE
    assert call["ResourceArns"] == [f"arn:aws:s3:::bucket{end}" for end in ("", "/some/data", "/some/data/object")]
    assert call["ContextEntries"][0]["ContextKeyValues"] == ["some/data"]
    for action in needed:
        bad, _ = simulated("s3://bucket/some/data", field, action)
        assert bad.status == "fail" and action in bad.seen and field in bad.seen and "s3://bucket/some/data" in bad.seen


def test_addresses_are_in_the_roles_partition():
    good, call = simulated("s3://bucket/d", "OutputDataConfig.S3OutputPath", role=ROLE.replace("aws", "aws-cn", 1))
    assert good.status == "ok" and call["ResourceArns"][0] == "arn:aws-cn:s3:::bucket"


def test_without_permission_to_simulate_the_check_is_unknown_and_names_the_permission():
    client, stub = stubbed("iam")
    stub.add_client_error("simulate_principal_policy", "AccessDenied")
    check = access.rights(ROLE, "OutputDataConfig.S3OutputPath", "s3://bucket/out", client)
    assert check.status == "unknown" and "iam:SimulatePrincipalPolicy" in check.remedy


@pytest.mark.parametrize(
    ("bucket_region", "status", "message"),
    [
        ("us-east-1", "ok", "us-east-1"),
        ("eu-west-1", "fail", "--region eu-west-1"),
        (None, "unknown", "unknown region"),
    ],
)
def test_a_bucket_must_be_in_the_jobs_region(bucket_region, status, message):
    client, stub = stubbed("s3")
    stub.add_response("head_bucket", {"BucketRegion": bucket_region} if bucket_region else {}, {"Bucket": "bucket"})
    check = access.bucket("bucket", "us-east-1", client)
    assert check.status == status and message in check.seen + check.remedy


def test_a_denied_bucket_still_has_a_region_and_a_missing_one_fails():
    client, stub = stubbed("s3")
    header = {"HTTPHeaders": {"x-amz-bucket-region": "eu-west-1"}}
    stub.add_client_error("head_bucket", "403", http_status_code=403, response_meta=header)
    assert access.bucket("bucket", "us-east-1", client).status == "fail"
    stub.add_client_error("head_bucket", "404", http_status_code=404)
    assert "no such bucket" in access.bucket("bucket", "us-east-1", client).seen


def test_requirements_are_read_from_a_job_file():
    job = Path(__file__).parents[2] / "images/embed/job.yaml"
    settings = {f"{name}_URI": f"s3://bucket/{name.lower()}" for name in ("DATASET", "MODEL", "OUTPUT", "CHECKPOINT")}
    settings |= {"IMAGE": "210987654321.dkr.ecr.us-east-1.amazonaws.com/embed:1", "ROLE_ARN": ROLE}
    needs = doctor.requirements_of(job, settings, None, None)
    assert (needs.max_run_s, needs.keep_alive_s, needs.instances) == (3600, None, ((G4DN, 1),))
    assert {uri for _, uri in needs.addresses} == {uri for uri in settings.values() if uri.startswith("s3://")}


class Portal(http.server.BaseHTTPRequestHandler):
    """A login page that answers every request in place of AWS."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html><body>Welcome to the hotel<br></body>")

    do_GET = do_HEAD = do_POST

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def portal(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Portal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_unreadable_sts_response_is_one_line_with_a_remedy(portal):
    checks = {one.name: one for one in ready.checks(Requirements(region="us-east-1"), network=True)}
    assert checks["aws credentials"].status == "unknown"
    assert "AWS_ENDPOINT_URL" in checks["aws credentials"].remedy and "\n" not in checks["aws credentials"].seen
    assert "clock" in checks


@pytest.mark.parametrize("words", [["list", "--target", "sagemaker"], ["status", "job", "--target", "sagemaker"]])
def test_a_sagemaker_response_that_is_not_from_aws_is_one_line_with_a_remedy(words, portal, tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_STATE", str(tmp_path))
    done = CliRunner().invoke(app, [*words, "--region", "us-east-1"])
    assert (done.exit_code == 1 and done.exception is None) or isinstance(done.exception, SystemExit)
    assert "something answers in place of AWS" in done.stderr and len(done.stderr.splitlines()) == 1


def test_iam_and_s3_responses_that_are_not_from_aws_are_one_line(portal):
    with pytest.raises(AwsUnavailable, match="something answers in place of AWS"):
        arn_of("Train", "us-east-1")
    with pytest.raises(HostError, match="AWS_ENDPOINT_URL"):
        S3Store("s3://bucket/data", attempts=1).list()


def test_an_unreadable_sts_response_keeps_the_long_lived_keys_for_a_remote_host(portal):
    values, (warning,) = credentials.credentials(3600)
    assert values == {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    assert "long-lived AWS keys" in warning and "\n" not in warning
