#!/bin/sh
# Inside a build: install an image's locked wheels into the base's Python, offline, prove that torch is untouched, and make
# the folders that any user may write to.
#
#   RUN --mount=type=bind,source=images/install.sh,target=/install.sh \
#       --mount=type=bind,from=wheels,target=/wheels sh /install.sh
#
# Leaves /opt/estiba/base-freeze.txt, what the base held before, for the test that compares.
set -eu

freeze() {
    python -c 'import importlib.metadata as m
print("\n".join(sorted({f"{d.name.lower()}=={d.version}" for d in m.distributions() if d.name})))'
}
accelerator() { grep -E '^(torch|torchvision|torchaudio|triton|nvidia|cuda|nccl|flash.attn|transformer.engine|deepspeed)' "$1" || true; }

# SageMaker may hide what is baked below /opt/ml, so code and caches live in /opt/estiba. Both must be writable for a user
# without a home, as `docker run --user` makes one.
mkdir -p /opt/ml/input/data /opt/ml/input/config /opt/ml/output/data /opt/ml/model /opt/ml/checkpoints
chmod 1777 /opt/ml /opt/ml/input /opt/ml/input/* /opt/ml/output /opt/ml/output/data /opt/ml/model /opt/ml/checkpoints
mkdir -p /opt/estiba/home /opt/estiba/cache/huggingface
chmod 1777 /opt/estiba/home /opt/estiba/cache /opt/estiba/cache/huggingface

freeze >/opt/estiba/base-freeze.txt

# --no-deps: the lock is complete, and a resolver would be free to replace what the base owns.
if python -m pip --version >/dev/null 2>&1; then
    python -m pip install --quiet --no-index --no-deps --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
        --find-links=/wheels -r /wheels/requirements.txt
else
    # AWS's Amazon Linux images make their venv with uv, which leaves pip out.
    uv pip install --quiet --offline --no-index --no-deps --no-cache --python "$(command -v python)" \
        --find-links /wheels -r /wheels/requirements.txt
fi

# Files that images/NAME/data.txt takes out of packages.
[ ! -d /wheels/share ] || cp -r /wheels/share "$(python -c 'import sys; print(sys.prefix)')/"

freeze >/tmp/after.txt
accelerator /opt/estiba/base-freeze.txt >/tmp/before-accelerator.txt
accelerator /tmp/after.txt >/tmp/after-accelerator.txt
diff /tmp/before-accelerator.txt /tmp/after-accelerator.txt >&2 || {
    echo "install: the lock changed packages that belong to the base (above); add them to images/excludes.txt" >&2
    exit 1
}
rm -f /tmp/after.txt /tmp/before-accelerator.txt /tmp/after-accelerator.txt
