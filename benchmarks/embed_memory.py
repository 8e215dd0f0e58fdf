# environment: host
# needs: embed
"""Embed a 2 GB parquet file in a container that may use 1.5 GB: does memory grow with the file?

    make bench/embed_memory
    python benchmarks/embed_memory.py --gigabytes 4 --limit-mb 1500 --row-groups 1

Writes random text (incompressible, so that the file is as large as it says) into one parquet file under runs/, makes a
tiny model in the image, and runs the job under `docker run --memory`, swap off. The model reads 16 tokens of each row,
as this is about reading and writing. Goal: it ends, with every row embedded. Peak is the container's own memory.peak.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
ROW_BYTES = 20_000


def make_file(path: Path, gigabytes: float, row_groups: int) -> int:
    """One file of random letters in words. Returns its rows."""
    rows = int(gigabytes * 1e9 / ROW_BYTES)
    dice = random.Random(0)
    letters = b"abcdefghijklmnopqrstuvwxyz      " * 8
    schema = pa.schema([("id", pa.int64()), ("texto", pa.large_string())])
    per_group = -(-rows // row_groups)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for start in range(0, rows, per_group):
            count = min(per_group, rows - start)
            data = b"".join(dice.randbytes(ROW_BYTES).translate(letters) for _ in range(count))
            offsets = array("q", range(0, (count + 1) * ROW_BYTES, ROW_BYTES))
            text = pa.LargeStringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(data))
            writer.write_table(
                pa.table([pa.array(range(start, start + count)), text], schema=schema), row_group_size=count
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--limit-mb", type=int, default=1500)
    parser.add_argument("--row-groups", type=int, default=1)
    parser.add_argument("--image", default="estiba/embed:local")
    options = parser.parse_args()
    place = ROOT / "runs/embed_memory"
    shutil.rmtree(place, ignore_errors=True)
    (place / "in").mkdir(parents=True)
    rows = make_file(place / "in/grande.parquet", options.gigabytes, options.row_groups)
    size = (place / "in/grande.parquet").stat().st_size
    print(f"input: {size / 1e9:.2f} GB, {rows} rows, {options.row_groups} row group(s)")
    build = (
        "import sys, pathlib; sys.path.insert(0, '/tests'); "
        "import tiny_model; tiny_model.build(pathlib.Path('/job/model'))"
    )
    subprocess.run(
        ["docker", "run", "--rm", "-v", f"{ROOT}/tests/images/embed:/tests:ro", "-v", f"{place}:/job", options.image,
         "python", "-c", build],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    job = (
        "python -m embed --input-path /job/in --output-path /job/out --checkpoint-path /job/ck --model /job/model "
        "--max-length 16; code=$?; cat /sys/fs/cgroup/memory.peak 2>/dev/null || "
        "cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes; exit $code"
    )
    limit = f"{options.limit_mb}m"
    began = time.monotonic()
    done = subprocess.run(
        ["docker", "run", "--rm", "--memory", limit, "--memory-swap", limit, "-v", f"{place}:/job", options.image,
         "bash", "-c", job],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - began
    found = {"exit_code": done.returncode, "seconds": round(seconds, 1), "rows": rows, "input_bytes": size}
    if done.returncode == 0:
        results = json.loads((place / "out/results.json").read_text())
        found |= {
            "rows_embedded": results["rows"]["embedded"],
            "process_peak_mb": round(results["peak_memory_bytes"] / 1e6),
            "container_peak_mb": round(int(done.stdout.split()[-1]) / 1e6),
            "output_bytes": (place / "out/grande.parquet").stat().st_size,
        }
    shutil.rmtree(place, ignore_errors=True)
    print(found)
    ended = done.returncode == 0 and found.get("rows_embedded") == rows
    what = f"rows embedded of a {options.gigabytes:g} GB file, under {options.limit_mb} MB"
    publish("embed_memory", found, [goal(what, found.get("rows_embedded") if ended else None, f"=={rows}")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
