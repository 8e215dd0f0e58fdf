#!/usr/bin/env bash
# From a bare machine to vectors: engine, image, a Spanish corpus, a model, a real embedding job, and a search.
#
#   make demo                      # or: bash demo/run.sh
#   ESTIBA_BUILD=0 make demo       # use the existing images
#
# Every step is skipped when its result is there, so a second run takes seconds. Ctrl-C stops the job; the next run
# resumes from what it saved. Results are in runs/demo/output; `rm -r runs/demo` starts over.
# Exit status: 0; 1 a step failed; 2 a configuration mistake; 130 or 143 interrupted, run again to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly IMAGE="${ESTIBA_EMBED_IMAGE:-estiba/embed:local}"
readonly RUNS="$PWD/runs/demo"
readonly EMBEDDING="embedding (runs/demo/output)"
readonly STOP_GRACE_S=120
readonly BURST_S="${ESTIBA_DEMO_BURST_S:-3}"
readonly STEPS=7
readonly TICK_S="${ESTIBA_DEMO_TICK_S:-15}"
# One name per checkout: two checkouts can run side by side, one checkout cannot run twice.
CONTAINER="estiba-demo-$(printf %s "$PWD" | cksum | cut -d' ' -f1)"
readonly CONTAINER

stop_status=""
stopped_at=0
job_told=""
step_number=0

say() { printf 'demo: %s\n' "$*"; }

fail() { # MESSAGE [STATUS]
    printf 'demo: %s\n' "$1" >&2
    exit "${2:-1}"
}

# Run one step: say which of how many it is, that it still runs, and how long it took. On failure print the remedy and exit
# with the step's status.
step() { # NAME REMEDY COMMAND...
    local name="$1" remedy="$2" started=$SECONDS status=0 ticker
    shift 2
    announce "$name"
    tick "$name" &
    ticker=$!
    "$@" || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    [ -z "$stop_status" ] || fail "interrupted during: $name; run \`make demo\` again" "$stop_status"
    [ "$status" = 0 ] || fail "$name: failed after $((SECONDS - started)) s; $remedy"
    say "step $step_number of $STEPS: $name: done in $((SECONDS - started)) s"
}

announce() { # NAME
    step_number=$((step_number + 1))
    say "step $step_number of $STEPS: $1"
}

# A line whenever nothing was written for TICK_S: the seconds so far, and for the build what it does.
tick() { # NAME
    local started=$SECONDS doing
    trap - INT TERM
    while sleep "$TICK_S" >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        case "$1" in
            "$EMBEDDING") [ -z "$(docker logs --since "${TICK_S}s" --tail 1 "$CONTAINER" 2>&1)" ] || continue ;;
            "image $IMAGE") doing="$(tail -n 1 "$RUNS/build.log" 2>/dev/null | tr -d '\r' | cut -c1-80)" || true ;;
        esac
        say "step $step_number of $STEPS: $1: $((SECONDS - started)) s${doing:+; $doing}"
    done
}

# Forward the first signal to the job in its container, which saves its work and exits; a later one ends it at once.
# `make` and a signal to the whole process group bring the same signal several times.
on_signal() { # NAME STATUS
    if [ -z "$stop_status" ]; then
        stop_status="$2" stopped_at=$SECONDS
        stop_job "$1" || return 0
        job_told=yes
        say "stopping: the job saves its finished work and exits; another Ctrl-C or TERM ends it at once"
    elif [ $((SECONDS - stopped_at)) -ge "$BURST_S" ]; then
        stop_job KILL || return 0
        say "stopping at once"
    fi
}

stop_job() { # SIGNAL
    docker kill --signal "$1" "$CONTAINER" >/dev/null 2>&1
}

# However this script ends, a job that goes on is announced.
on_exit() {
    [ "$(state_of_container)" = running ] || return 0
    say "the job goes on: \`make demo\` follows it, \`docker stop $CONTAINER\` stops it" >&2
}

build() {
    if [ "${ESTIBA_BUILD:-1}" = 0 ]; then
        docker image inspect "$IMAGE" >/dev/null
    elif ! BUILD_PROGRESS=plain make --no-print-directory build/embed BASE=local >"$RUNS/build.log" 2>&1; then
        tail -n 25 "$RUNS/build.log" >&2
        return 1
    fi
}

state_of_container() { docker container inspect --format '{{.State.Status}}' "$CONTAINER" 2>/dev/null || true; }
exit_code_of_container() { docker container inspect --format '{{.State.ExitCode}}' "$CONTAINER"; }

start_job() {
    local gpus=()
    # The local base is CPU only; an image on another base gets the GPUs of this machine.
    if [[ "$IMAGE" != *:local ]] && docker info --format '{{json .Runtimes}}' | grep -q nvidia; then gpus=(--gpus all); fi
    mkdir -p "$RUNS/output" "$RUNS/checkpoints"
    docker run --detach --name "$CONTAINER" --network none --stop-timeout "$STOP_GRACE_S" \
        ${gpus[@]+"${gpus[@]}"} \
        --volume "$RUNS/input:/opt/ml/input/data/dataset:ro" \
        --volume "$RUNS/model:/model:ro" \
        --volume "$RUNS/output:/opt/ml/output/data" \
        --volume "$RUNS/checkpoints:/opt/ml/checkpoints" \
        "$IMAGE" --model /model >/dev/null
}

# Run the job to its end and show its log. Its container is not a child of this shell, so that a Ctrl-C reaches it only
# once, through on_signal, and so that the next run finds it if this shell is killed.
job() {
    local status
    if [ "$(state_of_container)" = running ]; then
        say "the job of an earlier run is still running; following it"
    else
        docker rm --force "$CONTAINER" >/dev/null 2>&1 || true
        if [ -n "$(ls -A "$RUNS/checkpoints" 2>/dev/null)" ] && [ ! -e "$RUNS/output/results.json" ]; then
            say "an earlier run was interrupted; the job resumes from its committed work"
        fi
        start_job || [ -n "$stop_status" ] || return 1
        # A signal that came before there was a container.
        [ -z "$stop_status" ] || [ -n "$job_told" ] || stop_job TERM || return "$stop_status"
    fi
    docker logs --follow "$CONTAINER" &
    await $!
    # A signal to the process group ends the follower, and not the job.
    while [ "$(state_of_container)" = running ]; do
        docker logs --follow --tail 0 "$CONTAINER" &
        await $!
    done
    status="$(exit_code_of_container)" && docker rm "$CONTAINER" >/dev/null && return "$status"
}

# `wait` returns early when a signal comes; the log ends with the container.
await() { # PID
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
}

show() {
    docker run --rm --network none --entrypoint python \
        --volume "$PWD/demo/neighbours.py:/neighbours.py:ro" --volume "$RUNS/output:/output:ro" \
        "$IMAGE" /neighbours.py /output
}

# A function, so that bash reads all of it before it runs: a `git pull` in the meantime changes nothing.
main() {
    trap 'on_signal INT 130' INT
    trap 'on_signal TERM 143' TERM
    trap on_exit EXIT

    mkdir -p "$RUNS"
    step "Docker engine" "see its message above" bash scripts/engine.sh
    step "host tools (.venv)" "see its message above; \`make env\` tries again" bash scripts/env.sh
    step "image $IMAGE" "see runs/demo/build.log" build
    step "corpus (runs/demo/input)" "see its message above; fetched packages are kept" \
        .venv/bin/python demo/corpus.py --out runs/demo/input --cache runs/demo/.cache
    step "model (runs/demo/model)" "see its message above" \
        .build/tools/bin/python demo/model.py --out runs/demo/model --cache runs/demo/.cache/wheels

    local started=$SECONDS status=0 ticker
    announce "$EMBEDDING"
    tick "$EMBEDDING" &
    ticker=$!
    job || status=$?
    kill "$ticker" 2>/dev/null || true
    [ -z "$stop_status" ] || [ "$status" = 0 ] || status="$stop_status"
    case "$status" in
        0) say "step $step_number of $STEPS: $EMBEDDING: done in $((SECONDS - started)) s" ;;
        130 | 143) fail "interrupted after $((SECONDS - started)) s; committed work is kept, \`make demo\` resumes" "$status" ;;
        137) fail "the job was killed (out of memory?); committed work is kept, \`make demo\` resumes" "$status" ;;
        *) fail "the job failed with exit status $status; its reason is above" "$status" ;;
    esac
    step "search" "\`rm -r runs/demo/output runs/demo/checkpoints\` and run again" show
    say "MiniLM is an English model and matches Spanish mostly by shared words. Try your own model with --model."
}

main
