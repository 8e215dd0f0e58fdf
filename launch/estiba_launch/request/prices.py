"""What an instance type costs and has: dated tables; later ones override earlier ones entry by entry.

The order is: the shipped table, the one that `estiba prices refresh` saved for the region,
`~/.config/estiba/prices.json`, and `--prices FILE`. Each is JSON:

    {"source": "…", "date": "2026-09-27", "region": "us-east-1", "instances": {"ml.g5.xlarge": {"usd_per_h": 1.41}}}

SageMaker has no fixed spot price: a spot job bills about BillableTime x count x the on-demand rate.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import re
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import botocore.session
from botocore.exceptions import BotoCoreError

from estiba_launch.errors import LaunchError
from estiba_launch.paths import config_dir

STALE_AFTER_DAYS = 90
OFFER_URL = "https://pricing.us-east-1.amazonaws.com/offers/v1.0/aws/AmazonSageMaker/current/{region}/index.csv"
# USE1-Train:ml.g5.xlarge. Train-Spot, WarmPool and Processing usage types have other forms and are left out.
TRAIN_USAGE = re.compile(r"(?:[A-Z0-9]+-)?Train:(ml\.[a-z0-9-]+\.[a-z0-9]+)")


SIZES = ("gpus", "gpu_memory_mib", "vcpus", "memory_gib")
"""Numbers of an entry other than its price."""
MAX_SIZE = 1e9


@dataclass(frozen=True, kw_only=True)
class Instance:
    name: str
    usd_per_h: float | None
    """On-demand training price of one instance; None if no table has it."""
    date: datetime.date | None
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


@dataclass(kw_only=True)
class Prices:
    instances: dict[str, Instance] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    """Their origins, in order."""

    def add(self, table: Any, origin: str) -> None:
        """Override entries with those of `table`, which may hold only the changes. Raises LaunchError."""
        self.tables.append(origin)
        try:
            shared: dict[str, Any] = {"source": table.get("source", origin), "region": table.get("region", "us-east-1")}
            for name, entry in table["instances"].items():
                date = datetime.date.fromisoformat(entry.get("date") or table.get("date"))
                usd_per_h = float(entry["usd_per_h"])
                if not 0 <= usd_per_h < math.inf:
                    raise ValueError(f"price of {usd_per_h}")
                for size in (entry[one] for one in SIZES if entry.get(one) is not None):
                    if type(size) not in (int, float) or not 0 <= size < MAX_SIZE:
                        raise ValueError(f"size of {size!r}")
                # A note belongs to the price that it came with, so a newer price drops it.
                values = {"note": None, **entry, "date": date, "usd_per_h": usd_per_h}
                old = self.instances.get(name)
                self.instances[name] = (
                    replace(old, **shared, **values) if old else Instance(name=name, **shared, **values)
                )
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise LaunchError(
                f'{origin}: not a price table ({error!r}); write {{"date": "YYYY-MM-DD", "instances": '
                '{"ml.g5.xlarge": {"usd_per_h": 1.41}}}'
            ) from None

    def get(self, name: str) -> Instance:
        """One instance type. Raises LaunchError if no table has it."""
        if name not in self.instances:
            raise LaunchError(self._unknown(name))
        return self.instances[name]

    def find(self, name: str) -> Instance:
        """One instance type, without price and size if no table has it."""
        return self.instances.get(name) or Instance(name=name, usd_per_h=None, date=None, region="", source="unknown")

    def _unknown(self, name: str) -> str:
        return (
            f"{name}: no price known (tables: {', '.join(self.tables)}); run `estiba prices refresh`, "
            f'or put {{"instances": {{"{name}": {{"usd_per_h": …}}}}}} in {user_table()}'
        )

    def warnings(self, names: Iterable[str], region: str | None, today: datetime.date | None = None) -> list[str]:
        """What to know before trusting the prices of `names`."""
        now = today or datetime.datetime.now(datetime.UTC).date()
        warnings = []
        for name in dict.fromkeys(names):
            one = self.instances.get(name)
            if one is None or one.date is None:
                warnings.append(self._unknown(name))
                continue
            age = (now - one.date).days
            if age > STALE_AFTER_DAYS:
                warnings.append(f"{name}: price is {age} days old ({one.date}); run `estiba prices refresh`")
            if region and one.region != region:
                remedy = f"run `estiba prices refresh {region}`"
                warnings.append(f"{name}: price is for {one.region}, not {region}; {remedy}")
            if one.note:
                warnings.append(f"{name}: {one.note}")
        return warnings


def user_table() -> Path:
    return config_dir() / "prices.json"


def refreshed_table(region: str) -> Path:
    return config_dir() / f"prices-{region}.json"


def load(region: str = "us-east-1", extra: Path | None = None) -> Prices:
    """Merge all tables. Raises LaunchError for an invalid one."""
    shipped = resources.files("estiba_launch") / "data" / "instances.json"
    prices = Prices()
    prices.add(json.loads(shipped.read_text("utf-8")), "shipped")
    saved = [path for path in (refreshed_table(region), user_table()) if path.exists()]
    for path in [*saved, *([extra] if extra else [])]:
        try:
            table = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise LaunchError(f"{path}: not a price table ({error}); correct or remove it") from None
        prices.add(table, str(path))
    return prices


Hosts = list[tuple[str, int]]
"""[(instance type, count), ...]; more than one entry for instance groups."""


def region_of(request: Mapping[str, Any], region: str | None = None) -> str | None:
    """Where AWS runs and bills a job: the region given, as AWS's client finds it, else where the image is."""
    return region or configured_region() or image_region(request)


def configured_region() -> str | None:
    """The region of the AWS settings of this machine; None where they name none or cannot be read."""
    try:
        region = botocore.session.Session().get_config_variable("region")
    except BotoCoreError:
        # Whatever needs the settings says what is wrong with them.
        return None
    return str(region) if region else None


def image_region(request: Mapping[str, Any]) -> str | None:
    """The region in the address of an image in ECR."""
    image = str(request.get("AlgorithmSpecification", {}).get("TrainingImage"))
    match = re.match(r"\d{12}\.dkr\.ecr(?:-fips)?\.([a-z0-9-]+)\.", image)
    return match and match[1]


def hosts_of(request: Mapping[str, Any]) -> Hosts:
    """The hosts of a checked request or a described job; the first of several preferences."""
    return choices_of(request)[0]


def choices_of(request: Mapping[str, Any]) -> list[Hosts]:
    """The clusters that AWS may choose: one, or one for each of InstancePreferences until AWS has selected."""
    config = request.get("ResourceConfig") or {}
    if "SelectedInstanceType" in config:
        return [[(str(config["SelectedInstanceType"]), int(config.get("SelectedInstanceCount", 1)))]]
    shared = config.get("InstanceCount", 1)
    if preferred := config.get("InstancePreferences"):
        return [[(str(one["InstanceType"]), int(one.get("InstanceCount", shared)))] for one in preferred]
    groups = config.get("InstanceGroups") or [config]
    return [[(str(group["InstanceType"]), int(group.get("InstanceCount", 1))) for group in groups]]


def read_offer(lines: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Yield (instance type, USD per hour) for every on-demand training price in AWS's offer CSV, line by line.

    Raises LaunchError when the columns are not AWS's.
    """
    rows = csv.reader(lines)
    header = next(([name.lower() for name in row] for row in rows if row and row[0] == "SKU"), [])
    if not {"termtype", "unit", "priceperunit", "currency", "usagetype"} <= set(header):
        raise LaunchError("the offer file lacks the expected columns; AWS may have changed its format")
    for row in rows:
        offer = dict(zip(header, row, strict=False))
        match = TRAIN_USAGE.fullmatch(offer.get("usagetype", ""))
        is_usd_per_h = offer.get("unit", "").lower() in ("hrs", "hours", "hour") and offer.get("currency") == "USD"
        if match and is_usd_per_h and offer["termtype"] == "OnDemand" and float(offer["priceperunit"]) > 0:
            yield match.group(1), float(offer["priceperunit"])


def refresh(region: str, url: str | None = None, today: datetime.date | None = None) -> Path:
    """Read AWS's public offer file for `region`, save its training prices and return the path of the table.

    Raises LaunchError if AWS cannot be reached or lists no training price; the saved prices stay.
    """
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", region):
        raise LaunchError(f"region {region!r}: not a region name; write for example us-east-1")
    address = url or OFFER_URL.format(region=region)
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            offers = dict(read_offer(line.decode("utf-8", "replace") for line in response))
    except (OSError, ValueError, csv.Error) as error:
        raise LaunchError(f"{address}: cannot be read ({error}); the current prices stay in use") from None
    if not offers:
        raise LaunchError(f"{address}: has no training price for {region}; the current prices stay in use")
    date = today or datetime.datetime.now(datetime.UTC).date()
    table = {
        "source": address,
        "date": date.isoformat(),
        "region": region,
        "instances": {name: {"usd_per_h": usd} for name, usd in sorted(offers.items())},
    }
    path = refreshed_table(region)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    partial.replace(path)
    return path
