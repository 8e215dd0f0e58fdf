"""Does this machine's NVIDIA driver carry the CUDA of an image?

A driver runs any CUDA up to its own, and later minors of the same major ("minor version compatibility", CUDA 11 on).
Images say what they need in NVIDIA_REQUIRE_CUDA (alternatives by spaces, conditions by commas) or CUDA_VERSION.
Source: docs.nvidia.com/deploy/cuda-compatibility.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .check import Check

SMI_S = 20


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What nvidia-smi tells."""

    version: str
    """Such as 535.183.01."""
    cuda: str
    """The newest CUDA it carries, such as 12.2."""
    gpus: tuple[str, ...]
    brand: str
    """Such as tesla, geforce, nvidia."""


def read_driver(text: str) -> Driver | None:
    """Driver from the output of `nvidia-smi -q`, or None when it is not that."""

    def all_of(name: str) -> list[str]:
        return [found.strip() for found in re.findall(rf"^\s*{name}\s*:\s*(.+)$", text, re.MULTILINE)]

    version, cuda = all_of("Driver Version"), all_of("CUDA Version")
    if not version or not cuda:
        return None
    brand = (all_of("Product Brand") or ["unknown"])[0].lower()
    return Driver(version=version[0], cuda=cuda[0], gpus=tuple(all_of("Product Name")), brand=brand)


def driver() -> Driver | Check:
    """This machine's driver, or a check that says why there is none."""
    if not shutil.which("nvidia-smi"):
        return Check(name="gpu driver", status="ok", seen="no NVIDIA driver: local jobs run on the CPU")
    remedy = "reinstall or reload the NVIDIA driver, or reboot; a stopped rented box may have lost its GPU"
    try:
        done = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=SMI_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        return Check(name="gpu driver", status="warn", seen=f"nvidia-smi: {error}", remedy=remedy)
    found = read_driver(done.stdout)
    if done.returncode or found is None:
        seen = (done.stderr or done.stdout).strip()[:160] or f"nvidia-smi exit {done.returncode}"
        return Check(name="gpu driver", status="warn", seen=seen, remedy=remedy)
    return found


def number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def holds(condition: str, on: Driver) -> bool:
    """One condition of NVIDIA_REQUIRE_CUDA, such as `cuda>=12.4`, `driver<536` or `brand=tesla`."""
    match = re.fullmatch(r"(cuda|driver|brand)(>=|<=|=|<|>|!=)([\w.-]+)", condition)
    if match is None:
        return False
    what, sign, wanted = match.groups()
    if what == "brand":
        return (on.brand == wanted.lower()) == (sign != "!=")
    have, need = number(on.cuda if what == "cuda" else on.version), number(wanted)
    have = have[: len(need)]
    return {
        ">=": have >= need,
        "<=": have <= need,
        "=": have == need,
        "!=": have != need,
        "<": have < need,
        ">": have > need,
    }[sign]


def verdict(image: str, settings: Mapping[str, str], on: Driver) -> Check:
    """Compare an image's environment and labels with a driver."""
    has = f"driver {on.version} (CUDA {on.cuda}), {', '.join(sorted(set(on.gpus)))}"
    required = settings.get("NVIDIA_REQUIRE_CUDA", "").strip()
    version = settings.get("CUDA_VERSION") or settings.get("com.nvidia.cuda.version") or ""
    if required:
        alternatives = required.split()
        if any(all(holds(one, on) for one in alternative.split(",")) for alternative in alternatives):
            return Check(name="image's CUDA", status="ok", seen=f"{has}; {image} wants {alternatives[0]}")
        version = version or ".".join(re.findall(r"\d+", alternatives[0])[:2])
    elif not version:
        return Check(name="image's CUDA", status="ok", seen=f"{has}; {image} names no CUDA")
    need, have = number(version)[:2], number(on.cuda)[:2]
    if need <= have:
        return Check(name="image's CUDA", status="ok", seen=f"{has}; {image} has CUDA {version}")
    update = f"update the driver to one that carries CUDA {version}, or take an image with CUDA {on.cuda} or older"
    if need[:1] == have[:1]:
        seen = f"{has}; {image} has CUDA {version}: runs by minor version compatibility, PTX code does not"
        return Check(name="image's CUDA", status="warn", seen=seen, remedy=update)
    return Check(name="image's CUDA", status="fail", seen=f"{has}; {image} has CUDA {version}", remedy=update)


def settings_of(inspected: Mapping[str, Any]) -> dict[str, str]:
    """Environment and labels of an inspected image in one."""
    config = inspected.get("Config") or {}
    pairs = dict(one.partition("=")[::2] for one in config.get("Env") or [])
    return {**(config.get("Labels") or {}), **pairs}
