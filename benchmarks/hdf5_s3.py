# environment: torch
"""Reading trials from HDF5 on S3: the byte index with ranged reads compared with other readers, on the same batches.

    make bench/hdf5_s3                                            # about 5 min; 1.7 GB in a temporary folder
    python benchmarks/hdf5_s3.py --peers local,ours_cold --seconds 5 --rounds 1

Needs what `make bench/hdf5_s3` installs: brain-to-text's requirements, s3fs, s3torchconnector; no image. The S3 server
(endpoint/shaped_s3.py: 25 ms per request, 90 MB/s per connection) shares the cores with the clients, but needs little.
Every peer runs in its own process, reads the same batches (64 trials from 4 days), reopens files for each batch as
upstream does, and stops after a few seconds. Peers alternate; goals are medians of the ratios of each round. GETs are
counted in the server's log and bytes on the loopback device, so nothing else should use it meanwhile. Peers that need
converted data are not included, because avoiding the conversion is the point.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from shaped_endpoint import shaped_endpoint  # type: ignore[import-not-found]  # noqa: E402

BUCKET, KEY, SECRET = "brain", "bench", "not-a-secret"
LATENCY_MS, MB_PER_S = 25, 90
SESSIONS, TRIALS = 8, 100
BATCH, DAYS, SEED = 64, 4, 1
PEERS = {
    "local": "h5py on a local disk, reopened per batch",
    "s3fs": "s3fs with its defaults (the guide)",
    "s3fs_tuned": "s3fs, background cache 2 MB x 128",
    "obstore_file": "h5py over obstore's file object",
    "connector_whole": "s3torchconnector, whole object",
    "connector_ranged": "s3torchconnector, ranged",
    "ours_cold": "byte index, one GET per trial, no cache",
    "ours_warm": "the same, trials in memory",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds per peer, after its first batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    parser.add_argument("--data", type=Path, help="keep the generated data in this folder, and reuse it")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "images/brain-to-text")]
    if options.peer:
        print(json.dumps(run_peer(options.peer, options.seconds)))
        return 0
    with tempfile.TemporaryDirectory(prefix="hdf5-s3-") as folder:
        try:
            results = measure(options, Path(folder))
        except ModuleNotFoundError as error:
            print(f"needs {error.name}; `make bench/hdf5_s3` installs it", file=sys.stderr)
            return 2
    return report(results, options.results)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from brain_to_text.synthetic.generator import make_dataset

    served = options.data or folder / "served"
    data = make_dataset(
        served / BUCKET / "data", sessions=options.sessions, trials=TRIALS, held_out_trials=1, bins_per_phoneme=28.0
    )
    size_mb = sum(path.stat().st_size for path in data.rglob("data_train.hdf5")) / 1e6
    count = options.sessions * TRIALS
    results: dict[str, Any] = {"trials": count, "mb_per_trial": round(size_mb / count, 2)}
    with endpoint(served, folder / "server.log") as (url, log):
        environ = {
            **os.environ, "AWS_ENDPOINT_URL_S3": url, "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1", "BENCH_DATA": str(data),
            "BENCH_INDEX": str(folder / "index"), "PYTHONPATH": os.pathsep.join(sys.path[:2]),
        }  # fmt: skip
        environ.pop("AWS_SESSION_TOKEN", None)
        names = options.peers.split(",")
        if unknown := [name for name in names if name not in PEERS]:
            raise SystemExit(f"--peers: unknown {', '.join(unknown)}; available: {', '.join(PEERS)}")
        if any(name.startswith("ours") for name in names):  # build the index before the rounds
            results["index_s"] = run("ours_cold", 0.0, environ).get("open_s")
        bytes_per_trial = size_mb * 1e6 / count
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(options.rounds):
            print(f"round {turn + 1} of {options.rounds}", flush=True)
            for name in names if turn % 2 == 0 else names[::-1]:
                measured = one_turn(name, options.seconds, environ, log, bytes_per_trial)
                rounds[name].append(measured)
                print(f"  {PEERS[name]:<44}{line_of(measured)}", flush=True)
    results["peers"] = {name: summary(measurements) for name, measurements in rounds.items()}
    results["rounds"] = rounds
    return results


def one_turn(name: str, seconds: float, environ: dict[str, str], log: Path, bytes_per_trial: float) -> dict[str, Any]:
    before = gets_in(log), loopback_bytes()
    measured = run(name, seconds, environ)
    time.sleep(0.3)
    gets, received_bytes = gets_in(log) - before[0], loopback_bytes() - before[1]
    if "error" not in measured and name not in ("local", "ours_warm"):
        measured["gets_per_trial"] = round(gets / measured["read_trials"], 2)
        measured["fetched_per_used"] = round(received_bytes / (measured["read_trials"] * bytes_per_trial), 3)
    return measured


def summary(measurements: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each number, or the first error if there was one."""
    failed = [measured for measured in measurements if "error" in measured]
    if failed:
        return failed[0]
    return {key: round(statistics.median(measured[key] for measured in measurements), 3) for key in measurements[0]}


def line_of(measured: dict[str, Any]) -> str:
    if "error" in measured:
        return f"did not run: {measured['error']}"
    text = f"{measured['trials_per_s']:>9.1f} trials/s, first batch {measured['first_batch_s']:.2f} s"
    if "gets_per_trial" in measured:
        text += f", {measured['gets_per_trial']:.2f} GETs per trial, {measured['fetched_per_used']:.2f} x the bytes"
    return text


def run(name: str, seconds: float, environ: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--peer", name, "--seconds", str(seconds)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=seconds * 4 + 120)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:200]}
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


@contextmanager
def endpoint(served: Path, log: Path) -> Iterator[tuple[str, Path]]:
    with shaped_endpoint(served, log, "--latency-ms", str(LATENCY_MS), "--mb-per-s", str(MB_PER_S)) as server:
        yield server.url, log


def gets_in(log: Path) -> int:
    return len(re.findall(rb'"GET /[^ ]*\.hdf5', log.read_bytes()))


def loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/rx_bytes").read_text())


# In the peer's process --------------------------------------------------------------------------------------


def run_peer(name: str, seconds: float) -> dict[str, Any]:
    """Read batches for some seconds. The first batch is timed separately."""
    if name.startswith("ours"):
        return run_ours(name, seconds)
    open_file = OPENERS[name]()
    trials = batch_plan()
    started = time.perf_counter()
    read_trials = read_batch(open_file, trials(0), budget_s=4 * seconds)
    first_s = time.perf_counter() - started
    started, step, later_trials = time.perf_counter(), 1, 0
    while time.perf_counter() - started < seconds:
        if first_s > seconds and step > 1:
            break
        later_trials += read_batch(open_file, trials(step), budget_s=seconds - (time.perf_counter() - started))
        step += 1
    elapsed_s = time.perf_counter() - started
    return {
        "trials_per_s": round(later_trials / elapsed_s, 2),
        "first_batch_s": round(first_s, 3),
        "read_trials": read_trials + later_trials,
    }


def batch_plan() -> Callable[[int], list[tuple[str, str]]]:
    """Return a function that returns (session, trial) of each trial of a step, as our sampler draws them."""
    from brain_to_text.data.sampler import SeededSampler

    sessions = sorted(path.parent.name for path in Path(os.environ["BENCH_DATA"]).glob("*/data_train.hdf5"))
    sampler = SeededSampler([TRIALS] * len(sessions), batch_size=BATCH, days_per_batch=DAYS, seed=SEED)
    return lambda step: [
        (sessions[trial // TRIALS], f"trial_{trial % TRIALS:04d}") for trial in sampler.trials(step).tolist()
    ]


def read_batch(open_file: Callable[[str], Any], trials: list[tuple[str, str]], budget_s: float) -> int:
    """Read like upstream's __getitem__: one file per day, its trials one by one. Stops early when out of time."""
    import h5py
    import numpy as np

    started, count, rows = time.perf_counter(), 0, []
    for session in dict.fromkeys(session for session, _ in trials):
        with open_file(f"{session}/data_train.hdf5") as opened, h5py.File(opened, "r") as file:
            for day, name in trials:
                if day != session:
                    continue
                group = file[name]
                rows.append(group["input_features"][:])
                for dataset in ("seq_class_ids", "transcription"):
                    group[dataset][:]
                for attribute in ("n_time_steps", "seq_len", "block_num", "trial_num"):
                    group.attrs[attribute]
                count += 1
                if budget_s and time.perf_counter() - started > budget_s:
                    return count
    padded = np.zeros((len(rows), max(len(row) for row in rows), rows[0].shape[1]), np.float32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return count


def local() -> Callable[[str], Any]:
    data = Path(os.environ["BENCH_DATA"])
    return lambda key: nullcontext(data / key)


def s3fs_with(**options: Any) -> Callable[[str], Any]:
    import s3fs

    system = s3fs.S3FileSystem(
        key=KEY,
        secret=SECRET,
        client_kwargs={"endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"], "region_name": "us-east-1"},
    )
    return lambda key: system.open(f"{BUCKET}/data/{key}", "rb", **options)


def obstore_file() -> Callable[[str], Any]:
    import obstore

    from estiba.storage.s3 import S3ObjectStore

    class ObstoreFile(io.RawIOBase):
        def __init__(self, reader: Any) -> None:
            self.reader = reader

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            return int(self.reader.seek(offset, whence))

        def tell(self) -> int:
            return int(self.reader.tell())

        def readinto(self, buffer: Any) -> int:
            data = self.reader.read(len(buffer))
            buffer[: len(data)] = memoryview(data)
            return len(data)

    store = S3ObjectStore(f"s3://{BUCKET}/data").client
    return lambda key: ObstoreFile(obstore.open_reader(store, key, buffer_size=128 * 1024))


def connector(kind: str) -> Callable[[str], Any]:
    from s3torchconnector import S3ClientConfig, S3MapDataset, S3ReaderConstructor

    constructor = S3ReaderConstructor.sequential() if kind == "whole" else S3ReaderConstructor.range_based()

    def open_one(key: str) -> Any:
        dataset = S3MapDataset.from_objects(
            [f"s3://{BUCKET}/data/{key}"], region="us-east-1", endpoint=os.environ["AWS_ENDPOINT_URL_S3"],
            s3client_config=S3ClientConfig(force_path_style=True), transform=lambda reader: reader,
            reader_constructor=constructor,
        )  # fmt: skip
        return nullcontext(dataset[0])

    return open_one


OPENERS: dict[str, Callable[[], Callable[[str], Any]]] = {
    "local": local,
    "s3fs": lambda: s3fs_with(),
    "s3fs_tuned": lambda: s3fs_with(cache_type="background", block_size=2 * 2**20, cache_options={"maxblocks": 128}),
    "obstore_file": obstore_file,
    "connector_whole": lambda: connector("whole"),
    "connector_ranged": lambda: connector("ranged"),
}


def run_ours(name: str, seconds: float) -> dict[str, Any]:
    from brain_to_text.config import BrainConfig
    from brain_to_text.data.opening import open_trials
    from estiba.platform.stop import Stop

    started = time.perf_counter()
    config = BrainConfig(
        dataset_dir=f"s3://{BUCKET}/data", dataset_seed=SEED, batch_size=BATCH, days_per_batch=DAYS,
        cache_gb=0.0 if name == "ours_cold" else 8.0, num_dataloader_workers=2, index_path=os.environ["BENCH_INDEX"],
    )  # fmt: skip
    trials = open_trials(config, "train", Stop(), sessions=None)
    if not seconds:
        trials.close()
        return {"open_s": round(time.perf_counter() - started, 2)}
    trials.batch(0)
    first_s = time.perf_counter() - started
    if name == "ours_warm":
        for ids in trials.sweep(BATCH):
            trials.read(ids)
        for step in range(1, 20):
            trials.batch(step)
    gets, fetched = trials.statistics()["gets"], trials.statistics()["bytes_fetched"]
    started, step, count = time.perf_counter(), 1, 0
    while time.perf_counter() - started < seconds:
        count += len(trials.batch(step).trial)
        step += 1
    elapsed_s = time.perf_counter() - started
    counts = trials.statistics()
    trials.close()
    used = counts["bytes_used"]
    return {
        "trials_per_s": round(count / elapsed_s, 2),
        "first_batch_s": round(first_s, 3),
        "read_trials": max(1, round(used / (counts["bytes_fetched"] / max(1, counts["gets"])))),
        "drawn_trials": count,
        "own_gets": counts["gets"] - gets,
        "own_bytes_fetched": counts["bytes_fetched"] - fetched,
        "hedged": counts["hedged"],
        "retries": counts["retries"],
    }


def report(results: dict[str, Any], path: Path | None) -> int:
    rounds = results["rounds"]

    def speedup(ours: str, *others: str) -> float | None:
        """Return our speed relative to the fastest of the others, as a median over rounds."""
        ratios = []
        for turn in range(len(rounds.get(ours, []))):
            rates = [rounds[name][turn].get("trials_per_s") for name in others if name in rounds]
            fastest = max((rate for rate in rates if rate), default=None)
            if fastest and (own := rounds[ours][turn].get("trials_per_s")):
                ratios.append(own / fastest)
        return round(statistics.median(ratios), 2) if ratios else None

    cold = results["peers"].get("ours_cold", {})
    connectors = ("connector_whole", "connector_ranged")
    goals = [
        goal("cold, times local h5py", speedup("ours_cold", "local"), ">=1"),
        goal("warm, times local h5py", speedup("ours_warm", "local"), ">=4"),
        goal("cold, times s3fs with its defaults", speedup("ours_cold", "s3fs"), ">=500"),
        goal("cold, times the best tuned s3fs", speedup("ours_cold", "s3fs_tuned"), ">=40"),
        goal("cold, times the best s3torchconnector", speedup("ours_cold", *connectors), ">=20"),
        goal("bytes fetched / used", cold.get("fetched_per_used"), "<=1.01"),
        goal("first batch with an index, s", cold.get("first_batch_s"), "<=0.5"),
    ]
    network = f"{LATENCY_MS} ms per request, {MB_PER_S} MB/s per connection"
    publish("hdf5_s3", results, goals, conditions=f"shared by server and client; {network}", path=path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
