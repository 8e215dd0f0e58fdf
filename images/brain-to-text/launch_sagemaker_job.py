"""The guide's launcher, by its name: `python launch_sagemaker_job.py …` is `estiba launch --target sagemaker …`.

    IMAGE=ACCOUNT.dkr.ecr.REGION.amazonaws.com/estiba/brain-to-text:TAG ROLE_ARN=… \
    python launch_sagemaker_job.py --s3-bucket B --s3-data-prefix P --config-file rnn_args.yaml

`--request` prints the CreateTrainingJob request and starts nothing; `estiba launch --help` lists all flags.
"""

import os
import shutil
import sys
from pathlib import Path


def main() -> None:
    estiba = shutil.which("estiba", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if estiba is None:
        sys.exit("launch_sagemaker_job: no command `estiba` here; `make env` in the project makes .venv/bin/estiba")
    # A flag that is given twice counts the last time: --target can still be another.
    os.execv(estiba, [estiba, "launch", "--target", "sagemaker", *sys.argv[1:]])


if __name__ == "__main__":
    main()
