"""Sharded checkpoints without a trainer: parts of several ranks, their commit, and reads by other numbers of ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint import layout, snapshot, tree_spec
from estiba.checkpoint.format import MANIFEST
from estiba.checkpoint.manager import CheckpointManager
from estiba.checkpoint.remote import Remote
from estiba.checkpoint.retention import Retention
from estiba.checkpoint.sharded import format as sharded
from estiba.checkpoint.sharded import restore as sharded_restore
from estiba.checkpoint.sharded.retention import prune_store
from estiba.checkpoint.sharded.writer import Owner, ShardedWriter
from estiba.checkpoint.staging import StagingBuffer
from estiba.errors import CheckpointError
from estiba.storage import FileStore, Store, open_store

TENSORS = {
    "model/wide": torch.arange(7 * 3, dtype=torch.float32).reshape(7, 3),
    "model/short": torch.tensor([[5, 6]], dtype=torch.int64),  # fewer rows than ranks
    "optimizer/average": torch.arange(1000, dtype=torch.bfloat16),
}


def rows(tensor: torch.Tensor, shards: int, shard: int) -> torch.Tensor:
    start, stop = sharded.shard_rows(len(tensor), shards, shard)
    return tensor[start:stop].clone()


def save(
    folder: Path, rank: int, ranks: int, *, step: int = 20, attempt: str = "feed", upload: str | None = None
) -> tuple[ShardedWriter, sharded.Part]:
    """Write one rank's part, as its writer process does."""
    kept = {name: rows(tensor, ranks, rank) for name, tensor in TENSORS.items()}
    kept["random"] = torch.tensor([rank, 42])
    if rank == 0:
        kept["optimizer/step"] = torch.tensor(3.0)
    state: dict[str, Any] = {"random": kept["random"], "loop": {"step": step}}
    if rank == 0:
        for name, tensor in kept.items():
            if "/" in name:
                state.setdefault(name.split("/")[0], {})[name.split("/")[1]] = tensor
    _, tree = tree_spec.flatten(state)
    file = snapshot.TensorFile(sharded.PART_DATA, layout.lay_out(kept), kept)
    buffer = StagingBuffer()
    buffer.reserve(file.layout.size_bytes)
    snapshot.copy_file(buffer, 0, file)
    writer = ShardedWriter(
        {
            "folder": str(folder), "rank": rank, "ranks": ranks, "local_rank": 0, "token": attempt,
            "descriptor": buffer.descriptor, "retention": {}, "upload": upload,
        }
    )  # fmt: skip
    shapes = {
        name: {"dtype": layout.DTYPES[tensor.dtype], "shape": list(tensor.shape)} for name, tensor in TENSORS.items()
    }
    part = {
        "step": step, "kind": "step", "shard": rank, "shards": ranks, "metrics": {}, "tree": tree,
        "sharded": shapes if rank == 0 else {},
    }  # fmt: skip
    command = {
        "name": ckpt_format.checkpoint_name(step), "size": file.layout.size_bytes, "needed": 0, "kept": None,
        "buffer_bytes": buffer.size_bytes, "part": part,
    }  # fmt: skip
    return writer, writer.save(command, writer.owner)


def save_all(folder: Path, ranks: int, **options: Any) -> str:
    """Write the parts of all ranks and commit. Returns the checkpoint's name."""
    for rank in range(ranks):
        _, part = save(folder, rank, ranks, **options)
    name = ckpt_format.checkpoint_name(part.step)
    assert sharded.commit_if_whole(FileStore(folder), name) is not None
    return name


def load(stores: list[Store], name: str, rank: int, ranks: int) -> dict[str, Any]:
    manifest = sharded.read_manifest(stores[-1], name)
    common = sharded_restore.load_common(stores, name, manifest)
    return sharded_restore.load_state(stores, name, manifest, common, rank=rank, ranks=ranks, shard=rank, shards=ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_what_three_ranks_saved_any_number_of_ranks_reads(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, "PIECE_BYTES", 64)  # so that tensors and ranges cross the ends of pieces
    name = save_all(tmp_path, 3)
    states = [load([FileStore(tmp_path)], name, rank, ranks) for rank in range(ranks)]
    for path, expected in TENSORS.items():
        group, key = path.split("/")
        parts = [state[group][key].rows for state in states]
        assert torch.equal(torch.cat(parts), expected) and parts[0].dtype == expected.dtype
        assert states[0][group][key].shape == tuple(expected.shape)
    assert all(state["optimizer"]["step"].item() == 3.0 for state in states)
    own = [int(state["random"][0]) for state in states]
    assert own == ([0, 1, 2] if ranks == 3 else [0] * ranks)


def test_a_rank_reads_only_the_pieces_that_hold_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "PIECE_BYTES", 64)
    name = save_all(tmp_path, 2)
    store = FileStore(tmp_path)
    read_bytes = 0
    original = store.read

    def counted(path: str, start: int = 0, length: int | None = None) -> bytes:
        nonlocal read_bytes
        data = original(path, start, length)
        read_bytes += len(data) if path.endswith(sharded.PART_DATA) else 0
        return data

    monkeypatch.setattr(store, "read", counted)
    manifest = sharded.read_manifest(store, name)
    common = sharded_restore.load_common([store], name, manifest)
    read_bytes = 0
    sharded_restore.load_state([store], name, manifest, common, rank=1, ranks=8, shard=1, shards=8)
    header_bytes = 1000
    assert read_bytes < manifest.size_bytes / 8 + header_bytes


def test_every_flipped_byte_of_a_part_is_found_by_a_rank_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, "PIECE_BYTES", 256)
    name = save_all(tmp_path, 2)
    (path,) = tmp_path.glob(f"{name}/rank-00001-*/{sharded.PART_DATA}")
    good = path.read_bytes()
    for position in range(0, len(good), 97):
        bad = bytearray(good)
        bad[position] ^= 4
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="do not match their digest"):
            _ = [load([FileStore(tmp_path)], name, rank, 2) for rank in range(2)]
    path.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="bytes where"):
        load([FileStore(tmp_path)], name, 1, 2)


def test_a_part_that_is_bad_here_is_read_from_the_other_store(tmp_path: Path) -> None:
    name = save_all(tmp_path / "disk", 2)
    save_all(tmp_path / "remote", 2)
    for path in (tmp_path / "disk").glob(f"{name}/rank-*/{sharded.PART_DATA}"):
        path.write_bytes(b"\0" * path.stat().st_size)
    state = load([FileStore(tmp_path / "disk"), FileStore(tmp_path / "remote")], name, 0, 1)
    assert torch.equal(state["model"]["wide"].rows, TENSORS["model/wide"])


def test_a_checkpoint_is_committed_when_all_parts_of_one_attempt_are_there(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    save(tmp_path, 0, 2, attempt="feed")
    save(tmp_path, 1, 2, attempt="beef")  # of another attempt
    assert sharded.commit_if_whole(store, "step-00000020") is None
    assert sharded.uncommitted(store.list()) == ["step-00000020"] and sharded.committed(store.list()) == []
    save(tmp_path, 1, 2, attempt="feed")
    manifest = sharded.commit_if_whole(store, "step-00000020")
    assert manifest is not None and [part.token for part in manifest.parts] == ["feed", "feed"]
    assert sharded.committed(store.list()) == ["step-00000020"]


def test_a_damaged_record_of_a_part_is_no_part(tmp_path: Path) -> None:
    for rank in range(2):
        save(tmp_path, rank, 2)
    (record,) = tmp_path.glob(f"step-*/rank-00001-*/{sharded.PART_RECORD}")
    record.write_bytes(record.read_bytes().replace(b'"ranks": 2', b'"ranks": 3'))
    assert sharded.commit_if_whole(FileStore(tmp_path), "step-00000020") is None


def test_what_was_revoked_is_not_committed_again_but_another_attempt_may_save_the_step(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    name = save_all(tmp_path, 2)
    sharded.revoke(store, name, "feed")
    assert sharded.committed(store.list()) == [] and sharded.commit_if_whole(store, name) is None
    for rank in range(2):
        save(tmp_path, rank, 2, attempt="beef")
    manifest = sharded.commit_if_whole(store, name)
    assert manifest is not None and manifest.token == "beef"


def test_of_two_attempts_that_commit_one_step_the_first_counts(tmp_path: Path) -> None:
    name = save_all(tmp_path, 2)
    parts = []
    for rank in range(2):
        writer, part = save(tmp_path, rank, 2, attempt="beef")
        parts.append(part.to_bytes().decode())
    with pytest.raises(CheckpointError, match="another attempt committed this step"):
        writer.commit({"name": name, "step": 20, "parts": parts})
    assert sharded.read_manifest(FileStore(tmp_path), name).token == "feed"


def test_sagemakers_marker_files_are_ignored_wherever_checkpoints_are_listed(tmp_path: Path) -> None:
    name = save_all(tmp_path, 2)
    manager = CheckpointManager(tmp_path / "plain")
    manager.save(4, {"model": {"weight": torch.ones(2)}}, wait=True)
    manager.close()
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        for suffix in (".sagemaker-uploading", ".sagemaker-uploaded"):
            path.with_name(path.name + suffix).touch()
    (tmp_path / "step-00000099.sagemaker-uploading").touch()
    store = FileStore(tmp_path)
    assert sharded.committed(store.list()) == [name] and sharded.uncommitted(store.list()) == []
    load([store], name, 0, 1)
    assert ckpt_format.checkpoint_names(tmp_path / "plain") == ["step-00000004"]
    assert Remote(str(tmp_path / "plain")).names() == ["step-00000004"]
    restored = CheckpointManager(tmp_path / "plain").restore()
    assert restored is not None and restored.step == 4


def test_old_checkpoints_are_deleted_with_what_was_never_committed(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_all(tmp_path, 2, step=step)
    save(tmp_path, 0, 2, step=15)  # its other host was lost
    save(tmp_path, 0, 2, step=50)  # is being saved
    kept = prune_store(FileStore(tmp_path), Retention(keep_last=2), keep="step-00000040")
    assert kept == ["step-00000040", "step-00000030"]
    assert sorted(os.listdir(tmp_path)) == ["step-00000030", "step-00000040", "step-00000050"]


# --- S3 ------------------------------------------------------------------------------------------------------------


def test_a_host_that_survives_commits_an_upload_that_was_complete_on_all_hosts(tmp_path: Path, s3: Any) -> None:
    """Each host has a disk of its own. The main host is lost after its upload, before it commits."""
    url = "s3://estiba/survivor"
    main, _ = save(tmp_path / "algo-1", 0, 2, upload=url)
    main.send("step-00000020", main.owner)
    other, _ = save(tmp_path / "algo-2", 1, 2, upload=url)
    other.send("step-00000020", other.owner)
    other.commit_remote("step-00000020", other.owner)
    store = open_store(url)
    assert sharded.committed(store.list()) == ["step-00000020"]
    state = load([FileStore(tmp_path / "new"), store], "step-00000020", 0, 1)
    assert torch.equal(state["optimizer"]["average"].rows, TENSORS["optimizer/average"])
    before = store.read(f"step-00000020/{MANIFEST}")
    main.commit_remote("step-00000020", main.owner)  # it was only slow: the first is kept, and the bytes are the same
    assert store.read(f"step-00000020/{MANIFEST}") == before


def test_a_replica_whose_step_another_replica_has_committed_is_saved(tmp_path: Path, s3: Any) -> None:
    """Each has a disk of its own, so it sees the other's commit on S3 alone."""
    url = "s3://estiba/replicas"
    name = "step-00000020"
    for replica in range(2):
        writers = [
            save(tmp_path / f"algo-{2 * replica + rank}", rank, 2, attempt=f"feed{replica:02x}", upload=url)[0]
            for rank in range(2)
        ]
        for writer in writers:
            writer.send(name, writer.owner)
        first = writers[0]
        owner, first.owner = first.owner, Owner("feed", 2 * replica, 4)
        first.commit_remote(name, owner)
        first.commit_replica(name, owner, timeout_s=0)
    assert sharded.read_manifest(open_store(url), name).token == "feed00"


def test_an_upload_that_lacks_a_lost_hosts_part_is_not_a_checkpoint(
    tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("estiba.checkpoint.sharded.writer.CLOSING_TIMEOUT_S", 0.2)
    url = "s3://estiba/lost"
    main, _ = save(tmp_path / "algo-1", 0, 2, upload=url)
    main.send("step-00000020", main.owner)
    main._closing.set()
    with pytest.raises(CheckpointError, match="1 of 2 parts arrived; the checkpoint before it counts"):
        main.commit_remote("step-00000020", main.owner)
    assert sharded.committed(open_store(url).list()) == []


def test_no_two_ranks_write_one_name(tmp_path: Path, s3: Any) -> None:
    url = "s3://estiba/names"
    written = []
    for rank in range(3):
        writer, _ = save(tmp_path / f"algo-{rank + 1}", rank, 3, upload=url)
        before = {entry.path for entry in open_store(url).list()}
        writer.send("step-00000020", writer.owner)
        written.append({entry.path for entry in open_store(url).list()} - before)
    assert all(len(names) == 2 for names in written)
    assert len(set().union(*written)) == 6


def test_a_manifest_is_refused_if_a_bit_of_it_changed(tmp_path: Path) -> None:
    name = save_all(tmp_path, 2)
    path = tmp_path / name / MANIFEST
    content = json.loads(path.read_bytes())
    content["body"]["parts"][0]["step"] = 21
    path.write_text(json.dumps(content, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match="do not match its digest"):
        sharded.read_manifest(FileStore(tmp_path), name)
