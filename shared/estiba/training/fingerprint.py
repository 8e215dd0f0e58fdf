"""The run fingerprint: settings that a resume must not change, compared field by field."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from estiba.errors import ConfigError
from estiba.log import get_logger

logger = get_logger(__name__)

DETAILS = "details"
"""The field whose contents explain a difference in another one, such as a digest. It is not compared by itself."""


def check_fingerprint(
    saved: Mapping[str, Any], current: Mapping[str, Any], where: str, *, accept: bool, fixed: Collection[str] = ()
) -> None:
    """Compare a checkpoint's fingerprint with this run's. `accept` turns the error into a warning.

    `fixed` names fields, such as `model.embed_size`, that the saved tensors do not survive a change of, whatever
    `accept` says. Raises ConfigError naming each changed field, its saved and its current value.
    """
    changes = _changes(_without_details(saved), _without_details(current))
    if not changes:
        return
    details = _changes(saved.get(DETAILS, {}), current.get(DETAILS, {})) if DETAILS in saved else {}
    text = f"{where} was made with other settings: {'; '.join({**changes, **details}.values())}"
    if not accept:
        raise ConfigError(
            f"{text}. Use the same settings, give another directory for checkpoints (--checkpoint-path; in a job file "
            "its CheckpointConfig), or continue with the new settings by --accept-changed-plan"
        )
    if impossible := [change for name, change in changes.items() if name in fixed]:
        raise ConfigError(
            f"{where}: its weights cannot continue with {'; '.join(impossible)}, even by --accept-changed-plan. Use "
            "the same settings, or start a new run in another directory for checkpoints (--checkpoint-path)"
        )
    logger.warning(f"{text}. Continuing with the current settings because of --accept-changed-plan")


def _without_details(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fingerprint.items() if name != DETAILS}


def _changes(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Describe every field that differs, by its name, such as `schedule.steps: saved 40, now 60`."""
    changes: dict[str, str] = {}
    for name in sorted({*saved, *current}):
        before, now = saved.get(name), current.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            changes |= _changes(before, now, f"{prefix}{name}.")
        elif before != now:
            changes[f"{prefix}{name}"] = f"{prefix}{name}: saved {before!r}, now {now!r}"
    return changes
