"""Prices: dated, warned about when old, laid over by the user's own, refreshed from AWS's public file."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from estiba_launch import prices
from estiba_launch.errors import LaunchError

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


def test_the_shipped_table_is_whole():
    table = prices.load()
    assert len(table.instances) == 38
    for one in table.instances.values():
        assert one.usd_per_h > 0
        assert one.vcpus
        assert one.memory_gib
        assert bool(one.gpus) == bool(one.gpu) == bool(one.gpu_memory_mib)
    assert table.get("ml.g4dn.xlarge").usd_per_h == 0.7364
    assert table.get("ml.g5.12xlarge").gpus == 4


def test_a_price_is_warned_about_after_90_days():
    table = prices.load()
    day = table.get("ml.g5.xlarge").date
    assert table.warnings(["ml.g5.xlarge"], None, day + datetime.timedelta(days=90)) == []
    (warning,) = table.warnings(["ml.g5.xlarge"], None, day + datetime.timedelta(days=91))
    assert "91 days old" in warning
    assert "prices refresh" in warning


def test_a_price_of_another_region_is_warned_about():
    (warning,) = prices.load().warnings(["ml.g5.xlarge"], "eu-west-1", datetime.date(2026, 10, 1))
    assert "us-east-1, not eu-west-1" in warning


def test_an_unknown_type_is_refused_with_both_remedies():
    with pytest.raises(LaunchError, match=r"ml\.p9\.xlarge.*prices refresh.*prices\.json"):
        prices.load().get("ml.p9.xlarge")


def test_the_users_table_lies_over_the_shipped_one_and_a_file_over_both(own_config, tmp_path):
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
    ],
)
def test_a_file_that_is_no_price_table_is_refused_by_name(text, tmp_path):
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


def test_refresh_keeps_the_prices_it_read_with_date_and_source(offer_url):
    path = prices.refresh("us-east-1", offer_url, datetime.date(2026, 10, 5))
    one = prices.load().get("ml.g5.xlarge")
    assert (one.usd_per_h, one.date, one.source, one.gpu) == (1.5, datetime.date(2026, 10, 5), offer_url, "A10G")
    assert prices.load().get("ml.p6-b200.48xlarge").usd_per_h == 40.5
    assert path.parent.name == "estiba"


def test_a_failed_refresh_leaves_the_prices_there_were(offer_url, own_config):
    prices.refresh("us-east-1", offer_url)
    for bad in (offer_url + "x", "http://127.0.0.1:9/none"):
        with pytest.raises(LaunchError, match="stay in use"):
            prices.refresh("us-east-1", bad)
    assert prices.load().get("ml.g5.xlarge").usd_per_h == 1.5
    assert [path.name for path in own_config.iterdir()] == ["prices-us-east-1.json"]


def test_an_offer_file_of_another_form_is_refused():
    with pytest.raises(LaunchError, match="columns"):
        list(prices.read_offer(["a,b\n", "SKU,c\n", "1,2\n"]))
