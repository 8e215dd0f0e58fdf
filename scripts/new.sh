#!/usr/bin/env bash
# Make an image from the template, with its locks.
#
#   scripts/new.sh my-image            # an image that trains
#   scripts/new.sh my-image job        # a plain job that works in chunks
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/ruff ] || bash scripts/env.sh

name="${1:?the name of the new image, such as my-image}"
.venv/bin/python scripts/new_image.py "$name" --kind "${2:-training}"
# The order of imports and the length of lines depend on the name.
.venv/bin/ruff check --quiet --select I --fix "images/$name" "tests/images/$name"
.venv/bin/ruff format --quiet "images/$name" "tests/images/$name"
bash scripts/lock.sh "$name"
cat >&2 <<END
new: images/$name and tests/images/$name are ready and contain a working example. Next:
  make test/$name                      # its own tests, inside the image
  make test/contract IMAGE=$name       # the contract
  CONTRIBUTING.md, "Add an image"      # what to replace
END
