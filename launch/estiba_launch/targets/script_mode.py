"""Checks a request's script mode against its image, where this machine has the image."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

FRAMEWORK = "SAGEMAKER_TRAINING_MODULE"
"""Set in AWS's images that launch several processes. The toolkit alone supports only MPI, with mpirun."""
WORKLOAD = "ESTIBA_WORKLOAD"


def notes(request: Mapping[str, Any]) -> Iterator[str]:
    """Warnings about what the request asks for and the image lacks. Starts nothing, contacts no registry."""
    values: Mapping[str, str] = request.get("HyperParameters", {})
    image = request.get("AlgorithmSpecification", {}).get("TrainingImage", "")
    launchers = [
        name
        for name, value in values.items()
        if name.startswith("sagemaker_") and name.endswith("_enabled") and value.strip('"').lower() == "true"
    ]
    script = request.get("Environment", {}).get("SAGEMAKER_PROGRAM") or values.get("sagemaker_program", "").strip('"')
    settings = image_settings(image) if launchers or script else None
    if settings is None or FRAMEWORK in settings:
        return
    if script and WORKLOAD not in settings:
        yield f"{image}: by its settings neither Estiba's nor AWS's, so it may not run {script} (script mode)"
    for name in launchers:
        effect = "ends with an error, as there is no mpirun" if "_mpi_" in name else "runs one process on each host"
        yield f"HyperParameters.{name}: {image} has no such launcher, so the job {effect}; build it with BASE=dlc"


def image_settings(image: str) -> Mapping[str, str] | None:
    """The environment variables of a local image; None without the image or an engine."""
    if not image or not shutil.which("docker"):
        return None
    words = ["docker", "image", "inspect", "--format", "{{json .Config.Env}}", image]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return dict(one.partition("=")[::2] for one in json.loads(done.stdout) or ())
