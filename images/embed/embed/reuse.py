"""Read the outputs of an earlier run: the vector of each row, under the digest of what the model reads of its text."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from embed.artifacts.old_outputs import OldFile, OldOutputs
from embed.data.chunks import Status
from embed.data.files import file_faults
from embed.data.known_vectors import KnownFile, KnownVectorsWriter
from embed.data.rows import record_batches, texts_of
from embed.model import Encoder
from embed.model.known import digests_of
from estiba.errors import DataError, ObjectChangedError, StoreError
from estiba.log import get_logger
from estiba.platform.stop import seconds
from estiba.progress import INTERVAL_S
from estiba.storage import Store, open_store

logger = get_logger(__name__)

NORM_TOLERANCE = 0.01
"""More than rounding to float16 changes."""


def read_old_outputs(
    old: OldOutputs, encoder: Encoder, writer: KnownVectorsWriter, should_stop: Callable[[], bool]
) -> KnownFile | None:
    """Fill `writer`. None if it was stopped. Raises StoreError if the disk is full or S3 does not answer.

    A file that is damaged is named and left out, so that its rows are computed.
    """
    store = open_store(old.location)
    interval_s = seconds(os.environ, "ESTIBA_LOG_INTERVAL_S") or INTERVAL_S
    began = said = time.monotonic()
    rows = 0
    try:
        for file in old.files:
            before = writer.rows
            try:
                for count in _read(store, file, encoder, writer):
                    rows += count
                    if should_stop():
                        return None
                    if time.monotonic() - said >= interval_s:
                        said = time.monotonic()
                        rate = rows / (said - began)
                        logger.info(f"--reuse {old.location}: read {rows} of {old.rows} old rows, {rate:.0f} a second")
            except (DataError, StoreError) as error:
                if isinstance(error, StoreError) and store.is_durable and not isinstance(error, ObjectChangedError):
                    raise
                writer.keep(before)
                logger.warning(f"--reuse {old.location}: {error}; the rows of this file are computed")
        known = writer.finish(old.computed_by)
    except OSError as error:
        raise StoreError(
            f"{tempfile.gettempdir()}: old vectors cannot be kept there ({error.strerror}); make room, or set TMPDIR "
            "to a larger directory"
        ) from error
    logger.info(
        f"--reuse {old.location}: {known.rows} vectors in {rows} rows of {len(old.files)} files, read in "
        f"{time.monotonic() - began:.1f} s"
    )
    return known


def _read(store: Store, file: OldFile, encoder: Encoder, writer: KnownVectorsWriter) -> Iterator[int]:
    """The numbers of rows read. Raises DataError if the file is damaged."""
    table, unsound = file.table, 0
    columns = [file.text_column, file.vector_column]
    with store.open(table.path, table.file.size_bytes, etag=table.file.etag) as opened:
        for row_group in range(len(table.row_group_rows)):
            for batch in record_batches(opened, table, row_group, columns):
                with file_faults(table, row_group):
                    texts = texts_of(batch, file.text_column)
                window = encoder.tokenize(texts)
                column = batch.column(file.vector_column)
                has_vector = column.is_valid().to_numpy(zero_copy_only=False)
                rows = np.flatnonzero(has_vector & (window.status == Status.OK))
                vectors = _vectors(column.take(pa.array(rows)))
                is_sound = _is_sound(vectors, encoder.config.normalize)
                unsound += int((~is_sound).sum())
                writer.add(digests_of(window, rows[is_sound]), vectors[is_sound])
                yield batch.num_rows
    if unsound:
        logger.warning(
            f"{table.path}: {unsound} vectors are not finite or have another length; they are computed again"
        )


def _vectors(column: pa.FixedSizeListArray) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def _is_sound(vectors: np.ndarray, is_unit: bool) -> np.ndarray:
    """bool[rows]: what a damaged page would hardly keep."""
    is_finite = np.isfinite(vectors).all(axis=1)
    norms = np.linalg.norm(np.where(is_finite[:, None], vectors, 0).astype(np.float32), axis=1)
    return is_finite & (np.abs(norms - 1) <= NORM_TOLERANCE if is_unit else norms > 0)
