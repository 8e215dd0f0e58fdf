"""Where a run keeps its checkpoints unless --checkpoint-path says so."""

from __future__ import annotations

import os
from pathlib import Path

from aura.config import AuraConfig
from estiba.platform.contract import root_of


def with_checkpoint_path(config: AuraConfig) -> AuraConfig:
    """Return `config` with checkpoints below the output directory, if nobody provides another place.

    Without SageMaker, a mount or an earlier run there, /opt/ml/checkpoints is lost with the container, or is not there.
    """
    output = config.output_dir.rstrip("/")
    is_below_root = "://" not in output and root_of() in (Path(output), *Path(output).parents)
    chosen = {"checkpoint_path"} & config.model_fields_set
    if chosen or "output_dir" not in config.model_fields_set or is_below_root:
        return config
    if _is_provided(Path(config.checkpoint_path)):
        return config
    values = {**dict(config), "checkpoint_path": f"{output}/checkpoints"}
    return AuraConfig.model_construct(_fields_set=set(config.model_fields_set), **values)


def _is_provided(folder: Path) -> bool:
    root = root_of()
    is_mounted = any(os.path.ismount(path) for path in (folder, root))
    is_used = folder.is_dir() and any(folder.iterdir())
    return is_mounted or is_used or (root / "input/config/checkpointconfig.json").exists()
