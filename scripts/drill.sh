#!/usr/bin/env bash
# Rehearse spot interruptions of one image on this machine and count the lost work.
#
#   scripts/drill.sh                            # embed, three random interruptions
#   scripts/drill.sh embed --scenario term      # more arguments go to `estiba drill`
#
# embed uses the corpus and model of `make demo` in runs/demo; without them, a small corpus and a one-layer model that this
# script makes in runs/drill. finetune uses a small survey and a two-layer model, multinode two hosts
# and a three-layer model. aura uses the corpus that
# `make train/aura` fetches. DATASET_URI and MODEL_URI (finetune: TRAINING_URI and BASE_MODEL_URI) in the environment
# override all of these.
# Exit status: 0 PASS, 1 FAIL, 2 wrong usage.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/estiba ] || bash scripts/env.sh

name="${1:-embed}"
[ $# -eq 0 ] || shift
[ -f "images/$name/job.yaml" ] || { echo "drill: no images/$name/job.yaml; name an image that has one" >&2; exit 2; }
# `make drill IMAGE=embed` exports IMAGE, which a job file would take for the image's tag.
[ "${IMAGE:-}" != "$name" ] || unset IMAGE
image="${IMAGE:-estiba/$name:local}"
docker image inspect "$image" >/dev/null 2>&1 || BASE=local bash scripts/build.sh "$name"

tiny_model() { # where its folder `made` is, the image whose tests make it, a kind: leaves made/model
    docker run --rm --network none --env HF_HUB_OFFLINE=1 --env PYTHONPATH=/opt/estiba:/tests --entrypoint python \
        --volume "$PWD/tests/images/$2:/tests:ro" --volume "$1/made:/made" "$image" \
        -c 'import pathlib, sys, tiny_model; tiny_model.build(pathlib.Path("/made/model"), *sys.argv[1:])' "${@:3}" \
        >/dev/null 2>&1
}

small_embed() {
    local place="$PWD/runs/drill"
    if [ ! -e "$place/model/modules.json" ] || [ ! -d "$place/input" ]; then
        echo "drill: no runs/demo (\`make demo\` makes it): a small corpus and model in runs/drill" >&2
        rm -rf "$place" && mkdir -p "$place/made"
        tiny_model "$place" embed
        PYTHONPATH=tests/images/embed .venv/bin/python -c 'import pathlib, sys, rehearsal
rehearsal.make_input(pathlib.Path(sys.argv[1]), files=12, rows=1000, seed=0)' "$place/making"
        mv "$place/made/model" "$place/model" && mv "$place/making" "$place/input"
    fi
    export DATASET_URI="${DATASET_URI:-file://$place/input}" MODEL_URI="${MODEL_URI:-file://$place/model}"
}

small_finetune() {
    local place="$PWD/runs/drill/finetune"
    if [ ! -e "$place/model/config.json" ] || [ ! -e "$place/input/survey.csv" ]; then
        rm -rf "$place" && mkdir -p "$place/made" "$place/input"
        tiny_model "$place" finetune
        PYTHONPATH=tests/images/finetune .venv/bin/python -c 'import pathlib, sys, survey
survey.write_survey(pathlib.Path(sys.argv[1]), rows=3000)' "$place/input/survey.csv"
        mv "$place/made/model" "$place/model"
    fi
    export TRAINING_URI="file://$place/input" BASE_MODEL_URI="${BASE_MODEL_URI:-file://$place/model}"
    export ACCUMULATION="${ACCUMULATION:-1}" EPOCHS="${EPOCHS:-1}" SAVE_STEPS="${SAVE_STEPS:-20}" EVAL_RECORDS="${EVAL_RECORDS:-16}"
}

small_multinode() {
    local place="$PWD/runs/drill/multinode"
    if [ ! -e "$place/model/config.json" ] || [ ! -d "$place/input" ]; then
        rm -rf "$place" && mkdir -p "$place/made" "$place/input"
        tiny_model "$place" multinode llama-tied
        cp README.md CONTRIBUTING.md "$place/input"
        mv "$place/made/model" "$place/model"
    fi
    export TRAINING_URI="file://$place/input" MODEL_URI="${MODEL_URI:-file://$place/model}"
    export MAX_STEPS="${MAX_STEPS:-400}" SAVE_STEPS="${SAVE_STEPS:-20}" GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-8}"
    export BATCH_SIZE="${BATCH_SIZE:-4}" MAX_SEQUENCE_LENGTH="${MAX_SEQUENCE_LENGTH:-128}" LEARNING_RATE="${LEARNING_RATE:-0.003}"
}

if [ "$name" = multinode ] && [ -z "${TRAINING_URI:-}" ] && [[ "$*" != *TRAINING_URI* ]]; then small_multinode; fi
if [ "$name" = finetune ] && [ -z "${TRAINING_URI:-}" ] && [[ "$*" != *TRAINING_URI* ]]; then small_finetune; fi
bash scripts/data.sh "$name" "$*"
if [ "$name" = embed ] && [ ! -d runs/demo/input ] && [ -z "${DATASET_URI:-}" ]; then small_embed; fi
exec .venv/bin/estiba drill "images/$name/job.yaml" "$@"
