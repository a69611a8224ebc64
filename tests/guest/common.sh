# shellcheck shell=bash
# What `install` and `run` share.

# Where the guest's kernel, its modules and its busybox are kept.
cache=${PLOOP_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ploop-guest}

# Modules of scenarios; what they need comes with them.
modules="nbd ublk_drv loop quota_v2 xfs"

# TOOL:PACKAGE of what runs on the host or goes into the guest.
tools="qemu-system-x86_64:qemu-system-x86 nbd-client:nbd-client setquota:quota cpio:cpio xz:xz-utils zstd:zstd
strip:binutils mke2fs:e2fsprogs setpriv:util-linux"

export PATH=$PATH:/usr/sbin:/sbin

# The packages of `tools` that are missing.
missing() {
    local pair
    for pair in $tools; do
        command -v "${pair%%:*}" >/dev/null || echo "${pair##*:}"
    done | sort -u
}
