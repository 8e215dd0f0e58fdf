#!/usr/bin/env bash
# Write every lock: images/*, tests/images/*, compose/s3 (requirements.txt), benchmarks/embedders/locks and uv.lock.
#
#   scripts/lock.sh              # lock what is new in the .in files; locked versions stay
#   scripts/lock.sh --upgrade    # the newest versions of everything
#   scripts/lock.sh embed        # the locks of one image only
#
# One lock serves Python 3.11 and 3.12 (--universal). It names no index and no path of this machine. torch and CUDA belong
# to the base image and are left out of every image's lock.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

compile() { # output folder, .in file, more arguments
    local folder="$1" input="$2"
    shift 2
    echo "lock: $folder/requirements.txt" >&2
    "$UV" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --annotation-style line \
        "$@" "$input" -o "$folder/requirements.txt"
}

work=.build/lock # a relative path, as it is written into the locks
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT

only=""
case "${1:-}" in "" | -*) ;; *) only="$1"; shift ;; esac

# An image's tests are locked together with the image and first, so the image ships exactly the versions that were tested.
for folder in images/${only:-*}/; do
    name="$(basename "$folder")"
    [ "$name" != base ] && [ -f "images/$name/requirements.in" ] || continue
    tests="tests/images/$name"
    [ -f "$tests/requirements.in" ] || { echo "lock: $tests/requirements.in is missing; it needs one line: -r ../requirements.in" >&2; exit 1; }
    compile "$tests" "$tests/requirements.in" "images/$name/requirements.in" --excludes images/excludes.txt "$@"
    compile "images/$name" "images/$name/requirements.in" --excludes images/excludes.txt --constraint "$tests/requirements.txt" "$@"
done

[ -z "$only" ] || exit 0

# The local base installs torch from torch.txt (the CPU build); its lock holds what torch needs besides CUDA. It uses
# the same versions of the test tools as the images, so that images need not replace them.
grep -vx 'torch' images/excludes.txt >"$work/not-torch"
"$UV" pip compile --quiet --universal --python-version 3.11 --no-header tests/images/requirements.in -o "$work/tools.txt"
compile images/base images/base/requirements.in --excludes "$work/not-torch" --no-emit-package torch --constraint "$work/tools.txt" "$@"

compile compose/s3 compose/s3/requirements.in "$@"

# Other projects' programs that benchmarks run, each in its own environment; torch comes from images/base/torch.txt.
for input in benchmarks/embedders/locks/*.in; do
    "$UV" pip compile --quiet --python-version 3.11 --no-header --no-annotate --excludes images/excludes.txt "$@" \
        "$input" -o "${input%.in}.txt"
done

"$UV" lock --quiet "$@"
