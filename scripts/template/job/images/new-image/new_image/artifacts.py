"""What the job leaves in the output: records, and results.json."""

from __future__ import annotations

import json
from typing import Any

from estiba import __version__
from estiba.platform.contract import Job
from estiba.storage import Store

OUTPUT_SUFFIX = ".jsonl"


def records(lines: list[str], *, longest_word: bool) -> bytes:
    """JSON Lines, one record for each line of text."""
    encoded = []
    for line in lines:
        words = line.split()
        record: dict[str, Any] = {"words": len(words)}
        if longest_word:
            record["longest_word"] = max(words, key=len, default=None)
        encoded.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(encoded).encode()


def write_results(target: Store, job: Job, *, files: int, resumed: int, computed: int, seconds: float) -> str:
    """Write results.json, or results-<host>.json if there are several hosts. Returns a summary for the log."""
    results = {
        "status": "complete",
        "job": job.name,
        "host": job.current_host,
        "version": __version__,
        "files": files,
        "chunks": {"found": resumed, "computed_in_this_attempt": computed},
        "seconds": round(seconds, 3),
    }
    name = "results.json" if job.host_count == 1 else f"results-{job.current_host}.json"
    target.write(name, (json.dumps(results, indent=2) + "\n").encode())
    return f"{files} files in {seconds:.1f} s; {computed} chunks computed, {resumed} resumed"
