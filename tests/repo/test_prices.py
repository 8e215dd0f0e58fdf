"""The job layer's prices and the launcher's are the same numbers of the same day."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_both_tables_say_the_same() -> None:
    ours = json.loads((ROOT / "shared/estiba/prices.json").read_text())
    theirs = json.loads((ROOT / "launch/estiba_launch/data/instances.json").read_text())
    assert ours["date"] == theirs["date"]
    known = {name: item["usd_per_h"] for name, item in theirs["instances"].items()}
    for name, price in ours["usd_per_h"].items():
        assert known[name] == price, name
