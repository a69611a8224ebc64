//! From standard input and output to a service: the far end of `exec:ssh HOST …`.
//!
//! ```text
//!  input ─▶ up ─▶ socket      input ends: our direction of the socket is ended
//! output ◀─ down ◀─ socket    the socket ends: output is ended; it is gone: that is the end
//! ```
//!
//! One thread waits for all three, so that nothing is left behind when either side ends. Input and
//! output belong to others, too: their flags stay as they are, and no call is made that blocks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use ploop::error::{Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::connect;

/// Bytes that are under way in one direction.
const ROOM: usize = 256 << 10;
/// What a pipe that can be written to takes without blocking.
const PIPE: usize = 4 << 10;

/// Copies standard input and output to and from the unix socket of a service, until either ends.
pub fn bridge(socket: &Path) -> Result<()> {
    let failed = |what: &str, e| Error::io(what, socket, e);
    let service = connect::unix(socket, &(Arc::new(|| false) as _), None)
        .map_err(|e| failed("connect to the service", e))?;
    // Taken now: it must not fail at the end.
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .map_err(|e| Error::io("open", "/dev/null", e))?;
    let (input, output) = (io::stdin(), io::stdout());
    let bridge = Bridge::new(service, input.as_fd(), output.as_fd());
    let end = || rustix::stdio::dup2_stdout(&null).map_err(io::Error::from);
    bridge
        .run(end)
        .map_err(|e| failed("copy to and from the service", e))
}

/// Bytes on their way in one direction.
#[derive(Debug, Default)]
struct Pipe {
    room: Vec<u8>,
    /// The bytes in `room` that are not sent yet.
    left: Range<usize>,
    /// Nothing more comes.
    ended: bool,
    /// And whoever takes it knows.
    told: bool,
}

impl Pipe {
    fn waiting(&self) -> &[u8] {
        &self.room[self.left.clone()]
    }

    fn wants_more(&self) -> bool {
        !self.ended && self.left.is_empty()
    }

    fn take(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> rustix::io::Result<usize>,
    ) -> io::Result<()> {
        self.room.resize(ROOM, 0);
        match read(&mut self.room) {
            Ok(0) => self.ended = true,
            Ok(n) => self.left = 0..n,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    fn give(&mut self, write: impl FnOnce(&[u8]) -> rustix::io::Result<usize>) -> io::Result<()> {
        match write(self.waiting()) {
            Ok(n) => self.left.start += n,
            Err(Errno::AGAIN | Errno::INTR) => {}
            // Nobody takes it any more.
            Err(Errno::PIPE | Errno::CONNRESET) => self.drop_all(),
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    fn drop_all(&mut self) {
        self.left = 0..0;
        self.ended = true;
    }

    /// True once: when all was sent, and that it was is still to be told.
    fn tells(&mut self) -> bool {
        let over = self.ended && self.left.is_empty();
        over && !std::mem::replace(&mut self.told, true)
    }
}

pub(super) struct Bridge<'a> {
    service: OwnedFd,
    input: BorrowedFd<'a>,
    output: BorrowedFd<'a>,
    up: Pipe,
    down: Pipe,
    /// Nobody reads the output any more.
    deaf: bool,
    /// The service has closed its socket.
    gone: bool,
}

impl<'a> Bridge<'a> {
    pub(super) fn new(service: OwnedFd, input: BorrowedFd<'a>, output: BorrowedFd<'a>) -> Self {
        Bridge {
            service,
            input,
            output,
            up: Pipe::default(),
            down: Pipe::default(),
            deaf: false,
            gone: false,
        }
    }

    /// Copies until either ends. `end` closes the output.
    pub(super) fn run(mut self, mut end: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        loop {
            if self.up.tells() {
                // It may be gone, and need not be told.
                shutdown(&self.service, Shutdown::Write).ok();
            }
            if self.down.tells() {
                // Not every output is a socket; of one that is, input may be the other direction.
                shutdown(self.output, Shutdown::Write).ok();
                end()?;
                self.deaf = true;
                self.refuse();
            }
            if self.down.told && (self.up.told || self.gone) {
                return Ok(());
            }
            self.turn()?;
        }
    }

    /// Lets the service not write for nobody. What it wrote before is thrown away: closed with that
    /// unread, its socket would be reset, and what it reads from us not end as it should.
    fn refuse(&mut self) {
        // One that is gone needs it not.
        shutdown(&self.service, Shutdown::Read).ok();
        let mut waste = [0; PIPE];
        while matches!(
            recv(&self.service, &mut waste, RecvFlags::DONTWAIT),
            Ok((_, 1..))
        ) {}
    }

    /// Waits, and moves what can be moved.
    fn turn(&mut self) -> io::Result<()> {
        let wish = |wish: bool, flag| if wish { flag } else { PollFlags::empty() };
        let up = self.up.wants_more();
        let (to, from) = (!self.up.left.is_empty(), self.down.wants_more());
        let down = !self.down.left.is_empty();
        // A descriptor that has ended would end every wait at once.
        let mut fds = Vec::with_capacity(3);
        fds.push(PollFd::new(
            &self.service,
            wish(to, PollFlags::OUT) | wish(from, PollFlags::IN),
        ));
        let service = to || from || (self.down.ended && !self.gone);
        if !service {
            fds.clear();
        }
        let input = up.then(|| {
            fds.push(PollFd::from_borrowed_fd(self.input, PollFlags::IN));
            fds.len() - 1
        });
        let output = (!self.deaf).then(|| {
            fds.push(PollFd::from_borrowed_fd(
                self.output,
                wish(down, PollFlags::OUT),
            ));
            fds.len() - 1
        });
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        let ready = |n: Option<usize>| n.map_or(PollFlags::empty(), |n| fds[n].revents());
        let (service, input, output) = (ready(service.then_some(0)), ready(input), ready(output));
        drop(fds);
        let end = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;

        if input.intersects(PollFlags::IN | end) {
            let input = self.input;
            self.up.take(|room| rustix::io::read(input, room))?;
        }
        if to && service.intersects(PollFlags::OUT | end) {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let socket = &self.service;
            self.up.give(|bytes| send(socket, bytes, flags))?;
        }
        if from && service.intersects(PollFlags::IN | end) {
            let socket = &self.service;
            let read = |room: &mut [u8]| recv(socket, room, RecvFlags::DONTWAIT).map(|(n, _)| n);
            self.down.take(read)?;
        }
        // What it sent before is read first.
        if self.down.ended && service.intersects(end) {
            self.gone = true;
            self.up.drop_all();
        }
        if output.intersects(end) {
            self.down.drop_all();
        } else if down && output.contains(PollFlags::OUT) {
            let output = self.output;
            self.down.give(|bytes| write(output, bytes))?;
        }
        Ok(())
    }
}

/// Writes to a descriptor that poll found ready, without blocking.
fn write(output: BorrowedFd<'_>, bytes: &[u8]) -> rustix::io::Result<usize> {
    match send(output, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Err(Errno::NOTSOCK) => rustix::io::write(output, &bytes[..bytes.len().min(PIPE)]),
        sent => sent,
    }
}
