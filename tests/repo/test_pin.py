"""`make pin` writes digests and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DIGEST = "sha256:" + "5" * 64


@pytest.fixture
def pin(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/pin.py, working on a copy of docker-bake.hcl."""
    spec = importlib.util.spec_from_file_location("pin", root / "scripts/pin.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    copy = tmp_path / "docker-bake.hcl"
    copy.write_text((root / "docker-bake.hcl").read_text())
    monkeypatch.setattr(module, "BAKE", copy)
    return module


def test_every_base_is_looked_up_by_its_full_name(pin: ModuleType) -> None:
    references = [p.reference for p in pin.pins(pin.BAKE.read_text(), "eu-west-3")]
    assert len(references) == 3
    assert all(
        name.startswith(("763104351884.dkr.ecr.eu-west-3.amazonaws.com/", "public.ecr.aws/")) for name in references
    )


def test_a_digest_is_written_and_a_pin_without_an_answer_stays(
    pin: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(reference: str) -> str:
        if reference.startswith("public"):
            return DIGEST
        raise OSError("no basic auth credentials")

    monkeypatch.setattr(pin, "digest_of", answer)
    before = pin.BAKE.read_text()
    assert pin.main() == 1
    after = pin.BAKE.read_text()
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert changed == [f'variable "PUBLIC_DIGEST" {{ default = "{DIGEST}" }}']
    assert "no basic auth credentials" in capsys.readouterr().err


def test_pinning_twice_changes_nothing_the_second_time(pin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pin, "digest_of", lambda _: DIGEST)
    assert pin.main() == 0
    once = pin.BAKE.read_text()
    assert pin.main() == 0
    assert pin.BAKE.read_text() == once
    assert once.count(DIGEST) == 3
