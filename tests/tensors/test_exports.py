"""Checkpoints in other tools' forms, and back."""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from estiba.checkpoint.exports import export_dcp, export_pt, import_pt, verify_file, write_digest
from estiba.checkpoint.manager import CheckpointManager
from estiba.errors import CheckpointError
from estiba.training import rng
from tensors import runs
from tensors.states import is_same, state_of
from tensors.toy import Toy, digest


def full_state() -> dict[str, Any]:
    return {**state_of(5), "random": rng.get_state(), "scaler": None, "plan": {"seed": 42}}


def test_an_export_loads_with_torch_load_weights_only_and_resumes(tmp_path: Path) -> None:
    state = full_state()
    export_pt(state, tmp_path / "checkpoint-step-5.pt", {"config": {"layers": 4}})
    content = torch.load(tmp_path / "checkpoint-step-5.pt", weights_only=True)
    assert content["step"] == 5 and content["config"] == {"layers": 4}
    assert is_same(content["model_state_dict"], state["model"])
    assert is_same(content["optimizer_state_dict"], state["optimizer"])
    back = import_pt(tmp_path / "checkpoint-step-5.pt")
    assert set(back) == set(state) and all(is_same(back[name], state[name]) for name in state)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-step-5.pt", "checkpoint-step-5.pt.xxh128"]


def test_a_restored_checkpoint_can_be_exported_and_continues_to_the_same_bits(tmp_path: Path) -> None:
    whole, _ = runs.attempt(tmp_path / "whole")
    runs.attempt(tmp_path / "run", ("micro", 7, 1))
    checkpoints = CheckpointManager(tmp_path / "run/checkpoints")
    found = checkpoints.restore()
    assert found is not None
    export_pt(found.state, tmp_path / "x.pt")
    checkpoints.close()
    work = Toy()
    trainer = runs.make(tmp_path, work)
    trainer.resume(replace(found, state=import_pt(tmp_path / "x.pt")))
    trainer.run()
    assert digest(work.model) == whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list; a checkpoint is a dict"),
        ({"epoch": 3}, r"has no 'model_state_dict' \(found \['epoch'\]\)"),
        ({}, "has no 'model_state_dict'"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused_with_its_content(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=words):
        import_pt(tmp_path / "x.pt")


class Surprise:
    def __reduce__(self) -> Any:
        return os.mkdir, ("surprise",)


def test_code_in_a_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": Surprise()}, "x.pt")
    with pytest.raises(CheckpointError, match="not a file of tensors and plain values"):
        import_pt(tmp_path / "x.pt")
    assert not (tmp_path / "surprise").exists()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"hello, world", b"\x80\x02]q\x00."])
def test_bytes_that_are_not_a_torch_file_are_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(damage)
    with pytest.raises(CheckpointError):
        import_pt(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="No such file"):
        import_pt(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError):
        import_pt(tmp_path)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    export_pt(full_state(), tmp_path / "x.pt")
    size = (tmp_path / "x.pt").stat().st_size
    for length in (size - 1, size // 2, 100):
        os.truncate(tmp_path / "x.pt", length)
        with pytest.raises(CheckpointError):
            import_pt(tmp_path / "x.pt")


def test_weights_of_another_program_are_a_model_alone(tmp_path: Path) -> None:
    model = state_of(5)["model"]
    torch.save(model, tmp_path / "bare.pt")
    torch.save({"model_state_dict": model, "epoch": 3}, tmp_path / "theirs.pt")
    for name in ("bare.pt", "theirs.pt"):
        assert is_same(dict(import_pt(tmp_path / name)["model"]), model)
        assert set(import_pt(tmp_path / name)) == {"model"}


def test_what_torch_distributed_loads_from_an_export_is_what_was_saved(tmp_path: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    state = full_state()
    export_dcp(state, tmp_path / "dcp")
    target = {"model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}}
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert is_same(target["model"], state["model"])
    with pytest.raises(CheckpointError, match="exists already"):
        export_dcp(state, tmp_path / "dcp")


def test_an_export_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_pt(full_state(), tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()

    def fail(content: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            export_pt(full_state(), tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]  # its digest went first, since it was to be replaced


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not exported"):
        export_dcp(full_state(), tmp_path / "file/dcp")


def _flips(path: Path, count: int) -> Iterator[int]:
    """Flip one bit of a tensor's bytes at a time, and back."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    start = largest.header_offset + 128  # behind its header, which torch pads
    dice = random.Random(0)
    for _ in range(count):
        at = dice.randrange(start, start + largest.file_size - 128)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :])
        yield at
    path.write_bytes(data)


@pytest.mark.parametrize("has_digest", [True, False])
def test_a_flipped_bit_in_a_file_from_outside_is_noticed_every_time(has_digest: bool, tmp_path: Path) -> None:
    """39 of 40 loaded silently."""
    path = tmp_path / "x.pt"
    export_pt({**full_state(), "model": {"w": torch.randn(100, 100)}}, path)
    beside = tmp_path / "x.pt.xxh128"
    assert beside.read_text() == f"{xxhash.xxh3_128_hexdigest(path.read_bytes())}  x.pt\n"
    if not has_digest:
        beside.unlink()
    for at in _flips(path, 40):
        with pytest.raises(CheckpointError, match=r"do not match|is damaged") as caught:
            import_pt(path)
        assert "copy" in str(caught.value), at
    import_pt(path)


def test_a_bare_file_with_a_digest_beside_it_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 100)
    write_digest(path)
    verify_file(path)
    path.write_bytes(b"\0" * 99 + b"\1")
    with pytest.raises(CheckpointError, match=r"do not match the digest in model.safetensors.xxh128"):
        verify_file(path)


def _save_without_crcs(content: Any, path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, path)
    finally:
        torch.serialization.set_crc32_options(True)


def _save_as_before_torch_1_6(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("save", "form"),
    [(_save_as_before_torch_1_6, "is not a zip, as torch.save writes them"), (_save_without_crcs, "without CRCs")],
)
def test_a_file_that_nothing_can_verify_is_refused_until_its_digest_lies_beside_it(
    save: Callable[[Any, Path], None], form: str, tmp_path: Path
) -> None:
    path, model = tmp_path / "x.pt", {"w": torch.randn(30, 40)}
    save({"model_state_dict": model}, path)
    with pytest.raises(CheckpointError, match=form) as caught:
        import_pt(path)
    assert "save it again with a current torch" in str(caught.value)
    assert "xxh128sum x.pt > x.pt.xxh128" in str(caught.value)
    write_digest(path)
    assert is_same(dict(import_pt(path)["model"]), model)
    flipped = bytearray(path.read_bytes())
    flipped[-1000] ^= 4  # in the tensor
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="do not match the digest"):
        import_pt(path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_lose_the_prefixes_of_compile_and_ddp(prefix: str, tmp_path: Path) -> None:
    model = state_of(5)["model"]
    wrapped = {f"{prefix}{name}": tensor for name, tensor in model.items()}
    torch.save(wrapped, tmp_path / "bare.pt")
    torch.save({"model_state_dict": wrapped}, tmp_path / "theirs.pt")
    for name in ("bare.pt", "theirs.pt"):
        assert is_same(dict(import_pt(tmp_path / name)["model"]), model)
