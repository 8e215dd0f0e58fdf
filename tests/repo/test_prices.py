"""The prices that images carry are derived from the launcher's table."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_prices_of_the_job_layer_are_those_of_the_launcher() -> None:
    script = runpy.run_path(str(ROOT / "scripts/derive_prices.py"))
    table = json.loads(script["source"]().read_text())
    derived = script["DERIVED"].read_text()
    assert derived == script["derive"](table), "run python scripts/derive_prices.py"
    prices = json.loads(derived)["usd_per_h"]
    assert len(prices) > 30 and prices["ml.g5.xlarge"] == table["instances"]["ml.g5.xlarge"]["usd_per_h"]
