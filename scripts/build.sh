#!/usr/bin/env bash
# Build images: engine, wheels, then the graph in docker-bake.hcl.
#
#   scripts/build.sh                       # every image
#   scripts/build.sh embed embed-test      # targets by name; `base` is the stand-in alone
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
    echo "build: REGISTRY is empty, so there is nowhere to push to; make push REGISTRY=ACCOUNT.dkr.ecr.REGION.amazonaws.com" >&2
    exit 2
fi
[ "$*" != base ] || BASE=local   # the stand-in is of that base, whatever the others stand on

# The folder is the registry. The stand-in is not an image of its own: it is a base.
images="$(printf '%s\n' images/*/Dockerfile | sed 's#^images/##; s#/Dockerfile$##' | grep -vx base | paste -sd, -)"
VERSION="$(cat VERSION)"
REVISION="$(git rev-parse --short=12 HEAD 2>/dev/null || true)"
export IMAGES="$images" VERSION REVISION

# shellcheck disable=SC2046 # names without spaces
[ $# -gt 0 ] || set -- $(tr ',' ' ' <<<"$images")
for target in "$@"; do
    [ "$target" = base ] || case ",$images," in *",${target%-test},"*) ;; *)
        echo "build: no image '$target'; there are: base,$images" >&2
        exit 2 ;;
    esac
done

wheels=()
[ "$BASE" = local ] && wheels=(base)
for target in "$@"; do
    [ "$target" = base ] || wheels+=("$target")
    case "$target" in *-test) wheels+=("${target%-test}") ;; esac   # a test image stands on its image
done
case "$BASE" in local) python=3.11 ;; *) python=3.12 ;; esac
[ ${#wheels[@]} -eq 0 ] || "$TOOLS_PYTHON" scripts/wheelhouse.py --python "$python" "${wheels[@]}"
[ "$mode" != wheels ] || exit 0

bash scripts/engine.sh builder
if [ "$BASE" = local ]; then
    bash images/base/rootfs.sh
    set -- base "$@"
fi
if ! docker buildx bake --progress="${BUILD_PROGRESS:-auto}" "$@"; then
    [ "$BASE" = local ] || echo "build: if the base image above could not be pulled: BASE=dlc needs a login to AWS's registry
(aws ecr get-login-password --region ${AWS_REGION:-us-east-1} | docker login --username AWS --password-stdin
763104351884.dkr.ecr.${AWS_REGION:-us-east-1}.amazonaws.com), BASE=public needs the public gallery, BASE=local neither" >&2
    exit 1
fi
# Each rebuild leaves the image it replaces behind, without a name: gigabytes in a day of work.
docker image prune --force --filter label=estiba.image >/dev/null
if [ "$mode" = push ]; then
    docker buildx bake --print "$@" 2>/dev/null |
        "$TOOLS_PYTHON" -c 'import json, sys
for name, target in json.load(sys.stdin)["target"].items():
    if name != "base" and not name.endswith("-test"): print(*target["tags"], sep="\n")' |
        while read -r tag; do docker push "$tag"; done
fi
