"""Moves objects between S3 and /data on a remote host, inside the job's image, which has boto3.

agent.py get s3://BUCKET/PREFIX
    download every object below the prefix that differs in size
agent.py sync s3://BUCKET/PREFIX DIR
    download all, then upload changes and carry out deletes every 30 s, and once more on TERM; exits with 1 and says on
    the last line what is not in the store then. DIR is where the job's containers have the folder.

Imports the standard library, boto3, and the files of this package that are copied to the host beside it.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

from estiba_launch.errors import HostError
from estiba_launch.jobs.s3 import S3Store
from estiba_launch.jobs.sync import CheckpointSync, describe

ROOT = Path("/data")
LEDGER = Path("/state/known.json")
EVERY_S = 30
RETRY_S = 5
LAST_S = 540
"""Seconds for the last sync, before the engine kills this container."""
LAST_TRIES = 3
"""For files that the store refuses while it takes others, or a folder that is gone."""
ATTEMPTS = 10


def say(text: object) -> None:
    print(text, file=sys.stderr, flush=True)


def sync(store: S3Store, mounted_at: str) -> None:
    """`mounted_at` is where the job has the folder. Raises HostError when something is not in the store at the end."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    host = CheckpointSync(ROOT, store, ledger=LEDGER, report=say, mounted_at=mounted_at)
    if LEDGER.exists():
        host.adopt()
    else:
        files, size_bytes = host.restore()
        say(f"{store.uri}: restored {files} files, {size_bytes} bytes")
    say("ready")
    failing = False
    while not stopped.wait(EVERY_S):
        try:
            host.push()
            failing = False
        except Exception as error:
            if not failing:
                say(f"checkpoints not synced, trying again: {error}")
            failing = True
    last(host)


def last(host: CheckpointSync) -> None:
    until, tries = time.monotonic() + LAST_S, 0
    while True:
        tries += 1
        waits = tries < LAST_TRIES
        try:
            problems = host.push(last=True).problems
            if not problems:
                return
            error = HostError(describe(problems))
        except Exception as failed:
            error = HostError(str(failed))
            # The store may come back. A folder that is gone will not.
            waits = waits or (host.local.is_dir() and time.monotonic() < until)
        if not waits:
            raise error
        say(f"last sync failed, trying again: {error}")
        time.sleep(RETRY_S)


if __name__ == "__main__":
    task, address, *more = sys.argv[1:]
    try:
        if task == "get":
            store, found = S3Store(address, attempts=ATTEMPTS).matching()
            store.get_changed(found, ROOT)
            say(f"{address}: {len(found)} objects")
        else:
            sync(S3Store(address, attempts=ATTEMPTS, report=say), *more)
    except HostError as error:
        sys.exit(str(error))
