"""Trials out of HDF5 on S3: the byte index and ranged reads against what else there is, on the same plan of batches.

    make bench/hdf5_s3                                            # some 5 min; 1.7 GB in a temporary folder
    python benchmarks/hdf5_s3.py --peers local,ours_cold --seconds 5 --rounds 1

Needs what `make bench/hdf5_s3` installs: brain-to-text's requirements, s3fs, s3torchconnector; no image. The endpoint
(endpoint/shaped_s3.py: 25 ms a request, 90 MB/s a connection) takes little of the cores that it shares with clients.
Every peer runs in a process of its own, draws the same batches (64 trials of 4 days), reopens files for each batch as
the reference trainer does, and stops after some seconds. Rounds in turn; goals are medians of each round's ratio. GETs
are counted from the server's log, bytes from the loopback device: nothing else should use it meanwhile. Peers that
train on converted data are not here: converting is what this spares.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUCKET, KEY, SECRET = "brain", "bench", "not-a-secret"
LATENCY_MS, MB_PER_S = 25, 90
SESSIONS, TRIALS = 8, 100
BATCH, DAYS, SEED = 64, 4, 1
PEERS = {
    "local": "h5py on a local disk, reopened per batch",
    "s3fs": "s3fs as it comes (the guide)",
    "s3fs_tuned": "s3fs, background cache 2 MB x 128",
    "obstore_file": "h5py over obstore's file object",
    "connector_whole": "s3torchconnector, whole object",
    "connector_ranged": "s3torchconnector, ranged",
    "ours_cold": "byte index, one GET a trial, no cache",
    "ours_warm": "the same, trials in memory",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each peer, beyond its first batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    parser.add_argument("--data", type=Path, help="keep the made-up data here, and use what is there")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "images/brain-to-text")]
    if options.peer:
        print(json.dumps(run_peer(options.peer, options.seconds)))
        return 0
    with tempfile.TemporaryDirectory(prefix="hdf5-s3-") as folder:
        try:
            found = measure(options, Path(folder))
        except ModuleNotFoundError as error:
            print(f"needs {error.name}; `make bench/hdf5_s3` installs it", file=sys.stderr)
            return 2
    return report(found, options.results)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from brain_to_text.generator import make_dataset

    served = options.data or folder / "served"
    data = make_dataset(
        served / BUCKET / "data", sessions=options.sessions, trials=TRIALS, held_out_trials=1, bins_per_phoneme=28.0
    )
    size_mb = sum(path.stat().st_size for path in data.rglob("data_train.hdf5")) / 1e6
    count = options.sessions * TRIALS
    found: dict[str, Any] = {"trials": count, "mb_per_trial": round(size_mb / count, 2)}
    with endpoint(served, folder / "server.log") as (url, log):
        environ = {
            **os.environ, "AWS_ENDPOINT_URL_S3": url, "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1", "BENCH_DATA": str(data),
            "BENCH_INDEX": str(folder / "index"), "PYTHONPATH": os.pathsep.join(sys.path[:2]),
        }  # fmt: skip
        environ.pop("AWS_SESSION_TOKEN", None)
        names = options.peers.split(",")
        if strange := [name for name in names if name not in PEERS]:
            raise SystemExit(f"--peers {', '.join(strange)}: is none of {', '.join(PEERS)}")
        if any(name.startswith("ours") for name in names):  # the index is made once for everybody, before
            found["index_s"] = run("ours_cold", 0.0, environ).get("open_s")
        wanted_bytes = size_mb * 1e6 / count
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(options.rounds):
            print(f"round {turn + 1} of {options.rounds}", flush=True)
            for name in names if turn % 2 == 0 else names[::-1]:
                answer = one_turn(name, options.seconds, environ, log, wanted_bytes)
                rounds[name].append(answer)
                print(f"  {PEERS[name]:<44}{line_of(answer)}", flush=True)
    found["peers"] = {name: summary(answers) for name, answers in rounds.items()}
    found["rounds"] = rounds
    return found


def one_turn(name: str, seconds: float, environ: dict[str, str], log: Path, bytes_per_trial: float) -> dict[str, Any]:
    before = gets_in(log), loopback_bytes()
    answer = run(name, seconds, environ)
    time.sleep(0.3)
    gets, moved = gets_in(log) - before[0], loopback_bytes() - before[1]
    if "error" not in answer and name not in ("local", "ours_warm"):
        answer["gets_per_trial"] = round(gets / answer["read_trials"], 2)
        answer["fetched_per_used"] = round(moved / (answer["read_trials"] * bytes_per_trial), 3)
    return answer


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; the first error where there was one."""
    failed = [answer for answer in answers if "error" in answer]
    if failed:
        return failed[0]
    return {key: round(statistics.median(answer[key] for answer in answers), 3) for key in answers[0]}


def line_of(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return f"did not run: {answer['error']}"
    text = f"{answer['trials_per_s']:>9.1f} trials/s, first batch {answer['first_batch_s']:.2f} s"
    if "gets_per_trial" in answer:
        text += f", {answer['gets_per_trial']:.2f} GETs a trial, {answer['fetched_per_used']:.2f} x the bytes"
    return text


def run(name: str, seconds: float, environ: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--peer", name, "--seconds", str(seconds)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=seconds * 4 + 120)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:200]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


@contextmanager
def endpoint(served: Path, log: Path) -> Iterator[tuple[str, Path]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = ROOT / "benchmarks/endpoint/shaped_s3.py"
    command = [
        sys.executable, str(program), str(served), "--port", str(port), "--latency-ms", str(LATENCY_MS),
        "--mb-per-s", str(MB_PER_S),
    ]  # fmt: skip
    with open(log, "wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", log
    finally:
        server.terminate()
        server.wait()


def gets_in(log: Path) -> int:
    return len(re.findall(rb'"GET /[^ ]*\.hdf5', log.read_bytes()))


def loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/rx_bytes").read_text())


# In the peer's own process --------------------------------------------------------------------------------------


def run_peer(name: str, seconds: float) -> dict[str, Any]:
    """Read batches of the plan for some seconds, the first one apart."""
    if name.startswith("ours"):
        return run_ours(name, seconds)
    open_file = OPENERS[name]()
    trials = plan_of()
    began = time.perf_counter()
    read_trials = read_batch(open_file, trials(0), budget_s=4 * seconds)
    first_s = time.perf_counter() - began
    began, step, more = time.perf_counter(), 1, 0
    while time.perf_counter() - began < seconds:
        if first_s > seconds and step > 1:
            break
        more += read_batch(open_file, trials(step), budget_s=seconds - (time.perf_counter() - began))
        step += 1
    took = time.perf_counter() - began
    return {
        "trials_per_s": round(more / took, 2),
        "first_batch_s": round(first_s, 3),
        "read_trials": read_trials + more,
    }


def plan_of() -> Callable[[int], list[tuple[str, str]]]:
    """(session, trial) of each step, as ours draws them."""
    from brain_to_text.reading.plan import SeededPlan

    sessions = sorted(path.parent.name for path in Path(os.environ["BENCH_DATA"]).glob("*/data_train.hdf5"))
    plan = SeededPlan([TRIALS] * len(sessions), batch_size=BATCH, days_per_batch=DAYS, seed=SEED)
    return lambda step: [(sessions[one // TRIALS], f"trial_{one % TRIALS:04d}") for one in plan.trials(step).tolist()]


def read_batch(open_file: Callable[[str], Any], trials: list[tuple[str, str]], budget_s: float) -> int:
    """As the reference trainer's __getitem__: a file a day, its trials one by one. Ends early when out of time."""
    import h5py
    import numpy as np

    began, count, rows = time.perf_counter(), 0, []
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
                if budget_s and time.perf_counter() - began > budget_s:
                    return count
    padded = np.zeros((len(rows), max(len(row) for row in rows), rows[0].shape[1]), np.float32)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
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

    from estiba.s3 import S3ObjectStore

    class Whole(io.RawIOBase):
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
    return lambda key: Whole(obstore.open_reader(store, key, buffer_size=128 * 1024))


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
    from brain_to_text.data import Trials
    from estiba.stop import Stop

    began = time.perf_counter()
    trials = Trials.open(
        f"s3://{BUCKET}/data", sessions=None, split="train", stop=Stop(), seed=SEED, batch_size=BATCH,
        days_per_batch=DAYS, cache_bytes=0 if name == "ours_cold" else 2**33, disk_cache=None, n_classes=41,
        n_features=512, workers=2, index_path=os.environ["BENCH_INDEX"],
    )  # fmt: skip
    if not seconds:
        trials.close()
        return {"open_s": round(time.perf_counter() - began, 2)}
    trials.batch(0)
    first_s = time.perf_counter() - began
    if name == "ours_warm":
        for ids in trials.sweep(BATCH):
            trials.read(ids)
        for step in range(1, 20):
            trials.batch(step)
    gets, fetched = trials.statistics()["gets"], trials.statistics()["bytes_fetched"]
    began, step, count = time.perf_counter(), 1, 0
    while time.perf_counter() - began < seconds:
        count += len(trials.batch(step).trial)
        step += 1
    took = time.perf_counter() - began
    counts = trials.statistics()
    trials.close()
    used = counts["bytes_used"]
    return {
        "trials_per_s": round(count / took, 2),
        "first_batch_s": round(first_s, 3),
        "read_trials": max(1, round(used / (counts["bytes_fetched"] / max(1, counts["gets"])))),
        "drawn_trials": count,
        "own_gets": counts["gets"] - gets,
        "own_bytes_fetched": counts["bytes_fetched"] - fetched,
        "hedged": counts["hedged"],
        "retries": counts["retries"],
    }


def report(found: dict[str, Any], results: Path | None) -> int:
    turns = found["rounds"]

    def times(mine: str, *others: str) -> float | None:
        """The median over rounds of ours against the fastest of the others."""
        ratios = []
        for turn in range(len(turns.get(mine, []))):
            rates = [turns[name][turn].get("trials_per_s") for name in others if name in turns]
            fastest = max((rate for rate in rates if rate), default=None)
            if fastest and (own := turns[mine][turn].get("trials_per_s")):
                ratios.append(own / fastest)
        return round(statistics.median(ratios), 2) if ratios else None

    ours = found["peers"].get("ours_cold", {})
    goals = [
        goal(label, value, least, least=True)
        for label, value, least in (
            ("cold, times local h5py", times("ours_cold", "local"), 1.0),
            ("warm, times local h5py", times("ours_warm", "local"), 4.0),
            ("cold, times s3fs as it comes", times("ours_cold", "s3fs"), 500.0),
            ("cold, times the best tuned s3fs", times("ours_cold", "s3fs_tuned"), 40.0),
            ("cold, times the best s3torchconnector", times("ours_cold", "connector_whole", "connector_ranged"), 20.0),
        )
    ]
    goals.append(goal("bytes fetched / used", ours.get("fetched_per_used"), 1.01, least=False))
    goals.append(goal("first batch with an index, s", ours.get("first_batch_s"), 0.5, least=False))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    document = {
        "benchmark": "hdf5_s3",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, shared by server and client; "
        f"{LATENCY_MS} ms a request, {MB_PER_S} MB/s a connection",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "results": found,
        "goals": goals,
    }
    if results:
        results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(json.dumps(document))
    return 0


def goal(name: str, value: float | None, bound: float, *, least: bool) -> dict[str, Any]:
    met = value is not None and (value >= bound if least else value <= bound)
    return {"name": name, "value": value, "goal": f"{'>=' if least else '<='}{bound:g}", "met": met}


if __name__ == "__main__":
    sys.exit(main())
