#!/bin/sh
# embed-golden on ssh://user@203.0.113.7:2222: engine, image, data, then detached containers.
# By hand, from this machine: sh FILE. The host stores no secret.
set -eu
if [ "${1-}" != start ]; then
  ssh="${ESTIBA_SSH:-ssh} -p 2222"
  on_host() { $ssh user@203.0.113.7 "$@"; }
  on_host 'docker info >/dev/null 2>&1' || on_host 'bash -s engine' < scripts/engine.sh
  here=$(docker image inspect --format '{{json .RootFS.Layers}} {{json .Config.Entrypoint}} {{json .Config.Cmd}} {{json .Config.Env}} {{json .Config.WorkingDir}} {{json .Config.Labels}}' estiba/embed:local 2>/dev/null) || here=
  there=$(on_host 'docker image inspect --format '"'"'{{json .RootFS.Layers}} {{json .Config.Entrypoint}} {{json .Config.Cmd}} {{json .Config.Env}} {{json .Config.WorkingDir}} {{json .Config.Labels}}'"'"' estiba/embed:local' 2>/dev/null) || there=
  if [ -z "$there" ] || { [ -n "$here" ] && [ "$here" != "$there" ]; }; then
    [ -n "$here" ] || { echo "image estiba/embed:local: neither here nor on the host, and it names no registry; build it (make build), or give its registry (docker.io/...)" >&2; exit 1; }
    docker save estiba/embed:local | gzip -1 | on_host docker load -q
  fi
  on_host 'mkdir -p estiba/data estiba/jobs && mkdir estiba/jobs/embed-golden estiba/jobs/embed-golden/data'
  on_host 'command -v rsync >/dev/null' || on_host 'bash -s rsync' < scripts/engine.sh
  on_host 'mkdir -p estiba/data/376fdd58b8b8-my_data estiba/jobs/embed-golden/data/dataset'
  rsync -rt --copy-links --perms --chmod=u+rwX --partial --protect-args -e "$ssh" --delete --rsync-path='flock estiba/data/376fdd58b8b8-my_data.lock rsync' '/srv/my data'/ user@203.0.113.7:estiba/data/376fdd58b8b8-my_data/
  on_host 'flock estiba/data/376fdd58b8b8-my_data.lock cp -al estiba/data/376fdd58b8b8-my_data/. estiba/jobs/embed-golden/data/dataset/'
  on_host 'mkdir -p estiba/data/6e29a63c6b2a-model estiba/jobs/embed-golden/data/model'
  rsync -rt --copy-links --perms --chmod=u+rwX --partial --protect-args -e "$ssh" --delete --rsync-path='flock estiba/data/6e29a63c6b2a-model.lock rsync' /srv/model/ user@203.0.113.7:estiba/data/6e29a63c6b2a-model/
  on_host 'flock estiba/data/6e29a63c6b2a-model.lock cp -al estiba/data/6e29a63c6b2a-model/. estiba/jobs/embed-golden/data/model/'
  [ ! -d /srv/checkpoints ] || rsync -rt --copy-links --perms --chmod=u+rwX --partial --protect-args -e "$ssh" /srv/checkpoints/ user@203.0.113.7:estiba/jobs/embed-golden/checkpoints/
  on_host 'cat > estiba/jobs/embed-golden/start.sh' < "$0"
  { :; } | on_host sh estiba/jobs/embed-golden/start.sh start
  echo 'estiba status embed-golden --target ssh://user@203.0.113.7:2222 knows this job' >&2
  on_host docker logs --follow embed-golden
  exit
fi
work="$HOME/estiba/jobs/embed-golden"
cat > "$work/request.json" <<'ESTIBA_FILE'
{"TrainingJobName": "embed-golden", "AlgorithmSpecification": {"TrainingImage": "estiba/embed:local", "TrainingInputMode": "File", "MetricDefinitions": [{"Name": "rows_per_s", "Regex": "rows_per_s=([0-9.eE+-]+)"}, {"Name": "tokens_per_s", "Regex": "tokens_per_s=([0-9.eE+-]+)"}]}, "HyperParameters": {"model": "/opt/ml/input/data/model", "text-column": "texto"}, "InputDataConfig": [{"ChannelName": "dataset", "ContentType": "application/x-parquet", "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "file:///srv/my data"}}}, {"ChannelName": "model", "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "file:///srv/model"}}}], "OutputDataConfig": {"S3OutputPath": "file:///srv/out"}, "EnableManagedSpotTraining": true, "CheckpointConfig": {"S3Uri": "file:///srv/checkpoints", "LocalPath": "/opt/ml/checkpoints"}, "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30}, "StoppingCondition": {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 10800}}
ESTIBA_FILE
env=$(cat)
exec 8>"$work/start.lock" && flock 8
[ -z "$env" ] || : >"$work/had-secrets"
docker network rm estiba-embed-golden >/dev/null 2>&1 || :
docker network create estiba-embed-golden >/dev/null
undo() {
  code=$?
  if [ $code != 0 ]; then docker rm --force embed-golden embed-golden-sync >/dev/null 2>&1 || :
  docker network rm estiba-embed-golden >/dev/null 2>&1 || :; fi
  [ -z "${guard-}" ] || kill "$guard" 2>/dev/null || :
  exit $code
}
trap undo EXIT
trap 'exit 1' HUP INT TERM PIPE
{ nvidia-smi -L >/dev/null 2>&1 && { docker info --format '{{json .Runtimes}}' | grep -q nvidia || command -v nvidia-container-runtime-hook >/dev/null 2>&1; }; } || { echo '--gpus all: this host has no GPU that docker can use; see nvidia-smi, or pass --gpus none' >&2; exit 1; }
[ -s "$work/deadline" ] || echo $(( $(date +%s) + 3600 )) >"$work/deadline"
must_end() {
  [ -e "$work/stopped" ] && return
  [ "$(date +%s)" -ge "$(cat "$work/deadline")" ] && echo MaxRuntimeExceeded >"$work/stopped"
}
(
  until must_end; do sleep 2; done
  docker ps --quiet --filter "volume=$work/agent" | xargs -r docker kill
) >/dev/null 2>&1 8>&- &
guard=$!
users=$(docker info --format '{{.SecurityOptions}} {{.DockerRootDir}}')
root='' userns=''
case $users in *name=userns*) root=$(echo "${users##*/}" | tr . :) userns='--userns host' ;; esac
own() { docker run --rm --network none $userns --user 0 --mount "type=bind,source=$work,target=/host" \
  --entrypoint chown "$@" >/dev/null; }
mkdir -p "$work/checkpoints" "$work/sync"
[ -z "$root" ] || own estiba/embed:local -R "$root" /host/checkpoints /host/sync
cat > "$work/watch.sh" <<'ESTIBA_FILE'
names='embed-golden'
work="$HOME/estiba/jobs/embed-golden"
cd "$work" || exit 1
exec 9>watch.lock
flock -n 9 || exit 0
[ -e end ] && exit 0
# Files that are written on a full disk stay empty.
[ -s deadline ] || echo $(( $(date +%s) + 3600 )) > deadline
deadline=$(cat deadline)
: "${deadline:=$(( $(date +%s) + 3600 ))}"
engine() { cat /proc/sys/kernel/random/boot_id; stat -c %Y /run/docker.pid 2>/dev/null; }
seen=$(cat engine 2>/dev/null)
[ -n "$seen" ] || { seen=$(engine); echo "$seen" > engine; }
secrets=; [ ! -e had-secrets ] || secrets=1
starts() { docker logs embed-golden-sync 2>&1 | grep -c '^ready'; }
# Whoever removes the folder of a running job must still see it end.
stay() { [ -e "$work/watch.lock" ] || { mkdir -p "$work" && cd "$work" && exec 9>watch.lock && flock -n 9; }; }
while [ ! -e end.part ] && sleep 2; do
  stay
  docker info >/dev/null 2>&1 || continue
  running= failed= gone=
  for name in $names; do
    state=$(docker inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$name") || { gone=1; continue; }
    case $state in
      exited\ 0 | dead\ 0) ;;
      exited* | dead*) failed=1 ;;
      *) running="$running $name" ;;
    esac
  done
  # An engine that goes down between two questions has no containers.
  docker info >/dev/null 2>&1 || continue
  if [ "$(engine)" != "$seen" ]; then
    if [ -z "$gone" ] && [ ! -e stopped ] && [ "$running" != " $names" ] && [ "$(date +%s)" -lt $deadline ]; then
      rm -f */output/failure
      docker start embed-golden-sync 2>/dev/null
      docker start $names || continue
      date -u +%FT%TZ >> restarts
    fi
    seen=$(engine)
    echo "$seen" > engine
    continue
  fi
  [ -n "$running" ] || break
  if [ -n "$failed" ]; then docker stop --time 120 $running; continue; fi
  if [ "$(date +%s)" -ge $deadline ]; then
    [ -e stopped ] || echo MaxRuntimeExceeded > stopped
    docker stop --time 120 $running
  fi
done
case $(docker inspect --format '{{.State.Running}}' embed-golden-sync 2>/dev/null) in
  true) docker stop --time 600 embed-golden-sync ;;
  # It died, so the last sync is still to be made.
  false) starts=$(starts); docker start embed-golden-sync
    while [ "$(starts)" = "$starts" ] && docker top embed-golden-sync >/dev/null; do sleep 1; done
    docker stop --time 600 embed-golden-sync ;;
esac
stay
case $(docker inspect --format '{{.State.ExitCode}}' embed-golden-sync 2>/dev/null) in
  0 | '') ;;
  *) docker logs --tail 1 embed-golden-sync 2>&1 | head -c 800 > unsynced ;;
esac
docker rm --force embed-golden-sync 2>/dev/null
# Until the disk has room for it: containers keep their log and exit code so long.
until [ -e end.part ]; do
  saved=1
  for name in $names; do
    ! docker inspect "$name" >/dev/null 2>&1 || docker logs --timestamps "$name" > "$name.log" 2>&1 || saved=
  done
  ends=$(docker inspect --format '{{.Name}} {{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}} {{.State.StartedAt}} {{.State.FinishedAt}}' $names)
  docker info >/dev/null 2>&1 && [ -n "$saved" ] && echo "$ends" > end.new && mv end.new end.part || sleep 5
done
# Docker keeps a container's environment, so containers that were given secrets do not outlive their job.
if [ -n "$secrets" ]; then docker rm --force $names; fi
docker network rm estiba-embed-golden
mv end.part end
ESTIBA_FILE
if must_end; then exit 1; fi
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
[ -z "$root" ] || own estiba/embed:local -R "$root" /host/algo-1
printf '%s\n' "$env" | docker run --detach \
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
  --mount "type=bind,source=$work/algo-1/input,target=/opt/ml/input" \
  --mount "type=bind,source=$work/algo-1/model,target=/opt/ml/model" \
  --mount "type=bind,source=$work/algo-1/output,target=/opt/ml/output" \
  --mount "type=bind,source=$work/data/dataset,target=/opt/ml/input/data/dataset,readonly" \
  --mount "type=bind,source=$work/data/model,target=/opt/ml/input/data/model,readonly" \
  --mount "type=bind,source=$work/checkpoints,target=/opt/ml/checkpoints" \
  estiba/embed:local train >/dev/null
: >"$work/watch.lock"
setsid nohup sh "$work/watch.sh" >>"$work/watch.log" 2>&1 </dev/null 8>&- &
if must_end; then setsid nohup docker stop --time 120 embed-golden >/dev/null 2>&1 8>&- & fi
