"""`ShardedCheckpointManager`: what a trainer calls, as it calls `CheckpointManager` for a model that is whole.

Each rank saves its own shard below its own prefix, in the folder of its host and, with `upload`, on S3. The folder may
be one that all hosts share, or a disk of each host. A restore reads ranges, so the number of ranks may change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from estiba.checkpoint import layout, snapshot, tree_spec
from estiba.checkpoint.format import Manifest, checkpoint_name
from estiba.checkpoint.manager import SPACING, CheckpointManager, SaveRequest
from estiba.checkpoint.restore import Restored
from estiba.checkpoint.retention import Retention
from estiba.checkpoint.sharded import format as sharded
from estiba.checkpoint.sharded.catalogue import Catalogue, read_manifest
from estiba.checkpoint.sharded.format import ShardedManifest
from estiba.checkpoint.sharded.receipts import Receipts
from estiba.checkpoint.sharded.restore import LocalShard, Packed, Trouble, load_common, load_state
from estiba.checkpoint.writer_process import Reply, WriterProcess
from estiba.distributed import DistContext
from estiba.errors import CheckpointError, StoreError
from estiba.log import get_logger
from estiba.storage import FileStore, Store, open_store

logger = get_logger(__name__)
OWN_KEYS = ("random", "meter")
"""The parts of a state that are each rank's own. Sharded tensors apart, the first rank saves the rest for all."""
COMMIT_S = 2.0
"""How long a complete save may take to be committed."""


class ShardedCheckpointManager(CheckpointManager):
    """The sharded checkpoints in a folder that only this job uses. All ranks call each method together."""

    is_sharded = True

    def __init__(
        self,
        folder: Path,
        *,
        mesh: DeviceMesh,
        retention: Retention | None = None,
        upload: str | None = None,
        dist: DistContext | None = None,
    ) -> None:
        """`mesh` is the model's: (shard) or (replicate, shard). Raises CheckpointError as CheckpointManager does."""
        self.mesh = mesh
        self.shard, self.shards = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
        self.replica = 0 if mesh.ndim == 1 else mesh.get_local_rank(0)
        self.is_first_replica, self.has_replicas = self.replica == 0, mesh.ndim == 2
        self.is_first_of_replica = self.shard == 0
        self._part_is_done = threading.Event()
        super().__init__(folder, retention=retention, upload=upload, dist=dist)
        self._remote = open_store(upload) if upload else None
        self._catalogue = Catalogue(FileStore(self.folder), self._remote)
        self._receipts = Receipts(self.dist)
        self._kept: list[str] | None = None
        self._is_uploading = False
        self._closed_at: float | None = None

    def _remove_incomplete(self) -> None:
        """Nothing yet: a checkpoint whose parts are all there is committed by `restore`."""

    # --- restoring

    def restore(self, source: Path | None = None) -> Restored | None:
        """Return the newest state that verifies on every rank; None if there is none.

        One that does not verify is revoked with a warning, and the one before is used. Raises StoreError if a rank
        cannot read, CheckpointError if `source`, the path of one checkpoint, does not verify.
        """
        if source is not None:
            found = self.dist.broadcast(
                read_manifest(source.name, [FileStore(source.parent)]) if self.dist.is_main else None
            )
            if isinstance(found, str):
                raise CheckpointError(f"{source}: {found}")
            manifest = ShardedManifest.from_bytes(found, str(source))
            restored, problem, _ = self._load(source.name, manifest, source.parent)
            if restored is None:
                raise CheckpointError(f"{source}: {problem}")
            return restored
        names = self.dist.broadcast(self._catalogue.names() if self.dist.is_main else None)
        if isinstance(names, str):
            raise StoreError(names)
        passed_over: list[tuple[str, str]] = []  # names and attempts of newer ones
        missing = ""
        for name in names:
            restored, token, problem, is_missing = self._try(name)
            if restored is not None:
                if self.dist.is_main:  # this run will save these steps again
                    for newer, attempt in passed_over:
                        self._catalogue.revoke(newer, attempt)
                self.newest_step = restored.step
                return restored
            if self.dist.is_main:
                logger.warning(f"{self.folder / name}: {problem}; falling back to the one before")
                if not is_missing:
                    self._catalogue.revoke(name, token)
            if is_missing:
                missing = missing or problem
                passed_over.append((name, token))
        if missing:
            raise CheckpointError(
                f"{missing}, so none of {len(names)} checkpoints can be restored on these hosts; give every host all "
                "parts (--checkpoint-upload s3://... or one shared directory), or an empty directory to start at step 0"
            )
        if names and self.dist.is_main:
            logger.warning(f"{self.folder}: none of {len(names)} checkpoints verifies; this run starts from step 0")
        return None

    def _try(self, name: str) -> tuple[Restored | None, str, str, bool]:
        """Load one on all ranks. Returns the state, the attempt that saved it, what is wrong, if a part is missing."""
        found = self.dist.broadcast(read_manifest(name, self._catalogue.stores) if self.dist.is_main else None)
        if isinstance(found, str):
            return None, "unreadable", found, False
        manifest = ShardedManifest.from_bytes(found, name)
        restored, problem, is_missing = self._load(name, manifest, self.folder)
        return restored, manifest.token, problem, is_missing

    def _load(self, name: str, manifest: ShardedManifest, folder: Path) -> tuple[Restored | None, str, bool]:
        """Load this rank's state, on all ranks or on none. Returns it, or what is wrong, and if only a part is missing.

        Raises StoreError.
        """
        stores: list[Store] = [FileStore(folder), *([] if self._remote is None else [self._remote])]
        trouble = Trouble()
        common: Packed | None = None
        state: dict[str, Any] = {}
        with trouble.noted():
            common = load_common(stores, name, manifest) if self.dist.is_main else None
        common = self.dist.broadcast(common)
        if common is not None:
            with trouble.noted():
                state = load_state(
                    stores,
                    name,
                    manifest,
                    common,
                    rank=self.dist.rank,
                    ranks=self.dist.world_size,
                    shard=self.shard,
                    shards=self.shards,
                )
        problems = self.dist.all_gather((trouble.denied, trouble.problem, trouble.missing))
        denied, problem, missing = (next(filter(None, one), "") for one in zip(*problems, strict=True))
        if denied:
            raise StoreError(denied)
        if problem or missing:
            return None, problem or missing, not problem
        first = manifest.parts[0]
        return (
            Restored(
                state=self._with_dtensors(state),
                step=manifest.step,
                path=folder / name,
                manifest=Manifest(
                    step=first.step, kind=first.kind, ranks=manifest.ranks, metrics=first.metrics, files={}
                ),
            ),
            "",
            False,
        )

    def _with_dtensors(self, value: Any) -> Any:
        if isinstance(value, LocalShard):
            placements = [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]
            whole = torch.empty(value.shape, device="meta")
            return DTensor.from_local(
                value.rows.to(self.mesh.device_type),
                self.mesh,
                placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        if isinstance(value, dict):
            return {key: self._with_dtensors(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._with_dtensors(item) for item in value)
        return value

    # --- saving

    def reserve(self, state: Mapping[str, Any]) -> None:
        planned = self._planned(state, is_first=self.dist.is_main, holds_shard=self.is_first_replica)
        self._buffer.reserve(planned[0].layout.size_bytes)
        self._start_writer()

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        kind: str = "step",
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Copy this rank's state into memory and have its writer save it, as `CheckpointManager.save` does."""
        self.wait()
        # Ranks that upload at different speeds must leave out the same saves.
        is_uploaded = wait or self.dist.all_reduce_max(float(self._is_uploading))[0] == 0
        kept = self.dist.broadcast(self._kept)
        with self.state_lock:
            self._send(
                step,
                self._planned(state, is_first=self.dist.is_main, holds_shard=self.is_first_replica),
                {"kind": kind, "shard": self.shard if self.is_first_replica else None, "metrics": metrics},
                {"is_uploaded": is_uploaded, "kept": kept},
            )
        if self.dist.is_main:
            arguments = (self._request, checkpoint_name(step), self._saves)
            threading.Thread(
                target=self._commit_when_written, args=arguments, name="estiba-commit", daemon=True
            ).start()
        if wait:
            self.wait()

    def save_replica(
        self, step: int, state: Mapping[str, Any], *, timeout_s: float, metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Save this rank's replica as a whole checkpoint, without the ranks of other replicas, which may be lost.

        Every rank of the replica calls it with its whole `state`, as the main rank has it. Returns whether the
        checkpoint is committed; on ranks other than the replica's first, whether this rank's part is written.
        """
        deadline = time.monotonic() + timeout_s
        with self.state_lock:
            if self._request is not None:
                self._part_is_done.wait(timeout_s)
                self._request.done.wait(COMMIT_S)  # perhaps every rank wrote its part before the others were lost
                self._request.done.set()
            replica = {"token": f"{self._token}{self.replica:02x}", "rank": self.shard, "ranks": self.shards}
            self._send(
                step,
                self._planned(state, is_first=self.is_first_of_replica, holds_shard=True),
                {"kind": "interrupt", "shard": self.shard, "metrics": metrics},
                {"is_uploaded": True, "kept": None, "replica": replica, "timeout_s": deadline - time.monotonic()},
            )
        assert self._request is not None
        self.wait(max(0.0, deadline - time.monotonic()))
        return self._request.is_saved

    def _send(
        self,
        step: int,
        planned: tuple[snapshot.TensorFile, Any, dict[str, dict[str, Any]]],
        part: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        """Copy a planned file into the staging buffer and have the writer save it."""
        started = time.monotonic()
        file, tree, shapes = planned
        self._buffer.reserve(file.layout.size_bytes)
        self._buffer.pin()
        snapshot.copy_file(self._buffer, 0, file)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        blocking_s = time.monotonic() - started
        self._saves += 1
        self._part_is_done.clear()
        writer = self._start_writer()
        self._request = SaveRequest(step, started, blocking_s, file.layout.size_bytes, writer)
        self._is_uploading = bool(options["is_uploaded"]) and self._remote is not None
        metrics = {key: float(value) for key, value in (part["metrics"] or {}).items()}
        writer.send(
            {
                "do": "save",
                "step": step,
                "name": checkpoint_name(step),
                "needed": file.layout.size_bytes,
                "size": file.layout.size_bytes,
                "buffer_bytes": self._buffer.size_bytes,
                **options,
                "part": {
                    **part,
                    "step": step,
                    "shards": self.shards,
                    "metrics": metrics,
                    "tree": tree,
                    "sharded": shapes,
                },
            }
        )
        self._next_save_at = time.monotonic() + SPACING * blocking_s

    def _planned(
        self, state: Mapping[str, Any], *, is_first: bool, holds_shard: bool
    ) -> tuple[snapshot.TensorFile, Any, dict[str, dict[str, Any]]]:
        """Return this rank's file, its tree spec, and the whole shapes of what is sharded.

        The first rank of a checkpoint saves what all ranks share too.
        """
        tensors, tree = tree_spec.flatten(state)
        if not is_first:
            _, tree = tree_spec.flatten({key: state[key] for key in OWN_KEYS if key in state})
        kept: dict[str, torch.Tensor] = {}
        shapes: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                shapes[name] = {"dtype": layout.DTYPES[tensor.dtype], "shape": list(tensor.shape)}
                if holds_shard:
                    kept[name] = tensor.to_local()
            elif is_first or name.split("/")[0] in OWN_KEYS:
                kept[name] = tensor
        return snapshot.TensorFile(sharded.PART_DATA, layout.lay_out(kept), kept), tree, shapes if is_first else {}

    def _commit_when_written(self, request: SaveRequest, name: str, number: int) -> None:
        """On the main rank: wait until every rank wrote its part, and commit."""
        try:
            parts = self._receipts.collect(number, request.done, lambda: self._closed_at)
        except CheckpointError as error:
            self._on_failure(request, str(error))
            return
        if parts is not None:
            request.writer.send({"do": "commit", "step": request.step, "name": name, "parts": parts})

    def close(self, timeout_s: float | None = None) -> None:
        self._closed_at = time.monotonic()
        super().close(timeout_s)

    # --- the writer

    def _start_writer(self) -> WriterProcess:
        if self._writer is not None and self._writer.is_running:
            return self._writer
        settings = {
            "folder": str(self.folder),
            "rank": self.dist.rank,
            "ranks": self.dist.world_size,
            "local_rank": self.dist.local_rank,
            "token": self._token,
            "descriptor": self._buffer.descriptor,
            "retention": self.retention.model_dump(),
            "upload": self.upload,
        }
        self._writer = WriterProcess(
            settings,
            descriptor=self._buffer.descriptor,
            on_reply=self._on_reply,
            on_exit=self._on_exit,
            module="estiba.checkpoint.sharded.writer",
        )
        return self._writer

    def _on_reply(self, reply: Reply) -> None:
        request = self._request
        if "kept" in reply:
            self._kept = reply["kept"]
        elif "part" in reply and request is not None:
            self._part_is_done.set()
            self._receipts.give(self._saves, reply["part"])
            if not self.dist.is_main:  # its own part is on the disk; the main rank waits for all of them
                super()._on_reply({"step": reply["written"]})
        elif "failed" in reply and request is not None:
            self._part_is_done.set()
            self._receipts.give_failure(self._saves, reply["failed"])
            super()._on_reply(reply)
        else:
            if "sent" in reply or "unsent" in reply:
                self._is_uploading = False
            super()._on_reply(reply)

    def _on_exit(self, writer: WriterProcess) -> None:
        self._part_is_done.set()
        if self._request is not None and not self._request.done.is_set():
            self._receipts.give_failure(self._saves, writer.exit_report())
        super()._on_exit(writer)
