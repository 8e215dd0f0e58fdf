"""`results.json`: counts of files and rows by outcome, the time taken, and the cost if the price is known."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from embed.artifacts.speed import speed_of
from embed.artifacts.stale import OldOutput
from embed.config import EmbedConfig
from embed.data.chunks import ModelInfo
from embed.state import JobState, State
from estiba import __version__
from estiba.platform.contract import Job
from estiba.prices import price_of
from estiba.progress import peak_memory_bytes


def results_of(
    state: JobState,
    *,
    config: EmbedConfig,
    job: Job,
    model: ModelInfo,
    ignored: list[str],
    stale: list[OldOutput],
    started: float,
    loaded: float,
    computed: float,
) -> dict[str, Any]:
    """The document as JSON types. Counts cover all attempts; rates and times only this one.

    `started`, `loaded` and `computed` are readings of time.monotonic(). Rates do not count the time in which old
    outputs are read or worker processes end.
    """
    total_s = time.monotonic() - started
    compute_s = computed - loaded - state.attempt.reading_old_s
    states = Counter(item.state for item in state.files.values())
    counts = [item.written.counts for item in state.files.values() if item.written is not None]
    statuses: Counter[str] = Counter()
    for item in counts:
        statuses.update(item["statuses"])
    rows = sum(item["rows"] for item in counts)
    tokens_aproximados = [item["tokens_aproximados"] for item in counts if item["tokens_aproximados"] is not None]
    attempt = state.attempt
    rows_per_s = attempt.rows_computed / compute_s if compute_s > 0 else 0.0
    tokens_per_s = attempt.tokens / compute_s if compute_s > 0 else 0.0
    done = states[State.DONE] + states[State.ALREADY_DONE]
    is_failed = (state.bad and config.on_bad_file == "fail") or (state.bad_rows() and config.on_bad_row == "fail")
    result = {
        "status": "failed" if is_failed else "complete",
        "job": job.name,
        "host": job.current_host,
        "hosts": job.host_count,
        "input": config.input_path,
        "output": config.output_path,
        "reuse": config.reuse,
        "model": {"given": config.model, **model.identity},
        "device": model.device,
        "engine": model.engine,
        "dimensions": model.dimensions,
        "batch": {"rows": config.batch_size or None, "tokens": model.token_budget, "device": model.device},
        "version": __version__,
        "files": {
            "total": state.files_total,
            "done": done,
            "done_in_this_attempt": states[State.DONE],
            "already_complete": states[State.ALREADY_DONE],
            "bad": [{"path": item.path, "reason": item.reason} for item in state.bad],
            "ignored": ignored,
            "stale": [{"path": item.path, "reason": item.reason} for item in stale],
            "stale_removed": config.stale_outputs == "remove",
        },
        "rows": {
            "total": rows,
            "embedded": statuses["ok"],
            "without_vector": {word: count for word, count in sorted(statuses.items()) if word != "ok"},
            "bad": [{"path": path, "rows": rows} for path, rows in state.bad_rows()],
            "truncated": sum(item["truncated"] for item in counts),
            "computed_in_this_attempt": attempt.rows_computed,
            "resumed": attempt.rows_found,
            "copied": sum(item.get("copied", 0) for item in counts),
            "reused": sum(item.get("reused", 0) for item in counts),
        },
        "tokens": {
            "total": sum(item["tokens"] for item in counts),
            "computed_in_this_attempt": attempt.tokens,
            "padded_in_this_attempt": attempt.padded_tokens,
            "padding_ratio": round(attempt.padded_tokens / attempt.tokens, 4) if attempt.tokens else None,
        },
        "seconds": {
            "total": round(total_s, 3),
            "until_model_loaded": round(loaded - started, 3),
            "embedding": round(compute_s, 3),
        },
        "stages": state.stages.as_json(),
        "rows_per_s": round(rows_per_s, 2),
        "tokens_per_s": round(tokens_per_s, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "checkpoint": {
            "path": None if config.no_checkpoint else config.checkpoint_path,
            "pieces_found": attempt.chunks_found,
            "pieces_saved": attempt.chunks_saved,
            "pieces_set_aside": attempt.chunks_lost,
            "bytes_saved": attempt.chunk_bytes,
        },
        "cost": _cost(job, total_s),
    }
    result["speed"] = speed_of(
        config, job, model, tokens=attempt.tokens, padded_tokens=attempt.padded_tokens, seconds=compute_s
    )  # after the peak of the memory was read
    if tokens_aproximados:
        result["tokens_aproximados"] = sum(tokens_aproximados)
    if config.chunk_output == "rows":
        result["chunks"] = sum(item.get("chunks") or 0 for item in counts)
    taken = f"{attempt.rows_copied} copied from equal rows, " if attempt.rows_copied else ""
    taken += f"{attempt.rows_reused} reused, " if attempt.rows_reused else ""
    already = max(0, rows - attempt.rows_computed - attempt.rows_copied - attempt.rows_reused)
    result["summary"] = (
        f"{done} of {state.files_total} files, {rows} rows ({statuses['ok']} embedded) in {total_s:.1f} s: "
        f"{attempt.rows_computed} rows computed now at {tokens_per_s:.0f} tokens/s, {taken}{already} already done"
    )
    return result


def _cost(job: Job, total_s: float) -> dict[str, Any] | None:
    price = price_of(job.instance_type)
    if price is None:
        return None
    return {
        "instance_type": job.instance_type,
        "usd_per_h": price.usd_per_h,
        "price_date": price.date,
        "usd_of_this_attempt": round(price.usd_per_h * total_s / 3600, 6),
        "note": "one host, on demand, this attempt, without the time the platform adds before and after",
    }
