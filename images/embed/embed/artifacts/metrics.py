"""The job's progress numbers in the form that `--metrics-format` names."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from embed.config import EmbedConfig
from estiba.metrics_output import EmbeddedMetrics, JsonLines, MetricsWriter, PrometheusFile
from estiba.platform.contract import Job
from estiba.storage import FileStore, Store


def metrics_writer(config: EmbedConfig, job: Job, saved: Store) -> MetricsWriter | None:
    """None if the numbers have no place: JSON lines are kept in a local checkpoint directory only."""
    labels = {"Job": job.name, "Host": job.current_host} if job.name else {"Host": job.current_host}
    if config.metrics_format == "emf":
        return EmbeddedMetrics("Estiba/embed", labels)
    if config.no_checkpoint or not isinstance(saved, FileStore):
        return None
    if config.metrics_format == "prometheus":
        path = saved.path_of(f"metrics-{job.current_host}.prom")
        return PrometheusFile(path, "estiba_embed", {name.lower(): value for name, value in labels.items()})
    return JsonLines(saved.path_of(f"metrics-{job.current_host}.jsonl"))


def write_last(metrics: MetricsWriter | None, results: dict[str, Any]) -> None:
    """The numbers of the whole attempt, which the progress lines lack: they come at intervals."""
    if metrics is not None:
        rows = {"rows": results["rows"]["total"], "of": results["rows"]["total"]}
        with contextlib.suppress(OSError):  # a full disk must not end the job
            metrics.write({"time": round(time.time(), 3), **rows, **results["speed"]})
