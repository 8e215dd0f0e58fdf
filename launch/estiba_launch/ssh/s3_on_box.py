"""Move objects between S3 and /data; runs inside the job's image, which has boto3. Standard library and boto3 only.

s3.py get s3://BUCKET/PREFIX     bring every object below the prefix that differs in size
s3.py sync s3://BUCKET/PREFIX    carry changes and deletes of /data there every 30 s, and once more on TERM
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import boto3
from botocore.config import Config

ROOT = "/data"
EVERY_S = 30

stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
s3 = boto3.client("s3", config=Config(retries={"mode": "standard", "total_max_attempts": 10}))
what, address = sys.argv[1:]
bucket, _, prefix = address.removeprefix("s3://").partition("/")
prefix = prefix.strip("/")


def objects(start: str) -> Iterator[tuple[str, int]]:
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start):
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):
                yield entry["Key"], entry["Size"]


def get() -> None:
    below = f"{prefix}/" if prefix else ""
    found = [(key, key[len(below) :], size) for key, size in objects(below)]
    # S3's own meaning: a prefix is any beginning of a key.
    cut = len(prefix) - len(prefix.rpartition("/")[2])
    found = found or [(key, key[cut:], size) for key, size in objects(prefix)]
    for key, name, size in found:
        path = os.path.join(ROOT, name)
        if os.path.realpath(path) != path:
            sys.exit(f"{key}: leads out of the folder")
        if not os.path.exists(path) or os.path.getsize(path) != size:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            s3.download_file(bucket, key, path)
    print(f"{address}: {len(found)} objects, {sum(size for _, _, size in found)} bytes", file=sys.stderr)


def look() -> dict[str, tuple[int, int]]:
    seen: dict[str, tuple[int, int]] = {}
    for folder, _, names in os.walk(ROOT):
        for name in names:
            path = os.path.join(folder, name)
            try:
                if not os.path.islink(path):
                    status = os.stat(path)
                    seen[os.path.relpath(path, ROOT)] = (status.st_size, status.st_mtime_ns)
            except FileNotFoundError:
                pass
    return seen


def sync() -> None:
    sent = look()
    print("ready", file=sys.stderr, flush=True)
    while True:
        last = stop.wait(EVERY_S)
        try:
            now = look()
            # Manifests name the other files, so what is small and newest goes last.
            for name in sorted(set(now), key=lambda name: now[name][1]):
                if sent.get(name) != now[name]:
                    try:
                        s3.upload_file(os.path.join(ROOT, name), bucket, f"{prefix}/{name}" if prefix else name)
                        sent[name] = now[name]
                    except FileNotFoundError:
                        pass
            for name in set(sent) - set(now):
                s3.delete_object(Bucket=bucket, Key=f"{prefix}/{name}" if prefix else name)
                del sent[name]
        except Exception as error:
            print(f"checkpoints not synced, trying again: {error}", file=sys.stderr)
            time.sleep(5)
        else:
            if last:
                return


get() if what == "get" else sync()
