"""The memory that is left, to the machine and to a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from estiba import memory

GIB = 2**30
V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file")
V2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 16 GiB left, whose cgroup files are in the returned folder."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {16 * 2**20} kB\n")
    (tmp_path / "memory").mkdir()
    return tmp_path


@pytest.mark.parametrize("names", [V1, V2], ids=["version 1", "version 2"])
def test_what_is_left_of_the_limit_counts_and_page_cache_is_free(machine: Path, names: tuple[str, ...]) -> None:
    limit, usage, statistics, page_cache = names
    (machine / limit).write_text(f"{4 * GIB}\n")
    (machine / usage).write_text(f"{3 * GIB}\n")
    (machine / statistics).write_text(f"cache 7\n{page_cache} {GIB // 2}\n")
    assert memory.available_memory_bytes() == GIB + GIB // 2
    (machine / usage).write_text(f"{5 * GIB}\n")
    assert memory.available_memory_bytes() == 0


@pytest.mark.parametrize(
    ("own", "names"), [("4:pids,memory:/job/step", V1), ("0::/job/step", V2)], ids=["version 1", "version 2"]
)
@pytest.mark.parametrize("limited", ["job", "job/step"])
def test_the_limit_of_a_group_that_the_process_is_in_without_a_container_counts(
    own: str, names: tuple[str, ...], limited: str, machine: Path
) -> None:
    """As Slurm and systemd-run --property MemoryMax set it."""
    (machine / "own").write_text(f"9:name=systemd:/\n{own}\n")
    limit, usage, statistics, page_cache = (Path(name) for name in names)
    folder = machine / limit.parent / limited
    folder.mkdir(parents=True)
    (folder / limit.name).write_text(f"{2 * GIB}\n")
    (folder / usage.name).write_text(f"{GIB}\n")
    (folder / statistics.name).write_text(f"{page_cache} 5\n")
    assert memory.available_memory_bytes() == GIB + 5


def test_without_a_limit_it_is_what_the_machine_has_left(machine: Path) -> None:
    assert memory.available_memory_bytes() == 16 * GIB
    (machine / "memory.max").write_text("max\n")
    (machine / "memory.current").write_text("1\n")
    assert memory.available_memory_bytes() == 16 * GIB


def test_nothing_is_known_where_neither_says(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert memory.available_memory_bytes() is None
