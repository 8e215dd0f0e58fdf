"""The request of the fine-tuning document, word for word."""

from __future__ import annotations

from pathlib import Path

REQUEST = """
HyperParameters: {base_model: llama-2-7b, learning_rate: '0.001', batch_size: '4', epochs: '3', max_sequence_length: '2048', optimizer: adam, weight_decay: '0.01'}
AlgorithmSpecification: {TrainingImage: IMAGE, TrainingInputMode: File, EnableSageMakerMetricsTimeSeries: true}
InputDataConfig: [{ChannelName: training, DataSource: {S3DataSource: {S3Uri: DATA}}, ContentType: application/jsonlines},
                  {ChannelName: code, DataSource: {S3DataSource: {S3Uri: SCRIPTS}}, ContentType: application/x-python}]
OutputDataConfig: {S3OutputPath: OUT}
ResourceConfig: {InstanceType: TYPE, InstanceCount: 1, VolumeSizeInGB: 30}
StoppingCondition: {MaxRuntimeInSeconds: 10800}
Environment: {SAGEMAKER_PROGRAM: finetune.py, SAGEMAKER_SUBMIT_DIRECTORY: SCRIPTS, SAGEMAKER_REQUIREMENTS: requirements.txt}
"""  # noqa: E501


def write(path: Path, *, base_model: str = "llama-2-7b", **values: str) -> Path:
    """Write it as a job file, with what a user may change: IMAGE, DATA, SCRIPTS, OUT and the base model."""
    text = REQUEST.replace("llama-2-7b", base_model)
    for name, value in {"TYPE": "ml.g5.2xlarge", **values}.items():
        text = text.replace(name, value)
    path.write_text(text)
    return path
