"""Where a run begins: at its own newest checkpoint, at one that was asked for, or at step 0."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import xxhash

from estiba.checkpoint import directory
from estiba.checkpoint.directory import Manifest
from estiba.checkpoint.exports import import_pt
from estiba.checkpoint.saver import Checkpoints, Restored
from estiba.errors import CheckpointError, ConfigError
from estiba.stop import say
from estiba.store import open_store, stage


def find_origin(
    checkpoints: Checkpoints, resume_from: str | None
) -> tuple[Restored | None, dict[str, Any] | None, str | None]:
    """The state to go on from; or weights alone, to begin with; and a name for what `resume_from` led to.

    With `resume_from`, the run's own checkpoints count if they descend from it: a run that was interrupted after it
    began there goes on, and does not begin there again. Raises CheckpointError, ConfigError.
    """
    own = checkpoints.restore()
    if resume_from is None:
        return own, None, own.state["work"].get("origin") if own else None
    given, weights, name = _read(checkpoints, resume_from)
    if own is not None and own.state["work"].get("origin") == name:
        say(f"going on from step {own.step} in {checkpoints.folder}, which began with {resume_from}")
        return own, None, name
    step = given.step if given else 0
    if own is not None and given is not None and own.path == given.path:
        return own, None, own.state["work"].get("origin")
    if own is not None and own.step > step:
        raise ConfigError(
            f"--resume-from {resume_from} is of step {step}, and {checkpoints.folder} holds newer checkpoints of "
            f"another run (step {own.step}); give --checkpoint-path another directory, or leave --resume-from out"
        )
    return given, weights, name


def _read(checkpoints: Checkpoints, place: str) -> tuple[Restored | None, dict[str, Any] | None, str]:
    path = _local(place)
    if path.is_file():
        state = import_pt(path)
        name = f"{path.name} {_digest(path)}"
        if "loop" not in state:
            say(f"{place}: weights alone; the run begins with them at step 0")
            return None, state["model"], name
        step = int(state["loop"]["step"])
        return Restored(state=state, step=step, path=path, manifest=Manifest(step=step, files={})), None, name
    if not path.is_dir():
        raise ConfigError(f"--resume-from {place}: there is nothing; give a checkpoint directory or a .pt file")
    if not (path / directory.MANIFEST).exists():
        names = directory.names_in(path)
        if not names:
            raise ConfigError(f"--resume-from {place}: holds no checkpoint (step-…/{directory.MANIFEST}); give one")
        for one in names:
            try:
                return _whole(checkpoints, path / one)
            except CheckpointError as error:
                say(f"warning: {error}; going back to the one before")
        raise CheckpointError(f"--resume-from {place}: none of {len(names)} checkpoints verifies; give another")
    return _whole(checkpoints, path)


def _whole(checkpoints: Checkpoints, path: Path) -> tuple[Restored, None, str]:
    found = checkpoints.restore(path)
    assert found is not None
    return found, None, f"{path.name} {xxhash.xxh3_64_hexdigest(found.manifest.to_bytes())}"


def _local(place: str) -> Path:
    if not place.startswith(("s3://", "file://")):
        return Path(place)
    parent, _, name = place.rstrip("/").rpartition("/")
    folder = Path(tempfile.gettempdir()) / f"estiba-resume-{xxhash.xxh3_64_hexdigest(place.encode())}"
    if name.endswith(".pt"):
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        with open_store(parent).open(name) as reading, open(target, "wb") as writing:
            while chunk := reading.read(2**24):
                writing.write(chunk)
        return target
    return stage(place, folder / name)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()
