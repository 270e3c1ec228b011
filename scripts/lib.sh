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

# have COMMAND: whether it can be called. /usr/sbin is where iproute2 and nftables live, and not on every PATH; single
# tools that were fetched are in the cache.
export PATH="$PATH:$HOME/.cargo/bin:/usr/sbin:/sbin:$cache/bin"
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

# private_apt DIR SUITE...: an apt directory of its own in DIR, with the package lists of these suites. apt_options is set
# for apt-get and apt-cache to use it: neither the machine's package lists nor its installed packages change.
private_apt() {
    local dir=$1 suite keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    shift
    [[ $(dpkg --print-architecture 2>/dev/null) == amd64 ]] || die "what is missing here is fetched from Debian's amd64 packages"
    [[ -f $keyring ]] || die "$keyring is missing: install the package debian-archive-keyring"
    mkdir -p "$dir"/{lists,archives}/partial "$dir/parts"
    for suite in "$@"; do
        echo "deb [signed-by=$keyring] ${PAGECOPY_DEBIAN_MIRROR:-http://deb.debian.org/debian} $suite main"
    done >"$dir/sources.list"
    apt_options=(
        -o "Dir::Etc::SourceList=$dir/sources.list" -o "Dir::Etc::SourceParts=$dir/parts"
        -o "Dir::State::Lists=$dir/lists" -o "Dir::Cache=$dir" -o "Dir::Cache::Archives=$dir/archives"
        -o APT::Sandbox::User=root -o Debug::NoLocking=true -o APT::Get::List-Cleanup=0 -qq
    )
    apt-get "${apt_options[@]}" update >&2
}

# run_and_clean_up COMMAND...: runs a program that starts QEMUs, daemons and namespaces. However it ends, by Ctrl-C too,
# its processes end with it, and what it named after its pid is removed (tests/src/real/scratch.rs has the names).
run_and_clean_up() {
    local status=0
    set -m # a process group of its own, which can be ended as a whole
    "$@" </dev/null &
    local group=$!
    set +m
    # shellcheck disable=SC2064 # the group is known now
    trap "clean_up $group; exit 130" INT TERM
    wait "$group" || status=$?
    trap - INT TERM
    clean_up "$group"
    return "$status"
}

clean_up() {
    local group=$1 name
    # The group is the program and all that it started; none of it outlives this.
    kill -TERM -- "-$group" 2>/dev/null || true
    wait "$group" 2>/dev/null || true
    kill -KILL -- "-$group" 2>/dev/null || true
    for name in $(ip netns list 2>/dev/null | cut -d' ' -f1 | grep "^pagecopy-$group-" || true); do
        ip netns delete "$name" || true
    done
    rm -rf "/tmp/pagecopy-$group-"* "/dev/shm/pagecopy-$group-"*
}
