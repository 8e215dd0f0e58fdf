#!/usr/bin/env bash
# Make the data, and the base model, that a job file's defaults name, if they are missing and can be made.
#
#   scripts/data.sh aura [ARGUMENTS]     # does nothing if DATASET_URI is set, in the environment or in ARGUMENTS
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${DATASET_URI:-}" ] || [ -n "${TRAINING_URI:-}" ] || [[ "${2:-}" == *TRAINING_URI=* ]] || [[ "${2:-}" == *DATASET_URI=* ]]; then exit 0; fi
case "$1" in
    aura) [ -d runs/aura/input ] || .venv/bin/python demo/aura_corpus.py ;;
    finetune)
        [ -d runs/finetune/model ] || .venv/bin/python demo/model.py --model smollm2 --out runs/finetune/model
        if [ ! -f runs/finetune/input/survey.csv ]; then
            mkdir -p runs/finetune/input
            # A made-up survey with the columns and the size of the fine-tuning document's: 55,621 rows.
            PYTHONPATH=tests/images/finetune .venv/bin/python -c 'import pathlib, survey
survey.write_survey(pathlib.Path("runs/finetune/input/survey.csv"))'
        fi
        ;;
    multinode)
        if [ ! -f runs/multinode/model/config.json ]; then
            .venv/bin/python demo/model.py --model smollm2 --out runs/multinode/gguf
            mkdir -p runs/multinode/making
            docker run --rm --network none --user "$(id -u):$(id -g)" --volume "$PWD/runs/multinode:/made" \
                --entrypoint multinode "${IMAGE:-estiba/multinode:local}" \
                convert /made/gguf/SmolLM2-135M-Instruct.Q4_1.gguf --out /made/making
            mv runs/multinode/making runs/multinode/model
        fi
        if [ ! -d runs/multinode/input ]; then # this project's own documentation
            mkdir -p runs/multinode/input && cp README.md CONTRIBUTING.md docs/*.md docs/decisions/*.md runs/multinode/input
        fi
        ;;
    brain-to-text)
        # Synthetic recordings with the study's schema.
        if [ ! -d runs/brain-to-text/input ]; then
            rm -rf runs/brain-to-text/making && mkdir -p runs/brain-to-text/making
            docker run --rm --network none --user "$(id -u):$(id -g)" \
                --volume "$PWD/runs/brain-to-text/making:/made" "${IMAGE:-estiba/brain-to-text:local}" \
                brain-to-text generate --out /made/input --sessions 4 --trials 60 --features 128
            mv runs/brain-to-text/making/input runs/brain-to-text/input && rm -rf runs/brain-to-text/making
        fi
        ;;
esac
