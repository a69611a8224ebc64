//! A socket and what was read from it: unix or TCP, the same for whoever uses it.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice};
use std::path::PathBuf;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{Interest, Ready};
use tokio::net::{TcpStream, UnixStream};

use ploop::error::{Error, Result};

/// Bytes that are asked for at once.
const READ: usize = 256 << 10;
/// Silence after which a server's host is asked whether it is there.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Room for reading that is left before more is made.
const READ_MIN: usize = 64 << 10;

/// Where a server listens: `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A host and a port.
    Tcp(String),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl Address {
    /// Reads one. A bare absolute path is a unix socket. Error: `Invalid`.
    pub fn parse(text: &str) -> Result<Address> {
        let refused = || {
            Error::invalid(format!("'{text}' is no address of a server"))
                .fix("Write unix:/PATH, or tcp:HOST:PORT")
        };
        if let Some(path) = text
            .strip_prefix("unix:")
            .or(text.starts_with('/').then_some(text))
        {
            return match path.is_empty() {
                true => Err(refused()),
                false => Ok(Address::Unix(path.into())),
            };
        }
        match text.strip_prefix("tcp:") {
            Some(address) if address.contains(':') => Ok(Address::Tcp(address.into())),
            _ => Err(refused()),
        }
    }

    pub(super) async fn connect(&self) -> io::Result<Line> {
        Ok(Line::new(match self {
            Address::Unix(path) => Socket::Unix(UnixStream::connect(path).await?),
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address.as_str()).await?;
                stream.set_nodelay(true)?;
                // A host that vanished with nothing under way is noticed, too.
                rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
                rustix::net::sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
                Socket::Tcp(stream)
            }
        }))
    }
}

/// A connected socket.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Line {
    socket: Socket,
    pub(super) input: BytesMut,
}

impl Line {
    pub(super) fn new(socket: Socket) -> Line {
        Line {
            socket,
            input: BytesMut::new(),
        }
    }

    pub(super) async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        match &self.socket {
            Socket::Unix(s) => s.ready(interest).await,
            Socket::Tcp(s) => s.ready(interest).await,
        }
    }

    /// Reads what is there, with room for `need` bytes in all. `None`: nothing is there now; 0: the
    /// other side has closed.
    pub(super) fn try_read(&mut self, need: usize) -> io::Result<Option<usize>> {
        // A long message is made room for as it comes, not as it says.
        let more = need
            .saturating_sub(self.input.len())
            .clamp(READ_MIN, 4 * READ);
        if self.input.capacity() - self.input.len() < more {
            self.input.reserve(more.max(READ));
        }
        let read = match &self.socket {
            Socket::Unix(s) => s.try_read_buf(&mut self.input),
            Socket::Tcp(s) => s.try_read_buf(&mut self.input),
        };
        match read {
            Ok(n) => Ok(Some(n)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Writes what the socket takes now; `None`: nothing.
    pub(super) fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let wrote = match &self.socket {
            Socket::Unix(s) => s.try_write_vectored(slices),
            Socket::Tcp(s) => s.try_write_vectored(slices),
        };
        match wrote {
            Ok(0) => Err(ErrorKind::WriteZero.into()),
            Ok(n) => Ok(Some(n)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Ends the connection in both directions, for the other side to see.
    pub(super) fn shut(&self) {
        use rustix::net::{Shutdown, shutdown};
        let ended = match &self.socket {
            Socket::Unix(s) => shutdown(s, Shutdown::Both),
            Socket::Tcp(s) => shutdown(s, Shutdown::Both),
        };
        // One that is not connected any more needs none.
        ended.ok();
    }

    /// Returns when the other side has closed. What it sends before is read, up to a bound.
    pub(super) async fn closed(&mut self) {
        while self.input.len() < READ {
            match self.try_read(0) {
                Ok(Some(0)) | Err(_) => return,
                Ok(Some(_)) => {}
                Ok(None) => {
                    if self.ready(Interest::READABLE).await.is_err() {
                        return;
                    }
                }
            }
        }
        std::future::pending().await
    }

    /// Waits until `need` bytes are there. Error: `UnexpectedEof` when the other side closes before.
    pub(super) async fn need(&mut self, need: usize) -> io::Result<()> {
        while self.input.len() < need {
            match self.try_read(need)? {
                Some(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Some(_) => {}
                None => drop(self.ready(Interest::READABLE).await?),
            }
        }
        Ok(())
    }

    /// Sends all of it.
    pub(super) async fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.try_write(&[IoSlice::new(bytes)])? {
                Some(n) => bytes = &bytes[n..],
                None => drop(self.ready(Interest::WRITABLE).await?),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown_the_same() {
        for text in [
            "unix:/run/nbd.sock",
            "tcp:localhost:10809",
            "tcp:[::1]:10809",
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(
            Address::parse("/run/nbd.sock").unwrap(),
            Address::Unix("/run/nbd.sock".into())
        );
        for text in ["", "unix:", "tcp:nowhere", "localhost:10809", "nbd://x"] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }
}
