"""AWS's SDK, version 3, in local container mode: v3.py IMAGE DATA MODEL OUT JSON. Runs in a venv of its own."""

import json
import sys
from importlib.metadata import version

import boto3
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.training.configs import Compute, InputData
from sagemaker.train.model_trainer import Mode, ModelTrainer

image, data, model, out, hyperparameters = sys.argv[1:]
trainer = ModelTrainer(
    training_image=image,
    training_mode=Mode.LOCAL_CONTAINER,
    # A bucket that is named is not asked for; nothing is put there.
    sagemaker_session=Session(boto_session=boto3.Session(region_name="us-east-1"), default_bucket="not-used"),
    role="arn:aws:iam::210987654321:role/Estiba",
    compute=Compute(instance_type="local_cpu", instance_count=1),
    hyperparameters=json.loads(hyperparameters),
    local_container_root=out,
    input_data_config=[
        InputData(channel_name="dataset", data_source=data),
        InputData(channel_name="model", data_source=model),
    ],
)
trainer.train(wait=True)
print(json.dumps({"version": version("sagemaker"), "archives": f"{out}/compressed_artifacts"}))
