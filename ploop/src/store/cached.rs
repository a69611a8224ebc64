//! What the page cache has of a file.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::AsFd;

use rustix::io::ReadWriteFlags;

/// `cachestat` counts pages of this size, or larger ones: then nothing is taken for cached.
const PAGE: u64 = 4096;

/// A byte of each of these is read. A page that is still on its way from the disk is counted as
/// cached; the kernel reads ahead in longer pieces, so what is on its way is seen here.
const LOOK: u64 = 32 << 10;

/// True when reading the range needs not wait for a disk. Not a promise: memory may be needed
/// elsewhere in the next instant. `len` is not 0.
pub(super) fn is_cached(file: &File, offset: u64, len: usize) -> bool {
    let end = offset.saturating_add(len as u64);
    let pages = end.div_ceil(PAGE) - offset / PAGE;
    if count(file, offset, len as u64).is_none_or(|n| n < pages) {
        return false;
    }
    let starts = (offset..end).step_by(LOOK as usize);
    starts.chain([end - 1]).all(|at| {
        let mut byte = [0];
        let mut into = [IoSliceMut::new(&mut byte)];
        rustix::io::preadv2(file, &mut into, at, ReadWriteFlags::NOWAIT) == Ok(1)
    })
}

/// Pages of the range that the cache has; `None` where the kernel (before 6.5) or a sandbox does not
/// say.
#[cfg(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
))]
fn count(file: &File, offset: u64, len: u64) -> Option<u64> {
    use std::os::fd::AsRawFd;

    const CACHESTAT: libc::c_long = 451;
    let mut range = [offset, len];
    let mut found = [0u64; 5];
    #[expect(unsafe_code, reason = "neither rustix nor libc has this call")]
    // SAFETY: the call reads two 64-bit numbers, which `range` points to, and writes five, which
    // `found` has room for; the descriptor is open for as long as `file` is borrowed.
    let done = unsafe {
        let fd = file.as_fd().as_raw_fd();
        libc::syscall(CACHESTAT, fd, range.as_mut_ptr(), found.as_mut_ptr(), 0)
    };
    (done == 0).then_some(found[0])
}

#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
)))]
fn count(_: &File, _: u64, _: u64) -> Option<u64> {
    None
}
