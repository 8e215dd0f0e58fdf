#!/usr/bin/env bash
# The host's Python tools: uv and pip in .build/tools, the developer environment in .venv (uv.lock).
#
#   scripts/env.sh               # what `make env` does: make both if they are missing or outdated
#   . scripts/env.sh             # only set UV and TOOLS_PYTHON (and make .build/tools when it is missing)
#
# A machine needs git, make and Python >= 3.11; everything else is installed by pip, with the machine's pip configuration.

# Trust this machine's own certificates: the bundled ones fail behind a TLS proxy.
export UV_SYSTEM_CERTS=1
# Use this project's environment even if another one is active.
export UV_PROJECT_ENVIRONMENT=.venv
unset VIRTUAL_ENV

estiba_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
UV="$estiba_root/.build/tools/bin/uv"
TOOLS_PYTHON="$estiba_root/.build/tools/bin/python"

estiba_tools() {
    [ -x "$UV" ] && "$TOOLS_PYTHON" -m pip --version >/dev/null 2>&1 && return
    local python
    for python in python3 python3.13 python3.12 python3.11; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        python=""
    done
    [ -n "$python" ] || { echo "env: no Python >= 3.11 on the PATH ($(python3 --version 2>&1)); install one" >&2; return 1; }
    bash "$estiba_root/scripts/engine.sh" python || return 1
    echo "env: installing uv and pip into .build/tools" >&2
    "$python" -m venv --clear "$estiba_root/.build/tools" &&
        "$TOOLS_PYTHON" -m pip install --quiet --disable-pip-version-check --upgrade pip 'uv>=0.9' 2>&1 | { grep -v '^WARNING' || true; } >&2
    [ -x "$UV" ]
}

estiba_tools || { echo "env: pip could not install uv; try '$TOOLS_PYTHON -m pip install uv'" >&2; exit 1; }

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    cd "$estiba_root"
    "$UV" sync --quiet --locked --all-groups --python "$TOOLS_PYTHON"
fi
