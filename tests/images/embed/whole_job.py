"""Run the whole embed job in this process, below ESTIBA_ROOT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embed.config import EmbedConfig
from embed.job import embed
from estiba.platform.contract import Job
from estiba.platform.stop import Stop


def run(model: Path, **options: Any) -> dict[str, Any]:
    """Run the job and return its results.json."""
    config = EmbedConfig(model=str(model), **options)
    embed(config, Job.read(), Stop())
    return json.loads((Path(config.output_path) / "results.json").read_text())


def write(path: Path, texts: list[str | None], **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"texto": pa.array(texts, pa.string()), **more}), path)


def outputs(root: Path, name: str = "a.parquet") -> pa.Table:
    return pq.read_table(root / "output/data" / name)
