#!/usr/bin/env bash
# Build images: engine, wheels, then the graph in docker-bake.hcl.
#
#   scripts/build.sh                       # every image
#   scripts/build.sh embed embed-test      # targets by name; `base` is the local base alone
#   scripts/build.sh --wheels [NAME...]    # only fill the wheelhouses
#   scripts/build.sh --push [NAME...]      # push the tags as well
#
# From the environment: BASE (dlc | public | local), REGISTRY (prefix of the tags), AWS_REGION.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

export BASE="${BASE:-dlc}" REGISTRY="${REGISTRY:-}"
case "$BASE" in dlc | public | local) ;; *) echo "build: BASE=$BASE: no such base; one of dlc, public, local" >&2; exit 2 ;; esac

mode=build
case "${1:-}" in --wheels | --push) mode="${1#--}"; shift ;; esac

if [ "$mode" = push ] && [ -z "$REGISTRY" ]; then
    echo "build: REGISTRY is empty, so the push has no destination; make push REGISTRY=ACCOUNT.dkr.ecr.REGION.amazonaws.com" >&2
    exit 2
fi
[ "$*" != base ] || BASE=local   # the only base that is built here
case "$BASE:$(uname -m)" in local:* | *:x86_64) ;; *)
    echo "build: BASE=$BASE needs an x86_64 machine, and this is $(uname -m); AWS's training images exist for no other," \
        "BASE=local builds here" >&2
    exit 2 ;;
esac

# The folder is the registry. The local base is not an image of its own.
images="$(printf '%s\n' images/*/Dockerfile | sed 's#^images/##; s#/Dockerfile$##' | grep -vx base | paste -sd, -)"
VERSION="$(cat VERSION)"
REVISION="$(git rev-parse --short=12 HEAD 2>/dev/null || true)"
export IMAGES="$images" VERSION REVISION

# shellcheck disable=SC2046 # names without spaces
[ $# -gt 0 ] || set -- $(tr ',' ' ' <<<"$images")
for target in "$@"; do
    [ "$target" = base ] || case ",$images," in *",${target%-test},"*) ;; *)
        echo "build: no image '$target'; one of: base,$images" >&2
        exit 2 ;;
    esac
done

wheels=()
[ "$BASE" = local ] && wheels=(base)
for target in "$@"; do
    [ "$target" = base ] || wheels+=("$target")
    case "$target" in *-test) wheels+=("${target%-test}") ;; esac   # a test image is built on its image
done
case "$BASE" in local) python=3.11 ;; *) python=3.12 ;; esac

# One line for each base image that the targets need from a registry.
bases() {
    docker buildx bake --print "$@" 2>/dev/null | "$TOOLS_PYTHON" -c 'import json, sys
contexts = [target.get("contexts", {}) for target in json.load(sys.stdin)["target"].values()]
print(*{at.split("://")[1] for one in contexts for at in one.values() if at.startswith("docker-image://")}, sep="\n")'
}

# A base that cannot be had is told before the wheels are fetched, which takes minutes.
require_bases() {
    local base reason region="${AWS_REGION:-us-east-1}"
    for base in $(bases "$@"); do
        ! docker image inspect "$base" >/dev/null 2>&1 || continue
        ! reason="$(timeout 60 docker buildx imagetools inspect "$base" 2>&1 >/dev/null)" || continue
        echo "build: BASE=$BASE needs $base, and its registry says: $(tail -n 1 <<<"${reason:-no answer within 60 s}" | sed "s,^ERROR: ,,")" >&2
        case "$BASE" in
            dlc) echo "build: log in (aws ecr get-login-password --region $region | docker login --username AWS --password-stdin \
763104351884.dkr.ecr.$region.amazonaws.com), or build with BASE=public (no AWS account) or BASE=local (nothing is pulled)" >&2 ;;
            public) echo "build: the public gallery needs a network and no login; BASE=local builds without either" >&2 ;;
        esac
        exit 1
    done
}

if [ "$mode" != wheels ]; then
    bash scripts/engine.sh builder
    [ "$BASE" = local ] || require_bases "$@"
fi
[ ${#wheels[@]} -eq 0 ] || "$TOOLS_PYTHON" scripts/wheelhouse.py --python "$python" "${wheels[@]}"
[ "$mode" != wheels ] || exit 0

if [ "$BASE" = local ]; then
    bash images/base/rootfs.sh
    set -- base "$@"
fi
docker buildx bake --progress="${BUILD_PROGRESS:-auto}" "$@"
# Each rebuild leaves the image it replaces untagged, which adds up to gigabytes in a day.
docker image prune --force --filter label=estiba.image >/dev/null
if [ "$mode" = push ]; then
    # shellcheck disable=SC2046 # tags without spaces
    exec "$TOOLS_PYTHON" scripts/push.py $(docker buildx bake --print "$@" 2>/dev/null | "$TOOLS_PYTHON" -c 'import json, sys
for name, target in json.load(sys.stdin)["target"].items():
    if name != "base" and not name.endswith(("-common", "-test")): print(*target["tags"], sep="\n")')
fi
