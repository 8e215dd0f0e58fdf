#!/bin/sh
# embed-golden on ssh://user@203.0.113.7:2222: image, data, then a detached container. Nothing secret is written on the box.
set -eu
ssh -p 2222 user@203.0.113.7 mkdir -p estiba/embed-golden/data
ssh -p 2222 user@203.0.113.7 docker pull estiba/embed:local || docker save estiba/embed:local | gzip -1 | ssh -p 2222 user@203.0.113.7 'gunzip | docker load'
rsync -az -e 'ssh -p 2222' '/srv/my data/' user@203.0.113.7:estiba/embed-golden/data/dataset/
rsync -az -e 'ssh -p 2222' /srv/model/ user@203.0.113.7:estiba/embed-golden/data/model/
ssh -p 2222 user@203.0.113.7 sh -s <<'ESTIBA_SSH'
set -eu
work="$HOME/estiba/embed-golden"
docker network create estiba-embed-golden
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
mkdir -p "$work/checkpoints"
docker run \
  --detach \
  --name embed-golden-algo-1 \
  --hostname algo-1 \
  --stop-timeout 120 \
  --shm-size 8g \
  --network estiba-embed-golden \
  --network-alias algo-1 \
  --gpus all \
  --env TRAINING_JOB_NAME=embed-golden \
  --env TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-golden \
  --volume "$work/algo-1/input:/opt/ml/input" \
  --volume "$work/algo-1/model:/opt/ml/model" \
  --volume "$work/algo-1/output:/opt/ml/output" \
  --volume "$work/data/dataset:/opt/ml/input/data/dataset:ro" \
  --volume "$work/data/model:/opt/ml/input/data/model:ro" \
  --volume "$work/checkpoints:/opt/ml/checkpoints" \
  estiba/embed:local train
ESTIBA_SSH
ssh -p 2222 user@203.0.113.7 docker logs --follow embed-golden-algo-1
