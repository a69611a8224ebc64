//! One negotiated connection: a blocking socket, an engine and a thread that owns both.
//!
//! While nothing waits for a disk, the thread sleeps in `recv` ([`super::spin`]) and nothing else is
//! there to be woken by. Otherwise it sleeps in `poll`, for the socket and for what is finished. However a connection
//! ends, what it deferred is over, and its buffers and leases are gone, before its thread ends.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};

use super::engine::{Engine, Sink, Turn};
use super::hall::Cut;
use super::input::Input;
use super::mailbox::Look;
use super::plane::Plane;
use super::spin::{Source, Spin};
use super::traffic::Totals;
use crate::export::space::OnFull;
use crate::export::{Counted, Counters};
use crate::session::Negotiated;

/// Room that a unix socket has for bytes in flight, in each direction; the default of 208 KiB makes
/// both sides wait for each other.
const SOCKET_BUFFER: usize = 4 << 20;

/// Buffers are given back after this long without a request.
const IDLE: Duration = Duration::from_secs(1);

/// Most that is read and thrown away when a connection is closed from here.
const LINGER_MAX: usize = 64 << 20;

/// A connected socket.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// Makes the socket blocking and fit for bulk data. A refused buffer size is no error: it is
    /// slower, and nothing else.
    pub(super) fn prepare(&self) -> io::Result<()> {
        match self {
            Socket::Unix(s) => {
                s.set_nonblocking(false)?;
                sockopt::set_socket_send_buffer_size_force(s, SOCKET_BUFFER)
                    .or_else(|_| sockopt::set_socket_send_buffer_size(s, SOCKET_BUFFER))
                    .ok();
                sockopt::set_socket_recv_buffer_size_force(s, SOCKET_BUFFER)
                    .or_else(|_| sockopt::set_socket_recv_buffer_size(s, SOCKET_BUFFER))
                    .ok();
            }
            Socket::Tcp(s) => {
                s.set_nonblocking(false)?;
                s.set_nodelay(true)?;
                // A peer that vanished without a word gives its place back some day.
                sockopt::set_socket_keepalive(s, true)?;
            }
        }
        Ok(())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Unix(s) => s.as_fd(),
            Socket::Tcp(s) => s.as_fd(),
        }
    }

    pub(super) fn shutdown(&self, how: Shutdown) {
        // The peer may be gone already; then this has nothing left to do.
        match self {
            Socket::Unix(s) => s.shutdown(how).ok(),
            Socket::Tcp(s) => s.shutdown(how).ok(),
        };
    }

    /// Whether the peer has closed its end: nothing more will be asked here. Does not block.
    pub(super) fn hung_up(&self) -> bool {
        let mut asked = [PollFd::from_borrowed_fd(
            self.descriptor(),
            PollFlags::RDHUP,
        )];
        let now = Timespec::default();
        // A socket that cannot be asked counts as in use.
        matches!(poll(&mut asked, Some(&now)), Ok(1..))
    }

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(s) => s.set_read_timeout(patience),
            Socket::Tcp(s) => s.set_read_timeout(patience),
        }
    }
}

impl Source for Socket {
    fn receive_now(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::net::recv(self.descriptor(), &mut *buf, RecvFlags::DONTWAIT) {
                Ok((n, _)) => return Ok(Some(n)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let got = match self {
                Socket::Unix(s) => (&mut &*s).read(buf),
                Socket::Tcp(s) => (&mut &*s).read(buf),
            };
            match got {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

/// A socket until the word that it is to end.
struct Answers<'a> {
    socket: &'a Socket,
    cut: &'a Cut,
}

impl Sink for Answers<'_> {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.socket {
            Socket::Unix(s) => (&mut &*s).write_all(bytes),
            Socket::Tcp(s) => (&mut &*s).write_all(bytes),
        }
    }

    fn send_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            let to = self.socket.descriptor();
            match rustix::net::send(
                to,
                &bytes[sent..],
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(sent)
    }

    fn ended(&self) -> bool {
        self.cut.is_set()
    }
}

/// Why a connection ended.
enum End {
    /// The client said good-bye.
    Disconnected,
    /// The client closed the socket, with this many bytes of a request outstanding.
    Closed(usize),
    /// The client broke the protocol.
    Violated(&'static str),
    /// The server is going down.
    Stopped,
    /// It was cut from here.
    Cut,
    /// The socket failed.
    Failed(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Disconnected => f.write_str("the client disconnected"),
            End::Closed(0) => f.write_str("the client closed the socket"),
            End::Closed(n) => write!(f, "the client closed the socket {n} bytes into a request"),
            End::Violated(how) => write!(f, "the client broke the protocol: {how}"),
            End::Stopped => f.write_str("the server is stopping"),
            End::Cut => f.write_str("it was ended on request"),
            End::Failed(e) => write!(f, "the socket failed: {e}"),
        }
    }
}

/// A connection in transmission, without what it transmits.
pub(super) struct Session<'a> {
    pub(super) socket: &'a Socket,
    pub(super) peer: &'a str,
    pub(super) counters: Arc<Counters>,
    pub(super) plane: &'a Arc<Plane>,
    /// The server is going down.
    pub(super) stopping: &'a AtomicBool,
    /// This connection is to end now.
    pub(super) cut: &'a Cut,
}

impl Session<'_> {
    /// Serves until the end, and logs that end.
    pub(super) fn run(&self, mut negotiated: Negotiated, rest: Vec<u8>) {
        let space = negotiated.export.space.as_ref();
        let waits = space.is_some_and(|s| s.on_full() == OnFull::Pause);
        let device = Counted::new(negotiated.export.device.clone(), self.counters.clone());
        let device = device.waiting_for_room(waits);
        negotiated.export.device = Arc::new(device);
        let start = Instant::now();
        let mut engine = Engine::of(self.plane, &negotiated);
        let end = self.serve(&mut engine, rest).and_then(|end| {
            self.settle_held(&mut engine, &end)?;
            let answers = &mut Answers {
                socket: self.socket,
                cut: self.cut,
            };
            match (engine.finish(answers), &end) {
                // A client that closed its socket may or may not take what it asked for.
                (Err(_), End::Closed(_)) | (Ok(()), _) => Ok(end),
                (Err(e), _) => Err(e),
            }
        });
        // Waits for what is still at work.
        drop(engine);
        let end = match end.unwrap_or_else(End::Failed) {
            _ if self.cut.is_set() => End::Cut,
            end => end,
        };
        if matches!(end, End::Stopped) {
            linger(self.socket);
        }
        let (export, peer) = (negotiated.export.name.as_str(), self.peer);
        let done = Totals::of(&self.counters);
        if matches!(end, End::Closed(1..) | End::Violated(_) | End::Failed(_)) {
            tracing::warn!(export, peer, why = %end, "connection broke");
        }
        tracing::info!(
            export,
            peer,
            why = %end,
            seconds = start.elapsed().as_secs_f64(),
            reads = done.reads,
            read_bytes = done.read_bytes,
            writes = done.writes,
            write_bytes = done.write_bytes,
            flushes = done.flushes,
            errors = done.errors,
            "connection closed"
        );
    }

    /// What becomes of requests that are held back, or are still to be, when a connection ends.
    fn settle_held(&self, engine: &mut Engine, end: &End) -> io::Result<()> {
        let (socket, cut) = (self.socket, self.cut);
        match end {
            End::Stopped => engine.release(),
            End::Disconnected => {
                while engine.outstanding() > 0 {
                    let came = engine.wait(Some((socket.descriptor(), Look::End)))?;
                    if came.gone {
                        match self.stopping.load(Ordering::Acquire) {
                            true => engine.release(),
                            false => engine.forget(),
                        }
                        break;
                    }
                    engine.reap(&mut Answers { socket, cut })?;
                }
            }
            _ => engine.forget(),
        }
        Ok(())
    }

    fn serve(&self, engine: &mut Engine, rest: Vec<u8>) -> io::Result<End> {
        let (socket, cut) = (self.socket, self.cut);
        let stopping = || self.stopping.load(Ordering::Acquire);
        let mut input = Input::holding(rest);
        let mut patient = true;
        let mut spin = Spin::default();
        loop {
            let (used, turn) = engine.run(input.filled(), &mut Answers { socket, cut })?;
            input.used(used);
            let need = match turn {
                Turn::NeedMore(need) => need,
                Turn::Full => {
                    while engine.is_full() {
                        // Nothing is received, so nothing else would say that nobody is there.
                        let end = (engine.held() > 0).then_some((socket.descriptor(), Look::End));
                        let came = engine.wait(end)?;
                        if came.gone && stopping() {
                            engine.release();
                        } else if came.gone {
                            return Ok(End::Closed(input.filled().len()));
                        }
                        engine.reap(&mut Answers { socket, cut })?;
                    }
                    continue;
                }
                Turn::Disconnected => return Ok(End::Disconnected),
                Turn::Violated(why) => return Ok(End::Violated(why)),
            };
            // Everything received in full has been executed; the rest was not begun.
            if stopping() {
                return Ok(End::Stopped);
            }
            let mut input_came = engine.outstanding() == 0;
            while !input_came {
                let came = engine.wait(Some((socket.descriptor(), Look::Input)))?;
                if came.word {
                    engine.reap(&mut Answers { socket, cut })?;
                }
                input_came = came.input || engine.outstanding() == 0;
            }
            if patient && (input.is_large() || engine.is_large()) {
                socket.set_patience(Some(IDLE))?;
                patient = false;
            }
            match spin.receive(socket, input.room(need)) {
                Ok(0) if stopping() => return Ok(End::Stopped),
                Ok(0) => return Ok(End::Closed(input.filled().len())),
                Ok(n) => input.received(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    input.shrink();
                    engine.shrink();
                    if !input.is_large() && input.filled().is_empty() {
                        socket.set_patience(None)?;
                        patient = true;
                    }
                }
                Err(e) => return Err(e),
            }
        }
    }
}

/// Closes a connection whose client may still be sending. Closing a socket with unread bytes resets
/// it, and a reset can overtake the last answers.
fn linger(socket: &Socket) {
    socket.shutdown(Shutdown::Write);
    let mut scratch = vec![0; 64 << 10];
    let mut thrown = 0;
    while thrown < LINGER_MAX {
        // Receiving was shut down before, so this ends when what has already come is read.
        match socket.receive(&mut scratch) {
            Ok(n) if n > 0 => thrown += n,
            _ => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::transmission::Rules;
    use crate::testing::FileDevice;
    use crate::wire::reply::Style;
    use crate::wire::request::{Request, kind};

    /// Takes some answers, and is ended then.
    struct Until(usize);

    impl Sink for Until {
        fn send(&mut self, _: &[u8]) -> io::Result<()> {
            Ok(())
        }

        fn ended(&self) -> bool {
            self.0 == 0
        }
    }

    #[test]
    fn nothing_of_a_batch_is_executed_after_the_word_to_end() {
        let device = FileDevice::temporary(1 << 20);
        let counters = Arc::new(Counters::default());
        let counted = Arc::new(Counted::new(device, counters.clone()));
        let rules = Rules {
            style: Style::Simple,
            size: (1 << 20).into(),
            read_only: false,
            contexts: Vec::new(),
        };
        let mut engine = Engine::new(counted, rules);
        let mut input = Vec::new();
        for cookie in 0..100 {
            let request = Request {
                flags: 0,
                kind: kind::FLUSH,
                cookie,
                offset: 0,
                length: 0,
            };
            request.emit(Style::Simple, &mut input);
        }
        let ended = engine.run(&input, &mut Until(0)).unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(counters.flushes.load(Ordering::Relaxed), 0);
        engine.run(&input, &mut Until(1)).unwrap();
        assert_eq!(counters.flushes.load(Ordering::Relaxed), 100);
    }
}
