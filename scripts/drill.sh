#!/usr/bin/env bash
# Rehearse spot interruptions of one image on this machine and count the lost work.
#
#   scripts/drill.sh                            # embed, three random interruptions
#   scripts/drill.sh embed --scenario term      # further words go to `estiba drill`
#
# embed works on the corpus and model that `make demo` left in runs/demo; without them on a small corpus and a model of
# one layer, made here in runs/drill. aura works on the corpus that `make train/aura` fetches. DATASET_URI and MODEL_URI
# in the environment win over all of these.
# Exit status: 0 PASS, 1 FAIL, 2 a mistake in the call.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/estiba ] || bash scripts/env.sh

name="${1:-embed}"
[ $# -eq 0 ] || shift
[ -f "images/$name/job.yaml" ] || { echo "drill: images/$name/job.yaml: not there; name an image that has one" >&2; exit 2; }
# `make drill IMAGE=embed` exports IMAGE, which a job file would take for the image's tag.
[ "${IMAGE:-}" != "$name" ] || unset IMAGE
image="${IMAGE:-estiba/$name:local}"
docker image inspect "$image" >/dev/null 2>&1 || BASE=local bash scripts/build.sh "$name"

small_embed() {
    local place="$PWD/runs/drill"
    if [ ! -e "$place/model/modules.json" ] || [ ! -d "$place/input" ]; then
        echo "drill: no runs/demo (\`make demo\` makes it): a small corpus and model in runs/drill" >&2
        rm -rf "$place" && mkdir -p "$place/made"
        docker run --rm --network none --env HF_HUB_OFFLINE=1 --env PYTHONPATH=/tests --entrypoint python \
            --volume "$PWD/tests/images/embed:/tests:ro" --volume "$place/made:/made" "$image" \
            -c 'import pathlib, tiny_model; tiny_model.build(pathlib.Path("/made/model"))' >/dev/null 2>&1
        PYTHONPATH=tests/images/embed .venv/bin/python -c 'import pathlib, sys, rehearsal
rehearsal.make_input(pathlib.Path(sys.argv[1]), files=12, rows=1000, seed=0)' "$place/making"
        mv "$place/made/model" "$place/model" && mv "$place/making" "$place/input"
    fi
    export DATASET_URI="${DATASET_URI:-file://$place/input}" MODEL_URI="${MODEL_URI:-file://$place/model}"
}

bash scripts/data.sh "$name" "$*"
if [ "$name" = embed ] && [ ! -d runs/demo/input ] && [ -z "${DATASET_URI:-}" ]; then small_embed; fi
exec .venv/bin/estiba drill "images/$name/job.yaml" "$@"
