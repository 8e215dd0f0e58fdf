#!/usr/bin/env bash
# Run tests, fast ones first. Rooms that run in containers of their own run two at a time and print when they end.
#
#   scripts/test.sh                    # everything but `slow`, which takes most of an hour on a small machine
#   scripts/test.sh slow               # the slow tests: AWS's SDKs, whole jobs through the launcher, long kills
#   scripts/test.sh fast               # tests of shared, launch and repo that need no Docker
#   scripts/test.sh repo               # one room: shared, launch, repo, tensors, contract, or an image's name
#   scripts/test.sh embed -k resume    # more arguments go to pytest
#   IMAGE=embed scripts/test.sh contract    # the contract of one image
#
# BASE=local unless the environment says otherwise: tests must run where nothing can be pulled.
set -euo pipefail
cd "$(dirname "$0")/.."
export BASE="${BASE:-local}"
built="${ESTIBA_TEST_BUILT:-}"    # set for each room of a run of all, which has built everything at once
[ -n "$built" ] || bash scripts/env.sh
only="${IMAGE:-}"
unset IMAGE         # job files read it as the image's tag
TORCH_IMAGE=aura    # runs the tests of shared/ that need torch
FAST="not docker and not slow"
JOB_LAYER=(tests/contract/test_processes.py tests/contract/test_script_mode.py)
pytest=(env --default-signal .venv/bin/python -m pytest) # the background ignores Ctrl-C, nohup ignores HUP

images() { printf '%s\n' images/*/Dockerfile | sed 's#^images/##; s#/Dockerfile$##' | grep -vx base; }

host() { "${pytest[@]}" -q "$@"; }

inside() { # image, pytest's arguments
    local image="$1"
    shift
    [ -n "$built" ] || bash scripts/build.sh "$image-test"
    local gpu=()
    docker info --format '{{json .Runtimes}}' | grep -q nvidia && gpu=(--gpus all)
    [ $# -gt 0 ] || set -- -q
    echo "test: $image, inside estiba/$image-test:local" >&2
    # /small-disk: a disk that tests may fill.
    docker run --rm --tmpfs /small-disk:size=64m,mode=1777 "${gpu[@]}" "estiba/$image-test:local" "$@"
}

contract() { # pytest's arguments
    # shellcheck disable=SC2046 # names without spaces
    [ -n "$built" ] || bash scripts/build.sh $([ -n "$only" ] && echo "$only" || images)
    host ${only:+--image="$only"} "$@"
}

together() { # rooms with their arguments, a line each: two at a time; fails if one of them does
    printf '%s\n' "$@" | ESTIBA_TEST_BUILT=yes xargs -P 2 -I {} bash "$0" logged {}
}

logged() { # one line for `together`: its output comes in one piece
    local log status=0
    log="$(mktemp)"
    # shellcheck disable=SC2086 # several words
    bash "$0" $1 >"$log" 2>&1 || status=$?
    cat "$log"
    rm -f "$log"
    echo "test: $1: $([ "$status" = 0 ] && echo passed || echo FAILED) after $((SECONDS / 60)) min $((SECONDS % 60)) s"
    return "$status"
}

room="${1:-all}"
[ $# -eq 0 ] || shift
case "$room" in
    fast)
        if [ $# -gt 0 ]; then
            case " $* " in *" tests/"*) ;; *) set -- tests/shared tests/launch tests/repo "$@" ;; esac
            host -m "$FAST" "$@"
        else # those of shared mostly wait: for timeouts, pauses and hosts that are lost
            together "fast tests/shared" "fast tests/launch tests/repo"
        fi ;;
    shared | launch | repo) host "tests/$room" "$@" ;;
    docker) host -m "docker and not slow" "$@" ;;
    tensors) inside "$TORCH_IMAGE" -q tensors "$@" ;; # checkpoints and training
    contract) contract -m "not slow" tests/contract "$@" ;;
    all)
        bash "$0" fast
        # shellcheck disable=SC2046 # names without spaces
        bash scripts/build.sh $(images) $(images | sed 's/$/-test/') # at once, as they share a base and their wheels
        mapfile -t lines < <(images && echo tensors &&
            images | sed "s/.*/contract --image=& --job-layer-on=$(images | head -n 1)/")
        together "docker tests/launch tests/repo" "${lines[@]}" ;; # the longest first
    logged) logged "$@" ;;
    slow)
        contract "${JOB_LAYER[@]}" "$@"
        contract -m slow tests/contract "$@"
        host -m slow tests/shared tests/launch tests/repo "$@" ;;
    *)
        [ -f "images/$room/Dockerfile" ] || {
            echo "test: no room '$room'; one of: fast slow shared launch repo tensors contract $(images | paste -sd' ')" >&2
            exit 2
        }
        inside "$room" "$@" ;;
esac
