//! Where a connection is told what others finished for it, and by what it is woken.
//!
//! The eventfd is drained *before* the contents are taken: what comes in between wakes once more
//! than needed, never once less.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::export::limits::Told;

/// See the module text.
#[derive(Debug)]
pub(super) struct Mailbox<T> {
    wake: Arc<OwnedFd>,
    contents: Mutex<Vec<T>>,
}

/// What came while a connection waited.
#[derive(Clone, Copy, Debug)]
pub(super) struct Came {
    /// Something was finished.
    pub(super) word: bool,
    /// The socket can be read, or has ended.
    pub(super) input: bool,
    /// The client has closed the socket, or it was shut down here.
    pub(super) gone: bool,
}

impl Came {
    /// Something was finished.
    pub(super) const WORD: Came = Came {
        word: true,
        input: false,
        gone: false,
    };
}

impl Told for Mailbox<u64> {
    fn granted(&self, ticket: u64) {
        self.post(ticket);
    }
}

impl<T> Mailbox<T> {
    pub(super) fn new() -> io::Result<Mailbox<T>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox {
            wake: Arc::new(wake),
            contents: Mutex::default(),
        })
    }

    /// The eventfd, for a ring to add to.
    pub(super) fn wake(&self) -> &Arc<OwnedFd> {
        &self.wake
    }

    /// Puts something in.
    pub(super) fn post(&self, thing: T) {
        let mut contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        contents.push(thing);
        let first = contents.len() == 1;
        drop(contents);
        if first {
            #[expect(
                clippy::host_endian_bytes,
                reason = "an eventfd takes a number of this machine"
            )]
            let one = 1u64.to_ne_bytes();
            // It fails only when the count is at its end, and then there is a wake-up anyway.
            rustix::io::write(&self.wake, &one).ok();
        }
    }

    /// Takes everything out.
    pub(super) fn take(&self) -> Vec<T> {
        std::mem::take(&mut self.contents.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until something was posted or a ring completed something, or `socket` can be read.
    pub(super) fn wait(&self, socket: Option<BorrowedFd<'_>>) -> io::Result<Came> {
        wait_for([Some(&self.wake), None], socket.map(|s| (s, Look::Input)))
    }
}

/// What is waited for at a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Something to receive, or its end.
    Input,
    /// Its end only.
    End,
}

/// Waits for one of several mailboxes, or for a socket. Without any it does not wait.
pub(super) fn wait_for(
    wakes: [Option<&Arc<OwnedFd>>; 2],
    socket: Option<(BorrowedFd<'_>, Look)>,
) -> io::Result<Came> {
    let mut on = Vec::with_capacity(3);
    if let Some((socket, look)) = socket {
        let flags = match look {
            Look::Input => PollFlags::IN | PollFlags::RDHUP,
            Look::End => PollFlags::RDHUP,
        };
        on.push(PollFd::from_borrowed_fd(socket, flags));
    }
    on.extend(
        wakes
            .iter()
            .flatten()
            .map(|w| PollFd::new(*w, PollFlags::IN)),
    );
    if on.is_empty() {
        return Ok(Came::WORD);
    }
    wait(&mut on)?;
    let mut came = Came {
        word: false,
        input: false,
        gone: false,
    };
    if socket.is_some() {
        let events = on.remove(0).revents();
        came.input = !events.is_empty();
        came.gone = events.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR);
    }
    let woken = wakes.iter().flatten().zip(&on);
    for (wake, _) in woken.filter(|(_, p)| !p.revents().is_empty()) {
        came.word = true;
        let mut count = [0; 8];
        match rustix::io::read(wake.as_fd(), &mut count) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(came)
}

fn wait(on: &mut [PollFd<'_>]) -> io::Result<()> {
    loop {
        match poll(on, None) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(_) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_is_lost() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let threads: Vec<_> = (0..4u32)
            .map(|t| {
                let mailbox = mailbox.clone();
                std::thread::spawn(move || (0..1000).for_each(|i| mailbox.post(t * 1000 + i)))
            })
            .collect();
        let mut got = Vec::new();
        while got.len() < 4000 {
            mailbox.wait(None).unwrap();
            got.extend(mailbox.take());
        }
        threads.into_iter().for_each(|t| t.join().unwrap());
        got.sort_unstable();
        assert_eq!(got, (0..4000).collect::<Vec<_>>());
    }

    #[test]
    fn a_socket_wakes_too() {
        let mailbox = Mailbox::<()>::new().unwrap();
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut theirs, b"x").unwrap();
        let came = mailbox.wait(Some(ours.as_fd())).unwrap();
        assert!(came.input && !came.word);
        mailbox.post(());
        let came = mailbox.wait(Some(ours.as_fd())).unwrap();
        assert!(came.input && came.word);
        drop(theirs);
        assert!(mailbox.wait(Some(ours.as_fd())).unwrap().input);
    }
}
