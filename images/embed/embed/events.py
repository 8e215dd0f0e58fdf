"""What a worker tells about its work. Events cross processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from embed.data.chunks import RowRange


@dataclass(frozen=True, kw_only=True)
class ChunkSaved:
    """A worker made the vectors of some rows durable."""

    path: str
    row_range: RowRange
    name: str
    size_bytes: int
    resumed: int
    """Rows of a partial chunk of an earlier attempt."""
    rest: int
    """Rows that were neither in a batch nor resumed, such as empty ones."""
    copied: int = 0
    """Those of the rest that have the vector of an earlier row with the same tokens."""
    reused: int = 0
    """Those of the rest that have a vector of an earlier run."""
    parts: tuple[tuple[str, str], ...] = ()
    """Key and name of the chunks that hold the earlier parts of the range, if it has several."""


@dataclass(frozen=True, kw_only=True)
class RowsComputed:
    """A worker finished a batch. It is not durable yet."""

    path: str
    rows: int
    tokens: int
    padded_tokens: int


@dataclass(frozen=True, kw_only=True)
class PartialSaved:
    """A worker made some finished rows of a window durable."""

    key: str
    name: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class PartialsReplaced:
    """A worker saved the chunks of a window and deleted its partial chunks."""

    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FileBroken:
    """A worker found a file that cannot be read to its end."""

    path: str
    reason: str
    may_be_good: bool = False
    """As in BadFile."""


@dataclass(frozen=True, kw_only=True)
class TaskDone:
    """The chunks of a task are saved, or its files cannot be read."""

    path: str
    row_group: int
    """Its first row group."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What the stages of the worker's pipeline took since its last task."""


Event = ChunkSaved | FileBroken | PartialSaved | PartialsReplaced | RowsComputed | TaskDone
