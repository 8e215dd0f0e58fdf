#!/usr/bin/env bash
# Run tests, fast ones first; stop at the first room that fails.
#
#   scripts/test.sh                # fast; then each image's own tests inside it; the contract; the local host in Docker
#   scripts/test.sh fast           # shared, launch, repo: what needs no Docker
#   scripts/test.sh repo           # one room: shared, launch, repo, tensors, contract, or an image's name
#   scripts/test.sh embed -k resume    # further words go to pytest
#
# BASE=local unless the environment says otherwise: tests must run where nothing can be pulled.
set -euo pipefail
cd "$(dirname "$0")/.."
export BASE="${BASE:-local}"
bash scripts/env.sh
TORCH_IMAGE=aura # what in shared needs torch is tested in this image
pytest=(.venv/bin/python -m pytest)

images() { printf '%s\n' images/*/Dockerfile | sed 's#^images/##; s#/Dockerfile$##' | grep -vx base; }

host() { "${pytest[@]}" -q "$@"; }

inside() { # image, pytest's words
    local image="$1"
    shift
    bash scripts/build.sh "$image-test"
    local gpu=()
    docker info --format '{{json .Runtimes}}' | grep -q nvidia && gpu=(--gpus all)
    [ $# -gt 0 ] || set -- -q
    echo "test: $image, inside estiba/$image-test:local" >&2
    # /small-disk: one that tests may fill.
    docker run --rm --tmpfs /small-disk:size=64m,mode=1777 "${gpu[@]}" "estiba/$image-test:local" "$@"
}

room="${1:-all}"
[ $# -eq 0 ] || shift
case "$room" in
    fast) host -m "not docker and not slow" tests/shared tests/launch tests/repo "$@" ;;
    shared | launch | repo) host "tests/$room" "$@" ;;
    tensors) inside "$TORCH_IMAGE" -q tensors "$@" ;; # checkpoints and the training loop
    contract)
        # shellcheck disable=SC2046 # names without spaces
        bash scripts/build.sh $(images)
        host tests/contract "$@" ;;
    all)
        bash "$0" fast
        for image in $(images); do inside "$image"; done
        inside "$TORCH_IMAGE" -q tensors
        bash "$0" contract
        host -m "docker and not slow" tests/launch ;;
    *)
        [ -f "images/$room/Dockerfile" ] || { echo "test: no room '$room'; one of: fast shared launch repo tensors contract $(images | paste -sd' ')" >&2; exit 2; }
        inside "$room" "$@" ;;
esac
