"""Rules of the repository: no secrets, no machine-specific names, scripts that parse, complete help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SECRETS = {
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)(?!IOSFODNN7EXAMPLE)[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{34}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}\b"),
}
# Mirrors come from the machine's own pip and apt configuration. (Split, so that this file passes its own test.)
HOSTS = re.compile(
    "|".join(["pypi" + r"\.org", "python" + "hosted", "deb" + r"\.debian\.org", "registry" + r"\.npmjs"])
)
# uv always writes the URL of each package into its lock.
NAMES_HOSTS = {"uv.lock"}


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def test_no_file_holds_a_secret(files: list[Path]) -> None:
    found = [f"{path}: {kind}" for path in files for kind, pattern in SECRETS.items() if pattern.search(text_of(path))]
    assert found == []


def test_no_file_names_a_package_registry(files: list[Path]) -> None:
    assert [str(path) for path in files if path.name not in NAMES_HOSTS and HOSTS.search(text_of(path))] == []


def test_no_file_contains_a_path_of_this_machine(root: Path, files: list[Path]) -> None:
    home, here = re.escape(str(Path.home())), re.escape(str(root))
    pattern = re.compile(rf"{here}\b|{home}/\.|/home/[a-z]+/")
    assert [str(path) for path in files if pattern.search(text_of(path))] == []


def test_no_file_is_larger_than_a_megabyte(files: list[Path]) -> None:
    assert [str(path) for path in files if path.stat().st_size > 1_000_000] == []


def test_every_shell_script_parses(files: list[Path]) -> None:
    scripts = [path for path in files if path.suffix == ".sh" or path.name == "run"]
    assert scripts
    for path in scripts:
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_engine_script_passes_shellcheck(root: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not in this environment (`make env` puts it there)")
    done = subprocess.run([shellcheck, "-S", "warning", root / "scripts/engine.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_engine_script_is_self_contained(root: Path) -> None:
    """It is piped to a remote host that has no other file of this repository."""
    code = "\n".join(
        line for line in text_of(root / "scripts/engine.sh").splitlines() if not line.lstrip().startswith("#")
    )
    assert not re.search(r"BASH_SOURCE|dirname|scripts/|images/", code)


def test_make_alone_lists_every_target(root: Path) -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    targets = re.findall(r"^([a-zA-Z][\w/%-]*):(?!=)(?!.*\bexport\b)", text_of(root / "Makefile"), re.MULTILINE)
    assert len(targets) > 15
    for target in targets:
        assert re.search(rf"^  make {re.escape(target.replace('%', 'NAME'))} +\S", shown, re.MULTILINE), target


def test_every_make_target_in_readme_and_ci_exists(root: Path) -> None:
    makefile = text_of(root / "Makefile")
    for page in [root / ".ci/run", root / "buildspec.yml", *root.glob("README.md"), *root.glob("CONTRIBUTING.md")]:
        for target in re.findall(r"(?:^|`|exec |- )make ((?:[a-z]+(?:/[a-z-]+)? ?)+)", text_of(page), re.MULTILINE):
            for word in target.split():
                rule = re.sub(r"/.*", "/%", word)
                assert re.search(rf"^{re.escape(rule)}:", makefile, re.MULTILINE), f"{page.name}: make {word}"


def test_the_version_is_written_once(root: Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", text_of(root / "VERSION"))
    assert 'dynamic = ["version"]' in text_of(root / "pyproject.toml")


def test_the_makefile_stays_short(root: Path) -> None:
    assert len(text_of(root / "Makefile").splitlines()) <= 80
