#!/usr/bin/env bash
# Make the data that a job file's defaults name, where there is a way to make it and it is not there.
#
#   scripts/data.sh aura [WORDS]     # nothing is done where DATASET_URI is set, in the environment or in WORDS
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${DATASET_URI:-}" ] || [[ "${2:-}" == *DATASET_URI=* ]]; then exit 0; fi
case "$1" in
    aura) [ -d runs/aura/input ] || .venv/bin/python demo/aura_corpus.py ;;
    brain-to-text)
        # Made-up recordings with the study's schema, and where a container finds them: on a local S3 server.
        if [ ! -d runs/brain-to-text/input ]; then
            rm -rf runs/brain-to-text/making && mkdir -p runs/brain-to-text/making
            docker run --rm --network none --user "$(id -u):$(id -g)" \
                --volume "$PWD/runs/brain-to-text/making:/made" "${IMAGE:-estiba/brain-to-text:local}" \
                brain-to-text generate --out /made/input --sessions 4 --trials 60 --features 128
            mv runs/brain-to-text/making/input runs/brain-to-text/input && rm -rf runs/brain-to-text/making
        fi
        ;;
esac
