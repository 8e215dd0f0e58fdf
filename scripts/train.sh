#!/usr/bin/env bash
# Run images/NAME/job.yaml with the launcher. Locally, make the image and the data that its defaults name first.
#
#   scripts/train.sh aura                         # TARGET=local: builds the image and fetches the corpus if missing
#   TARGET=ssh://user@host scripts/train.sh aura --set DATASET_URI=s3://...
#
# Exit status: that of `estiba run`.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/estiba ] || bash scripts/env.sh

name="${1:?the name of an image, such as aura}"
shift
[ -f "images/$name/job.yaml" ] || { echo "train: no images/$name/job.yaml; name an image that has one" >&2; exit 2; }
if [ "${TARGET:-local}" = local ]; then
    image="${IMAGE:-estiba/$name:local}"
    docker image inspect "$image" >/dev/null 2>&1 || { bash scripts/engine.sh && BASE=local bash scripts/build.sh "$name"; }
    bash scripts/data.sh "$name" "$*"
    if [ "$name" = brain-to-text ] && [ -z "${DATASET_URI:-}" ] && [[ "$*" != *DATASET_* ]]; then
        # Straight from S3, as in the cloud: the container gets the address of a local server with the recordings.
        bash scripts/s3.sh put runs/brain-to-text/input s3://estiba/brain-to-text/input
        bash scripts/s3.sh start >runs/brain-to-text/s3.env
        echo "train: the local S3 server (estiba-s3) keeps running; \`bash scripts/s3.sh stop\` removes it and its data" >&2
        set -- --set DATASET_DIR=s3://estiba/brain-to-text/input --env-file runs/brain-to-text/s3.env "$@"
    fi
    if [ "$name" = finetune ] && [ -z "${TRAINING_URI:-}" ] && [[ "$*" != *TRAINING_URI* ]]; then
        # 720 of the 55,621 rows, which two CPU cores train on in minutes. Questions state names: what words say of a
        # column carries over to other rows, while codes (the default keys) need each of them many times.
        set -- --set MAX_RECORDS=720 --set EPOCHS=1 --set ACCUMULATION=1 --set LEARNING_RATE=0.001 \
            --set KEY_COLUMNS=Year,Industry_name_NZSIOC,Industry_code_ANZSIC06,Variable_name \
            --set TARGET_COLUMNS=Industry_aggregation_NZSIOC,Industry_code_NZSIOC,Units,Variable_category,Value \
            --set EVAL_RECORDS=24 --set ANSWER_QUESTIONS=120 --set SAVE_STEPS=20 "$@"
    fi
    if [ "$name" = multinode ] && [ -z "${TRAINING_URI:-}" ] && [[ "$*" != *TRAINING_URI* ]]; then
        # Two hosts on the cores of this machine: eight steps of 512 tokens, which take minutes.
        set -- --set MAX_STEPS=8 --set GLOBAL_BATCH_SIZE=4 --set MAX_SEQUENCE_LENGTH=128 --set LEARNING_RATE=0.0001 \
            --set SAVE_STEPS=4 --set LOG_INTERVAL=1 "$@"
    fi
    set -- --yes "$@" # a local run costs nothing to confirm
fi
exec .venv/bin/estiba run "images/$name/job.yaml" --target "${TARGET:-local}" "$@"
