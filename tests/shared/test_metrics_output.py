"""Progress numbers for Prometheus and for CloudWatch."""

from __future__ import annotations

import io
import json
from pathlib import Path

from estiba.metrics_output import EmbeddedMetrics, PrometheusFile
from estiba.progress import Progress


def test_a_prometheus_file_holds_the_newest_number_of_each_name(tmp_path: Path) -> None:
    path = tmp_path / "metrics-algo-1.prom"
    writer = PrometheusFile(path, "estiba_embed", {"job": 'a "b"\\c', "host": "algo-1"})
    writer.write({"time": 1.5, "rows": 10, "rows_per_s": 2.5, "file": "a.parquet", "eta_s": None, "done": True})
    writer.write({"time": 2.5, "rows": 20})
    assert path.read_text() == (
        "# TYPE estiba_embed_rows gauge\n"
        'estiba_embed_rows{job="a \\"b\\"\\\\c",host="algo-1"} 20\n'
        "# TYPE estiba_embed_rows_per_s gauge\n"
        'estiba_embed_rows_per_s{job="a \\"b\\"\\\\c",host="algo-1"} 2.5\n'
    )
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_an_embedded_metric_line_names_each_number_with_its_unit() -> None:
    stream = io.StringIO()
    writer = EmbeddedMetrics("Estiba/embed", {"Job": "j", "Host": "algo-1"}, stream)
    writer.write({"time": 1700000000.25, "rows": 10, "rows_per_s": 2.5, "eta_s": 4, "memory_mb": 300, "file": "a"})
    line = json.loads(stream.getvalue())
    assert line["_aws"] == {
        "Timestamp": 1700000000250,
        "CloudWatchMetrics": [
            {
                "Namespace": "Estiba/embed",
                "Dimensions": [["Job", "Host"]],
                "Metrics": [
                    {"Name": "rows", "Unit": "None"},
                    {"Name": "rows_per_s", "Unit": "Count/Second"},
                    {"Name": "eta_s", "Unit": "Seconds"},
                    {"Name": "memory_mb", "Unit": "Megabytes"},
                ],
            }
        ],
    }
    del line["_aws"]
    assert line == {"Job": "j", "Host": "algo-1", "rows": 10, "rows_per_s": 2.5, "eta_s": 4, "memory_mb": 300}


def test_progress_writes_its_lines_to_the_writer_that_it_is_given() -> None:
    stream, log = io.StringIO(), io.StringIO()
    progress = Progress(total=4, unit="rows", stream=log, metrics=EmbeddedMetrics("N", {"Job": "j"}, stream))
    progress.advance(2)
    progress.line(padding=float("nan"))
    found = json.loads(stream.getvalue())
    assert (found["rows"], found["of"], "padding" in found) == (2, 4, False)
    assert "rows=2 of=4" in log.getvalue()


def test_a_full_disk_ends_the_prometheus_file_and_not_the_job(tmp_path: Path) -> None:
    log = io.StringIO()
    writer = PrometheusFile(tmp_path / "gone" / "m.prom", "p", {"job": "j"})
    progress = Progress(total=4, unit="rows", stream=log, metrics=writer)
    progress.line()
    progress.line()
    assert log.getvalue().count("metrics not written (No such file or directory)") == 1
