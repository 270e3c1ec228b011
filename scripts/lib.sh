# Shared by every script here: strict mode, where things live, how to say things and how to clean up.
# Sourced, never run.

set -Eeuo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# What is downloaded and unpacked once: QEMU versions and their package lists.
cache=${PAGECOPY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pagecopy}
# Where cargo builds to.
target=${CARGO_TARGET_DIR:-$root/target}
# QEMU versions that the tests and the demo use.
# shellcheck disable=SC2034 # read by the scripts that source this file
qemu_versions=(7.2 10.0)

# say TEXT: a line for people.
say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }

# die TEXT: ends the script with a reason.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# have COMMAND: whether it can be called. /usr/sbin is where iproute2 and nftables live, and not on every PATH.
export PATH="$PATH:$HOME/.cargo/bin:/usr/sbin:/sbin"
have() { command -v "$1" >/dev/null 2>&1; }

# as_root COMMAND...: runs it as root, with sudo where we are not root already.
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif have sudo; then
        sudo -- "$@"
    else
        die "'$*' needs root: run this script as root, or install sudo"
    fi
}

# need_root_tests: network namespaces and attaching to another process need root.
need_root() {
    ((EUID == 0)) || die "$1 needs root (network namespaces, ptrace): run it with sudo -E"
}
