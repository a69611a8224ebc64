//! A socket that waits with an end to it. It lies under TLS, so that TLS never sees a call that
//! failed halfway.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown};

use super::Stop;

/// How often a call that blocks asks whether to stop.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// See the module text.
pub(super) struct Line {
    socket: OwnedFd,
    pub(super) stop: Stop,
    /// How long a call may get nothing done.
    pub(super) silence: Option<Duration>,
    /// When every call ends.
    pub(super) until: Option<Instant>,
}

impl Line {
    /// A stream socket, whether it blocks or not.
    pub(super) fn new(socket: OwnedFd, stop: Stop) -> Line {
        Line {
            socket,
            stop,
            silence: None,
            until: None,
        }
    }

    /// Ends our direction, for the other side to see.
    pub(super) fn end(&self) {
        // One that is not connected any more needs none.
        shutdown(&self.socket, Shutdown::Write).ok();
    }

    fn patiently<T>(
        &self,
        ready: PollFlags,
        mut call: impl FnMut(&OwnedFd) -> rustix::io::Result<T>,
    ) -> io::Result<T> {
        let mut silent = None;
        loop {
            match call(&self.socket) {
                Err(Errno::AGAIN) => {}
                Err(Errno::INTR) => continue,
                other => return Ok(other?),
            }
            // A time too far to name never comes.
            let silence = self.silence.and_then(|silence| {
                let since = *silent.get_or_insert_with(Instant::now);
                Instant::checked_add(&since, silence)
            });
            let until = self.until.into_iter().chain(silence).min();
            wait(&self.socket, ready, &self.stop, until)?;
        }
    }
}

/// Waits for at most [`TICK`]. Errors: "stopped", and `TimedOut` after `until`.
pub(super) fn wait(
    socket: impl AsFd,
    ready: PollFlags,
    stop: &Stop,
    until: Option<Instant>,
) -> io::Result<()> {
    let time = turn(stop, until)?;
    let time = Timespec {
        tv_sec: 0,
        tv_nsec: time.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(&socket, ready)], Some(&time)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn stopped() -> io::Error {
    io::Error::other("stopped")
}

/// How long may be waited now, at most [`TICK`]. Errors: as [`wait`].
pub(super) fn turn(stop: &Stop, until: Option<Instant>) -> io::Result<Duration> {
    if stop() {
        return Err(stopped());
    }
    let Some(until) = until else {
        return Ok(TICK);
    };
    match until.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::Error::new(
            ErrorKind::TimedOut,
            "the other side did nothing for too long",
        )),
        rest => Ok(rest.min(TICK)),
    }
}

impl Read for Line {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        // Also where there is always something to read.
        if (self.stop)() {
            return Err(stopped());
        }
        self.patiently(PollFlags::IN, |socket| {
            recv(socket, &mut *buf, RecvFlags::DONTWAIT).map(|(n, _)| n)
        })
    }
}

impl Write for Line {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if slices.iter().all(|slice| slice.is_empty()) {
            return Ok(0);
        }
        // More than this the system does not take at once.
        let slices = &slices[..slices.len().min(1024)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        self.patiently(PollFlags::OUT, |socket| {
            sendmsg(socket, slices, &mut SendAncillaryBuffer::default(), flags)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
