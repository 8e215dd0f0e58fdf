#!/usr/bin/env bash
# Remove what can be made again: .build, .venv and caches. Trained models and checkpoints in runs/ stay, images too.
#
#   scripts/clean.sh          # what `make clean` does
#   scripts/clean.sh runs     # `make clean/runs`: runs/ alone, with the models, checkpoints and data in it
#
# Containers and `sudo make` leave files of root. They are removed by sudo or by a container, whichever needs no password.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    "") set -- .build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache ;;
    runs) ;;
    *) echo "clean: '$1': give nothing, or 'runs'" >&2; exit 2 ;;
esac

remaining() { for path in "$@"; do if [ -e "$path" ] || [ -L "$path" ]; then echo "$path"; fi; done; }

rm -rf "$@" 2>/dev/null || true
mapfile -t left < <(remaining "$@")
[ ${#left[@]} -gt 0 ] || exit 0
echo "clean: files of another user in ${left[*]}" >&2
sudo -n rm -rf "${left[@]}" 2>/dev/null ||
    docker run --rm --network none --entrypoint rm --volume "$PWD:/here" --workdir /here estiba/rootfs:bookworm \
        -rf "${left[@]}" >/dev/null 2>&1 || true
mapfile -t left < <(remaining "$@")
[ ${#left[@]} -eq 0 ] || { echo "clean: not removed; run: sudo rm -rf $(printf '%q ' "${left[@]/#/$PWD/}")" >&2; exit 1; }
