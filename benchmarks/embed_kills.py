# environment: host
# needs: embed-test
"""Kill an embed job at random moments and restart it: is anything lost, is anything done twice?

    make bench/embed_kills                       # in the test image, 20 kills, both ways
    python benchmarks/embed_kills.py --kills 40 --seed 7

Runs in estiba/embed-test:local, where the workload and its tests live. Two rehearsals, each of one uninterrupted run
and one killed again and again with SIGKILL: on the same host, and as on SageMaker with only the checkpoint directory
kept. Goals: the output directory byte for byte equal, and at most one row group a kill computed twice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "estiba/embed-test:local"

INSIDE = """
import json, sys, tempfile
from pathlib import Path
from typing import Any
sys.path.insert(0, {tests!r})
import rehearsal, tiny_model
place = Path(tempfile.mkdtemp())
model = tiny_model.build(place / "model")
options = dict(kills={kills}, seed={seed}, is_new_host={is_new_host}, files={files}, rows={rows})
found = rehearsal.rehearse(place / "job", model, **options)
print("REHEARSAL " + json.dumps({{**vars(found), "rows_twice": found.rows_twice, "within_bound": found.within_bound}}))
"""


def rehearse(is_new_host: bool, options: argparse.Namespace) -> dict[str, Any]:
    tests = "/opt/estiba/tests"
    program = INSIDE.format(
        tests=tests,
        kills=options.kills,
        seed=options.seed,
        is_new_host=is_new_host,
        files=options.files,
        rows=options.rows,
    )
    mount = f"{ROOT}/tests/images/embed:{tests}:ro"
    command = ["docker", "run", "--rm", "-v", mount, "--entrypoint", "python", options.image, "-c", program]
    log = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(next(line for line in log.splitlines() if line.startswith("REHEARSAL ")).split(" ", 1)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--rows", type=int, default=300, help="mean rows a file")
    parser.add_argument("--image", default=IMAGE)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    goals = []
    for name, is_new_host in (("same host", False), ("only the checkpoint directory kept", True)):
        found = rehearse(is_new_host, options)
        results[name] = found
        print(
            f"{name}: {len(found['kills'])} kills in {found['attempts']} attempts, {found['rows']} rows, "
            f"{found['rows_twice']} started twice (bound {len(found['kills']) * found['largest_row_group']}), "
            f"output {'equal' if found['equal'] else 'DIFFERENT'}"
        )
        goals.append({"name": f"{name}: output equal", "value": found["equal"], "goal": "true", "met": found["equal"]})
        per_kill = found["rows_twice"] / max(1, len(found["kills"])) / found["largest_row_group"]
        goals.append(
            {
                "name": f"{name}: row groups twice per kill",
                "value": round(per_kill, 3),
                "goal": "<=1",
                "met": found["within_bound"],
            }
        )
        goals.append(goal(f"{name}: kills that hit", len(found["kills"]), f">={options.kills}"))
    publish("embed_kills", results, goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
