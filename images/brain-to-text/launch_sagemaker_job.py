"""The guide's launcher: starts the decoder's training on SageMaker, or where ESTIBA_TARGET says.

    IMAGE=ACCOUNT.dkr.ecr.REGION.amazonaws.com/estiba/brain-to-text:TAG ROLE_ARN=... \\
    python launch_sagemaker_job.py --s3-bucket BUCKET --s3-data-prefix PREFIX --config-file rnn_args.yaml

It prints the plan and the price, starts the job and follows its log; `--ask` asks first, `--request` only prints the
CreateTrainingJob request. The other flags are those of `estiba launch --help`. ESTIBA_TARGET=local runs the same
command on this machine. In Python:

    from launch_sagemaker_job import launch_training_job
    estimator = launch_training_job(s3_bucket="BUCKET", config_file="rnn_args.yaml")
    estimator.fit(wait=True)
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGE = "estiba/brain-to-text:local"
"""Where IMAGE is not set; SageMaker needs one in ECR."""
NAME = "brain-to-text"
DATA_PREFIX = "data/hdf5_data_diphone_encoded"
CONFIG_FILE, DIPHONE_CONFIG_FILE = "rnn_args.yaml", "rnn_args_diphone_sagemaker.yaml"
CONFIG_FILES_OF_IMAGE = (CONFIG_FILE, DIPHONE_CONFIG_FILE, "rnn_args_small.yaml")
OTHER_DATA = {"channels", "inputs", "hyperparameters", "--channel", "--hyperparameter", "-p"}
"""Arguments, or flags, that may say where the data is without --s3-bucket."""
MAX_RUN_S = 432_000
"""Five days: AWS's default limit for a job. 150,000 batches with validation take more than the usual day."""


def launch_training_job(**arguments: Any) -> Any:
    """Start the job and return it; `.fit(wait=True)` follows it to its end.

    Accepts the arguments of `estiba_launch.launch_training_job`, with the guide's defaults. Raises LaunchError.
    """
    import estiba_launch
    from estiba_launch.request.build import default_checkpoints

    complete, notes = with_defaults(arguments)
    for note in notes:
        logging.getLogger("estiba_launch").warning(note)
    output = complete.get("output_path")
    if output and complete.get("use_spot", True) and not complete.get("checkpoint_s3_uri"):
        stem = complete.get("job_name") or complete.get("base_job_name") or NAME
        complete |= {"use_spot": True, "checkpoint_s3_uri": default_checkpoints(complete, output, stem)}
    return estiba_launch.launch_training_job(**complete)


def with_defaults(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the arguments with the guide's defaults, notes for the user). Raises SystemExit without data or its file."""
    if not arguments.get("s3_bucket") and not OTHER_DATA & set(arguments):
        sys.exit(
            "launch_sagemaker_job: no data; pass --s3-bucket BUCKET (s3_bucket= in Python), with the recordings below "
            f"{DATA_PREFIX} or --s3-data-prefix, or --channel dataset=URI (channels=)"
        )
    complete = {
        "target": os.environ.get("ESTIBA_TARGET") or "sagemaker",
        "image_uri": os.environ.get("IMAGE") or IMAGE,
        "max_run_s": MAX_RUN_S,
        **{name: value for name, value in arguments.items() if value is not None},
    }
    if "max_run" in arguments:
        del complete["max_run_s"]
    if bucket := complete.get("s3_bucket"):
        complete.setdefault("s3_data_prefix", DATA_PREFIX)
        complete.setdefault("output_path", f"s3://{bucket}/sagemaker-outputs")
    complete["config_file"], note = config_file(complete.get("config_file"), complete.get("s3_data_prefix"))
    return complete, [note]


def config_file(name: str | None, data_prefix: str | None) -> tuple[str, str]:
    """(the file to use, a note that says which it is): a file here, an s3:// address, or a file of the image."""
    if name is None:
        is_diphone = data_prefix == DATA_PREFIX and not Path(CONFIG_FILE).is_file()
        name = DIPHONE_CONFIG_FILE if is_diphone else CONFIG_FILE
    if Path(name).is_file():
        return name, f"config_file: {Path(name).absolute()} of this machine is sent with the job"
    if name.startswith("s3://"):
        return name, f"config_file: the job reads {name}"
    if name in CONFIG_FILES_OF_IMAGE:
        return name, f"config_file: there is no {name} here, so the job uses the image's own"
    sys.exit(
        f"launch_sagemaker_job: --config-file {name}: no such file here, and the image has none of this name; give "
        f"the path of a file, s3://BUCKET/KEY, or one of {', '.join(CONFIG_FILES_OF_IMAGE)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name in ("s3-bucket", "s3-data-prefix", "config-file", "output-uri"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--ask", action="store_true", help="ask before the job starts")
    given, others = parser.parse_known_args()
    estiba = [sys.executable, "-m", "estiba_launch"]
    if importlib.util.find_spec("estiba_launch") is None:
        if (command := shutil.which("estiba")) is None:
            sys.exit("launch_sagemaker_job: the command `estiba` is not installed; `make env` creates .venv/bin/estiba")
        estiba = [command]
    names = {"s3_bucket": given.s3_bucket, "s3_data_prefix": given.s3_data_prefix, "config_file": given.config_file}
    others_given = dict.fromkeys({word.partition("=")[0] for word in others if word.startswith("-")} & OTHER_DATA)
    complete, notes = with_defaults({**names, "output_path": given.output_uri, **others_given})
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    flags = {"image_uri": "image", "output_path": "output-uri"}
    words = [
        word
        for name, value in complete.items()
        for word in (f"--{flags.get(name, name.replace('_', '-'))}", str(value))
    ]
    # The last of a flag counts, so the caller's own win.
    os.execv(estiba[0], [*estiba, "launch", "--show-plan", *([] if given.ask else ["--yes"]), *words, *others])


if __name__ == "__main__":
    main()
