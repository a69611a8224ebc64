//! SIGINT: ends the program at once while it only looks, and after the repair while it writes.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};

use crate::CANCELLED;

/// A repair is being made.
static WRITING: AtomicBool = AtomicBool::new(false);
/// The signal came.
static SEEN: AtomicBool = AtomicBool::new(false);
/// The exit code of what is done so far.
static SO_FAR: AtomicU8 = AtomicU8::new(0);

#[expect(
    unsafe_code,
    reason = "a handler may call nothing else that ends the process"
)]
extern "C" fn interrupted(_signal: libc::c_int) {
    SEEN.store(true, SeqCst);
    if !WRITING.load(SeqCst) {
        let code = SO_FAR.load(SeqCst) | CANCELLED;
        // SAFETY: `_exit` may be called in a signal handler.
        unsafe { libc::_exit(code.into()) }
    }
}

/// From here on SIGINT is handled.
pub(crate) fn handle() {
    let handler = interrupted as extern "C" fn(libc::c_int);
    // SAFETY: the handler uses atomics and `_exit` only. A handler that could not be set leaves what
    // the signal did before.
    #[expect(unsafe_code, reason = "the kernel is given a function")]
    unsafe {
        libc::signal(libc::SIGINT, handler as libc::sighandler_t);
    }
}

/// Runs `work` to its end, whatever comes, and adds its `code` to the exit code.
pub(crate) fn uninterrupted<T>(work: impl FnOnce() -> T, code: impl FnOnce(&T) -> u8) -> T {
    WRITING.store(true, SeqCst);
    let out = work();
    SO_FAR.fetch_or(code(&out), SeqCst);
    WRITING.store(false, SeqCst);
    out
}

/// The signal came.
pub(crate) fn seen() -> bool {
    SEEN.load(SeqCst)
}

/// Adds to the exit code; true when the signal came meanwhile.
pub(crate) fn add(code: u8) -> bool {
    SO_FAR.fetch_or(code, SeqCst);
    seen()
}

/// The exit code.
pub(crate) fn code() -> u8 {
    let cancelled = if seen() { CANCELLED } else { 0 };
    SO_FAR.load(SeqCst) | cancelled
}
