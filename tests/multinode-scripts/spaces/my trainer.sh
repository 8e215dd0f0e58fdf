#!/bin/bash
echo "arguments: $*"
cd "$(dirname "$0")" || exit 1
RANK=$(python -c "import os,json; print(json.loads(os.environ['SM_HOSTS']).index(os.environ['SM_CURRENT_HOST']))")
export RANK WORLD_SIZE=$NODE_NUMBER
exec python -u "train model.py" "$@"
