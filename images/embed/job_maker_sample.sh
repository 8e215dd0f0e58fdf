#!/usr/bin/env bash
# Copy this file to job_maker.sh, edit the values, and run it:
#
#   bash job_maker.sh          # starts the training job on spot capacity
#   bash job_maker.sh plan     # prints the request and starts nothing
#
# The code is in the image, so there is no channel for it. TARGET=local runs the same request on this machine.
set -euo pipefail

BUCKET=${BUCKET:-my-bucket}
ROLE_ARN=${ROLE_ARN:-arn:aws:iam::111122223333:role/SageMakerRole}
IMAGE=${IMAGE:-111122223333.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:latest}
AWS_REGION=${AWS_REGION:-us-east-1}
MODEL=${MODEL:-pablosi/bge-m3-trained-2}
JOB_NAME=${JOB_NAME:-tokenizer-$(date +%Y%m%d-%H%M%S)}
DATASET_URI=${DATASET_URI:-s3://$BUCKET/dataset/}
OUTPUT_URI=${OUTPUT_URI:-s3://$BUCKET/output/}
CHECKPOINT_URI=${CHECKPOINT_URI:-s3://$BUCKET/checkpoints/}
INSTANCE_TYPE=${INSTANCE_TYPE:-ml.g4dn.xlarge}

request=$(mktemp --suffix=.yaml)
trap 'rm -f "$request"' EXIT
cat >"$request" <<REQUEST
TrainingJobName: $JOB_NAME
RoleArn: $ROLE_ARN
AlgorithmSpecification:
  TrainingImage: $IMAGE
  TrainingInputMode: File
HyperParameters:
  model: $MODEL
  batch-size: "0"
InputDataConfig:
  - ChannelName: dataset
    ContentType: application/x-parquet
    DataSource: {S3DataSource: {S3DataType: S3Prefix, S3Uri: $DATASET_URI, S3DataDistributionType: FullyReplicated}}
OutputDataConfig: {S3OutputPath: $OUTPUT_URI}
EnableManagedSpotTraining: true
CheckpointConfig: {S3Uri: $CHECKPOINT_URI, LocalPath: /opt/ml/checkpoints}
ResourceConfig: {InstanceType: $INSTANCE_TYPE, InstanceCount: 1, VolumeSizeInGB: 30}
StoppingCondition: {MaxRuntimeInSeconds: 3600, MaxWaitTimeInSeconds: 10800}
REQUEST

export AWS_REGION
case "${1:-run}" in
plan) estiba plan "$request" --target "${TARGET:-sagemaker}" ;;
*) estiba run "$request" --target "${TARGET:-sagemaker}" --yes ;;
esac
