"""The tokenizer guide's job_maker_sample.sh, edited and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ACCOUNT = {
    "ROLE_ARN": "arn:aws:iam::222233334444:role/Embed",
    "IMAGE": "222233334444.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1",
}
SCRIPT = Path(__file__).resolve().parents[2] / "images/embed/job_maker_sample.sh"


def test_the_sample_asks_for_the_originals_spot_job(tmp_path):
    edited = tmp_path / "job_maker.sh"
    edited.write_text(SCRIPT.read_text().replace("my-bucket", "un-cubo"))
    # Other variables, such as make's TARGET, would be settings of the script. estiba is beside this interpreter.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    command = ["bash", str(edited), "plan"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"HOME": os.environ["HOME"], "PATH": path, "JOB_NAME": "prueba", **ACCOUNT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    start = done.stdout.index("{")
    request, _ = json.JSONDecoder().raw_decode(done.stdout[start:])
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 10800}
    assert request["ResourceConfig"] == {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30}
    assert request["CheckpointConfig"] == {"S3Uri": "s3://un-cubo/checkpoints/", "LocalPath": "/opt/ml/checkpoints"}
    (channel,) = request["InputDataConfig"]
    assert (channel["ChannelName"], channel["ContentType"]) == ("dataset", "application/x-parquet")
    assert request["HyperParameters"] == {"model": "pablosi/bge-m3-trained-2", "batch-size": "0"}
