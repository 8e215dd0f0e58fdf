#!/usr/bin/env bash
# Run benchmarks/NAME.py; one that imports torch in an environment with torch and the peers, .build/bench.
#
#   scripts/bench.sh checkpoint_save --rounds 5
#   BENCH_PYTHON=python3 scripts/bench.sh aura_throughput     # a Python that has all of it already, such as a GPU box's
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

name="${1:?the name of a benchmark: $(cd benchmarks && echo *.py)}"
shift
program="benchmarks/$name.py"
[ -f "$program" ] || { echo "bench: no $program; one of: $(cd benchmarks && printf '%s ' *.py)" >&2; exit 2; }
[ -x .venv/bin/python ] || bash scripts/env.sh

if [ -n "${BENCH_PYTHON:-}" ]; then
    python="$BENCH_PYTHON"
elif grep -Eq '^ *(import torch$|from brain_to_text)' "$program"; then
    python=.build/bench/bin/python
    want="$(cat benchmarks/peers.txt images/base/torch.txt | sha256sum)"
    if [ "$(cat .build/bench/made-of 2>/dev/null)" != "$want" ]; then
        echo "bench: installing torch and the peers into .build/bench, some minutes once" >&2
        "$TOOLS_PYTHON" -m venv --clear .build/bench
        "$python" -m pip install --quiet --disable-pip-version-check -r images/base/torch.txt
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt
        printf '%s' "$want" >.build/bench/made-of
    fi
else
    python=.venv/bin/python
fi
if [ "$name" = aura_data ] && [ $# -eq 0 ]; then bash scripts/data.sh aura; fi
exec "$python" "$program" "$@"
