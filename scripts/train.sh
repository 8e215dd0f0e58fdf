#!/usr/bin/env bash
# Run images/NAME/job.yaml with the launcher; locally, with the image and the data that its defaults name.
#
#   scripts/train.sh aura                         # TARGET=local: image built, corpus fetched where they are missing
#   TARGET=ssh://user@host scripts/train.sh aura --set DATASET_URI=s3://...
#
# Exit status: that of `estiba run`.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/estiba ] || bash scripts/env.sh

name="${1:?the name of an image, such as aura}"
shift
[ -f "images/$name/job.yaml" ] || { echo "train: images/$name/job.yaml: not there; name an image that has one" >&2; exit 2; }
if [ "${TARGET:-local}" = local ]; then
    image="${IMAGE:-estiba/$name:local}"
    docker image inspect "$image" >/dev/null 2>&1 || { bash scripts/engine.sh && BASE=local bash scripts/build.sh "$name"; }
    bash scripts/data.sh "$name" "$*"
    if [ "$name" = brain-to-text ] && [ -z "${DATASET_URI:-}" ] && [[ "$*" != *DATASET_* ]]; then
        # Straight from S3, as in the cloud: a local server with the recordings, which the container is told of.
        bash scripts/s3.sh put runs/brain-to-text/input s3://estiba/brain-to-text/input
        bash scripts/s3.sh start >runs/brain-to-text/s3.env
        set -- --set DATASET_DIR=s3://estiba/brain-to-text/input --env-file runs/brain-to-text/s3.env "$@"
    fi
    set -- --yes "$@" # no bill to agree to
fi
exec .venv/bin/estiba run "images/$name/job.yaml" --target "${TARGET:-local}" "$@"
