//! Open files: a disk takes some, and a service that has none left says so and goes on.

use super::*;

/// Says what to do where the operating system gives no descriptor.
pub(super) fn explain_limit(e: Error) -> Error {
    const EMFILE: i32 = 24;
    match e.raw_os_error() {
        Some(EMFILE) => e
            .while_doing("the service may not have more open files")
            .fix(RAISE),
        _ => e,
    }
}

/// What to do about a full table of open files.
const RAISE: &str = "Raise the limit of open files of the service (LimitNOFILE=)";

/// Descriptors that opening a disk leaves for new connections and for the control API.
const RESERVE: u64 = 64;

/// Refuses to open another disk while few descriptors are left. The lowest free number says how
/// many are taken.
pub(super) fn keep_reserve() -> Result<()> {
    use rustix::process::{Resource, getrlimit};
    let Some(limit) = getrlimit(Resource::Nofile).current else {
        return Ok(());
    };
    let full = || {
        let what = "the service may not have more open files";
        Error::new(Kind::Io, format!("{what} ({limit} are allowed)")).fix(RAISE)
    };
    let free = rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), 0).map_err(|_| full())?;
    let taken = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&free)).unwrap_or(limit);
    match taken + RESERVE.min(limit / 6) >= limit {
        true => Err(full()),
        false => Ok(()),
    }
}
