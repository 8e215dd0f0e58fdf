"""The stored precision of vectors. What is stored of a vector depends on that vector alone, never on other rows, so a
resumed job stores the same bytes.

int8 keeps the direction: the largest value of each vector becomes 127 or -127. Vectors have unit length, so a reader
divides by the length and needs no scale. binary keeps the signs, packed as `np.packbits` does.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from embed.config import EmbedConfig
from estiba.errors import ConfigError

_VALUES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}
_DECODING = {
    "int8": "a vector's values divided by their length; the length of the vector before was 1",
    "binary": "numpy.unpackbits(values, axis=1): 1 where the value was above 0, first value in the highest bit",
}
SPARSE_TYPE = pa.map_(pa.int32(), pa.float32())
SPARSE, MULTI_VECTOR = "sparse", "colbert"
"""Names of the columns of BGE-M3's heads."""


def is_float(dtype: str) -> bool:
    return dtype.startswith("float")


def decoding(dtype: str) -> dict[str, str]:
    """What a reader must know of values that are not the vector's own."""
    return {} if is_float(dtype) else {"embedding_decode": _DECODING[dtype]}


def vector_type(dimensions: int, dtype: str) -> pa.DataType:
    """The type of a stored vector: `dimensions` values, or as many bytes as hold that number of bits."""
    return pa.list_(_VALUES[dtype], dimensions // 8 if dtype == "binary" else dimensions)


def stored(vectors_ND: np.ndarray, dtype: str) -> np.ndarray:
    """float32[N, D] as it is stored. float32 itself is not copied."""
    if dtype == "int8":
        largest_N1 = np.abs(vectors_ND).max(axis=1, keepdims=True, initial=0)
        largest_N1[largest_N1 == 0] = 1  # a row without a vector
        return np.rint(vectors_ND * (127 / largest_N1)).astype(np.int8)
    if dtype == "binary":
        return np.packbits(vectors_ND > 0, axis=1)
    return np.ascontiguousarray(vectors_ND, dtype=dtype)


def vector_array(vectors_ND: np.ndarray, dtype: str, is_null: np.ndarray | None = None) -> pa.Array:
    """float32[N, D] as an array of `vector_type`, with the values' memory where they are stored as they are."""
    kind = vector_type(vectors_ND.shape[1], dtype)
    values = pa.array(stored(vectors_ND, dtype).reshape(-1))
    mask = None if is_null is None else pa.array(is_null)
    return pa.FixedSizeListArray.from_arrays(values, kind.list_size, mask=mask).cast(kind)


def vector_fields(config: EmbedConfig, dimensions: int, token_dimensions: int) -> list[pa.Field]:
    """The output's vector columns: the embedding, and those of BGE-M3's heads that the settings ask for.

    Raises ConfigError if the width of a vector does not fit its stored precision.
    """
    dtype = config.embedding_dtype
    for width in (dimensions, *[token_dimensions] * config.multi_vector):
        if dtype == "binary" and width % 8:
            at_most = f"pass --dimensions {width // 8 * 8}, or " if width == dimensions > 8 else ""
            raise ConfigError(
                f"--embedding-dtype binary stores 8 values in a byte, and a vector has {width}; {at_most}"
                "use --embedding-dtype int8"
            )
    note = None if is_float(dtype) else {"estiba": json.dumps({"embedding_dtype": dtype, **decoding(dtype)})}
    fields = [pa.field(config.embedding_column, vector_type(dimensions, dtype), metadata=note)]
    if config.sparse:
        fields.append(pa.field(SPARSE, SPARSE_TYPE))
    if config.multi_vector:
        fields.append(pa.field(MULTI_VECTOR, pa.list_(vector_type(token_dimensions, dtype)), metadata=note))
    return fields
