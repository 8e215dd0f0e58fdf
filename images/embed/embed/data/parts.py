"""The chunks of a row range whose texts are cut into passages, made when its last part is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from embed.config import EmbedConfig
from embed.data.chunks import Encoded, RowRange, computed_by, encoded_from, from_bytes, to_bytes
from embed.data.passages import Passages, mean_of, part_key_of, partial_part_key_of, passages_from, with_passages
from estiba.checkpoint import ChunkStore
from estiba.errors import CheckpointError


def finish_range(
    chunks: ChunkStore,
    config: EmbedConfig,
    file: str,
    rows: RowRange,
    encoded: Encoded,
    passages: Passages,
    engines: Sequence[dict[str, Any]],
) -> tuple[memoryview, tuple[tuple[str, str], ...], tuple[str, ...]]:
    """The content of a range's chunk; key and name of the chunks of its earlier parts; and the partial chunks replaced.

    `encoded` and `passages` are the last part. One part is in memory at a time beside it. With --chunk-output rows each
    part becomes a chunk; a mean needs only one.
    """
    partials = tuple(partial_part_key_of(file, rows, part) for part in range(passages.part + 1))
    if config.chunk_output == "mean":
        engines = list(engines)

        def parts() -> Iterator[tuple[Encoded, Passages]]:
            for key in partials[:-1]:
                data = _load(chunks, key)
                engines.extend(each for each in computed_by(from_bytes(data)) if each not in engines)
                yield encoded_from(data), passages_from(from_bytes(data))
            yield encoded, passages

        mean = mean_of(parts(), rows.rows, normalize=config.normalize)
        return to_bytes(mean, config.embedding_dtype, engines), (), partials
    names = []
    for part, partial in enumerate(partials[:-1]):
        data = _load(chunks, partial)
        batch, key = from_bytes(data), part_key_of(file, rows, part)
        vectors = to_bytes(encoded_from(data), config.embedding_dtype, computed_by(batch))
        names.append((key, chunks.commit(key, with_passages(vectors, passages_from(batch)))))
    return with_passages(to_bytes(encoded, config.embedding_dtype, engines), passages), tuple(names), partials


def _load(chunks: ChunkStore, key: str) -> bytes:
    data = chunks.load(key)
    if data is None:
        raise CheckpointError(
            f"{chunks.store.url}: chunk {key} was saved and cannot be read any more; run the job again, with another "
            "--checkpoint-path if this happens twice"
        )
    return data
