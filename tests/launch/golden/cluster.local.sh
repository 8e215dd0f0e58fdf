#!/bin/sh
# embed-1 on this machine, by hand. `estiba run` starts the same containers, and also restores and
# syncs checkpoints, keeps the time limits, restarts after an interruption and packs the results.
set -eu
work=${WORK:-$PWD/embed-1}
set -- estiba-embed-1-algo-1-1 estiba-embed-1-algo-2-1
for name; do
  [ "$(docker inspect --format '{{.State.Running}}' "$name" 2>/dev/null)" != true ] || {
    echo "$name runs already; stop it (docker stop $name, or estiba stop embed-1) first" >&2; exit 1; }
done
docker rm "$@" >/dev/null 2>&1 || :
mkdir -p "$work/inputs/all/dataset"
aws s3 sync s3://bucket/data "$work/inputs/all/dataset"
[ -n "$(ls -A "$work/inputs/all/dataset")" ] || aws s3 sync s3://bucket "$work/inputs/all/dataset" --exclude '*' --include 'data*'
rm -rf "$work/inputs/algo-1/dataset"
mkdir -p "$work/inputs/algo-1/dataset"
(cd "$work/inputs/all/dataset" && find -L . -type f | LC_ALL=C sort | awk 'NR % 2 == 1' |
  while IFS= read -r file; do
    mkdir -p "$work/inputs/algo-1/dataset"/"${file%/*}"
    ln -fL "$file" "$work/inputs/algo-1/dataset"/"$file" 2>/dev/null || cp -L "$file" "$work/inputs/algo-1/dataset"/"$file"
  done)
rm -rf "$work/inputs/algo-2/dataset"
mkdir -p "$work/inputs/algo-2/dataset"
(cd "$work/inputs/all/dataset" && find -L . -type f | LC_ALL=C sort | awk 'NR % 2 == 0' |
  while IFS= read -r file; do
    mkdir -p "$work/inputs/algo-2/dataset"/"${file%/*}"
    ln -fL "$file" "$work/inputs/algo-2/dataset"/"$file" 2>/dev/null || cp -L "$file" "$work/inputs/algo-2/dataset"/"$file"
  done)
mkdir -p "$work/checkpoints"
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
docker network rm estiba-embed-1 >/dev/null 2>&1 || :
docker network create --internal --label estiba.job=embed-1 estiba-embed-1 >/dev/null
range=$(docker network inspect --format '{{(index .IPAM.Config 0).Subnet}}' estiba-embed-1)
docker network rm estiba-embed-1 >/dev/null
docker network create --internal --label estiba.job=embed-1 --subnet "$range" estiba-embed-1 >/dev/null
first=${range%/*}
trap '{ docker stop estiba-embed-1-algo-1-1 estiba-embed-1-algo-2-1; docker rm estiba-embed-1-algo-1-1 estiba-embed-1-algo-2-1; docker network rm estiba-embed-1; } >/dev/null 2>&1' EXIT
trap 'exit 1' HUP INT TERM
docker run --detach \
  --name estiba-embed-1-algo-1-1 \
  --hostname algo-1 \
  --label estiba.job=embed-1 \
  --label estiba.attempt=1 \
  --label estiba.host=algo-1 \
  --stop-timeout 120 \
  --shm-size 8g \
  --network estiba-embed-1 \
  --network-alias algo-1 \
  --ip "${first%.*}.$((${first##*.} + 2))" \
  --add-host algo-2:"${first%.*}.$((${first##*.} + 3))" \
  --gpus 1 \
  --memory 16g \
  --memory-swap 16g \
  --cpus 4 \
  --env TRAINING_JOB_NAME=embed-1 \
  --env TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-1 \
  --env HF_HUB_OFFLINE=1 \
  --mount "type=bind,source=$work/algo-1/input,target=/opt/ml/input" \
  --mount "type=bind,source=$work/algo-1/model,target=/opt/ml/model" \
  --mount "type=bind,source=$work/algo-1/output,target=/opt/ml/output" \
  --mount "type=bind,source=$work/checkpoints,target=/opt/ml/checkpoints" \
  --mount "type=bind,source=$work/inputs/algo-1/dataset,target=/opt/ml/input/data/dataset,readonly" \
  --entrypoint sh \
  210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1 -c 'echo "$HOME" && exec train'
docker run --detach \
  --name estiba-embed-1-algo-2-1 \
  --hostname algo-2 \
  --label estiba.job=embed-1 \
  --label estiba.attempt=1 \
  --label estiba.host=algo-2 \
  --stop-timeout 120 \
  --shm-size 8g \
  --network estiba-embed-1 \
  --network-alias algo-2 \
  --add-host algo-1:"${first%.*}.$((${first##*.} + 2))" \
  --ip "${first%.*}.$((${first##*.} + 3))" \
  --gpus 1 \
  --memory 16g \
  --memory-swap 16g \
  --cpus 4 \
  --env TRAINING_JOB_NAME=embed-1 \
  --env TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-1 \
  --env HF_HUB_OFFLINE=1 \
  --mount "type=bind,source=$work/algo-2/input,target=/opt/ml/input" \
  --mount "type=bind,source=$work/algo-2/model,target=/opt/ml/model" \
  --mount "type=bind,source=$work/algo-2/output,target=/opt/ml/output" \
  --mount "type=bind,source=$work/checkpoints,target=/opt/ml/checkpoints" \
  --mount "type=bind,source=$work/inputs/algo-2/dataset,target=/opt/ml/input/data/dataset,readonly" \
  --entrypoint sh \
  210987654321.dkr.ecr.us-east-1.amazonaws.com/estiba/embed:1 -c 'echo "$HOME" && exec train'
docker logs --follow estiba-embed-1-algo-1-1
exit "$(docker wait estiba-embed-1-algo-1-1 estiba-embed-1-algo-2-1 | sort -n | tail -n 1)"
