#!/usr/bin/env bash
# Make two local images: estiba/rootfs:bookworm, the root file system under images/base (Debian 12, Python 3.11), and
# estiba/rootfs-build:bookworm, the same with a C compiler, in which images/base builds what has no wheel.
#
#   images/base/rootfs.sh          # does nothing when both exist and this file has not changed since
#
# Pulled where a registry answers, else made with debootstrap from the mirror in this machine's apt sources, so that an
# air-gapped machine with a Debian mirror gets the same thing. Either way the same packages end up in it.
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
engine="$here/../../scripts/engine.sh"

IMAGE="estiba/rootfs:bookworm"
BUILD_IMAGE="estiba/rootfs-build:bookworm"
SUITE="bookworm"
PULL_WAIT_S="${ESTIBA_PULL_WAIT_S:-20}"
# libgomp1: torch's OpenMP. procps: sagemaker-training and people look at processes. The rest is Python itself.
PACKAGES="ca-certificates,libgomp1,libstdc++6,procps,python3,python3-venv,tzdata"
COMPILER="gcc,libc6-dev,python3-dev"

say() { printf 'rootfs: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

recipe="$(sha256sum "$0" | cut -c1-16)"
made_with() { docker image inspect --format '{{index .Config.Labels "estiba.recipe"}}' "$1" 2>/dev/null || true; }
if [ "$(made_with "$IMAGE")" = "$recipe" ] && [ "$(made_with "$BUILD_IMAGE")" = "$recipe" ]; then
    exit 0
fi

work="$(mktemp -d)"
trap 'as_root rm -rf "$work"' EXIT

# What no container needs, and what differs from run to run.
SLIM='
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /var/cache/debconf/*-old /var/lib/dpkg/*-old
find /usr/share/doc -mindepth 2 ! -name copyright -type f -delete
rm -rf /usr/share/man/* /usr/share/info/* /usr/share/locale/* /usr/share/groff /usr/share/lintian /tmp/*
'

labels=(--change "LABEL estiba.recipe=$recipe" --change "ENV LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" --change 'CMD ["bash"]')

# Run a shell text in a container of image $1, as root, and import its file system as image $2.
import_after() {
    local container="estiba-rootfs-$$"
    docker run --name "$container" -e DEBIAN_FRONTEND=noninteractive "$1" sh -ec "$3" >"$work/log" 2>&1 &&
        docker export "$container" | docker import "${labels[@]}" - "$2" >/dev/null && docker rm "$container" >/dev/null && return
    docker rm -f "$container" >/dev/null 2>&1 || true
    return 1
}

from_registry() {
    timeout "$PULL_WAIT_S" docker pull -q "debian:$SUITE-slim" >/dev/null 2>&1 || return 1
    say "pulled debian:$SUITE-slim; adding ${PACKAGES//,/ }"
    local install="apt-get -q update && apt-get -q install -y --no-install-recommends"
    import_after "debian:$SUITE-slim" "$BUILD_IMAGE" "$install ${PACKAGES//,/ } ${COMPILER//,/ } && $SLIM" &&
        import_after "debian:$SUITE-slim" "$IMAGE" "$install ${PACKAGES//,/ } && $SLIM" && return
    say "the pulled image could not reach its package mirror; using debootstrap instead"
    return 1
}

# The mirror (URI, then keyring or nothing) that this machine's own apt sources name for the suite.
mirror_here() {
    # apt tells its sources' places only once it has read them
    [ -n "$(apt-get indextargets 2>/dev/null)" ] || as_root apt-get -q update >/dev/null 2>&1 || true
    # shellcheck disable=SC2016 # the dollars are apt's
    apt-get indextargets --format '$(RELEASE)|$(REPO_URI)|$(SIGNED_BY)' 'Created-By: Packages' | sort -u |
        sed -n "s/^$SUITE|//p" | head -n 1
}

from_debootstrap() {
    command -v apt-get >/dev/null || die "no registry answered within $PULL_WAIT_S s, and without apt there is no debootstrap;
get debian:$SUITE-slim onto this machine ('docker load' of a saved one will do), then run this again"
    local mirror signed=""
    mirror="${ESTIBA_DEBIAN_MIRROR:-$(mirror_here)}"
    [ -n "$mirror" ] || die "no registry answered within $PULL_WAIT_S s, and this machine's apt sources name no mirror of $SUITE;
set ESTIBA_DEBIAN_MIRROR to one"
    case "$mirror" in *"|/"*) signed="${mirror#*|}" ;; esac
    mirror="${mirror%%|*}"
    bash "$engine" debootstrap
    say "no registry answered within $PULL_WAIT_S s; debootstrap $SUITE from this machine's mirror (about a minute)"
    as_root env PATH="/usr/sbin:/sbin:$PATH" debootstrap --variant=minbase --include="$PACKAGES,$COMPILER" \
        ${signed:+--keyring="$signed"} "$SUITE" "$work/root" "$mirror" >"$work/log" 2>&1 ||
        { tail -n 20 "$work/log" >&2; die "debootstrap failed (its words are above)"; }
    as_root chroot "$work/root" sh -ec "$SLIM"
    import_root "$BUILD_IMAGE"
    # What is not asked for by name, nor required by Debian, came with the compiler and goes with it.
    as_root chroot "$work/root" sh -ec "
        export DEBIAN_FRONTEND=noninteractive
        apt-mark auto \$(dpkg-query -W -f '\${Package} ') >/dev/null
        apt-mark manual apt ${PACKAGES//,/ } \
            \$(dpkg-query -W -f '\${Package} \${Priority}\n' | sed -n 's/ required\$//p') >/dev/null
        apt-get -q autoremove --purge -y
        $SLIM" >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; die "removing the compiler failed (its words are above)"; }
    import_root "$IMAGE"
}

import_root() {
    as_root tar -C "$work/root" --numeric-owner --one-file-system -c . | docker import "${labels[@]}" - "$1" >/dev/null
}

from_registry || from_debootstrap
for image in "$IMAGE" "$BUILD_IMAGE"; do
    say "$image: $(($(docker image inspect --format '{{.Size}}' "$image") / 1000000)) MB"
done
