"""Fill a folder with everything one image installs, so that its build needs no network.

    python scripts/wheelhouse.py --python 3.11 base embed embed-test

fills .build/wheels/base-py311 from images/base/requirements.txt and torch.txt, embed-py311 from
images/embed/requirements.txt, and embed-test-py311 with what tests/images/embed/requirements.txt adds to that.

Runs with any Python >= 3.11 that has pip (`scripts/env.sh` makes one), standard library only. Markers are decided for
the target Python and Linux, not for this machine. Every file is checked against the lock's hashes. A package that has
no wheel is kept as its source distribution; images/base compiles it inside the build. The folder also gets
`requirements.txt`, exact pins for this one target, which is what the Dockerfile installs.

Files that an image takes out of a package without installing it (images/NAME/data.txt) go into the folder's `share`.
`--share FOLDER NAME` puts only those into FOLDER, for a Python on this machine.

A stamp over the inputs makes a second call take no time. pip's own configuration (mirror, find-links, CA) is used.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".build" / "wheels"

# The one index named in this project: PyTorch's own, asked for CPU builds only, and only when pip's own
# configuration has none.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# glibc of the oldest base (Amazon Linux 2023: 2.34; Debian 12: 2.36) down to the oldest tag still published.
MANYLINUX = [f"manylinux_2_{minor}" for minor in range(34, 4, -1)] + ["manylinux2014", "manylinux2010", "manylinux1"]

ATTEMPTS = 3


class WheelhouseError(Exception):
    """A wheelhouse could not be filled; the message says what to do."""


def lock_of(name: str) -> Path:
    """The lock a wheelhouse name stands for: an image's, or (`<image>-test`) that of the tests inside it."""
    image = name.removesuffix("-test")
    path = ROOT / ("tests/images" if image != name else "images") / image / "requirements.txt"
    if not path.exists():
        raise WheelhouseError(
            f"{path.relative_to(ROOT)}: no such lock; write requirements.in beside it and run `make lock`"
        )
    return path


def environment(python: str) -> dict[str, str]:
    """PEP 508 marker values of the target: CPython `python` ("3.11") on Linux, on this machine's architecture."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine(),
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
        "extra": "",
    }


def machine() -> str:
    """The architecture of containers here; macOS calls arm64 what Linux calls aarch64."""
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())


def requirements(lock: Path) -> list[str]:
    """The lock's entries, one logical line each: name==version ; marker --hash=...; comments dropped."""
    text = re.sub(r"\\\n", " ", lock.read_text())
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def for_target(lines: list[str], python: str) -> list[str]:
    """Only the entries whose marker holds on the target, without the marker."""
    from pip._vendor.packaging.markers import Marker  # the library itself, in the one place that is always there

    kept = []
    for line in lines:
        requirement, *hashes = line.split(" --hash=")
        pin, _, marker = requirement.partition(";")
        if not marker or Marker(marker.strip()).evaluate(environment(python)):
            kept.append(" ".join([pin.strip(), *(f"--hash={h.strip()}" for h in hashes)]))
    return kept


def pip_download(folder: Path, python: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`pip download` of wheels for the target into `folder`, its output captured."""
    tags = [f"--platform={tag}_{machine()}" for tag in MANYLINUX]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet",
               f"--dest={folder}", f"--python-version={python}", "--implementation=cp", *tags, *arguments]  # fmt: skip
    return subprocess.run(command, text=True, capture_output=True)


def fetch_locked(folder: Path, python: str, lines: list[str]) -> None:
    """All entries of a lock: wheels where there are any, else the source distribution."""
    listing = folder / ".fetch.txt"
    listing.write_text("\n".join(lines) + "\n")
    for attempt in range(ATTEMPTS):
        done = pip_download(folder, python, ["--prefer-binary", "-r", str(listing)])
        if done.returncode == 0:
            break
        if attempt == ATTEMPTS - 1 or "hash" in done.stderr.lower():
            raise WheelhouseError(f"pip could not fetch the locked packages:\n{done.stderr.strip()}")
    listing.unlink()


def fetch_data(share: Path, python: str, listing: Path) -> None:
    """The files of `listing` (lines of NAME==VERSION --hash=sha256:... PATH...), each as `share`/NAME/FILE."""
    for line in requirements(listing):
        pin, hashed, *paths = line.split(" ")
        with tempfile.TemporaryDirectory() as temporary:
            fetch_locked(Path(temporary), python, [f"{pin} {hashed}"])
            (wheel,) = Path(temporary).glob("*.whl")
            place = share / pin.split("==")[0]
            place.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                for path in paths:
                    (place / Path(path).name).write_bytes(archive.read(path))


def fetch_torch(folder: Path, python: str, pin: str) -> None:
    """The CPU build of torch: `pin` names it with its +cpu tag, so that no CUDA build can answer."""
    if "+cpu" not in pin:
        raise WheelhouseError(f"images/base/torch.txt: {pin!r} does not name a CPU build; write it as torch==X.Y.Z+cpu")
    wanted = ["--only-binary=:all:", pin]
    if pip_download(folder, python, wanted).returncode == 0:
        return
    done = pip_download(folder, python, [f"--index-url={TORCH_CPU_INDEX}", *wanted])
    if done.returncode != 0:
        raise WheelhouseError(
            f"neither pip's configuration nor {TORCH_CPU_INDEX} gives {pin} for Python {python}.\n"
            f"{done.stderr.strip()}\nPut its wheel into a folder and set PIP_FIND_LINKS to it."
        )


def fingerprint(sources: list[Path], python: str) -> str:
    """What the folder's content depends on."""
    digest = hashlib.sha256(f"{python} {machine()}".encode())
    for path in [Path(__file__), *sources]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fill(name: str, python: str) -> Path:
    """Make `.build/wheels/<name>-py<NN>` hold exactly what the lock says; return it. Done already: returns at once."""
    lock, torch, data = lock_of(name), ROOT / f"images/{name}/torch.txt", ROOT / f"images/{name}/data.txt"
    inside = [lock_of(name.removesuffix("-test"))] if name.endswith("-test") else []
    sources = [path for path in (lock, torch, data, *inside) if path.exists()]
    final = WHEELS / f"{name}-py{python.replace('.', '')}"
    # Beside the folder, not in it: builds are cached by the folder's content.
    stamp, wanted = final.with_suffix(".stamp"), fingerprint(sources, python)
    if final.exists() and stamp.exists() and stamp.read_text() == wanted:
        return final

    print(f"wheelhouse: fetching {name} for Python {python}", file=sys.stderr, flush=True)
    WHEELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WHEELS, prefix=f".{name}-") as temporary:
        folder = Path(temporary) / "wheels"
        folder.mkdir()
        for kept in [*final.glob("*.whl"), *final.glob("*.tar.gz")]:  # pip checks the hash again and skips the download
            shutil.copy2(kept, folder)
        before = {path.name for path in folder.iterdir()}
        there_already = {line for path in inside for line in for_target(requirements(path), python)}
        lines = [line for line in for_target(requirements(lock), python) if line not in there_already]
        fetch_locked(folder, python, lines)
        pins = [line.split(" --hash=")[0] for line in lines]
        if torch.exists():
            (pin,) = requirements(torch)
            fetch_torch(folder, python, pin)
            pins.append(pin)
        if data.exists():
            fetch_data(folder / "share", python, data)
        forget_unlocked(folder, before, pins)
        refuse_cuda(folder)
        (folder / "requirements.txt").write_text("\n".join(pins) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        stamp.write_text(wanted)
    return final


def forget_unlocked(folder: Path, old: set[str], pins: list[str]) -> None:
    """Drop files of an earlier lock: those whose name and version are no longer pinned."""
    keys = {(normal(pin.split("==")[0]), pin.split("==")[1]) for pin in pins}
    for filename in old:
        stem = filename.removesuffix(".tar.gz")
        project, version = stem.rsplit("-", 1) if stem != filename else filename.split("-")[:2]
        if (normal(project), version) not in keys:
            (folder / filename).unlink()


def normal(project: str) -> str:
    """PEP 503 spelling of a project name."""
    return re.sub(r"[-_.]+", "-", project).lower()


def refuse_cuda(folder: Path) -> None:
    """Nothing of CUDA belongs into the stand-in, whatever a lock says."""
    found = [path.name for path in folder.glob("*.whl") if re.match(r"(nvidia_|triton-|cuda_)", path.name)]
    if found:
        raise WheelhouseError(
            f"refused: {', '.join(found)}; add these names to images/excludes.txt and run `make lock`"
        )


def main() -> int:
    """Fill the wheelhouses named on the command line; 1, with a message, if one cannot be filled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="an image, or IMAGE-test")
    parser.add_argument("--python", default="3.11", metavar="X.Y", help="Python of the base (default: 3.11, Debian 12)")
    parser.add_argument("--share", type=Path, metavar="FOLDER", help="only put the files of data.txt there")
    arguments = parser.parse_args()
    try:
        for name in arguments.names:
            if arguments.share:
                fetch_data(arguments.share, arguments.python, ROOT / f"images/{name}/data.txt")
            else:
                fill(name, arguments.python)
    except WheelhouseError as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
