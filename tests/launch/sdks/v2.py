"""AWS's SDK, version 2, in local mode: v2.py IMAGE DATA MODEL OUT JSON. Runs in a venv of its own."""

import json
import sys

import sagemaker
from sagemaker.estimator import Estimator
from sagemaker.local import LocalSession

image, data, model, out, hyperparameters = sys.argv[1:]
session = LocalSession()
session.config = {"local": {"region_name": "us-east-1"}}
estimator = Estimator(
    image_uri=image,
    role="arn:aws:iam::210987654321:role/Estiba",
    instance_count=1,
    instance_type="local",
    sagemaker_session=session,
    output_path=f"file://{out}",
    hyperparameters=json.loads(hyperparameters),
)
estimator.fit({"dataset": f"file://{data}", "model": f"file://{model}"}, wait=True)
print(json.dumps({"version": sagemaker.__version__, "archives": out}))
