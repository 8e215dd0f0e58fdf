"""Write shared/estiba/prices.json, the prices that images carry, from the launcher's table of instance types.

python scripts/derive_prices.py        # run it after a change of the launcher's instances.json; a test compares the two
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DERIVED = ROOT / "shared/estiba/prices.json"


def source() -> Path:
    """Return the path of the launcher's table."""
    (path,) = (ROOT / "launch/estiba_launch").rglob("instances.json")
    return path


def derive(table: dict[str, Any]) -> str:
    """Return the text of prices.json: one price per instance type, and its date where it differs from the table's."""
    prices = {name: item["usd_per_h"] for name, item in table["instances"].items()}
    dates = {name: item["date"] for name, item in table["instances"].items() if "date" in item}
    head = {name: table[name] for name in ("source", "date", "region")}
    return json.dumps({**head, "usd_per_h": prices, "dates": dates}, indent=2) + "\n"


if __name__ == "__main__":
    DERIVED.write_text(derive(json.loads(source().read_text())))
