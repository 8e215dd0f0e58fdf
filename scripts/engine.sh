#!/usr/bin/env bash
# Install and start what is missing for Docker: engine, buildx, compose v2, and the NVIDIA toolkit where there is a GPU.
#
#   scripts/engine.sh                        # what `make engine` does: the engine, and a Python that can make a venv
#   scripts/engine.sh engine                 # the engine alone
#   scripts/engine.sh builder                # what a build needs: engine and buildx, no GPU check
#   scripts/engine.sh debootstrap            # the tool images/base needs where no image can be pulled
#   scripts/engine.sh engine rsync           # what the ssh target needs on a remote host
#   ssh user@host 'bash -s engine rsync' <scripts/engine.sh   # a rented machine: needs nothing else of this repository
#
# Idempotent: what already works is left alone. Installs from the distribution's own packages; only the NVIDIA
# toolkit, which distributions do not carry, comes from NVIDIA. Exit status 0: ready; 1: failed, with the reason.
set -euo pipefail
export LC_ALL=C                                        # apt's and sudo's messages are read below
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"    # Debian keeps dockerd from the PATH of ordinary users

OS_RELEASE="${ESTIBA_OS_RELEASE:-/etc/os-release}"
LOCK_WAIT_S="${ESTIBA_LOCK_WAIT_S:-900}"       # cloud-init may hold the package lock for minutes on a fresh box
DAEMON_WAIT_S="${ESTIBA_DAEMON_WAIT_S:-60}"
DAEMON_LOG="${ESTIBA_DAEMON_LOG:-/var/log/estiba-dockerd.log}"
# Used only where nvidia-container-toolkit is in no configured package source.
NVIDIA_REPO="${ESTIBA_NVIDIA_REPO:-https://nvidia.github.io/libnvidia-container}"
# Any image with a libc will do: the toolkit brings nvidia-smi and its libraries into it.
GPU_PROBE_IMAGE="${ESTIBA_GPU_PROBE_IMAGE:-public.ecr.aws/docker/library/debian:bookworm-slim}"

say() { printf 'engine: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

NEEDS=engine
TEMP_DIR=""
trap '[ -z "$TEMP_DIR" ] || rm -rf "$TEMP_DIR"' EXIT

# ---------------------------------------------------------------------------------------------- packages

MANUAL="install Docker Engine >= 24 with the buildx and compose v2 plugins (docs.docker.com/engine/install), start it,
and check that 'docker info', 'docker buildx version' and 'docker compose version' answer; for a GPU also
nvidia-container-toolkit, then 'nvidia-ctk runtime configure --runtime=docker'"

# Fail before the installation rather than half-way through it.
require_apt_and_root() {
    have apt-get || die "this is not Debian or Ubuntu, so nothing was installed; $MANUAL"
    [ "$(id -u)" = 0 ] && return
    have sudo || die "installing needs root, and there is no sudo; run this as root, or $MANUAL"
    local reason
    reason="$(sudo -n true 2>&1)" || sudo -v </dev/tty 2>/dev/null ||
        die "installing needs root, and $(tail -n 1 <<<"$reason"); run this as root, or $MANUAL"
}

# Run apt-get and wait while another process holds the lock. Any other failure prints apt's output.
apt_get() {
    local deadline=$((SECONDS + LOCK_WAIT_S)) log notified=""
    log="$(mktemp)"
    while ! as_root env DEBIAN_FRONTEND=noninteractive ${APT_CONFIG:+APT_CONFIG="$APT_CONFIG"} \
        NEEDRESTART_MODE=a apt-get -q "$@" >"$log" 2>&1 </dev/null; do
        if grep -q 'dpkg was interrupted' "$log"; then
            say "an earlier installation was interrupted; finishing it (dpkg --configure -a)"
            as_root dpkg --configure -a </dev/null >/dev/null 2>&1 || true
        elif ! grep -qE 'Could not get lock|Unable to acquire the dpkg|Unable to lock|Waiting for cache lock' "$log"; then
            tail -n 25 "$log" >&2
            rm -f "$log"
            return 1
        fi
        if [ $SECONDS -ge $deadline ]; then
            grep -E 'lock' "$log" >&2 || true
            rm -f "$log"
            die "the package lock was still held after ${LOCK_WAIT_S} s; wait for that process or end it, then run this again"
        fi
        if [ -z "$notified" ]; then
            notified="$(sed -n 's/.*held by process \([0-9]* ([^)]*)\).*/\1/p' "$log" | head -n 1)"
            say "${notified:-another process} holds the package lock (unattended upgrades?); waiting up to ${LOCK_WAIT_S} s"
            notified=yes
        fi
        sleep 5
    done
    rm -f "$log"
}

in_dpkg() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }
in_apt() { apt-cache policy "$1" 2>/dev/null | grep -q 'Candidate: [^(]'; }

# Debian 12 has engine 20.10 and compose v1. Debian 13's engine 26.1, buildx 0.13 and compose 2.26 run with Debian 12's
# libc, so they are installed from there: from the same mirror, configured for this process only (APT_CONFIG), so that the
# machine's own sources do not change and no later upgrade crosses the release.
borrow_next_debian() {
    TEMP_DIR="$(mktemp -d)"
    chmod 755 "$TEMP_DIR"
    mkdir -p "$TEMP_DIR"/{sources,preferences,lists/partial}
    # apt lists its sources only after an update
    [ -n "$(apt-get indextargets 2>/dev/null)" ] || apt_get update || true
    local release uri signed option
    # shellcheck disable=SC2016 # the dollars are apt's
    apt-get indextargets --format '$(RELEASE)|$(REPO_URI)|$(SIGNED_BY)' 'Created-By: Packages' | sort -u |
        while IFS='|' read -r release uri signed; do
            case "$release" in bookworm*) ;; *) continue ;; esac
            option=""
            case "$signed" in /*) option="[signed-by=$signed] " ;; esac
            printf 'deb %s%s %s main\n' "$option" "$uri" "$release"
        done >"$TEMP_DIR/sources/here.list"
    local mirror
    mirror="$(sed -n 's/^\(deb .*\) bookworm main$/\1/p' "$TEMP_DIR/sources/here.list" | head -n 1)"
    [ -n "$mirror" ] || die "no 'bookworm' suite in this machine's apt sources, so no mirror is known for Debian 13's
docker packages; $MANUAL"
    printf '%s trixie main\n' "$mirror" >"$TEMP_DIR/sources/next.list"
    cat >"$TEMP_DIR/preferences/next" <<PIN
Package: *
Pin: release n=trixie
Pin-Priority: 50

Package: docker.io docker-cli docker-buildx docker-compose
Pin: release n=trixie
Pin-Priority: 900
PIN
    cat >"$TEMP_DIR/apt.conf" <<CONF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$TEMP_DIR/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "$TEMP_DIR/preferences";
Dir::State::lists "$TEMP_DIR/lists";
CONF
    export APT_CONFIG="$TEMP_DIR/apt.conf"
}

install_engine() {
    require_apt_and_root
    # shellcheck disable=SC1090,SC1091
    . "$OS_RELEASE"
    local packages
    if [ "${ID:-}:${VERSION_CODENAME:-}" = debian:bookworm ]; then
        borrow_next_debian
        apt_get update
        packages="docker.io docker-cli docker-buildx docker-compose"
        say "installing $packages of Debian 13 (this release has no compose v2); no other package changes its release"
    else
        case "${ID:-} ${ID_LIKE:-}" in *debian* | *ubuntu*) ;; *) die "this is ${PRETTY_NAME:-not Debian or Ubuntu}; $MANUAL" ;; esac
        apt_get update
        packages="docker.io"
        in_apt docker-cli && packages="$packages docker-cli"                       # a separate package since Debian 13
        if in_apt docker-buildx; then packages="$packages docker-buildx"; else die "${PRETTY_NAME:-this release} has no docker-buildx package; $MANUAL"; fi
        if in_apt docker-compose-v2; then packages="$packages docker-compose-v2"   # Ubuntu's name
        elif apt-cache policy docker-compose | grep -q 'Candidate: 2'; then packages="$packages docker-compose"
        else die "${PRETTY_NAME:-this release} has no compose v2 package; $MANUAL"; fi
        say "installing $packages"
    fi
    # shellcheck disable=SC2086 # a list of names
    apt_get install -y --no-install-recommends $packages iptables ca-certificates || die "apt could not install $packages (its output is above)"
    unset APT_CONFIG
    hash -r
}

# ------------------------------------------------------------------------------------------------ daemon

answers() { docker info >/dev/null 2>&1; }
plugins_answer() {
    docker buildx version >/dev/null 2>&1 || return 1
    [ "$NEEDS" = builder ] || docker compose version >/dev/null 2>&1
}

# After a crash, a pid file may name a process that is now another program; dockerd would refuse to start.
remove_stale_pid_files() {
    local file pid
    for file in /var/run/docker.pid /run/docker/containerd/containerd.pid; do
        pid="$(as_root cat "$file" 2>/dev/null)" || continue
        case "$(cat "/proc/$pid/comm" 2>/dev/null)" in
            dockerd | containerd) ;;
            *) as_root rm -f "$file" ;;
        esac
    done
}

daemon_answers_within() {
    local deadline=$((SECONDS + $1))
    until as_root docker info >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || return 1
        if [ -n "${2:-}" ] && [ ! -d "/proc/$2" ]; then return 1; fi     # it has exited
        sleep 0.5
    done
}

# dockerd without systemd: detached from this terminal, so that it outlives the command that needed it.
start_detached() {
    remove_stale_pid_files
    as_root sh -c 'log=$1; shift; setsid nohup dockerd "$@" >"$log" 2>&1 </dev/null & echo $!' sh "$DAEMON_LOG" "$@" >/tmp/.estiba-dockerd.$$ 
    local pid
    pid="$(cat /tmp/.estiba-dockerd.$$)"
    rm -f /tmp/.estiba-dockerd.$$
    # setsid forks if it leads a process group, so the pid may be gone already: watch it only if it is dockerd
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ] || pid=""
    daemon_answers_within "$DAEMON_WAIT_S" "$pid"
}

start_daemon() {
    require_apt_and_root
    if [ -d /run/systemd/system ]; then
        say "starting docker (systemd)"
        as_root systemctl enable --now docker >/dev/null 2>&1 || true
        daemon_answers_within "$DAEMON_WAIT_S" && return
        as_root journalctl -u docker -n 20 --no-pager >&2 || true
        die "docker did not start (its log is above)"
    fi
    have dockerd || die "no dockerd on the PATH; $MANUAL"
    say "starting dockerd (no systemd here; log: $DAEMON_LOG)"
    start_detached && return
    local reason
    reason="$(as_root cat "$DAEMON_LOG")"
    if grep -qiE 'iptables|nf_tables|nft' <<<"$reason" && have iptables-legacy && have update-alternatives; then
        say "dockerd could not use iptables over nftables; trying iptables-legacy"
        as_root update-alternatives --set iptables "$(command -v iptables-legacy)" >/dev/null 2>&1 || true
        start_detached && return
        reason="$(as_root cat "$DAEMON_LOG")"
    fi
    if grep -qiE 'overlay|storage-driver|graphdriver' <<<"$reason"; then
        local driver=vfs
        have fuse-overlayfs && driver=fuse-overlayfs
        say "dockerd could not use overlayfs; trying the '$driver' storage driver (slower, uses more disk)"
        start_detached --storage-driver="$driver" && return
        reason="$(as_root cat "$DAEMON_LOG")"
    fi
    if grep -qiE 'iptables|nf_tables|nft' <<<"$reason"; then
        say "dockerd could not set up its network; trying without iptables (containers reach each other, not the outside)"
        start_detached --iptables=false --ip6tables=false && return
    fi
    as_root tail -n 20 "$DAEMON_LOG" >&2 || true
    die "dockerd did not start within ${DAEMON_WAIT_S} s (the end of its log is above, all of it in $DAEMON_LOG)"
}

# Membership of the docker group begins at the next login; owning the socket bridges the time until then.
give_user_access() {
    # Through sudo the engine always answers; access is for the user behind it.
    local user="${SUDO_USER:-$(id -un)}"
    if [ "$user" = root ] || { [ "$user" = "$(id -un)" ] && answers; }; then return; fi
    case " $(id -nG "$user") " in *" docker "*) [ "$user" = "$(id -un)" ] || return 0 ;; esac
    say "adding $user to the docker group, which gives root rights on this machine"
    as_root usermod -aG docker "$user"
    as_root chown "$user" /var/run/docker.sock
    answers || die "docker runs, but $user has no access: log in again, or use sudo"
}

ensure_engine() {
    if have docker && answers && plugins_answer; then
        # a build prints nothing if nothing had to be done
        [ "$NEEDS" = builder ] || say "$(docker version --format 'Docker {{.Server.Version}} answers'), with buildx and compose v2"
        give_user_access
        return
    fi
    if have docker && answers && in_dpkg docker-ce; then
        # Docker's own packages are installed, and the distribution's would replace them.
        require_apt_and_root
        say "the engine answers, but buildx or compose v2 is missing; installing Docker's packages for them"
        apt_get update
        apt_get install -y docker-buildx-plugin docker-compose-plugin || die "apt could not install the plugins; $MANUAL"
    elif ! have docker || ! have dockerd || ! plugins_answer; then
        if have docker && answers; then say "the engine answers, but buildx or compose v2 is missing"; fi
        install_engine
    fi
    have docker && as_root docker info >/dev/null 2>&1 || start_daemon
    give_user_access
    docker buildx version >/dev/null 2>&1 || die "'docker buildx version' does not answer after the installation; $MANUAL"
    plugins_answer || die "'docker compose version' does not answer after the installation; $MANUAL"
    say "$(docker version --format 'Docker {{.Server.Version}} answers'), with buildx and compose v2," \
        "storage driver $(docker info --format '{{.Driver}}')"
    [ "$(docker info --format '{{.Driver}}')" != vfs ] ||
        say "dockerd fell back to vfs (no overlayfs here): every layer is a full copy, slow and large"
}

# --------------------------------------------------------------------------------------------------- GPU

install_nvidia_toolkit() {
    require_apt_and_root
    have nvidia-ctk && return
    if ! in_apt nvidia-container-toolkit; then
        say "adding NVIDIA's package source for nvidia-container-toolkit (the distribution has none)"
        apt_get install -y --no-install-recommends curl gnupg ca-certificates || die "apt could not install curl and gnupg"
        local key=/usr/share/keyrings/nvidia-container-toolkit.gpg
        curl -fsSL --retry 5 --max-time 60 "$NVIDIA_REPO/gpgkey" | as_root gpg --batch --yes --dearmor -o "$key" ||
            die "could not fetch NVIDIA's key from $NVIDIA_REPO; install nvidia-container-toolkit by hand and run this again"
        echo "deb [signed-by=$key] $NVIDIA_REPO/stable/deb/\$(ARCH) /" |
            as_root tee /etc/apt/sources.list.d/nvidia-container-toolkit.list >/dev/null
        apt_get update
    fi
    say "installing nvidia-container-toolkit"
    apt_get install -y --no-install-recommends nvidia-container-toolkit || die "apt could not install nvidia-container-toolkit"
}

restart_daemon() {
    if [ -d /run/systemd/system ]; then
        as_root systemctl restart docker
        daemon_answers_within "$DAEMON_WAIT_S" || die "docker did not come back after its restart"
    else
        local pid
        pid="$(as_root cat /var/run/docker.pid 2>/dev/null || true)"
        [ -z "$pid" ] || as_root kill "$pid" || true
        for _ in $(seq 60); do [ -n "$pid" ] && [ -d "/proc/$pid" ] || break; sleep 0.5; done
        start_daemon
    fi
    give_user_access
}

# Where no image can be pulled, build one from the machine's own C library and shell; it is enough for nvidia-smi.
probe_image() {
    if docker image inspect "$GPU_PROBE_IMAGE" >/dev/null 2>&1 ||
        timeout 120 docker pull -q "$GPU_PROBE_IMAGE" >/dev/null 2>&1; then
        echo "$GPU_PROBE_IMAGE"
        return
    fi
    local libraries
    libraries="$(ldconfig -p | awk '/lib(c|m|dl|pthread|rt)\.so\.[0-9]+ /{print $NF}')"
    # shellcheck disable=SC2086 # a list of names
    tar -ch --ignore-failed-read /bin/sh /etc/debian_version /etc/passwd /etc/ld.so.conf /etc/ld.so.conf.d \
        $libraries /lib64/ld-linux-*.so.* 2>/dev/null | docker import - estiba/gpu-probe:local >/dev/null
    echo estiba/gpu-probe:local
}

gpu_container_works() { docker run --rm --gpus all "$1" nvidia-smi -L; }

ensure_gpu() {
    have nvidia-smi && nvidia-smi -L >/dev/null 2>&1 || return 0
    local image gpus
    image="$(probe_image)"
    if ! gpus="$(gpu_container_works "$image" 2>/dev/null)"; then
        install_nvidia_toolkit
        as_root nvidia-ctk runtime configure --runtime=docker >/dev/null 2>&1 || die "'nvidia-ctk runtime configure' failed"
        say "restarting docker to load the NVIDIA runtime"
        restart_daemon
        gpus="$(gpu_container_works "$image")" ||
            die "a container still does not see the GPU; 'docker run --rm --gpus all $image nvidia-smi' shows why"
    fi
    say "a container sees: $(head -n 1 <<<"$gpus")"
}

# ------------------------------------------------------------------------------------------- other tools

# Debian packages ensurepip separately: without it `python3 -m venv` exists but fails.
ensure_python() {
    have python3 || { have apt-get || die "no python3; install Python >= 3.11 with venv"; }
    have python3 && python3 -c 'import ensurepip, venv' 2>/dev/null && return
    require_apt_and_root
    say "installing python3-venv"
    apt_get update
    apt_get install -y --no-install-recommends python3 python3-venv || die "apt could not install python3-venv"
}

ensure_tool() {
    have "$1" && return
    require_apt_and_root
    say "installing $1"
    apt_get update
    apt_get install -y --no-install-recommends "$1" || die "apt could not install $1 (its output is above)"
}

main() {
    [ $# -gt 0 ] || set -- engine python
    for what in "$@"; do
        case "$what" in
            engine) NEEDS=engine; ensure_engine; ensure_gpu ;;
            builder) NEEDS=builder; ensure_engine ;;
            python) ensure_python ;;
            debootstrap | rsync) ensure_tool "$what" ;;
            *) die "unknown argument '$what'; one of: engine builder python debootstrap rsync" ;;
        esac
    done
}

main "$@"
