#!/bin/sh
# embed-golden on this machine, by hand. `estiba run` does this and also restores and syncs checkpoints,
# keeps the time limits, restarts after an interruption and packs the results.
set -eu
work=${WORK:-$PWD/embed-golden}
mkdir -p "$work/algo-1/input/config" "$work/algo-1/model" "$work/algo-1/output/data"
cat > "$work/algo-1/input/config/hyperparameters.json" <<'ESTIBA_FILE'
{
 "model": "/opt/ml/input/data/model",
 "text-column": "texto"
}
ESTIBA_FILE
cat > "$work/algo-1/input/config/resourceconfig.json" <<'ESTIBA_FILE'
{
 "current_host": "algo-1",
 "current_instance_type": "ml.g4dn.xlarge",
 "current_group_name": "homogeneousCluster",
 "hosts": [
  "algo-1"
 ],
 "instance_groups": [
  {
   "instance_group_name": "homogeneousCluster",
   "instance_type": "ml.g4dn.xlarge",
   "hosts": [
    "algo-1"
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
  "S3DistributionType": "FullyReplicated",
  "RecordWrapperType": "None",
  "ContentType": "application/x-parquet"
 },
 "model": {
  "TrainingInputMode": "File",
  "S3DistributionType": "FullyReplicated",
  "RecordWrapperType": "None"
 }
}
ESTIBA_FILE
cat > "$work/algo-1/input/config/checkpointconfig.json" <<'ESTIBA_FILE'
{
 "LocalPath": "/opt/ml/checkpoints"
}
ESTIBA_FILE
mkdir -p /srv/checkpoints
docker run \
  --rm \
  --name embed-golden \
  --hostname algo-1 \
  --stop-timeout 120 \
  --shm-size 8g \
  --env TRAINING_JOB_NAME=embed-golden \
  --env TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-golden \
  --volume "$work/algo-1/input:/opt/ml/input" \
  --volume "$work/algo-1/model:/opt/ml/model" \
  --volume "$work/algo-1/output:/opt/ml/output" \
  --volume '/srv/my data:/opt/ml/input/data/dataset:ro' \
  --volume /srv/model:/opt/ml/input/data/model:ro \
  --volume /srv/checkpoints:/opt/ml/checkpoints \
  estiba/embed:local train
