# shellcheck shell=bash
# What scenarios say and do in the guest.

set -Eeuo pipefail
# A failure is seen from inside $(...), too.
exec 3>&1
trap 'fail "$BASH_COMMAND, at $(caller)"' ERR

pass() { echo "PASS $*"; }
info() { echo "INFO $*"; }

# Ends the scenario.
fail() {
    trap - ERR
    echo "FAIL $*" >&3
    exit 1
}

# check WHAT COMMAND...: the command succeeds.
check() {
    local what=$1 said
    shift
    said=$("$@" 2>&1) || fail "$what: $*: $said"
    pass "$what"
}

# refuses WHAT WORDS COMMAND...: the command fails, and says so with these words.
refuses() {
    local what=$1 words=$2 said
    shift 2
    if said=$("$@" 2>&1); then
        fail "$what: it was done: $*"
    fi
    [[ $said == *"$words"* ]] || fail "$what: $*: $said"
    pass "$what"
}

# same WHAT IS SHOULD
same() {
    [ "$2" = "$3" ] || fail "$1: is $2, should be $3"
    pass "$1 ($2)"
}

# Waits five minutes for a command to succeed.
await() {
    local _
    for _ in $(seq 3000); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    fail "waited in vain: $*"
}

# Loads a module, and what it needs first.
load() {
    local module
    for module in $(cat "/modules/$1.order"); do
        [ -d "/sys/module/$module" ] || insmod "/modules/$module.ko"
    done
}

# Starts ploopd for the store; `$server` is its process.
starts=0
serve() {
    starts=$((starts + 1))
    ploopd --root "$PLOOP_ROOT" >"/log/ploopd.$starts" 2>&1 &
    server=$!
    await grep -q 'control API' "/log/ploopd.$starts"
}

# attach NUMBER EXPORT [OPTION...]: as /dev/nbdNUMBER, with the kernel's client.
attach() {
    local number=$1 export=$2
    shift 2
    nbd-client -unix "$PLOOP_ROOT/nbd.sock" "/dev/nbd$number" -name "$export" "$@" >/log/nbd-client 2>&1
    settled "$number"
}

# Waits until the device has its size, and its partitions where it has them.
settled() {
    local number=$1
    await nbd-client -c "/dev/nbd$number"
    await test "$(blockdev --getsize64 "/dev/nbd$number")" -gt 0
    blockdev --rereadpt "/dev/nbd$number"
}

# Gives the device back, and waits until it is free.
detach() {
    nbd-client -d "/dev/nbd$1" >/log/nbd-client 2>&1
    free() { ! nbd-client -c "/dev/nbd$1"; }
    await free "$1"
}

# as USER COMMAND...: with the user's own group.
as() {
    local user=$1
    shift
    setpriv --reuid "$user" --regid "$user" --clear-groups "$@"
}

# KiB that the files of the host take.
host_kib() { du -sk "$1" | cut -f1; }

# What the kernel complained about since the last call; nothing is a good answer. A log that cannot be read is a failure.
complaints() {
    dmesg -c >/log/dmesg || fail "the kernel's log cannot be read"
    sed -nE '/I\/O error|EXT4-fs (error|warning)|Aborting journal|Remounting filesystem/p' /log/dmesg
}
