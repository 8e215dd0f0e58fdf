"""Hourly prices of known instance types: an estimate from a dated table, not a bill."""

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
    """The date of the price, or "given" if ESTIBA_PRICE_USD_PER_H is set."""


def price_of(instance_type: str | None, environ: Mapping[str, str] = os.environ) -> Price | None:
    """Return the on-demand price of one host, or None for an unknown type. ESTIBA_PRICE_USD_PER_H takes precedence."""
    override = environ.get("ESTIBA_PRICE_USD_PER_H", "").strip()
    if override:
        try:
            return Price(usd_per_h=float(override), date="given")
        except ValueError:
            return None
    if not instance_type:
        return None
    # scripts/derive_prices.py writes this file from the launcher's table.
    table = json.loads((Path(__file__).parent / "prices.json").read_text())
    name = instance_type if instance_type.startswith("ml.") else f"ml.{instance_type}"
    if name not in table["usd_per_h"]:
        return None
    return Price(usd_per_h=table["usd_per_h"][name], date=table["dates"].get(name, table["date"]))
