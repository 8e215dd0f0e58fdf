"""Choose where a run starts: its own newest checkpoint, the one named by --resume-from, or step 0."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from aura.config import STEP_FILE
from aura.model.decoder import Aura
from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint import restore
from estiba.checkpoint.exports import check_verifiable, import_pt, read_pt
from estiba.checkpoint.format import Manifest
from estiba.checkpoint.manager import CheckpointManager
from estiba.checkpoint.remote import Remote
from estiba.checkpoint.restore import Restored, load_newest
from estiba.errors import CheckpointError, ConfigError
from estiba.log import get_logger
from estiba.storage import FileStore, open_store, split_location, stage
from estiba.training.fingerprint import DETAILS

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from; by default random weights at step 0."""

    restored: Restored | None = None
    weights: Mapping[str, torch.Tensor] | None = None
    """Model weights without training state; the run starts at step 0."""
    origin: str | None = None
    """Identifies the checkpoint that --resume-from named."""
    supersedes_later: bool = False
    """Whether the run restarts from an older step of its own, so that its later checkpoints are to be superseded."""


def find_start(checkpoints: CheckpointManager, resume_from: str | None) -> Start:
    """Choose what the run starts from.

    With `resume_from`, the run's own checkpoints are used if they descend from it, so that an interrupted run resumes
    instead of starting over. An older step of the same run supersedes the later ones (`supersede_later`).
    Raises CheckpointError, ConfigError.
    """
    own = checkpoints.restore()
    own_origin = own.state["work"].get("origin") if own else None
    if resume_from is None:
        return Start(restored=own, origin=own_origin)
    start = _read(resume_from, checkpoints)
    step = start.restored.step if start.restored else 0
    if own is not None and start.restored is not None and own.path == start.restored.path:
        return Start(restored=own, origin=own_origin)
    if own is not None and own_origin == start.origin:
        logger.info(f"resuming from {checkpoints.folder}, step {own.step}, of a run that started from {resume_from}")
        return Start(restored=own, origin=own_origin)
    if own is not None and own.step > step:
        if not _is_same_run(own, start.restored, checkpoints.folder):
            raise ConfigError(
                f"--resume-from {resume_from} is at step {step}, but {checkpoints.folder} has newer checkpoints of "
                f"another run (step {own.step}); give another --checkpoint-path, or omit --resume-from"
            )
        return replace(start, supersedes_later=True)
    return start


def supersede_later(checkpoints: CheckpointManager, step: int) -> None:
    """Rename the checkpoints after `step`, and keep them. A run that is refused must not have come this far."""
    if checkpoints.dist.is_main:
        names = checkpoints.supersede_after(step)
        logger.warning(
            f"restarting from step {step}: the later checkpoints in {checkpoints.folder} are kept as "
            f"{', '.join(names)} and not used again; delete them when they are not needed"
        )
    checkpoints.dist.broadcast(None)


def peek_start(resume_from: str | None, folder: Path, upload: str | None) -> tuple[str, dict[str, Any]] | None:
    """Return where the state that a run will resume from is, and that state without tensors; None to start anew.

    Nothing is changed, and what is damaged is passed over: `find_start` deals with it.
    """
    if resume_from is None:
        return restore.peek(folder, upload)
    if (step := _step_named(resume_from)) is not None:
        name, is_here = _checkpoint_of(step, resume_from, folder, upload)
        if is_here:
            return str(folder / name), restore.peek_at(folder / name)
        assert upload is not None
        return f"{upload}/{name}", restore.peek_remote(Remote(upload), name)
    path = _local(resume_from)
    if path.is_dir():
        return restore.peek(path) if not (path / ckpt_format.MANIFEST).exists() else (str(path), restore.peek_at(path))
    if path.is_file():
        check_verifiable(path)  # before the text is read
    try:
        content = read_pt(path, mmap=True)
    except CheckpointError:
        return None
    return str(path), {"model_config": content.get("model_config"), **content.get("estiba", {})}


def load_weights(model: Aura, weights: Mapping[str, torch.Tensor], location: str | None) -> None:
    """Load weights into the model. Raises ConfigError if they belong to another model."""
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ConfigError(
            f"--resume-from {location}: the weights belong to another model ({lines[0][:300]}); give the same sizes "
            "and tokenizer, or omit --resume-from"
        ) from None


def _read(location: str, checkpoints: CheckpointManager) -> Start:
    if (step := _step_named(location)) is not None:
        path = _named(step, location, checkpoints)
        logger.info(f"{location}: means the verified checkpoint of step {step}, {path}")
    else:
        path = _local(location)
    if not path.is_file():
        restored = load_newest(path, flag="--resume-from", dist=checkpoints.dist)
        digest = xxhash.xxh3_64_hexdigest(restored.manifest.to_bytes())
        return Start(restored=restored, origin=f"{restored.path.name} {digest}")
    state = import_pt(path)
    with path.open("rb") as file:
        origin = f"{path.name} {hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()}"  # type: ignore[arg-type]
    if "loop" not in state:
        logger.info(f"{location}: weights only; the run starts with them at step 0")
        return Start(weights=state["model"], origin=origin)
    step = int(state["loop"]["step"])
    return Start(
        restored=Restored(state=state, step=step, path=path, manifest=Manifest(step=step, files={})), origin=origin
    )


def _is_same_run(own: Restored, other: Restored | None, folder: Path) -> bool:
    """Equal fingerprints and a common start give equal runs. A folder holds one run."""
    if other is None:
        return False
    plans = [{name: value for name, value in it.state["plan"].items() if name != DETAILS} for it in (own, other)]
    origins = [it.state["work"].get("origin") for it in (own, other)]
    return other.path.parent == folder or (plans[0] == plans[1] and origins[0] == origins[1])


def _step_named(location: str) -> int | None:
    """Return the step in `checkpoint-step-N.pt`, unless that is a file."""
    parent, name = split_location(location)
    match = STEP_FILE.fullmatch(name)
    return None if match is None or open_store(parent).head(name) is not None else int(match[1])


def _checkpoint_of(step: int, location: str, folder: Path, upload: str | None) -> tuple[str, bool]:
    """Return the name of a step's newest checkpoint, and whether it is in `folder`. Raises ConfigError."""
    here = ckpt_format.checkpoint_names(folder)
    there = Remote(upload).names() if upload else []
    for names, is_here in ((here, True), (there, False)):
        for name in names:
            if ckpt_format.sort_key(name)[0] == step:
                return name, is_here
    steps = sorted({ckpt_format.sort_key(name)[0] for name in (*here, *there)})
    kept = f"kept are those of steps {', '.join(map(str, steps))}" if steps else "there is none"
    raise ConfigError(
        f"--resume-from {location}: no such file, and {upload or folder} has no checkpoint of step {step}; {kept}. "
        "Give one of these, or omit --resume-from to resume from the newest (--keep-every keeps more)"
    )


def _named(step: int, location: str, checkpoints: CheckpointManager) -> Path:
    """Return the local path of a step's checkpoint, downloaded if needed."""
    path: str | None = None
    if checkpoints.dist.is_main:
        name, is_here = _checkpoint_of(step, location, checkpoints.folder, checkpoints.upload)
        if not is_here:
            assert checkpoints.upload is not None
            name = Remote(checkpoints.upload).fetch(name, checkpoints.folder)
        path = str(checkpoints.folder / name)
    return Path(checkpoints.dist.broadcast(path))


def _local(location: str) -> Path:
    """Return a local path, downloading from S3 if needed."""
    if not location.startswith(("s3://", "file://")):
        return Path(location)
    parent, name = split_location(location)
    store = open_store(location)
    if isinstance(store, FileStore):
        return store.root
    single = open_store(parent).head(name) if name.endswith(".pt") else None
    # Objects may be replaced under the same names: a copy is used again only for the same ones.
    version = [(entry.path, entry.size_bytes, entry.etag) for entry in ([single] if single else store.list())]
    folder = Path(tempfile.gettempdir()) / f"estiba-resume-{xxhash.xxh3_64_hexdigest(f'{location} {version}'.encode())}"
    if single is None:
        return stage(location, folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    for file in (name, f"{name}.xxh128"):
        if open_store(parent).head(file) is None:
            continue
        with open_store(parent).open(file) as source, FileStore(folder).writer(file) as target:
            shutil.copyfileobj(source, target, 2**24)
    return folder / name
