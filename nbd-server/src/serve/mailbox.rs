//! Where a connection is told what others finished for it, and by what it is woken.
//!
//! The eventfd is drained *before* the contents are taken: what comes in between wakes once more
//! than needed, never once less.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

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
        let wake = PollFd::new(self.wake.as_ref(), PollFlags::IN);
        let came = match socket {
            None => {
                let mut one = [wake];
                wait(&mut one)?;
                Came {
                    word: true,
                    input: false,
                }
            }
            Some(socket) => {
                let mut both = [wake, PollFd::from_borrowed_fd(socket, PollFlags::IN)];
                wait(&mut both)?;
                Came {
                    word: !both[0].revents().is_empty(),
                    input: !both[1].revents().is_empty(),
                }
            }
        };
        if came.word {
            let mut count = [0; 8];
            match rustix::io::read(self.wake.as_fd(), &mut count) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(came)
    }
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
