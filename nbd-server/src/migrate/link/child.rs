//! A command whose standard input and output are a link.
//!
//! It leads a process group of its own, which is killed as long as the command is not reaped: until
//! then the group's number cannot become another's.

use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{self, ChildStderr, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group, waitid,
};

use super::Stop;
use super::line::turn;

/// How long a command may take to end by itself, when the link is dropped.
const GRACE: Duration = Duration::from_secs(1);
/// How long one may take that has closed the link: how it ended tells an end from a failure.
const LAST: Duration = Duration::from_secs(10);
/// How often it is asked whether it has.
const LOOK: Duration = Duration::from_millis(5);
/// How much is kept of what it says on its standard error, in bytes.
const TAIL: usize = 1 << 10;
/// What a pipe holds, in bytes: so much may be unread when a command has ended.
const PIPE: usize = 64 << 10;

/// See the module text. Dropping it waits a second for the command to end, kills what is left of it,
/// and reaps it.
#[derive(Debug)]
pub(super) struct Child {
    child: process::Child,
    tail: Option<Tail>,
    /// What is to be said about its end, once that is known.
    said: Option<Result<(), String>>,
}

impl Child {
    /// Starts `command`; with our end of its standard input and output.
    pub(super) fn start(command: &str) -> io::Result<(OwnedFd, Child)> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut child = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(OwnedFd::from(theirs.try_clone()?))
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let stderr = child.stderr.take();
        let mut child = Child {
            child,
            tail: None,
            said: None,
        };
        child.tail = stderr.map(Tail::of).transpose()?;
        Ok((ours.into(), child))
    }

    /// What is to be said when nothing more comes from it: how it failed, and its last words. `Ok`:
    /// nothing, or it does not end.
    pub(super) fn ended(&mut self, stop: &Stop) -> io::Result<()> {
        if self.said.is_none() {
            let Some(status) = self.wait(stop, LAST)? else {
                return Ok(());
            };
            let how = match (status.exit_status(), status.terminating_signal()) {
                (Some(0), _) => None,
                (Some(status), _) => Some(format!("the command ended with exit status {status}")),
                (_, signal) => Some(format!(
                    "the command was killed by signal {}",
                    signal.unwrap_or(0)
                )),
            };
            let words = self.tail.take().map_or(String::new(), Tail::words);
            self.said = Some(match how {
                None => Ok(()),
                Some(how) if words.is_empty() => Err(how),
                Some(how) => Err(format!("{how}: {words}")),
            });
        }
        match &self.said {
            Some(Err(said)) => Err(io::Error::new(ErrorKind::BrokenPipe, said.clone())),
            _ => Ok(()),
        }
    }

    /// Waits for its end, without reaping it. `None`: it does not come.
    fn wait(&self, stop: &Stop, time: Duration) -> io::Result<Option<WaitIdStatus>> {
        let until = Instant::now() + time;
        loop {
            let ended = self.look()?;
            if ended.is_some() || Instant::now() >= until {
                return Ok(ended);
            }
            turn(stop, None)?;
            thread::sleep(LOOK);
        }
    }

    fn look(&self) -> io::Result<Option<WaitIdStatus>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(waitid(WaitId::Pid(Pid::from_child(&self.child)), options)?)
    }

    #[cfg(test)]
    pub(super) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let never: Stop = std::sync::Arc::new(|| false);
        self.wait(&never, GRACE).ok();
        kill_process_group(Pid::from_child(&self.child), Signal::KILL).ok();
        self.child.wait().ok();
    }
}

/// The last words on a pipe, read by a thread so that whoever says more is not held up.
#[derive(Debug)]
struct Tail {
    /// Closed when it is enough: another process may keep the pipe open for ever.
    enough: Option<UnixStream>,
    thread: Option<JoinHandle<Vec<u8>>>,
}

impl Tail {
    fn of(pipe: ChildStderr) -> io::Result<Tail> {
        let (ours, theirs) = UnixStream::pair()?;
        let thread = thread::Builder::new()
            .name("link-stderr".into())
            .spawn(move || listen(pipe, &theirs))?;
        Ok(Tail {
            enough: Some(ours),
            thread: Some(thread),
        })
    }

    fn end(&mut self) -> Vec<u8> {
        self.enough = None;
        let ended = self.thread.take().map(JoinHandle::join);
        ended.and_then(Result::ok).unwrap_or_default()
    }

    /// One line of them.
    fn words(mut self) -> String {
        let bytes = self.end();
        let text = String::from_utf8_lossy(&bytes);
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let text = lines.collect::<Vec<_>>().join("; ");
        text.replace(|c: char| c.is_control(), " ")
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.end();
    }
}

/// Reads `pipe` until its end, or until `enough` is closed and all that was said then is read.
fn listen(mut pipe: ChildStderr, enough: &UnixStream) -> Vec<u8> {
    let mut tail = Vec::new();
    let mut bytes = [0; 4 << 10];
    let mut left = None;
    while left != Some(0) {
        let ready = {
            let mut fds = [
                PollFd::new(&pipe, PollFlags::IN),
                PollFd::new(enough, PollFlags::IN),
            ];
            let at_once = left.map(|_| Timespec::default());
            match poll(&mut fds, at_once.as_ref()) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => break,
            }
            if !fds[1].revents().is_empty() && left.is_none() {
                left = Some(PIPE);
            }
            !fds[0].revents().is_empty()
        };
        match ready {
            true => match pipe.read(&mut bytes) {
                Ok(0) => break,
                Ok(n) => {
                    tail.extend_from_slice(&bytes[..n]);
                    tail.drain(..tail.len().saturating_sub(TAIL));
                    left = left.map(|left: usize| left.saturating_sub(n));
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            },
            false if left.is_some() => break,
            false => {}
        }
    }
    tail
}
