#!/usr/bin/env bash
# The demo's job over a local S3 server: wheels, images, the job, and a search in its output.
#
#   bash compose/run.sh            # after `make demo`, whose corpus and model it uses
#   bash compose/run.sh --build    # only build the images
#
# Exit status: 0; 1 a step failed; 130 or 143 interrupted, run again to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compose() { docker compose --file compose/compose.yaml "$@"; }
fail() { printf 'compose: %s\n' "$1" >&2; exit "${2:-1}"; }

for needed in runs/demo/input runs/demo/model; do
    [ -d "$needed" ] || [ "${1:-}" = --build ] || fail "no $needed; run \`make demo\` first"
done

bash scripts/engine.sh engine
bash scripts/env.sh
docker image inspect estiba/embed:local >/dev/null 2>&1 ||
    make --no-print-directory build/embed BASE=local || fail "\`make build/embed BASE=local\` failed, see above"

bash scripts/s3.sh build || fail "the S3 server's image could not be built, see above"
[ "${1:-}" != --build ] || exit 0

status=0
compose run --rm --no-TTY embed || status=$?
case "$status" in
    0) ;;
    130 | 143) fail "interrupted; committed work is kept on the S3 server, run this again to resume" "$status" ;;
    *) fail "the job failed with exit status $status; its reason is above" "$status" ;;
esac
mkdir -p runs/demo/from-s3
ESTIBA_USER="$(id -u):$(id -g)" compose run --rm --no-TTY fetch
docker run --rm --network none --entrypoint python \
    --volume "$PWD/demo/neighbours.py:/neighbours.py:ro" --volume "$PWD/runs/demo/from-s3:/output:ro" \
    estiba/embed:local /neighbours.py /output
echo "compose: the server keeps running; remove it and its data with: docker compose -f compose/compose.yaml down --volumes"
