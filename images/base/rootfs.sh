#!/usr/bin/env bash
# Make two local images: estiba/rootfs:bookworm, the root file system of images/base (Debian 12, Python 3.11), and
# estiba/rootfs-build:bookworm, the same with a C compiler, in which images/base builds packages that have no wheel.
#
#   images/base/rootfs.sh              # does nothing when both exist, are recent, and this file has not changed since
#   REFRESH=1 images/base/rootfs.sh    # makes both again, with today's security updates
#
# Pulled if a registry answers, otherwise built with debootstrap from the mirror in this machine's apt sources, so that an
# air-gapped machine with a Debian mirror gets the same packages. Both ways end with the updates of bookworm-security.
# After MAX_AGE_DAYS both are made again; if that fails, the old ones stay in use, with a warning.
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
engine="$here/../../scripts/engine.sh"

IMAGE="estiba/rootfs:bookworm"
BUILD_IMAGE="estiba/rootfs-build:bookworm"
SUITE="bookworm"
SUITES="$SUITE $SUITE-updates $SUITE-security"
MAX_AGE_DAYS="${ESTIBA_ROOTFS_MAX_AGE_DAYS:-30}"
PULL_WAIT_S="${ESTIBA_PULL_WAIT_S:-20}"
# libgomp1: torch's OpenMP. procps: sagemaker-training and people list processes. The rest is Python itself.
PACKAGES="ca-certificates,libgomp1,libstdc++6,procps,python3,python3-venv,tzdata"
COMPILER="gcc,libc6-dev,python3-dev"

say() { printf 'rootfs: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

recipe="$(sha256sum "$0" | cut -c1-16)"
made_with() { docker image inspect --format '{{index .Config.Labels "estiba.recipe"}}' "$1" 2>/dev/null || true; }
age_days() { echo $((($(date +%s) - $(date +%s -d "$(docker image inspect --format '{{.Created}}' "$IMAGE")")) / 86400)); }
is_current() { [ "$(made_with "$IMAGE")" = "$recipe" ] && [ "$(made_with "$BUILD_IMAGE")" = "$recipe" ]; }

if is_current && [ -z "${REFRESH:-}" ]; then
    [ "$(age_days)" -ge "$MAX_AGE_DAYS" ] || exit 0
    say "$IMAGE is $(age_days) days old; making it again, for the security updates since then"
    REFRESH=1 bash "$0" || say "$IMAGE stays as it was $(age_days) days ago, without later security updates (the reason is above)"
    exit 0
fi

work="$(mktemp -d)"
trap 'as_root rm -rf "$work"' EXIT

# Remove files that no container needs or that differ from run to run.
SLIM='
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /var/cache/debconf/*-old /var/lib/dpkg/*-old
find /usr/share/doc -mindepth 2 ! -name copyright -type f -delete
rm -rf /usr/share/man/* /usr/share/info/* /usr/share/locale/* /usr/share/groff /usr/share/lintian /tmp/*
'

# estiba.image: pruning after a build removes the images that these replace.
labels=(--change "LABEL estiba.image=rootfs estiba.recipe=$recipe" --change "ENV LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" --change 'CMD ["bash"]')

# Run the shell commands $3 as root in a container of image $1, and import its file system as image $2.
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
    local install="apt-get -q update && apt-get -q upgrade -y && apt-get -q install -y --no-install-recommends"
    import_after "debian:$SUITE-slim" "$BUILD_IMAGE" "$install ${PACKAGES//,/ } ${COMPILER//,/ } && $SLIM" &&
        import_after "debian:$SUITE-slim" "$IMAGE" "$install ${PACKAGES//,/ } && $SLIM" && return
    say "the pulled image could not reach its package mirror; using debootstrap instead"
    return 1
}

# Lines "suite|URI|keyring or something without a slash" of this machine's own apt sources, for the wanted suites. Its package
# lists are fetched into a folder of their own: those of the machine may be half there, while somebody else updates them.
sources_here() {
    local lists="$work/lists"
    mkdir -p "$lists/partial"
    local apt=(apt-get -q -o Dir::State::lists="$lists" -o APT::Sandbox::User=root -o Debug::NoLocking=1)
    as_root "${apt[@]}" update >/dev/null 2>&1 || true
    # shellcheck disable=SC2016 # the dollars are apt's
    "${apt[@]}" indextargets --format '$(RELEASE)|$(REPO_URI)|$(SIGNED_BY)' 'Created-By: Packages' | sort -u |
        grep -E "^(${SUITES// /|})\|" || true
}

# Install the updates of every suite. This machine's apt fetches them, so that its proxy, keys and certificates are used.
upgrade_root() { # lines of sources_here
    # Debian's keys are those in the new root, as this machine may be an Ubuntu.
    local suite uri signed updates="$work/updates" keys="$work/root/usr/share/keyrings/debian-archive-keyring.gpg"
    mkdir -p "$updates"/{lists,archives}/partial
    while IFS='|' read -r suite uri signed; do
        case "$signed" in /*) ;; *) signed="$keys" ;; esac
        printf 'deb [signed-by=%s] %s %s main\n' "$signed" "$uri" "$suite"
    done <<<"$1" >"$updates/sources.list"
    local apt=(as_root apt-get -q -y -o Dir::Etc::sourcelist="$updates/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null -o Dir::State::lists="$updates/lists"
        -o Dir::State::status="$work/root/var/lib/dpkg/status" -o Dir::Cache::archives="$updates/archives"
        -o APT::Sandbox::User=root -o Debug::NoLocking=1)
    sed 's/\[.*\] //' "$updates/sources.list" | as_root tee "$work/root/etc/apt/sources.list" >/dev/null
    { "${apt[@]}" update && "${apt[@]}" --download-only upgrade; } >"$work/log" 2>&1 || return 1
    as_root cp -r "$updates/lists/." "$work/root/var/lib/apt/lists/"
    as_root cp -r "$updates/archives/." "$work/root/var/cache/apt/archives/"
    as_root chroot "$work/root" env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-download upgrade >"$work/log" 2>&1
}

from_debootstrap() {
    command -v apt-get >/dev/null || die "no registry answered within $PULL_WAIT_S s, and debootstrap needs apt;
load debian:$SUITE-slim on this machine (docker save, docker load), then run this again"
    local sources mirror signed=""
    sources="$(sources_here)"
    if [ -n "${ESTIBA_DEBIAN_MIRROR:-}" ]; then
        sources="$(printf '%s\n' "$SUITE|$ESTIBA_DEBIAN_MIRROR|" "$SUITE-updates|$ESTIBA_DEBIAN_MIRROR|" \
            ${ESTIBA_DEBIAN_SECURITY_MIRROR:+"$SUITE-security|$ESTIBA_DEBIAN_SECURITY_MIRROR|"})"
    fi
    grep -q "^$SUITE-security|" <<<"$sources" ||
        say "no $SUITE-security in this machine's apt sources, so the image lacks security updates; add it to them, or set
ESTIBA_DEBIAN_MIRROR and ESTIBA_DEBIAN_SECURITY_MIRROR"
    mirror="$(sed -n "s/^$SUITE|//p" <<<"$sources" | head -n 1)"
    [ -n "$mirror" ] || die "no registry answered within $PULL_WAIT_S s, and this machine's apt sources have no mirror of $SUITE;
set ESTIBA_DEBIAN_MIRROR to one"
    case "$mirror" in *"|/"*) signed="${mirror#*|}" ;; esac
    mirror="${mirror%%|*}"
    bash "$engine" debootstrap
    say "no registry answered within $PULL_WAIT_S s; debootstrap $SUITE from this machine's mirror (about a minute)"
    as_root env PATH="/usr/sbin:/sbin:$PATH" debootstrap --variant=minbase --include="$PACKAGES,$COMPILER" \
        ${signed:+--keyring="$signed"} "$SUITE" "$work/root" "$mirror" >"$work/log" 2>&1 ||
        { tail -n 20 "$work/log" >&2; die "debootstrap failed (its output is above)"; }

    upgrade_root "$sources" ||
        { tail -n 20 "$work/log" >&2; die "the security updates could not be installed (apt's output is above)"; }
    as_root chroot "$work/root" sh -ec "$SLIM"
    import_root "$BUILD_IMAGE"
    # Packages that are neither listed above nor required by Debian came with the compiler; remove them with it.
    as_root chroot "$work/root" sh -ec "
        export DEBIAN_FRONTEND=noninteractive
        apt-mark auto \$(dpkg-query -W -f '\${Package} ') >/dev/null
        apt-mark manual apt ${PACKAGES//,/ } \
            \$(dpkg-query -W -f '\${Package} \${Priority}\n' | sed -n 's/ required\$//p') >/dev/null
        apt-get -q autoremove --purge -y
        $SLIM" >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; die "removing the compiler failed (its output is above)"; }
    import_root "$IMAGE"
}

import_root() {
    as_root tar -C "$work/root" --numeric-owner --one-file-system -c . | docker import "${labels[@]}" - "$1" >/dev/null
}

from_registry || from_debootstrap
for image in "$IMAGE" "$BUILD_IMAGE"; do
    say "$image: $(($(docker image inspect --format '{{.Size}}' "$image") / 1000000)) MB"
done
