"""Rare kinds of HDF5 storage decode to what h5py returns, or to an error."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hdf5_files import LAYOUTS

from brain_to_text.data.indexing.hdf5 import byte_ranges, decode, locate
from estiba.errors import DataError


def low_level_dataset(
    file: h5py.File, kind: Any, shape: tuple[int, ...], *filters: tuple[int, tuple[int, ...]]
) -> h5py.Dataset:
    """Create dataset 'x' in chunks of 5 rows, with a type and filters that h5py's high-level interface lacks."""
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_chunk((5, *shape[1:]))
    for code, values in filters:
        created.set_filter(code, h5py.h5z.FLAG_OPTIONAL, values)
    return h5py.Dataset(h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple(shape), created))


@pytest.mark.parametrize("kind", ["12 bits of 16", "bfloat16"])
@pytest.mark.parametrize("filters", [[], [(5, ())]], ids=["plain", "nbit"])
def test_numbers_in_unusual_formats_are_refused_and_not_misread(
    tmp_path: Path, kind: str, filters: list[tuple[int, tuple[int, ...]]]
) -> None:
    stored = (h5py.h5t.STD_I16LE if kind == "12 bits of 16" else h5py.h5t.IEEE_F32LE).copy()
    if kind == "12 bits of 16":
        stored.set_precision(12)
    else:
        stored.set_fields(15, 7, 8, 0, 7)
        stored.set_precision(16)
        stored.set_size(2)
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        dataset = low_level_dataset(file, stored, (10, 2), *filters)
        dataset[...] = np.arange(20).reshape(10, 2)
        with pytest.raises(DataError, match=r"/x: stores its numbers in a format that is not .*; write it as float32"):
            locate(dataset)


@pytest.mark.parametrize("dtype", ["<i2", ">i4", "<u2", "<f4", ">f8"])
def test_scaleoffset_with_a_fill_value_is_read_as_by_h5py(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "f.hdf5"
    values = np.random.default_rng(3).integers(0, 9, (20, 4)).astype(dtype)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", (20, 4), dtype, chunks=(6, 4), scaleoffset=2, fillvalue=3)
        dataset[:14] = values[:14]
    assert_as_h5py(path)


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_values_without_a_fill_value_are_zeros_as_in_h5py(tmp_path: Path, compression: str | None) -> None:
    path = tmp_path / "f.hdf5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "x", (20, 4), "f4", chunks=(5, 4), compression=compression, fillvalue=7, fill_time="never"
        )
        dataset[5:10] = 1
    assert_as_h5py(path)


def assert_as_h5py(path: Path) -> None:
    with h5py.File(path) as file:
        layout, expected = locate(file["x"]), file["x"][()]
    data = path.read_bytes()
    decoded = decode(layout, [data[start : start + length] for start, length in byte_ranges(layout)])
    assert (decoded.dtype, decoded.tobytes()) == (expected.dtype, expected.tobytes())


@pytest.mark.parametrize("layout", ["gzip", "shuffle alone", "fletcher32"])
def test_edge_chunks_without_filters_are_read_as_they_are(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "f.hdf5"
    options = {**LAYOUTS[layout], "chunks": (8, 3)}
    values = np.random.default_rng(5).standard_normal((12, 6)).astype(np.float32)
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset("like", (12, 6), "f4", **options)
        created = file["like"].id.get_create_plist()
        assert chunk_options()(created.id, 2) >= 0  # H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS
        space = h5py.h5s.create_simple(values.shape)
        h5py.Dataset(h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, created))[...] = values
    assert_as_h5py(path)


def chunk_options() -> Any:
    """Return H5Pset_chunk_opts from the HDF5 library that h5py has loaded, because h5py does not wrap it."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libhdf5" in line}
    (path,) = (name for name in loaded if "_hl" not in name)
    function = ctypes.CDLL(path).H5Pset_chunk_opts
    function.argtypes = [ctypes.c_int64, ctypes.c_uint]
    return function
