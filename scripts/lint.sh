#!/usr/bin/env bash
# Everything that reads code without running it; scripts/lint.sh --fix writes what can be repaired.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/env.sh
bin=.venv/bin

if [ "${1:-}" = --fix ]; then
    $bin/ruff check --quiet --fix-only . || true
    $bin/ruff format --quiet .
fi
$bin/ruff check .
$bin/ruff format --check .

# One run for the packages that see each other, one for each image's package.
folders=()
for folder in shared/estiba launch/estiba_launch scripts demo benchmarks tests/repo; do
    [ -n "$(find "$folder" -name '*.py' -print -quit 2>/dev/null)" ] && folders+=("$folder")
done
$bin/mypy "${folders[@]}"
for package in images/*/*/__init__.py; do
    [ -f "$package" ] || continue
    folder="$(dirname "$package")"
    MYPYPATH="$(dirname "$folder")" $bin/mypy "$folder"
done

shells="$(git ls-files --cached --others --exclude-standard '*.sh' .ci/run)"
# shellcheck disable=SC2086 # names without spaces
$bin/shellcheck --severity=warning --shell=bash -x $shells
