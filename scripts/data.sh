#!/usr/bin/env bash
# Make the data that a job file's defaults name, where there is a way to make it and it is not there.
#
#   scripts/data.sh aura [WORDS]     # nothing is done where DATASET_URI is set, in the environment or in WORDS
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${DATASET_URI:-}" ] || [[ "${2:-}" == *DATASET_URI=* ]]; then exit 0; fi
case "$1" in
    aura) [ -d runs/aura/input ] || .venv/bin/python demo/aura_corpus.py ;;
esac
