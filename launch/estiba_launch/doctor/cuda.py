"""Does this machine's NVIDIA driver support the CUDA version of an image?

A driver runs every CUDA up to its own, and later minors of the same major ("minor version compatibility", since
CUDA 11). An image states its needs in NVIDIA_REQUIRE_CUDA (alternatives separated by spaces, conditions by commas) or
CUDA_VERSION. Source: docs.nvidia.com/deploy/cuda-compatibility.
"""

from __future__ import annotations

import operator
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from estiba_launch.doctor.machine import CHARS_SHOWN, call, inspect
from estiba_launch.jobs.check import Check

COMPARE = {
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The driver as nvidia-smi reports it."""

    version: str
    """Such as 535.183.01."""
    cuda: str
    """The newest CUDA that it supports, such as 12.2."""
    gpus: tuple[str, ...]
    brand: str
    """Such as tesla, geforce, nvidia."""


def checks(image: str | None) -> Iterator[Check]:
    """The driver, and whether it supports the image's CUDA version."""
    driver = find_driver()
    if isinstance(driver, Check):
        yield driver
        return
    seen = f"{driver.version}, CUDA {driver.cuda}, {len(driver.gpus)} x {driver.gpus[0] if driver.gpus else 'no GPU'}"
    yield Check(name="gpu driver", status="ok" if driver.gpus else "warn", seen=seen)
    if image and (inspected := inspect(image)):
        yield compatibility(image, settings_of(inspected), driver)
    elif image:
        yield Check(name="image's CUDA", status="unknown", seen=f"{image} is not on this machine", remedy="pull it")


def find_driver() -> Driver | Check:
    """This machine's driver, or a check that explains why there is none."""
    if not shutil.which("nvidia-smi"):
        return Check(name="gpu driver", status="ok", seen="no NVIDIA driver: local jobs run on the CPU")
    code, output = call("nvidia-smi", "-q")
    driver = read_driver(output) if code == 0 else None
    if driver is None:
        remedy = "reinstall or reload the NVIDIA driver, or reboot; a rented host may lose its GPU while stopped"
        seen = f"nvidia-smi: {output[:CHARS_SHOWN] or f'exit {code}'}"
        return Check(name="gpu driver", status="warn", seen=seen, remedy=remedy)
    return driver


def read_driver(text: str) -> Driver | None:
    """Parse the output of `nvidia-smi -q`. Returns None for anything else."""

    def values(name: str) -> list[str]:
        return [value.strip() for value in re.findall(rf"^\s*{name}\s*:\s*(.+)$", text, re.MULTILINE)]

    version, cuda = values("Driver Version"), values("CUDA Version")
    if not version or not cuda:
        return None
    brand = (values("Product Brand") or ["unknown"])[0].lower()
    return Driver(version=version[0], cuda=cuda[0], gpus=tuple(values("Product Name")), brand=brand)


def version_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def satisfied(condition: str, driver: Driver) -> bool:
    """Check one condition of NVIDIA_REQUIRE_CUDA, such as `cuda>=12.4`, `driver<536` or `brand=tesla`."""
    match = re.fullmatch(r"(cuda|driver|brand)(>=|<=|=|<|>|!=)([\w.-]+)", condition)
    if match is None:
        return False
    what, sign, required = match.groups()
    if what == "brand":
        return (driver.brand == required.lower()) == (sign != "!=")
    have, need = version_numbers(driver.cuda if what == "cuda" else driver.version), version_numbers(required)
    return bool(COMPARE[sign](have[: len(need)], need))


def compatibility(image: str, settings: Mapping[str, str], driver: Driver) -> Check:
    """Compare an image's environment and labels with a driver."""
    check = partial(Check, name="image's CUDA")
    has = f"driver {driver.version} (CUDA {driver.cuda}), {', '.join(sorted(set(driver.gpus)))}"
    required = settings.get("NVIDIA_REQUIRE_CUDA", "").strip()
    version = settings.get("CUDA_VERSION") or settings.get("com.nvidia.cuda.version") or ""
    if required:
        alternatives = required.split()
        if any(all(satisfied(one, driver) for one in alternative.split(",")) for alternative in alternatives):
            return check(status="ok", seen=f"{has}; {image} requires {alternatives[0]}")
        version = version or ".".join(re.findall(r"\d+", alternatives[0])[:2])
    elif not version:
        return check(status="ok", seen=f"{has}; {image} states no CUDA version")
    need, have = version_numbers(version)[:2], version_numbers(driver.cuda)[:2]
    seen = f"{has}; {image} has CUDA {version}"
    if need <= have:
        return check(status="ok", seen=seen)
    update = f"update the driver to one that supports CUDA {version}, or use an image with CUDA {driver.cuda} or older"
    if need[:1] == have[:1]:
        seen += ": runs by minor version compatibility, except for PTX code"
        return check(status="warn", seen=seen, remedy=update)
    return check(status="fail", seen=seen, remedy=update)


def settings_of(inspected: Mapping[str, Any]) -> dict[str, str]:
    """Environment and labels of an inspected image, merged."""
    config = inspected.get("Config") or {}
    pairs = dict(one.partition("=")[::2] for one in config.get("Env") or [])
    return {**(config.get("Labels") or {}), **pairs}
