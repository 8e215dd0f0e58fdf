"""Export and import of checkpoints: one `.pt` file, or a folder of torch.distributed.checkpoint.

export_pt(restored.state, Path("checkpoint-step-500.pt"))     # torch.load(path, weights_only=True) reads it
state = import_pt(Path("checkpoint-step-500.pt"))             # for a resume
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from estiba.errors import CheckpointError, first_line
from estiba.storage import FileStore

DIGEST_SUFFIX = ".xxh128"
"""The file beside an exported one that holds its xxh3-128, as `xxh128sum` writes and checks it."""
_WRAPPERS = re.compile(r"(?:_orig_mod\.|module\.)+")
"""What torch.compile and DistributedDataParallel put before every name of a state dict."""
_READ_BYTES = 1 << 24
_ZIP_MAGIC = b"PK\x03\x04"
MODEL, OPTIMIZER = "model_state_dict", "optimizer_state_dict"


def export_pt(state: Mapping[str, Any], path: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write one file with `model_state_dict`, `optimizer_state_dict`, `step` and everything else that a resume needs.

    The write is atomic. Raises StoreError if it cannot be written.
    """
    content = {
        "step": state["loop"]["step"],
        MODEL: dict(state["model"]),
        OPTIMIZER: state["optimizer"],
        **(extra or {}),
        "estiba": {name: value for name, value in state.items() if name not in ("model", "optimizer")},
    }
    save_pt(content, path)


def save_pt(content: Mapping[str, Any], path: Path) -> None:
    """Write a `torch.save` file atomically, and its digest beside it. Raises StoreError."""
    store = FileStore(path.parent)
    store.delete(path.name + DIGEST_SUFFIX)  # a digest of the file before would condemn this one
    with store.writer(path.name) as file:
        torch.save(dict(content), file)
    os.chmod(path, 0o666 & ~_umask())
    write_digest(path)


def write_digest(path: Path) -> None:
    """Write `NAME.xxh128` beside a file that was just written. Raises StoreError."""
    FileStore(path.parent).write(path.name + DIGEST_SUFFIX, f"{_digest_of_file(path)}  {path.name}\n".encode())


def verify_file(path: Path) -> None:
    """Compare a file with the digest beside it, or a zip with its CRCs. Raises CheckpointError.

    Files of torch.save since torch 1.6 are zips, so that those from elsewhere are verified too. A file that has neither
    is refused.
    """
    check_verifiable(path)
    beside = path.with_name(path.name + DIGEST_SUFFIX)
    with _errors_of(path):
        if beside.is_file():
            if beside.read_text().split()[:1] != [_digest_of_file(path)]:
                raise CheckpointError(
                    f"{path}: its bytes do not match the digest in {beside.name}; copy both again from where they were "
                    f"written, or, if it was replaced on purpose, remove {beside.name}"
                )
            return
        with zipfile.ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise CheckpointError(
                    f"{path}: the bytes of {name} do not match their CRC; copy the file again from where it was written"
                )


def check_verifiable(path: Path) -> None:
    """Raise CheckpointError for a file whose bytes nothing can verify, or that cannot be read. Reads little of it."""
    beside = path.with_name(path.name + DIGEST_SUFFIX)
    with _errors_of(path), path.open("rb") as file:
        if beside.is_file():
            return
        if file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC:
            with zipfile.ZipFile(file) as archive:
                if any(entry.CRC for entry in archive.infolist()):
                    return
            form = "was written without CRCs (torch.serialization.set_crc32_options)"
        else:
            form = "is not a zip, as torch.save writes them since torch 1.6"
    raise CheckpointError(
        f"{path}: {form}, and has no {beside.name} beside it, so that nothing tells whether its bytes are intact; save "
        f"it again with a current torch (torch.save(torch.load(...), ...)), or write its digest beside it "
        f"(xxh128sum {path.name} > {beside.name})"
    )


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, UnicodeDecodeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is damaged ({first_line(error)}); copy it again from where it was written"
        ) from None


def _digest_of_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def import_pt(path: Path) -> dict[str, Any]:
    """Return the state in a file from `export_pt`, or just `model` from another program's file.

    Its bytes are verified first (`verify_file`). Only tensors and plain values are read (`weights_only=True`). Names
    lose the prefixes of torch.compile and DistributedDataParallel. Raises CheckpointError.
    """
    verify_file(path)
    content = read_pt(path)
    if MODEL not in content:
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {"model": _unwrapped(content)}  # a bare state dict
        raise CheckpointError(f"{path}: has no {MODEL!r} (found {sorted(map(str, content))[:10]}); export it again")
    if "estiba" not in content:
        return {"model": _unwrapped(content[MODEL])}
    return {**content["estiba"], "model": content[MODEL], "optimizer": content[OPTIMIZER]}


def read_pt(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Return the dict in a `torch.save` file, unverified. With `mmap`, tensors are read only when they are used.

    Raises CheckpointError.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: not a file of tensors and plain values ({first_line(error)}); export it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; a checkpoint is a dict with {MODEL!r}")
    return content


def _unwrapped(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights without the wrappers' prefixes, if all names have one."""
    if all(_WRAPPERS.match(str(name)) for name in weights):
        return {_WRAPPERS.sub("", name, count=1): tensor for name, tensor in weights.items()}
    return dict(weights)


def export_dcp(state: Mapping[str, Any], folder: Path) -> None:
    """Write model and optimizer for torch.distributed.checkpoint, for a job that shards them over its ranks.

    Its load reshards: every rank reads its own part of each tensor. Raises CheckpointError.
    """
    import torch.distributed.checkpoint as dcp

    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: exists already; give a new folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns that this is one process
            dcp.save(
                {"model": dict(state["model"]), "optimizer": state["optimizer"]}, checkpoint_id=folder, no_dist=True
            )
    except (OSError, dcp.CheckpointException) as error:  # the latter is a BaseException, not an Exception
        raise CheckpointError(f"{folder}: not exported ({error}); check the disk") from None


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
