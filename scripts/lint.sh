#!/usr/bin/env bash
# Static checks of the code; scripts/lint.sh --fix fixes what ruff can fix.
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
# Layers and forbidden imports (pyproject.toml); tests/repo/test_structure.py finds circles between files.
PYTHONPATH=shared:launch $bin/lint-imports --no-cache

# One run for the packages that import each other, one for each image's package.
folders=()
for folder in shared/estiba launch/estiba_launch scripts demo benchmarks tests/repo; do
    [ -n "$(find "$folder" -name '*.py' -print -quit 2>/dev/null)" ] && folders+=("$folder")
done
$bin/mypy --exclude '^scripts/template/' "${folders[@]}"
for package in images/*/*/__init__.py scripts/template/*/images/*/*/__init__.py; do
    [ -f "$package" ] || continue
    folder="$(dirname "$package")"
    MYPYPATH="$(dirname "$folder")" $bin/mypy "$folder"
done

mapfile -d '' shells < <(git ls-files -z --cached --others --exclude-standard '*.sh' .ci/run)
$bin/shellcheck --severity=warning --shell=bash -x "${shells[@]}"
