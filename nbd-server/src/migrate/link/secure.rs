//! TLS on a line.
//!
//! The line below waits, so that every call of it ends with bytes or for good. A link that failed
//! stays failed, and does not say the word of a clean end: the other side must see a cut.

use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::time::{Duration, Instant};

use ploop::error::{Error, Result};
use rustls::pki_types::ServerName;
use rustls::{
    AlertDescription as Alert, CertificateError as Bad, ClientConnection, Connection,
    Error as TlsError, ServerConnection,
};

use super::line::Line;
use super::subject::subject;
use super::{FAREWELL, Tls};

/// Bytes that are asked for at once.
const READ: usize = 64 << 10;
/// Bytes that are encrypted at once.
const WRITE: usize = 256 << 10;
/// How long one that is refused may take to hear why.
const HEARING: Duration = Duration::from_secs(1);

/// See the module text.
#[derive(Debug)]
pub(super) struct Secure {
    tls: Connection,
    input: Input,
    shaken: bool,
    /// What it failed of.
    fate: Option<(ErrorKind, String)>,
}

impl Secure {
    /// Our side of a link to `host`.
    pub(super) fn client(tls: &Tls, host: String) -> Result<Secure> {
        let shown = host.clone();
        let name = ServerName::try_from(host).map_err(|e| {
            Error::invalid(format!(
                "'{shown}' is no name that a certificate could be for"
            ))
            .caused_by(e)
        })?;
        Secure::of(ClientConnection::new(tls.client.clone(), name).map(Connection::from))
    }

    /// Our side of a link that was accepted.
    pub(super) fn server(tls: &Tls) -> Result<Secure> {
        Secure::of(ServerConnection::new(tls.server.clone()).map(Connection::from))
    }

    fn of(tls: Result<Connection, TlsError>) -> Result<Secure> {
        let mut tls = tls.map_err(|e| Error::invalid("set up TLS").caused_by(e))?;
        tls.set_buffer_limit(Some(WRITE));
        Ok(Secure {
            tls,
            input: Input::default(),
            shaken: false,
            fate: None,
        })
    }

    pub(super) fn is_shaken(&self) -> bool {
        self.shaken
    }

    /// Completes the handshake.
    pub(super) fn shake(&mut self, line: &mut Line) -> io::Result<()> {
        self.check()?;
        let shaken = self.try_shake(line);
        self.keep(shaken)?;
        self.shaken = true;
        Ok(())
    }

    fn try_shake(&mut self, line: &mut Line) -> io::Result<()> {
        loop {
            self.send(line)?;
            if !self.tls.is_handshaking() {
                return Ok(());
            }
            if self.fill(line)? == 0 {
                let text = "the other side closed the connection";
                return Err(io::Error::new(ErrorKind::UnexpectedEof, text));
            }
        }
    }

    pub(super) fn read(&mut self, line: &mut Line, buf: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        loop {
            match self.tls.reader().read(buf) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                    let text = "the connection was cut: it ended without the word of TLS for it";
                    return self.keep(Err(io::Error::new(ErrorKind::UnexpectedEof, text)));
                }
                other => return other,
            }
            // What waits for being sent is an answer to what was read.
            self.send(line)?;
            self.fill(line)?;
        }
    }

    pub(super) fn write(&mut self, line: &mut Line, buf: &[u8]) -> io::Result<usize> {
        self.check()?;
        let wrote = self.try_write(line, buf);
        // How much of it went is not known: it cannot be tried again.
        self.keep(wrote)
    }

    fn try_write(&mut self, line: &mut Line, buf: &[u8]) -> io::Result<usize> {
        self.send(line)?;
        let n = self.tls.writer().write(buf)?;
        self.send(line).map(|()| n)
    }

    /// Says that it ends here, unless it has failed.
    pub(super) fn farewell(&mut self, line: &mut Line) {
        if self.shaken && self.fate.is_none() {
            self.tls.send_close_notify();
            // One that does not take it sees a cut, and says so.
            self.send(line).ok();
        }
    }

    /// Who the other side is, after the handshake.
    pub(super) fn subject(&self) -> String {
        let shown = self.tls.peer_certificates().and_then(|c| c.first());
        shown.map_or("no certificate".into(), subject)
    }

    fn check(&self) -> io::Result<()> {
        match &self.fate {
            Some((kind, why)) => Err(io::Error::new(*kind, why.clone())),
            None => Ok(()),
        }
    }

    fn keep<T>(&mut self, tried: io::Result<T>) -> io::Result<T> {
        if let Err(e) = &tried {
            self.fate = Some((e.kind(), e.to_string()));
        }
        tried
    }

    /// Sends what waits for it. Where the other side is gone, it may have said why before.
    fn send(&mut self, line: &mut Line) -> io::Result<()> {
        while self.tls.wants_write() {
            if let Err(e) = self.tls.write_tls(line) {
                let gone = matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset);
                return Err(gone.then(|| self.last_words(line)).flatten().unwrap_or(e));
            }
        }
        Ok(())
    }

    fn last_words(&mut self, line: &mut Line) -> Option<io::Error> {
        let until = line.until;
        line.until = Some(Instant::now());
        let mut words = None;
        // No more than what a socket holds; what is read is of no use any more.
        for _ in 0..1024 {
            if !matches!(self.receive(line), Ok(1..)) {
                break;
            }
            if let Err(e) = self.tls.process_new_packets() {
                words = Some(reason(&e));
                break;
            }
            let mut waste = [0; 4 << 10];
            while matches!(self.tls.reader().read(&mut waste), Ok(1..)) {}
        }
        line.until = until;
        words
    }

    /// Takes what the other side sent; 0: it has closed.
    fn fill(&mut self, line: &mut Line) -> io::Result<usize> {
        let n = self.receive(line)?;
        match self.tls.process_new_packets() {
            Ok(_) => Ok(n),
            Err(e) => {
                let refused = self.keep(Err(reason(&e)));
                self.tell(line);
                refused
            }
        }
    }

    fn receive(&mut self, line: &mut Line) -> io::Result<usize> {
        self.tls.read_tls(&mut Reader {
            line,
            input: &mut self.input,
        })
    }

    /// Says what was wrong. Closing with bytes unread would reset the connection, and the other side
    /// might not hear it: they are read first.
    fn tell(&mut self, line: &mut Line) {
        let until = line.until;
        line.until = Some(Instant::now() + FAREWELL);
        while self.tls.wants_write() && self.tls.write_tls(line).is_ok() {}
        line.end();
        let hearing = Instant::now() + HEARING;
        line.until = Some(hearing);
        let mut waste = [0; 4 << 10];
        while Instant::now() < hearing && matches!(line.read(&mut waste), Ok(1..)) {}
        line.until = until;
    }
}

/// What was received, in larger pieces than TLS asks for.
#[derive(Debug, Default)]
struct Input {
    room: Vec<u8>,
    /// The bytes in `room` that are not taken yet.
    left: Range<usize>,
}

struct Reader<'a> {
    line: &'a mut Line,
    input: &'a mut Input,
}

impl Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let input = &mut *self.input;
        if input.left.is_empty() {
            input.room.resize(READ, 0);
            input.left = 0..self.line.read(&mut input.room)?;
        }
        let n = (&input.room[input.left.clone()]).read(buf)?;
        input.left.start += n;
        Ok(n)
    }
}

/// What failed, in words for an operator.
fn reason(e: &TlsError) -> io::Error {
    let denied = |text: String| io::Error::new(ErrorKind::PermissionDenied, text);
    let theirs = |why: &str| denied(format!("the certificate of the other side {why}"));
    let ours = |why: &str| denied(format!("the other side refuses our certificate: {why}"));
    match e {
        TlsError::InvalidCertificate(bad) => match bad {
            Bad::UnknownIssuer | Bad::BadSignature => {
                theirs("is not signed by the CA that was given (--tls-ca)")
            }
            Bad::Expired | Bad::ExpiredContext { .. } => theirs("has expired"),
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
                theirs("is not valid yet: look at the clocks of both hosts")
            }
            Bad::NotValidForName => theirs("is for another host name"),
            Bad::NotValidForNameContext {
                expected,
                presented,
            } => theirs(&format!(
                "is for another host name: not {}, but {}",
                expected.to_str(),
                match presented.is_empty() {
                    true => "none at all".into(),
                    false => presented.join(", "),
                }
            )),
            Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => theirs(
                "is not for this purpose (extendedKeyUsage: serverAuth where it is dialed, \
                 clientAuth where it dials)",
            ),
            other => theirs(&format!("is refused: {other}")),
        },
        TlsError::NoCertificatesPresented => denied("the other side shows no certificate".into()),
        TlsError::AlertReceived(alert) => match alert {
            // The latter where a CA of the same name has another key.
            Alert::UnknownCA | Alert::DecryptError => ours("its CA did not sign it"),
            Alert::CertificateExpired => ours("it has expired, or is not valid yet"),
            Alert::CertificateRequired => ours("there is none"),
            Alert::BadCertificate
            | Alert::CertificateUnknown
            | Alert::CertificateRevoked
            | Alert::UnsupportedCertificate
            | Alert::AccessDenied => ours(&format!("{alert:?}")),
            Alert::ProtocolVersion => denied("the other side does not speak TLS 1.3".into()),
            other => denied(format!("the other side refuses: {other:?}")),
        },
        TlsError::PeerIncompatible(why) => denied(format!(
            "the other side does not speak TLS 1.3 as it must: {why:?}"
        )),
        TlsError::InvalidMessage(why) => io::Error::new(
            ErrorKind::InvalidData,
            format!("what the other side sends is no TLS: {why:?}"),
        ),
        other => io::Error::new(ErrorKind::InvalidData, format!("TLS failed: {other}")),
    }
}
