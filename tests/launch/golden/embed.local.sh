#!/bin/sh
# embed-golden on this machine, by hand. `estiba run` starts the same containers, and also restores and
# syncs checkpoints, keeps the time limits, restarts after an interruption and packs the results.
set -eu
work=${WORK:-$PWD/embed-golden}
set -- estiba-embed-golden-algo-1-1
for name; do
  [ "$(docker inspect --format '{{.State.Running}}' "$name" 2>/dev/null)" != true ] || {
    echo "$name runs already; stop it (docker stop $name, or estiba stop embed-golden) first" >&2; exit 1; }
done
docker rm "$@" >/dev/null 2>&1 || :
mkdir -p /srv/checkpoints
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
docker network rm estiba-embed-golden >/dev/null 2>&1 || :
docker network create --label estiba.job=embed-golden estiba-embed-golden >/dev/null
trap '{ docker stop estiba-embed-golden-algo-1-1; docker rm estiba-embed-golden-algo-1-1; docker network rm estiba-embed-golden; } >/dev/null 2>&1' EXIT
trap 'exit 1' HUP INT TERM
docker run --detach \
  --name estiba-embed-golden-algo-1-1 \
  --hostname algo-1 \
  --label estiba.job=embed-golden \
  --label estiba.attempt=1 \
  --label estiba.host=algo-1 \
  --stop-timeout 120 \
  --shm-size 8g \
  --network estiba-embed-golden \
  --network-alias algo-1 \
  --env TRAINING_JOB_NAME=embed-golden \
  --env TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-golden \
  --mount "type=bind,source=$work/algo-1/input,target=/opt/ml/input" \
  --mount "type=bind,source=$work/algo-1/model,target=/opt/ml/model" \
  --mount "type=bind,source=$work/algo-1/output,target=/opt/ml/output" \
  --mount type=bind,source=/srv/checkpoints,target=/opt/ml/checkpoints \
  --mount 'type=bind,source=/srv/my data,target=/opt/ml/input/data/dataset,readonly' \
  --mount type=bind,source=/srv/model,target=/opt/ml/input/data/model,readonly \
  estiba/embed:local train
docker logs --follow estiba-embed-golden-algo-1-1
exit "$(docker wait estiba-embed-golden-algo-1-1 | sort -n | tail -n 1)"
