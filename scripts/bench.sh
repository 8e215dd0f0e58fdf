#!/usr/bin/env bash
# Run benchmarks/NAME.py in the environment that its first lines declare, after preparing what it needs.
#
#   scripts/bench.sh checkpoint_save --rounds 5
#   BENCH_PYTHON=python3 scripts/bench.sh aura_throughput     # a Python with everything installed
#
#   # environment: host         .venv
#   # environment: torch        .build/bench: torch, the images' libraries and the peers (benchmarks/peers.txt)
#   # needs: embed-test demo    images by name; demo (what `make demo` leaves in runs/); corpus (aura's Spanish text)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

name="${1:?the name of a benchmark: $(cd benchmarks && printf '%s ' *.py)}"
shift
program="benchmarks/$name.py"
[ -f "$program" ] || { echo "bench: no $program; one of: $(cd benchmarks && printf '%s ' *.py)" >&2; exit 2; }
[ -x .venv/bin/python ] || bash scripts/env.sh

declared() { sed -n "1,2s/^# $1: //p" "$program"; }

torch_environment() { # .build/bench, rebuilt when its lists change
    local lists
    lists="$(cat benchmarks/peers.txt images/base/torch.txt images/*/data.txt | sha256sum)"
    [ "$(cat .build/bench/made-of 2>/dev/null)" != "$lists" ] || return 0
    echo "bench: installing torch and the peers into .build/bench; this takes minutes, once" >&2
    "$TOOLS_PYTHON" -m venv --clear .build/bench
    .build/bench/bin/python -m pip install --quiet --disable-pip-version-check -r images/base/torch.txt
    .build/bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt
    for data in images/*/data.txt; do
        "$TOOLS_PYTHON" scripts/wheelhouse.py --share .build/bench/share "$(basename "$(dirname "$data")")"
    done
    printf '%s' "$lists" >.build/bench/made-of
}

environment="$(declared environment)"
[ -z "${BENCH_PYTHON:-}" ] || environment=custom
case "$environment" in
    custom) python="$BENCH_PYTHON" ;;
    host) python=.venv/bin/python ;;
    torch) torch_environment; python=.build/bench/bin/python ;;
    *) echo "bench: the first line of $program is not '# environment: host' or '# environment: torch'" >&2; exit 2 ;;
esac
case " $* " in *" --help "* | *" -h "*) needs="" ;; *) needs="$(declared needs)" ;; esac
for need in $needs; do
    case "$need" in
        demo) [ -d runs/demo/model ] || BASE=local bash demo/run.sh >&2 ;;
        corpus) [[ " $* " == *" --text "* ]] || bash scripts/data.sh aura ;;
        *) docker image inspect "estiba/$need:local" >/dev/null 2>&1 || BASE=local bash scripts/build.sh "$need" >&2 ;;
    esac
done
exec "$python" "$program" "$@"
