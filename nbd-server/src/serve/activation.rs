//! Sockets that systemd opened for us (`LISTEN_PID`, `LISTEN_FDS`).
//!
//! The variables count only when they name this process: they are inherited by children that they
//! were not meant for. The sockets are marked so that children of ours do not inherit them.

use std::net::TcpListener;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use ploop::error::{Error, Kind, Result};
use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketType, sockopt};

use super::listen::{Listener, check_exposure};

/// The first descriptor that systemd passes.
const FIRST: RawFd = 3;

/// More than anyone configures; a number beyond is a mistake.
const MAX: u32 = 256;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// The sockets that were passed to this process, if any. Works once: a second call fails.
pub(super) fn take(insecure: bool) -> Result<Vec<Listener>> {
    let variable = |name| std::env::var(name).ok();
    let me = std::process::id();
    let count = count(
        variable("LISTEN_PID").as_deref(),
        variable("LISTEN_FDS").as_deref(),
        me,
    )?;
    if count == 0 {
        return Ok(Vec::new());
    }
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(Error::invalid(
            "the sockets of LISTEN_FDS were taken before",
        ));
    }
    (0..count)
        .map(|i| adopt(FIRST + i as RawFd, insecure))
        .collect()
}

/// How many sockets the variables promise to process `me`.
fn count(pid: Option<&str>, fds: Option<&str>, me: u32) -> Result<u32> {
    let (Some(pid), Some(fds)) = (pid, fds) else {
        return Ok(0);
    };
    if pid.parse() != Ok(me) {
        return Ok(0);
    }
    match fds.parse() {
        Ok(count) if count <= MAX => Ok(count),
        _ => Err(Error::invalid(format!(
            "LISTEN_FDS is '{fds}', not a number up to {MAX}"
        ))),
    }
}

fn adopt(fd: RawFd, insecure: bool) -> Result<Listener> {
    // SAFETY: the descriptor is only looked at; if it is not open, the call says so.
    #[expect(unsafe_code, reason = "systemd passes descriptors by number")]
    let probe = unsafe { BorrowedFd::borrow_raw(fd) };
    let failed = |what: &str, e: rustix::io::Errno| {
        Error::new(
            Kind::Invalid,
            format!("descriptor {fd} of LISTEN_FDS: {what}"),
        )
        .caused_by(e)
    };
    let flags = rustix::io::fcntl_getfd(probe).map_err(|e| failed("not open", e))?;
    rustix::io::fcntl_setfd(probe, flags | FdFlags::CLOEXEC).map_err(|e| failed("mark", e))?;
    // SAFETY: the descriptor is open, LISTEN_PID says that it is this process's to take, and TAKEN
    // that nobody took it before.
    #[expect(unsafe_code, reason = "systemd passes descriptors by number")]
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let kind = sockopt::socket_type(&socket).map_err(|e| failed("not a socket", e))?;
    let listens = sockopt::socket_acceptconn(&socket).map_err(|e| failed("ask its state", e))?;
    let family = sockopt::socket_domain(&socket).map_err(|e| failed("ask its family", e))?;
    if kind != SocketType::STREAM || !listens {
        let text = format!("descriptor {fd} of LISTEN_FDS is not a listening stream socket");
        return Err(Error::invalid(text).fix("Use ListenStream= and Accept=no in the socket unit."));
    }
    match family {
        AddressFamily::UNIX => Ok(Listener::Unix(None, UnixListener::from(socket))),
        AddressFamily::INET | AddressFamily::INET6 => {
            let listener = TcpListener::from(socket);
            let address = listener
                .local_addr()
                .map_err(|e| Error::io("name", "socket", e))?;
            check_exposure(address, insecure)?;
            Ok(Listener::Tcp(listener))
        }
        _ => Err(Error::unsupported(format!(
            "descriptor {fd} of LISTEN_FDS is neither a unix nor a TCP socket"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_count_only_for_this_process() {
        assert_eq!(count(None, None, 7).unwrap(), 0);
        assert_eq!(count(Some("7"), None, 7).unwrap(), 0);
        assert_eq!(count(Some("8"), Some("2"), 7).unwrap(), 0);
        assert_eq!(count(Some("x"), Some("2"), 7).unwrap(), 0);
        assert_eq!(count(Some("7"), Some("2"), 7).unwrap(), 2);
        for bad in ["-1", "", "257", "99999999999", "two"] {
            assert!(count(Some("7"), Some(bad), 7).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        assert_eq!(adopt(987_654, false).unwrap_err().kind(), Kind::Invalid);
    }
}
