#!/bin/sh
# embed-1 on this machine, by hand. `estiba run` does this and also restores and syncs checkpoints,
# keeps the time limits, restarts after an interruption and packs the results.
set -eu
work=${WORK:-$PWD/embed-1}
docker network create --internal estiba-embed-1
# dataset is ShardedByS3Key: `estiba run` gives each host a share, here each sees it all.
aws s3 sync s3://bucket/data "$work/data/dataset"
aws s3 sync s3://bucket/checkpoints "$work/checkpoints"
mkdir -p "$work/algo-1/input/config" "$work/algo-1/model" "$work/algo-1/output/data"
cat > "$work/algo-1/input/config/hyperparameters.json" <<'ESTIBA_FILE'
{
 "model": "\"BAAI/bge-m3\"",
 "text-column": "\"texto\"",
 "note": "\"it's $HOME `date`\""
}
ESTIBA_FILE
cat > "$work/algo-1/input/config/resourceconfig.json" <<'ESTIBA_FILE'
{
 "current_host": "algo-1",
 "current_instance_type": "ml.g4dn.xlarge",
 "current_group_name": "homogeneousCluster",
 "hosts": [
  "algo-1",
  "algo-2"
 ],
 "instance_groups": [
  {
   "instance_group_name": "homogeneousCluster",
   "instance_type": "ml.g4dn.xlarge",
   "hosts": [
    "algo-1",
    "algo-2"
   ]
  }
 ],
 "network_interface_name": "eth0"
}
ESTIBA_FILE
cat > "$work/algo-1/input/config/inputdataconfig.json" <<'ESTIBA_FILE'
{
 "dataset": {
  "TrainingInputMode": "File",
  "S3DistributionType": "ShardedByS3Key",
  "RecordWrapperType": "None",
  "ContentType": "application/x-parquet"
 }
}
ESTIBA_FILE
cat > "$work/algo-1/input/config/checkpointconfig.json" <<'ESTIBA_FILE'
{
 "LocalPath": "/opt/ml/checkpoints"
}
ESTIBA_FILE
mkdir -p "$work/checkpoints"
docker run \
  --detach \
  --name embed-1-algo-1 \
  --hostname algo-1 \
  --stop-timeout 120 \
  --shm-size 8g \
  --network estiba-embed-1 \
  --network-alias algo-1 \
  --gpus 1 \
  --memory 16g \
  --cpus 4 \
  --env TRAINING_JOB_NAME=embed-1 \
  --env TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-1 \
  --env HF_HUB_OFFLINE=1 \
  --volume "$work/algo-1/input:/opt/ml/input" \
  --volume "$work/algo-1/model:/opt/ml/model" \
  --volume "$work/algo-1/output:/opt/ml/output" \
  --volume "$work/data/dataset:/opt/ml/input/data/dataset:ro" \
  --volume "$work/checkpoints:/opt/ml/checkpoints" \
  --entrypoint sh \
  210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1 -c 'echo "$HOME" && exec train'
mkdir -p "$work/algo-2/input/config" "$work/algo-2/model" "$work/algo-2/output/data"
cat > "$work/algo-2/input/config/hyperparameters.json" <<'ESTIBA_FILE'
{
 "model": "\"BAAI/bge-m3\"",
 "text-column": "\"texto\"",
 "note": "\"it's $HOME `date`\""
}
ESTIBA_FILE
cat > "$work/algo-2/input/config/resourceconfig.json" <<'ESTIBA_FILE'
{
 "current_host": "algo-2",
 "current_instance_type": "ml.g4dn.xlarge",
 "current_group_name": "homogeneousCluster",
 "hosts": [
  "algo-1",
  "algo-2"
 ],
 "instance_groups": [
  {
   "instance_group_name": "homogeneousCluster",
   "instance_type": "ml.g4dn.xlarge",
   "hosts": [
    "algo-1",
    "algo-2"
   ]
  }
 ],
 "network_interface_name": "eth0"
}
ESTIBA_FILE
cat > "$work/algo-2/input/config/inputdataconfig.json" <<'ESTIBA_FILE'
{
 "dataset": {
  "TrainingInputMode": "File",
  "S3DistributionType": "ShardedByS3Key",
  "RecordWrapperType": "None",
  "ContentType": "application/x-parquet"
 }
}
ESTIBA_FILE
cat > "$work/algo-2/input/config/checkpointconfig.json" <<'ESTIBA_FILE'
{
 "LocalPath": "/opt/ml/checkpoints"
}
ESTIBA_FILE
mkdir -p "$work/checkpoints"
docker run \
  --detach \
  --name embed-1-algo-2 \
  --hostname algo-2 \
  --stop-timeout 120 \
  --shm-size 8g \
  --network estiba-embed-1 \
  --network-alias algo-2 \
  --gpus 1 \
  --memory 16g \
  --cpus 4 \
  --env TRAINING_JOB_NAME=embed-1 \
  --env TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-1 \
  --env HF_HUB_OFFLINE=1 \
  --volume "$work/algo-2/input:/opt/ml/input" \
  --volume "$work/algo-2/model:/opt/ml/model" \
  --volume "$work/algo-2/output:/opt/ml/output" \
  --volume "$work/data/dataset:/opt/ml/input/data/dataset:ro" \
  --volume "$work/checkpoints:/opt/ml/checkpoints" \
  --entrypoint sh \
  210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1 -c 'echo "$HOME" && exec train'
