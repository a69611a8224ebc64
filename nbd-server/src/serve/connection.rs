//! One negotiated connection: a blocking socket, an engine and a thread that owns both.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use super::engine::{Engine, Sink, Turn};
use super::input::Input;
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

    pub(super) fn shutdown(&self, how: Shutdown) {
        // The peer may be gone already; then this has nothing left to do.
        match self {
            Socket::Unix(s) => s.shutdown(how).ok(),
            Socket::Tcp(s) => s.shutdown(how).ok(),
        };
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

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(s) => s.set_read_timeout(patience),
            Socket::Tcp(s) => s.set_read_timeout(patience),
        }
    }
}

impl Sink for &Socket {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Socket::Unix(s) => (&mut &*s).write_all(bytes),
            Socket::Tcp(s) => (&mut &*s).write_all(bytes),
        }
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
            End::Failed(e) => write!(f, "the socket failed: {e}"),
        }
    }
}

/// Serves a connection until its end, and logs that end.
pub(super) fn run(
    socket: &Socket,
    mut negotiated: Negotiated,
    rest: Vec<u8>,
    peer: &str,
    stopping: &AtomicBool,
) {
    let counters = Arc::new(Counters::default());
    let device = Counted::new(negotiated.export.device.clone(), counters.clone());
    negotiated.export.device = Arc::new(device);
    let start = Instant::now();
    let mut engine = Engine::of(&negotiated);
    let end = serve(socket, &mut engine, rest, stopping).unwrap_or_else(End::Failed);
    if matches!(end, End::Stopped) {
        linger(socket);
    }
    let export = negotiated.export.name.as_str();
    let seconds = start.elapsed().as_secs_f64();
    let c = &counters;
    let n = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let clean = matches!(end, End::Disconnected | End::Closed(0) | End::Stopped);
    if !clean {
        tracing::warn!(export, peer, why = %end, "connection broke");
    }
    tracing::info!(
        export,
        peer,
        why = %end,
        seconds,
        reads = n(&c.reads),
        read_bytes = n(&c.read_bytes),
        writes = n(&c.writes),
        write_bytes = n(&c.write_bytes),
        flushes = n(&c.flushes),
        errors = n(&c.errors),
        "connection closed"
    );
}

fn serve(
    socket: &Socket,
    engine: &mut Engine,
    rest: Vec<u8>,
    stopping: &AtomicBool,
) -> io::Result<End> {
    let mut input = Input::holding(rest);
    let mut patient = true;
    loop {
        let (used, turn) = engine.run(input.filled(), &mut { socket })?;
        input.used(used);
        let need = match turn {
            Turn::NeedMore(need) => need,
            Turn::Disconnected => return Ok(End::Disconnected),
            Turn::Violated(why) => return Ok(End::Violated(why)),
        };
        // Everything received in full has been executed and answered; the rest was not begun.
        if stopping.load(Ordering::Acquire) {
            return Ok(End::Stopped);
        }
        if patient && (input.is_large() || engine.is_large()) {
            socket.set_patience(Some(IDLE))?;
            patient = false;
        }
        match socket.receive(input.room(need)) {
            Ok(0) if stopping.load(Ordering::Acquire) => return Ok(End::Stopped),
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
