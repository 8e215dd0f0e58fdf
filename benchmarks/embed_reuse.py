# environment: host
# needs: embed-test
"""Embed a corpus again of which 1% changed: how many rows are computed, and what does the rest cost?

    make bench/embed_reuse                       # in the test image, a million rows
    python benchmarks/embed_reuse.py --rows 100000

Runs in estiba/embed-test:local with the tests' model of one layer, so the times are those of everything but a real
model. The first job embeds the corpus. Then 1% of the rows get another text, all rows are shuffled over other files
with other row groups, and the second job runs with --reuse. Goals: at most 1.1% of the rows computed, and all other
vectors equal to the old ones bit for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
TESTS = "/opt/estiba/tests"

INSIDE = """
import json, os, random, sys, tempfile
from pathlib import Path
sys.path.insert(0, {tests!r})
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
import tiny_model
from rehearsal import WORDS
place = Path(tempfile.mkdtemp())
os.environ["ESTIBA_ROOT"] = str(place)
from whole_job import run
rows, dice = {rows}, random.Random(7)
texts = [f"{{row}} " + " ".join(dice.choices(WORDS, k=dice.randint(1, 30))) for row in range(rows)]
ids = list(range(rows))

def write(folder, files, row_group):
    folder.mkdir()
    step = -(-rows // files)
    for file in range(files):
        part = ids[file * step : (file + 1) * step]
        table = pa.table({{"id": part, "texto": [texts[row] for row in part]}})
        pq.write_table(table, folder / f"f{{file:03d}}.parquet", row_group_size=row_group)

def vectors(folder):
    found = None
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path, columns=["id", "embeddings"])
        values = table["embeddings"].combine_chunks().flatten().to_numpy().view(np.uint32).reshape(len(table), -1)
        found = np.zeros((rows, values.shape[1]), np.uint32) if found is None else found
        found[table["id"].to_numpy()] = values
    return found

model = tiny_model.build(place / "model")
write(place / "in-1", 16, 20_000)
places = dict(device="cpu", no_checkpoint=True, model=model)
first = run(input_path=str(place / "in-1"), output_path=str(place / "out-1"), **places)
changed = dice.sample(range(rows), rows // 100)
for row in changed:
    texts[row] = "nuevo " + texts[row]
dice.shuffle(ids)
write(place / "in-2", 11, 7_000)
reused = dict(input_path=str(place / "in-2"), output_path=str(place / "out-2"), reuse=str(place / "out-1"))
second = run(**reused, **places)
before, after = vectors(place / "out-1"), vectors(place / "out-2")
is_same = (before == after).all(axis=1)
is_same[changed] = True
print("FOUND " + json.dumps({{
    "rows": rows, "changed": len(changed), "rows_second": second["rows"],
    "other_bits": int((~is_same).sum()),
    "seconds_first": first["seconds"]["embedding"], "seconds_second": second["seconds"]["embedding"],
    "tokens_first": first["tokens"]["computed_in_this_attempt"],
    "tokens_second": second["tokens"]["computed_in_this_attempt"],
    "peak_memory_mb": round(second["peak_memory_bytes"] / 1e6),
}}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--image", default="estiba/embed-test:local")
    options = parser.parse_args()
    program = INSIDE.format(tests=TESTS, rows=options.rows)
    mount = f"{ROOT}/tests/images/embed:{TESTS}:ro"
    command = ["docker", "run", "--rm", "--network", "none", "-v", mount, "--entrypoint", "python", options.image]
    log = subprocess.run([*command, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(next(line for line in log.splitlines() if line.startswith("FOUND ")).split(" ", 1)[1])
    computed = found["rows_second"]["computed_in_this_attempt"]
    reused = found["rows_second"]["reused"]
    print(
        f"{found['rows']} rows, {found['changed']} changed: {computed} computed, {reused} reused "
        f"in {found['seconds_second']:.0f} s (all computed: {found['seconds_first']:.0f} s)"
    )
    goals = [
        goal("share of the rows computed", round(computed / found["rows"], 5), "<=0.011"),
        goal("unchanged rows with other bits", found["other_bits"], "==0"),
    ]
    publish("embed_reuse", found, goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
