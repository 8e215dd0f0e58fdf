"""Fine-tune on a table or text of yours, here or on SageMaker.

    python launch_finetune_job.py --data table.csv --base_model ./SmolLM2-135M-Instruct --epochs 1
    python launch_finetune_job.py --data table.csv --base_model llama-2-7b --target sagemaker --fallback local \\
        --image ACCOUNT.dkr.ecr.REGION.amazonaws.com/estiba/finetune:TAG --role ROLE --output-uri s3://BUCKET/out

It takes the hyperparameters of the fine-tuning document and every flag of `estiba launch`; `--request` only prints the
CreateTrainingJob request. In Python:

    from launch_finetune_job import launch_finetune_job
    launch_finetune_job(data="table.csv", base_model="./SmolLM2-135M-Instruct", epochs=1).fit(wait=True)
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGE = "estiba/finetune:local"
HYPERPARAMETERS = (
    "learning_rate", "batch_size", "epochs", "max_sequence_length", "optimizer", "weight_decay", "method",
)  # fmt: skip
"""Those of the fine-tuning document, and `method`; others go through `hyperparameters`, or -p NAME=VALUE."""
DEFAULTS: dict[str, Any] = {"instance_type": "ml.g5.xlarge", "volume_size_gb": 60}


def launch_finetune_job(
    data: str | Path,
    base_model: str | Path,
    *,
    hyperparameters: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
    target: str = "local",
    **arguments: Any,
) -> Any:
    """Start the job and return it; `.wait()` or `.fit()` waits for its end.

    `data` is a file, a directory or an s3:// address; `base_model` is one of these, a hub id or an alias. What is on
    this machine is used in place here, and uploaded once for SageMaker. The hyperparameters named above are arguments;
    the rest are those of `estiba_launch.launch_training_job`, such as `fallback="local"`.
    """
    import estiba_launch

    channels, named = inputs_of(data, base_model)
    named |= {name: arguments.pop(name) for name in HYPERPARAMETERS if arguments.get(name) is not None}
    return estiba_launch.launch_training_job(
        **{
            "image_uri": os.environ.get("IMAGE") or IMAGE,
            **DEFAULTS,
            **arguments,
            "target": target,
            "channels": channels | dict(arguments.get("channels") or {}),
            "hyperparameters": named | dict(hyperparameters or {}),
            "environment": environment,
        }
    )


def inputs_of(data: str | Path, base_model: str | Path) -> tuple[dict[str, Any], dict[str, object]]:
    """(channels, hyperparameters). A model that is no directory and no address is for the image to find on the hub."""
    channels = {"training": address_of(data)}
    text = str(base_model)
    is_place = "://" in text or text.startswith(("/", ".", "~")) or Path(text).is_dir()
    return (channels | {"model": address_of(text)}, {}) if is_place else (channels, {"base_model": text})


def address_of(place: str | Path) -> str:
    return str(place) if "://" in str(place) else f"file://{Path(place).expanduser().absolute()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="file, directory or s3:// address")
    parser.add_argument("--base_model", "--base-model", required=True, help="hub id, alias, directory or s3:// address")
    for name in HYPERPARAMETERS:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", help="hyperparameter")
    given, others = parser.parse_known_args()
    estiba = shutil.which("estiba", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if estiba is None:
        sys.exit("launch_finetune_job: the command `estiba` is not installed; `make env` creates .venv/bin/estiba")
    channels, named = inputs_of(given.data, given.base_model)
    named |= {name: value for name in HYPERPARAMETERS if (value := getattr(given, name)) is not None}
    words = ["--image", os.environ.get("IMAGE") or IMAGE, "--instance-type", DEFAULTS["instance_type"]]
    words += ["--volume-gb", str(DEFAULTS["volume_size_gb"])]
    for flag, pairs in (("--channel", channels), ("--hyperparameter", named)):
        words += [word for name, value in pairs.items() for word in (flag, f"{name}={value}")]
    # The last of a flag counts, so the caller's image and machine win.
    os.execv(estiba, [estiba, "launch", *words, *others])


if __name__ == "__main__":
    main()
