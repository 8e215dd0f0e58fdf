#!/usr/bin/env bash
# Write every lock: images/*, tests/images/*, compose/s3 (requirements.txt) and uv.lock.
#
#   scripts/lock.sh              # newest versions the .in files allow, keeping what is locked already
#   scripts/lock.sh --upgrade    # newest versions of everything
#
# One lock serves Python 3.11 and 3.12 (--universal). No index and no path of this machine gets into it. torch and CUDA
# belong to the base image and are left out of every image's lock.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

compile() { # output folder, its .in file, further arguments
    local folder="$1" input="$2"
    shift 2
    echo "lock: $folder/requirements.txt" >&2
    "$UV" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --annotation-style line \
        "$@" "$input" -o "$folder/requirements.txt"
}

work=.build/lock # a relative path, as it is written into the locks
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT

# An image's tests are locked together with the image and first: the image then ships exactly the versions they ran with.
for folder in images/*/; do
    name="$(basename "$folder")"
    [ "$name" != base ] && [ -f "images/$name/requirements.in" ] || continue
    tests="tests/images/$name"
    [ -f "$tests/requirements.in" ] || { echo "lock: $tests/requirements.in is missing; one line does: -r ../requirements.in" >&2; exit 1; }
    compile "$tests" "$tests/requirements.in" "images/$name/requirements.in" --excludes images/excludes.txt "$@"
    compile "images/$name" "images/$name/requirements.in" --excludes images/excludes.txt --constraint "$tests/requirements.txt" "$@"
done

# The stand-in installs torch from torch.txt (its CPU build); its lock has what torch needs besides CUDA. What the tests'
# tools fix is taken over, so that images need not replace it.
grep -vx 'torch' images/excludes.txt >"$work/not-torch"
"$UV" pip compile --quiet --universal --python-version 3.11 --no-header tests/images/requirements.in -o "$work/tools.txt"
compile images/base images/base/requirements.in --excludes "$work/not-torch" --no-emit-package torch --constraint "$work/tools.txt" "$@"

compile compose/s3 compose/s3/requirements.in "$@"

"$UV" lock --quiet "$@"
