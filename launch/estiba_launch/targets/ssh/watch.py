"""watch.sh: what looks after a job on the remote host, whether or not anybody is connected."""

from __future__ import annotations

from estiba_launch.request.contract import max_runtime_s
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets.docker_command import STOP_S, network_of
from estiba_launch.targets.ssh.script import INSPECT, container_names, sync_name, work_dir


def watch_script(job: JobFile) -> str:
    """watch.sh: keeps MaxRuntimeInSeconds, ends a cluster when one host failed, saves logs and exit codes.

    When the machine or its engine restarted, it starts the job's containers again; they resume from the checkpoints,
    which are on the machine's disk. It holds a lock, so only one runs and starting it again is safe. `end` appears
    last: who sees it finds the log, the exit codes, the last checkpoint sync and the clean-up done.
    """
    sync, network = sync_name(job.name), network_of(job.name)
    return f"""\
names='{" ".join(container_names(job.name, job.request))}'
work="$HOME/{work_dir(job.name)}"
cd "$work" || exit 1
exec 9>watch.lock
flock -n 9 || exit 0
[ -e end ] && exit 0
# Files that are written on a full disk stay empty.
[ -s deadline ] || echo $(( $(date +%s) + {max_runtime_s(job.request)} )) > deadline
deadline=$(cat deadline)
: "${{deadline:=$(( $(date +%s) + {max_runtime_s(job.request)} ))}}"
engine() {{ cat /proc/sys/kernel/random/boot_id; stat -c %Y /run/docker.pid 2>/dev/null; }}
seen=$(cat engine 2>/dev/null)
[ -n "$seen" ] || {{ seen=$(engine); echo "$seen" > engine; }}
secrets=; [ ! -e had-secrets ] || secrets=1
starts() {{ docker logs {sync} 2>&1 | grep -c '^ready'; }}
# Whoever removes the folder of a running job must still see it end.
stay() {{ [ -e "$work/watch.lock" ] || {{ mkdir -p "$work" && cd "$work" && exec 9>watch.lock && flock -n 9; }}; }}
while [ ! -e end.part ] && sleep 2; do
  stay
  docker info >/dev/null 2>&1 || continue
  running= failed= gone=
  for name in $names; do
    state=$(docker inspect --format '{{{{.State.Status}}}} {{{{.State.ExitCode}}}}' "$name") || {{ gone=1; continue; }}
    case $state in
      exited\\ 0 | dead\\ 0) ;;
      exited* | dead*) failed=1 ;;
      *) running="$running $name" ;;
    esac
  done
  # An engine that goes down between two questions has no containers.
  docker info >/dev/null 2>&1 || continue
  if [ "$(engine)" != "$seen" ]; then
    if [ -z "$gone" ] && [ ! -e stopped ] && [ "$running" != " $names" ] && [ "$(date +%s)" -lt $deadline ]; then
      rm -f */output/failure
      docker start {sync} 2>/dev/null
      docker start $names || continue
      date -u +%FT%TZ >> restarts
    fi
    seen=$(engine)
    echo "$seen" > engine
    continue
  fi
  [ -n "$running" ] || break
  if [ -n "$failed" ]; then docker stop --time {STOP_S} $running; continue; fi
  if [ "$(date +%s)" -ge $deadline ]; then
    [ -e stopped ] || echo MaxRuntimeExceeded > stopped
    docker stop --time {STOP_S} $running
  fi
done
case $(docker inspect --format '{{{{.State.Running}}}}' {sync} 2>/dev/null) in
  true) docker stop --time 600 {sync} ;;
  # It died, so the last sync is still to be made.
  false) starts=$(starts); docker start {sync}
    while [ "$(starts)" = "$starts" ] && docker top {sync} >/dev/null; do sleep 1; done
    docker stop --time 600 {sync} ;;
esac
stay
case $(docker inspect --format '{{{{.State.ExitCode}}}}' {sync} 2>/dev/null) in
  0 | '') ;;
  *) docker logs --tail 1 {sync} 2>&1 | head -c 800 > unsynced ;;
esac
docker rm --force {sync} 2>/dev/null
# Until the disk has room for it: containers keep their log and exit code so long.
until [ -e end.part ]; do
  saved=1
  for name in $names; do
    ! docker inspect "$name" >/dev/null 2>&1 || docker logs --timestamps "$name" > "$name.log" 2>&1 || saved=
  done
  ends=$(docker inspect --format '{INSPECT}' $names)
  docker info >/dev/null 2>&1 && [ -n "$saved" ] && echo "$ends" > end.new && mv end.new end.part || sleep 5
done
# Docker keeps a container's environment, so containers that were given secrets do not outlive their job.
if [ -n "$secrets" ]; then docker rm --force $names; fi
docker network rm {network}
mv end.part end
"""
