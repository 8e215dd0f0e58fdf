"""A benchmark's last line: one JSON document with the machine, the results, and each goal met or missed."""

from __future__ import annotations

import json
import operator
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION_SETS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX"}


def publish(
    benchmark: str,
    results: Any,
    goals: Sequence[dict[str, Any]] = (),
    *,
    conditions: str = "",
    path: Path | None = None,
) -> None:
    """Print the document, and write it to `path` as well.

    conditions: what else decides the figures, beside the processor: a GPU, threads, a simulated network
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    document = {
        "benchmark": benchmark,
        "hardware": hardware() + (f"; {conditions}" if conditions else ""),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "results": results,
        "goals": list(goals),
    }
    if path:
        path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(json.dumps(document))


def goal(name: str, value: float | None, bound: str) -> dict[str, Any]:
    """Return a goal that is met if the value is known and keeps to the bound: `>=1.5`, `<=0.1` or `==0`."""
    keeps = {">=": operator.ge, "<=": operator.le, "==": operator.eq}[bound[:2]]
    met = value is not None and bool(keeps(value, float(bound[2:])))
    return {"name": name, "value": value, "goal": bound, "met": met}


def hardware() -> str:
    """Return the cores, the processor's name, and the instruction sets that decide the speed of a matrix product."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.+)", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    sets = [name for flag, name in INSTRUCTION_SETS.items() if flag in has]
    return ", ".join([f"{os.cpu_count()} cores", model[1].strip() if model else platform.machine(), *sets])
