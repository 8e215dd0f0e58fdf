"""Prices: dated, with warnings when old, overridden by the user's, refreshed from AWS's public file."""

from __future__ import annotations

import datetime
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.status import JobStatus
from estiba_launch.request import prices
from estiba_launch.targets import registry

HEADER = "SKU,OfferTermCode,RateCode,TermType,PriceDescription,Unit,PricePerUnit,Currency,usageType,Region Code"
OFFER = f""""FormatVersion","v1.0"
"Publication Date","2026-09-30T00:00:00Z"
{HEADER}
A,J,A.J.1,OnDemand,"$1.5 per Hour, training",Hrs,1.5000000000,USD,USE1-Train:ml.g5.xlarge,us-east-1
B,J,B.J.1,OnDemand,x,Hrs,9.0,USD,USE1-Host:ml.g5.xlarge,us-east-1
C,J,C.J.1,Reserved,x,Hrs,8.0,USD,USE1-Train:ml.g5.xlarge,us-east-1
D,J,D.J.1,OnDemand,x,Hrs,7.0,USD,USE1-Train:ml.g5.xlarge-WarmPool,us-east-1
E,J,E.J.1,OnDemand,x,Hrs,0.0,USD,USE1-Train:ml.g5.2xlarge,us-east-1
F,J,F.J.1,OnDemand,x,Hrs,40.5,USD,USE1-Train:ml.p6-b200.48xlarge,us-east-1
"""


@pytest.fixture(autouse=True)
def own_config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "estiba"


@pytest.fixture
def offer_url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/index.csv" else 404)
            self.end_headers()
            self.wfile.write(OFFER.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.csv"
    server.shutdown()
    server.server_close()


def test_the_shipped_table_is_complete():
    table = prices.load()
    assert len(table.instances) == 39
    for one in table.instances.values():
        assert one.usd_per_h > 0
        assert one.vcpus
        assert one.memory_gib
        assert bool(one.gpus) == bool(one.gpu) == bool(one.gpu_memory_mib)
    assert table.get("ml.g4dn.xlarge").usd_per_h == 0.7364
    assert table.get("ml.g5.12xlarge").gpus == 4


def test_a_price_older_than_90_days_has_a_warning():
    table = prices.load()
    day = table.get("ml.g5.xlarge").date
    assert table.warnings(["ml.g5.xlarge"], None, day + datetime.timedelta(days=90)) == []
    (warning,) = table.warnings(["ml.g5.xlarge"], None, day + datetime.timedelta(days=91))
    assert "91 days old" in warning
    assert "prices refresh" in warning


def test_a_price_from_another_region_has_a_warning():
    (warning,) = prices.load().warnings(["ml.g5.xlarge"], "eu-west-1", datetime.date(2026, 10, 1))
    assert "us-east-1, not eu-west-1" in warning


def test_an_unknown_type_is_refused_with_both_remedies():
    with pytest.raises(LaunchError, match=r"ml\.p9\.xlarge.*prices refresh.*prices\.json"):
        prices.load().get("ml.p9.xlarge")


ORIGINALS = {
    *("ml.g4dn.xlarge", "ml.m5.xlarge", "ml.p3.2xlarge", "ml.p4de.24xlarge"),
    *("ml.c5.2xlarge", "ml.g4dn.2xlarge", "ml.g5.2xlarge"),
}
"""Instance types in the guides that Estiba replaces."""


def test_every_instance_type_in_guides_job_files_and_docs_has_a_price():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("images/*/*.md"), *root.glob("images/*/*.yaml")]
    mentioned = {name for page in pages for name in re.findall(r"ml\.[a-z0-9]+\.\d*x?large", page.read_text())}
    assert "ml.g4dn.xlarge" in mentioned
    assert (ORIGINALS | mentioned) - prices.load().instances.keys() == set()


@pytest.mark.parametrize(("target", "usd"), [("local", 0.0), ("sagemaker", None)])
def test_a_job_on_a_type_without_a_price_still_has_a_cost_report(target, usd):
    document = {
        "TrainingJobName": "job",
        "TrainingJobStatus": "Completed",
        "TrainingTimeInSeconds": 100,
        "BillableTimeInSeconds": 40,
        "ResourceConfig": {"InstanceType": "ml.p9.xlarge", "InstanceCount": 2},
    }
    bill = registry.target_of(target).cost(JobStatus.from_json(document), prices.load())
    assert (bill.to_json()["usd"], bill.to_json()["sagemaker_usd"]) == (usd, None)
    assert "2 x ml.p9.xlarge" in bill.render() and "price unknown" in bill.render()
    assert "prices refresh" in bill.warnings[0]


def test_the_users_table_overrides_the_shipped_one_and_a_file_overrides_both(own_config, tmp_path):
    own_config.mkdir()
    entry = {"ml.g5.xlarge": {"usd_per_h": 1.0}, "ml.mine.xlarge": {"usd_per_h": 2}}
    (own_config / "prices.json").write_text(json.dumps({"date": "2026-10-01", "instances": entry}))
    table = prices.load()
    assert table.get("ml.g5.xlarge").usd_per_h == 1.0
    assert table.get("ml.g5.xlarge").gpu == "A10G"
    assert table.get("ml.mine.xlarge").usd_per_h == 2
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"date": "2026-10-02", "instances": {"ml.g5.xlarge": {"usd_per_h": 0.5}}}))
    assert prices.load(extra=extra).get("ml.g5.xlarge").usd_per_h == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"date": "soon", "instances": {"a": {"usd_per_h": 1}}}',
        '{"date": "2026-01-01", "instances": {"a": {"usd_per_h": -1}}}',
        '{"date": "2026-01-01", "instances": {"a": {"price": 1}}}',
        '{"instances": {"a": {"usd_per_h": 1}}}',
        '{"date": "2026-01-01", "instances": {"a": {"usd_per_h": 1, "vcpus": "x"}}}',
        '{"date": "2026-01-01", "instances": {"a": {"usd_per_h": 1, "memory_gib": "16"}}}',
        '{"date": "2026-01-01", "instances": {"a": {"usd_per_h": 1, "memory_gib": 1e308}}}',
        '{"date": "2026-01-01", "instances": {"a": {"usd_per_h": 1' + "0" * 400 + "}}}",
        "[" * 200_000,
    ],
)
def test_a_file_that_is_not_a_price_table_is_refused_by_name(text, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(LaunchError, match=r"bad\.json: not a price table"):
        prices.load(extra=tmp_path / "bad.json")


def test_only_on_demand_training_prices_are_read_from_the_offer_file():
    assert dict(prices.read_offer(OFFER.splitlines(keepends=True))) == {
        "ml.g5.xlarge": 1.5,
        "ml.p6-b200.48xlarge": 40.5,
    }


def test_the_offer_file_is_read_line_by_line():
    def lines() -> Iterator[str]:
        yield from OFFER.splitlines(keepends=True)
        raise AssertionError("read past the first price")

    assert next(prices.read_offer(lines())) == ("ml.g5.xlarge", 1.5)


def test_refresh_saves_prices_with_date_and_source(offer_url):
    path = prices.refresh("us-east-1", offer_url, datetime.date(2026, 10, 5))
    one = prices.load().get("ml.g5.xlarge")
    assert (one.usd_per_h, one.date, one.source, one.gpu) == (1.5, datetime.date(2026, 10, 5), offer_url, "A10G")
    assert prices.load().get("ml.p6-b200.48xlarge").usd_per_h == 40.5
    assert path.parent.name == "estiba"


def test_a_failed_refresh_keeps_the_current_prices(offer_url, own_config):
    prices.refresh("us-east-1", offer_url)
    for bad in (offer_url + "x", "http://127.0.0.1:9/none"):
        with pytest.raises(LaunchError, match="stay in use"):
            prices.refresh("us-east-1", bad)
    assert prices.load().get("ml.g5.xlarge").usd_per_h == 1.5
    assert [path.name for path in own_config.iterdir()] == ["prices-us-east-1.json"]


def test_an_offer_file_with_other_columns_is_refused():
    with pytest.raises(LaunchError, match="columns"):
        list(prices.read_offer(["a,b\n", "SKU,c\n", "1,2\n"]))


@pytest.mark.parametrize(
    ("image", "given", "settings", "region"),
    [
        ("ap-southeast-2", None, None, "ap-southeast-2"),
        ("ap-southeast-2", None, "eu-west-1", "eu-west-1"),
        ("ap-southeast-2", "us-west-2", "eu-west-1", "us-west-2"),
        (None, None, None, None),
    ],
)
def test_the_region_is_the_one_in_which_the_job_would_run(image, given, settings, region, tmp_path, monkeypatch):
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "aws").write_text(f"[default]\nregion = {settings}\n" if settings else "")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
    uri = f"210987654321.dkr.ecr.{image}.amazonaws.com/e:1" if image else "e:1"
    assert prices.region_of({"AlgorithmSpecification": {"TrainingImage": uri}}, given) == region


def test_aws_settings_that_cannot_be_used_name_no_region(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    assert prices.configured_region() is None
