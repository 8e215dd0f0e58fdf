"""What this hour costs, if the instance type is known: an estimate from a dated table, never a bill."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Price:
    usd_per_h: float
    date: str
    """Of the table, or "given" for ESTIBA_PRICE_USD_PER_H."""


def price_of(instance_type: str | None, environ: Mapping[str, str] = os.environ) -> Price | None:
    """On-demand price of one host of this type, or None. ESTIBA_PRICE_USD_PER_H is believed before the table."""
    given = environ.get("ESTIBA_PRICE_USD_PER_H", "").strip()
    if given:
        try:
            return Price(usd_per_h=float(given), date="given")
        except ValueError:
            return None
    if not instance_type:
        return None
    table = json.loads((Path(__file__).parent / "prices.json").read_text())
    price = table["usd_per_h"].get(instance_type if instance_type.startswith("ml.") else f"ml.{instance_type}")
    return None if price is None else Price(usd_per_h=price, date=table["date"])
