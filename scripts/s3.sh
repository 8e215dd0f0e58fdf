#!/usr/bin/env bash
# A local S3 API server in a container, for jobs that read from s3:// on a machine without AWS.
#
#   scripts/s3.sh build                          # the image estiba/s3:local
#   scripts/s3.sh start                          # the server, on this machine's Docker bridge; prints its environment
#   scripts/s3.sh put runs/x/input s3://estiba/x # copy a folder into a bucket; skips unchanged files
#   scripts/s3.sh stop                           # remove the server and its data, also those of other checkouts
set -euo pipefail
cd "$(dirname "$0")/.."

readonly WHEELS=.build/wheels/s3-py311 NAME=estiba-s3
PORT="${ESTIBA_S3_PORT:-4566}"

bridge() { docker network inspect bridge --format '{{(index .IPAM.Config 0).Gateway}}'; }

environment() {
    # The server accepts any key; these are not secrets and do not look like any.
    cat <<END
AWS_ENDPOINT_URL_S3=http://$(bridge):$PORT
AWS_ALLOW_HTTP=true
AWS_ACCESS_KEY_ID=estiba-local
AWS_SECRET_ACCESS_KEY=estiba-local-not-a-secret
AWS_REGION=us-east-1
AWS_DEFAULT_REGION=us-east-1
AWS_EC2_METADATA_DISABLED=true
END
}

build() {
    bash scripts/engine.sh engine
    bash scripts/env.sh
    docker image inspect estiba/base:local >/dev/null 2>&1 || BASE=local bash scripts/build.sh base
    # Wheels for the base's Python, fetched here so that the build needs no network; the lock's digest is the stamp.
    lock_digest="$(cksum <compose/s3/requirements.txt)"
    if [ "$(cat "$WHEELS/.lock" 2>/dev/null)" != "$lock_digest" ]; then
        rm -rf "$WHEELS"
        mkdir -p "$WHEELS"
        .build/tools/bin/python -m pip download --quiet --disable-pip-version-check --only-binary :all: \
            --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
            --platform "manylinux_2_28_$(uname -m)" --platform "manylinux2014_$(uname -m)" --platform any \
            --require-hashes --requirement compose/s3/requirements.txt --dest "$WHEELS" 2>&1 |
            { grep -v '^WARNING' || true; } >&2
        printf '%s\n' "$lock_digest" >"$WHEELS/.lock"
    fi
    docker compose --file compose/compose.yaml build --quiet s3
}

start() {
    docker image inspect estiba/s3:local >/dev/null 2>&1 || build >&2
    if [ "$(docker container inspect --format '{{.State.Running}}' $NAME 2>/dev/null)" != true ]; then
        docker rm --force $NAME >/dev/null 2>&1 || true
        docker run --detach --init --name $NAME --volume estiba-s3-data:/data --publish "$(bridge):$PORT:4566" \
            estiba/s3:local >/dev/null
    fi
    for _ in $(seq 60); do
        [ "$(docker container inspect --format '{{.State.Health.Status}}' $NAME)" != healthy ] || { environment; return; }
        sleep 0.5
    done
    docker logs --tail 20 $NAME >&2
    echo "s3: the server does not answer; its log is above" >&2
    return 1
}

case "${1:-}" in
    build) build ;;
    start) start ;;
    put)
        start >/dev/null
        # Use this checkout's program, since the image may be older.
        environment | docker run --rm --env-file /dev/stdin --volume "$(realpath "$2"):/from:ro" \
            --volume "$PWD/compose/s3/objects.py:/opt/s3/objects.py:ro" estiba/s3:local \
            python /opt/s3/objects.py put /from "$3" ;;
    stop) docker rm --force --volumes $NAME >/dev/null && docker volume rm estiba-s3-data >/dev/null ;;
    *) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
