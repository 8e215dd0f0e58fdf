#!/bin/sh
# embed-golden on ssh://user@203.0.113.7:2222: engine, image, data, then a detached container. The box stores no secret.
set -eu
ssh -p 2222 user@203.0.113.7 'docker info >/dev/null 2>&1' || ssh -p 2222 user@203.0.113.7 'bash -s engine' < scripts/engine.sh
ssh -p 2222 user@203.0.113.7 docker pull -q estiba/embed:local || docker save estiba/embed:local | gzip -1 | ssh -p 2222 user@203.0.113.7 docker load -q
ssh -p 2222 user@203.0.113.7 'mkdir -p estiba/data estiba/jobs && mkdir estiba/jobs/embed-golden estiba/jobs/embed-golden/data'
rsync -rt --copy-links --delete -e 'ssh -p 2222' '/srv/my data/' user@203.0.113.7:estiba/jobs/embed-golden/data/dataset/
rsync -rt --copy-links --delete -e 'ssh -p 2222' /srv/model/ user@203.0.113.7:estiba/jobs/embed-golden/data/model/
[ ! -d /srv/checkpoints ] || rsync -rt --copy-links --delete -e 'ssh -p 2222' /srv/checkpoints/ user@203.0.113.7:estiba/jobs/embed-golden/checkpoints/
ssh -p 2222 user@203.0.113.7 'cat > estiba/jobs/embed-golden/start.sh' <<'ESTIBA_SSH'
set -eu
work="$HOME/estiba/jobs/embed-golden"
env=$(cat)
[ -z "$env" ] || : >"$work/had-secrets"
docker network create estiba-embed-golden >/dev/null
mkdir -p "$work/checkpoints"
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
printf '%s\n' "$env" | docker run \
  --detach \
  --name embed-golden \
  --hostname algo-1 \
  --stop-timeout 120 \
  --shm-size 8g \
  --network estiba-embed-golden \
  --network-alias algo-1 \
  --gpus all \
  --env TRAINING_JOB_NAME=embed-golden \
  --env TRAINING_JOB_ARN=arn:aws:sagemaker:local:000000000000:training-job/embed-golden \
  --env-file /dev/stdin \
  --volume "$work/algo-1/input:/opt/ml/input" \
  --volume "$work/algo-1/model:/opt/ml/model" \
  --volume "$work/algo-1/output:/opt/ml/output" \
  --volume "$work/data/dataset:/opt/ml/input/data/dataset:ro" \
  --volume "$work/data/model:/opt/ml/input/data/model:ro" \
  --volume "$work/checkpoints:/opt/ml/checkpoints" \
  estiba/embed:local train
cat > "$work/watch.sh" <<'ESTIBA_FILE'
names='embed-golden'
cd "$HOME/estiba/jobs/embed-golden" || exit 1
exec 9>watch.lock
flock -n 9 || exit 0
[ -e deadline ] || echo $(( $(date +%s) + 3600 )) > deadline
deadline=$(cat deadline)
while sleep 2; do
  docker info >/dev/null 2>&1 || continue
  running= failed=
  for name in $names; do
    state=$(docker inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$name") || continue
    case $state in
      exited\ 0 | dead\ 0) ;;
      exited* | dead*) failed=1 ;;
      *) running="$running $name" ;;
    esac
  done
  [ -n "$running" ] || break
  if [ -n "$failed" ]; then docker stop --time 120 $running; continue; fi
  if [ "$(date +%s)" -ge $deadline ]; then
    [ -e stopped ] || echo MaxRuntimeExceeded > stopped
    docker stop --time 120 $running
  fi
done
docker stop --time 600 embed-golden-sync 2>/dev/null && docker rm embed-golden-sync
for name in $names; do docker logs --timestamps "$name" > "$name.log" 2>&1; done
docker inspect --format '{{.Name}} {{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}} {{.State.StartedAt}} {{.State.FinishedAt}}' $names > end.part
mv end.part end
# Docker keeps a container's environment, so containers that were given secrets do not outlive their job.
if [ -e had-secrets ]; then docker rm $names; fi
docker network rm estiba-embed-golden
ESTIBA_FILE
setsid nohup sh "$work/watch.sh" >"$work/watch.log" 2>&1 </dev/null &
ESTIBA_SSH
{ :; } | ssh -p 2222 user@203.0.113.7 sh estiba/jobs/embed-golden/start.sh
ssh -p 2222 user@203.0.113.7 docker logs --follow embed-golden
