"""What an instance type costs and holds: a dated table, laid over by the user's own.

Tables, later ones winning entry by entry: the one shipped here, the one `estiba prices refresh` saved for the region,
`~/.config/estiba/prices.json`, and `--prices FILE`. Each is JSON:

    {"source": "…", "date": "2026-09-27", "region": "us-east-1", "instances": {"ml.g5.xlarge": {"usd_per_h": 1.41}}}

SageMaker has no fixed spot price: a spot job bills about BillableTime x count x the on-demand rate.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import re
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import LaunchError

STALE_AFTER_DAYS = 90
OFFER_URL = "https://pricing.us-east-1.amazonaws.com/offers/v1.0/aws/AmazonSageMaker/current/{region}/index.csv"
# USE1-Train:ml.g5.xlarge. Train-Spot, WarmPool and Processing usage types have other forms and are left out.
TRAIN_USAGE = re.compile(r"(?:[A-Z0-9]+-)?Train:(ml\.[a-z0-9-]+\.[a-z0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One instance type."""

    name: str
    usd_per_h: float
    """On-demand training price of one instance."""
    date: datetime.date
    """When the price was read."""
    region: str
    source: str
    gpu: str | None = None
    gpus: int = 0
    gpu_memory_mib: int = 0
    """Memory of one GPU."""
    vcpus: int | None = None
    memory_gib: float | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Every known instance type by name."""

    instances: dict[str, Instance]
    tables: list[str] = field(default_factory=list)
    """Where they came from, first to last."""

    def get(self, name: str) -> Instance:
        """One instance type. Raises LaunchError when no table has it."""
        if name not in self.instances:
            raise LaunchError(
                f"{name}: no price known (tables: {', '.join(self.tables)}); run `estiba prices refresh`, "
                f'or put {{"instances": {{"{name}": {{"usd_per_h": …}}}}}} in {user_table()}'
            )
        return self.instances[name]

    def warnings(self, names: Iterable[str], region: str | None, today: datetime.date | None = None) -> list[str]:
        """What a person should know before trusting the prices of `names`."""
        now = today or datetime.datetime.now(datetime.UTC).date()
        found = []
        for name in dict.fromkeys(names):
            one = self.instances.get(name)
            if one is None:
                continue
            age = (now - one.date).days
            if age > STALE_AFTER_DAYS:
                found.append(f"{name}: price is {age} days old ({one.date}); run `estiba prices refresh`")
            if region and one.region != region:
                found.append(f"{name}: price is for {one.region}, not {region}; run `estiba prices refresh {region}`")
            if one.note:
                found.append(f"{name}: {one.note}")
        return found


def config_dir(environ: Mapping[str, str] | None = None) -> Path:
    """`~/.config/estiba`, or below $XDG_CONFIG_HOME."""
    base = (os.environ if environ is None else environ).get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "estiba"


def user_table() -> Path:
    return config_dir() / "prices.json"


def refreshed_table(region: str) -> Path:
    return config_dir() / f"prices-{region}.json"


def load(region: str = "us-east-1", extra: Path | None = None) -> Prices:
    """All tables laid over each other. Raises LaunchError for a table that is not of the form above."""
    shipped = resources.files("estiba_launch") / "data" / "instances.json"
    prices = Prices(instances={})
    prices = lay_over(prices, json.loads(shipped.read_text("utf-8")), "shipped")
    for path, needed in ((refreshed_table(region), False), (user_table(), False), (extra, True)):
        if path is None or (not needed and not path.exists()):
            continue
        try:
            table = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise LaunchError(f"{path}: not a price table ({error}); correct or remove it") from None
        prices = lay_over(prices, table, str(path))
    return prices


def lay_over(prices: Prices, table: Any, origin: str) -> Prices:
    """`prices` with the entries of `table`; an entry may give only what changes. Raises LaunchError."""
    instances = dict(prices.instances)
    try:
        date = table.get("date")
        shared: dict[str, Any] = {"source": table.get("source", origin), "region": table.get("region", "us-east-1")}
        for name, entry in table["instances"].items():
            given = {**entry, "date": datetime.date.fromisoformat(entry.get("date") or date)}
            given["usd_per_h"] = float(entry["usd_per_h"])
            if given["usd_per_h"] < 0:
                raise ValueError("a price below zero")
            old = instances.get(name)
            # A note speaks of the price it came with, so a newer price drops it.
            given.setdefault("note", None)
            instances[name] = replace(old, **shared, **given) if old else Instance(name=name, **shared, **given)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise LaunchError(
            f'{origin}: not a price table ({error!r}); write {{"date": "YYYY-MM-DD", "instances": '
            '{"ml.g5.xlarge": {"usd_per_h": 1.41}}}'
        ) from None
    return Prices(instances=instances, tables=[*prices.tables, origin])


def hosts_of(request: Mapping[str, Any]) -> list[tuple[str, int]]:
    """[(instance type, count), ...] of a checked request; more than one entry for instance groups."""
    config = request.get("ResourceConfig") or {}
    groups = config.get("InstanceGroups") or config.get("InstancePreferences", [])[:1] or [config]
    return [(str(group["InstanceType"]), int(group.get("InstanceCount", 1))) for group in groups]


def read_offer(lines: Iterable[str]) -> Iterator[tuple[str, float]]:
    """(instance type, USD per hour) of every on-demand training price in AWS's offer CSV, read line by line.

    Raises LaunchError when the columns are not AWS's.
    """
    rows = csv.reader(lines)
    header: dict[str, int] = {}
    for row in rows:
        if row and row[0] == "SKU":
            header = {name.lower(): index for index, name in enumerate(row)}
            break
    columns = [header.get(name) for name in ("termtype", "unit", "priceperunit", "currency", "usagetype")]
    if any(column is None for column in columns):
        raise LaunchError("the offer file has no columns of the known names; has AWS changed its format?")
    term, unit, price, currency, usage = (int(column) for column in columns if column is not None)
    for row in rows:
        if len(row) <= max(term, unit, price, currency, usage) or row[term] != "OnDemand":
            continue
        match = TRAIN_USAGE.fullmatch(row[usage])
        if match and row[unit].lower() in ("hrs", "hours", "hour") and row[currency] == "USD" and float(row[price]) > 0:
            yield match.group(1), float(row[price])


def refresh(region: str, url: str | None = None, today: datetime.date | None = None) -> Path:
    """Read AWS's public offer file for `region` and save its training prices. The only place that uses the network.

    Returns the file written. Raises LaunchError when AWS cannot be reached or gives no training price.
    """
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", region):
        raise LaunchError(f"region {region!r}: not a region name; write for example us-east-1")
    address = url or OFFER_URL.format(region=region)
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            found = dict(read_offer(line.decode("utf-8", "replace") for line in answer))
    except (OSError, ValueError, csv.Error) as error:
        raise LaunchError(f"{address}: cannot be read ({error}); the prices you have stay in use") from None
    if not found:
        raise LaunchError(f"{address}: holds no training price for {region}; the prices you have stay in use")
    date = today or datetime.datetime.now(datetime.UTC).date()
    table = {
        "source": address,
        "date": date.isoformat(),
        "region": region,
        "instances": {name: {"usd_per_h": usd} for name, usd in sorted(found.items())},
    }
    path = refreshed_table(region)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    partial.replace(path)
    return path
