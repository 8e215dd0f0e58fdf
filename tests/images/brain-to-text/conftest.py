"""Recordings and a store of them, for the tests of reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bucket import Bucket, bucket_for
from hdf5_files import write_folder


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with bucket_for(monkeypatch) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", splits=("train",))
