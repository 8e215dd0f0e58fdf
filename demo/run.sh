#!/usr/bin/env bash
# From a bare machine to vectors: engine, image, a Spanish corpus, a model, a real embedding job, and what came out.
#
#   make demo                      # or: bash demo/run.sh
#   ESTIBA_BUILD=0 make demo       # use the images as they are
#
# Every step is skipped when its result is there, so a second run takes seconds. Ctrl-C stops the job; the next run
# goes on from what it saved. Results are in runs/demo/output; `rm -r runs/demo` starts anew.
# Exit status: 0; 1 a step failed; 2 a configuration mistake; 130 or 143 interrupted, run again to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly IMAGE="${ESTIBA_EMBED_IMAGE:-estiba/embed:local}"
readonly RUNS="$PWD/runs/demo"
readonly STOP_GRACE_S=120
# One name per checkout: two checkouts can run side by side, one checkout cannot run twice.
CONTAINER="estiba-demo-$(printf %s "$PWD" | cksum | cut -d' ' -f1)"
readonly CONTAINER

asked_to_stop=""

say() { printf 'demo: %s\n' "$*"; }

fail() { # MESSAGE [STATUS]
    printf 'demo: %s\n' "$1" >&2
    exit "${2:-1}"
}

# Run one step, then print what it was and its seconds; on failure print the remedy and leave with the step's status.
step() { # NAME REMEDY COMMAND...
    local name="$1" remedy="$2" started=$SECONDS status=0
    shift 2
    "$@" || status=$?
    [ -z "$asked_to_stop" ] || fail "interrupted while at: $name; run \`make demo\` again" "$asked_to_stop"
    [ "$status" = 0 ] || fail "$name: failed after $((SECONDS - started)) s; $remedy"
    say "$name: $((SECONDS - started)) s"
}

# Pass a signal on to the job in its container. The job commits what it has and ends by itself.
on_signal() { # NAME STATUS
    [ -z "$asked_to_stop" ] || return 0
    asked_to_stop="$2"
    docker kill --signal "$1" "$CONTAINER" >/dev/null 2>&1 || return 0
    say "stopping: the job saves what is finished and ends"
}

build() {
    if [ "${ESTIBA_BUILD:-1}" = 0 ]; then
        docker image inspect "$IMAGE" >/dev/null
    elif ! make --no-print-directory build/embed BASE=local >"$RUNS/build.log" 2>&1; then
        tail -n 25 "$RUNS/build.log" >&2
        return 1
    fi
}

state_of_container() { docker container inspect --format '{{.State.Status}}' "$CONTAINER" 2>/dev/null || true; }

start_job() {
    local gpus=()
    # The stand-in base is CPU only; another image gets the GPUs there are.
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

# Run the job to its end, showing its lines. Its container is not a child of this shell, so that a Ctrl-C reaches it
# once, through on_signal, and so that it is found again if this shell is killed.
job() {
    local follower status
    if [ "$(state_of_container)" = running ]; then
        say "the job of an earlier run is still going; following it"
    else
        docker rm --force "$CONTAINER" >/dev/null 2>&1 || true
        if [ -n "$(ls -A "$RUNS/checkpoints" 2>/dev/null)" ] && [ ! -e "$RUNS/output/results.json" ]; then
            say "an earlier run was interrupted; the job takes up what it had committed"
        fi
        start_job || return 1
    fi
    docker logs --follow "$CONTAINER" &
    follower=$!
    # `wait` returns early when a signal comes; the log ends with the container.
    while kill -0 "$follower" 2>/dev/null; do wait "$follower" || true; done
    status="$(docker wait "$CONTAINER")"
    docker rm "$CONTAINER" >/dev/null
    return "$status"
}

show() {
    docker run --rm --network none --entrypoint python \
        --volume "$PWD/demo/neighbours.py:/neighbours.py:ro" --volume "$RUNS/output:/output:ro" \
        "$IMAGE" /neighbours.py /output
}

# In a function, so that bash has read all of it before it starts: a `git pull` meanwhile changes nothing.
main() {
    trap 'on_signal INT 130' INT
    trap 'on_signal TERM 143' TERM

    mkdir -p "$RUNS"
    step "Docker engine" "see its message above" bash scripts/engine.sh
    step "host tools (.venv)" "see its message above; \`make env\` tries again" bash scripts/env.sh
    docker image inspect "$IMAGE" >/dev/null 2>&1 || say "building $IMAGE: minutes the first time (runs/demo/build.log)"
    step "image $IMAGE" "all of it is in runs/demo/build.log" build
    step "corpus (runs/demo/input)" "see its message above; packages that were fetched are kept" \
        .venv/bin/python demo/corpus.py --out runs/demo/input --cache runs/demo/.cache
    step "model (runs/demo/model)" "see its message above" \
        .build/tools/bin/python demo/model.py --out runs/demo/model --cache runs/demo/.cache/wheels

    local started=$SECONDS status=0
    job || status=$?
    case "$status" in
        0) say "embedding (runs/demo/output): $((SECONDS - started)) s" ;;
        130 | 143) fail "interrupted after $((SECONDS - started)) s; what was committed is kept, \`make demo\` resumes" "$status" ;;
        137) fail "the job was killed (out of memory?); what was committed is kept, \`make demo\` resumes" "$status" ;;
        *) fail "the job failed with exit status $status; its reason is above" "$status" ;;
    esac
    step "what came out" "\`rm -r runs/demo/output runs/demo/checkpoints\` and run again" show
    say "MiniLM is an English model: it finds Spanish by its words. Try --model with one of your own on the same input."
}

main
