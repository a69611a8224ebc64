//! The bytes between two services: a blocking link in both directions, and nothing of what is said
//! on it.
//!
//! ```text
//!  dial ───────────┐                ┌── Secure: TLS ──┐
//!                  ├─▶ Link ────────┤                 ├──▶ Line: waits, with an end to it ──▶ socket
//!  Listener::accept┘                └──── plain ──────┘
//!  bridge: standard input and output, to and from a unix socket
//! ```
//!
//! * Whoever is on the other end was let in by something: the mode of a unix socket, loopback, the
//!   command (ssh), or a certificate that the CA signed. There is no other way in.
//! * No call blocks longer than its [`Stop`] allows: it is asked every 100 ms.
//! * An end is told from a cut where the transport can tell them: TLS ends with its own word, a
//!   command with exit status 0.

mod address;
mod bridge;
mod child;
mod connect;
mod line;
mod listener;
mod pem;
mod secure;
mod subject;
mod tls;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ploop::error::{Error, Kind, Result};

pub use address::Address;
pub use bridge::bridge;
pub use listener::Listener;
pub use tls::{Tls, TlsFiles};

use child::Child;
use line::Line;
use secure::Secure;

/// Whether to give up. Asked at least every 100 ms while a read or write blocks; true: the call
/// fails with "stopped".
pub type Stop = Arc<dyn Fn() -> bool + Send + Sync>;

/// How long a connection and its TLS handshake may take.
const GREETING: Duration = Duration::from_secs(10);

/// How long the last word of a TLS link is tried to be said.
const FAREWELL: Duration = Duration::from_millis(100);

/// A connection to another service. See the module text.
pub struct Link {
    // Dropped in this order: a command ends because its socket is closed.
    line: Line,
    secure: Option<Box<Secure>>,
    child: Option<Child>,
    address: String,
    peer: String,
    greeting: Duration,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("peer", &self.peer).finish()
    }
}

impl Link {
    /// Connects to `address`, and with `tls` makes sure of who is there. Blocks for at most ten
    /// seconds, and until `stop`. TLS is for TCP only, and needed beyond loopback.
    ///
    /// Where the other side refuses our certificate, the first read or write says so: it looks at
    /// it after we have looked at its own.
    pub fn dial(address: &Address, tls: Option<&Tls>, stop: Stop) -> Result<Link> {
        let until = Instant::now() + GREETING;
        if tls.is_some() && !matches!(address, Address::Tcp(_)) {
            let text = format!("TLS is for TCP, and {address} is none");
            return Err(Error::invalid(text).fix(
                "Leave out --tls-cert, --tls-key and --tls-ca: a unix socket stays on this host, \
                 and a command brings its own protection",
            ));
        }
        let mut link = connect::connect(address, tls, stop, until)?;
        link.greeting = until.saturating_duration_since(Instant::now());
        link.handshake()?;
        Ok(link)
    }

    fn new(line: Line, address: String) -> Link {
        Link {
            line,
            secure: None,
            child: None,
            peer: address.clone(),
            address,
            greeting: GREETING,
        }
    }

    /// Who is at the other end, for logs and errors: the address; the process of a unix socket; the
    /// name in the certificate, after the handshake.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// A read that gets nothing for so long fails with `TimedOut`, and so does a write that nothing
    /// is taken of. `None`: they wait for ever.
    pub fn set_patience(&mut self, silence: Option<Duration>) {
        self.line.silence = silence;
    }

    /// Asks `stop` from now on.
    pub fn set_stop(&mut self, stop: Stop) {
        self.line.stop = stop;
    }

    /// Makes sure of who has connected, for at most ten seconds; the first read or write does it,
    /// too. Nothing to do where there is no TLS. Error: `Permission` where it is not to be let in.
    pub fn handshake(&mut self) -> Result<()> {
        self.shake().map_err(|e| {
            let kind = match e.kind() {
                ErrorKind::PermissionDenied => Kind::Permission,
                _ => Kind::Io,
            };
            Error::new(kind, format!("TLS handshake with {}", self.peer)).caused_by(e)
        })
    }

    fn shake(&mut self) -> io::Result<()> {
        let Some(secure) = self.secure.as_mut().filter(|s| !s.is_shaken()) else {
            return Ok(());
        };
        self.line.until = Some(Instant::now() + self.greeting);
        let shaken = secure.shake(&mut self.line);
        self.line.until = None;
        shaken?;
        self.peer = format!("{} ({})", self.address, secure.subject());
        Ok(())
    }

    /// What is to be said about a command that has ended. `Ok`: that it ended well.
    fn ended(&mut self) -> io::Result<()> {
        match &mut self.child {
            Some(child) => child.ended(&self.line.stop),
            None => Ok(()),
        }
    }

    /// Puts what a command has to say before `e`.
    fn broken(&mut self, e: io::Error) -> io::Error {
        let gone = matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset);
        match gone.then(|| self.ended()) {
            Some(Err(said)) => said,
            _ => e,
        }
    }
}

impl Read for Link {
    /// 0: the other side has ended, and says so. A TLS link that is cut is an error, and so is a
    /// command that fails.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.shake()?;
        if let Some(secure) = &mut self.secure {
            return secure.read(&mut self.line, buf);
        }
        match self.line.read(buf) {
            Ok(0) if !buf.is_empty() => self.ended().map(|()| 0),
            Ok(n) => Ok(n),
            Err(e) => Err(self.broken(e)),
        }
    }
}

impl Write for Link {
    /// What is written is on its way when this returns; nothing waits for a flush.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.shake()?;
        if let Some(secure) = &mut self.secure {
            return secure.write(&mut self.line, buf);
        }
        self.line.write(buf).map_err(|e| self.broken(e))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(secure) = &mut self.secure {
            self.line.until = Some(Instant::now() + FAREWELL);
            secure.farewell(&mut self.line);
        }
    }
}
