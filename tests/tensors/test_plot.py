"""The loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from estiba.training.plot import loss_plot

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
ROWS = [
    {"step": s, "train_loss": 9 / (1 + s / 20), "val_loss": 9 / (1 + s / 20) if s % 25 == 0 else ""} for s in range(101)
]


def test_a_png_is_published_whole_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "loss.png"
    assert loss_plot(ROWS, path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.read_bytes().rstrip().endswith(b"IEND\xaeB`\x82")
    assert path.stat().st_mode & 0o777 == 0o644
    assert [item.name for item in path.parent.iterdir()] == ["loss.png"]


def test_rows_may_come_from_a_csv_and_gaps_are_skipped(tmp_path: Path) -> None:
    rows = [{"step": "1", "train_loss": "9.1", "val_loss": ""}, {"step": "2", "train_loss": "nan", "val_loss": "8.7"}]
    assert loss_plot(iter(rows), tmp_path / "loss.png")


def test_a_run_without_a_loss_gets_no_plot(tmp_path: Path) -> None:
    assert not loss_plot([{"step": 1, "train_loss": None}], tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_only_the_old_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "loss.png"
    loss_plot(ROWS, path)
    before = path.read_bytes()

    def fail(_figure: object, file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        loss_plot(ROWS[:5], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
