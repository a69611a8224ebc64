//! Where other services connect.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use ploop::error::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::connect::{Place, peer_of_unix, tune};
use super::line::{Line, TICK};
use super::secure::Secure;
use super::{Link, Stop, Tls};
use crate::serve::listen;

/// Where other services connect. Dropping it takes a socket's file away.
#[derive(Debug)]
pub struct Listener {
    // Dropped in this order: the file is found through the place.
    doors: Vec<listen::Listener>,
    _place: Option<Place>,
    path: PathBuf,
    tls: Option<Tls>,
}

impl Listener {
    /// Listens on a unix socket of mode 0600. One that nobody listens on is replaced.
    pub fn unix(path: &Path) -> Result<Listener> {
        let place = Place::of(path).map_err(|e| Error::io("open the directory", path, e))?;
        let door = listen::unix(&place.path).map_err(|e| e.on(path))?;
        Listener::of(vec![door], Some(place), path, None)
    }

    /// Listens on every address of `address` ("HOST:PORT", IPv6 in brackets); with those. May block
    /// while the name is looked up. Without TLS only loopback addresses are listened on.
    pub fn tcp(address: &str, tls: Option<Tls>) -> Result<(Vec<SocketAddr>, Listener)> {
        let found = address.to_socket_addrs().map_err(|e| {
            Error::invalid(format!("'{}' is not an address", address.escape_debug()))
                .caused_by(e)
                .fix("Write HOST:PORT, for example 192.0.2.1:10810 or [2001:db8::1]:10810")
        })?;
        // Looked up once: what was checked is what is listened on.
        let found: Vec<_> = found.collect();
        let beyond = found.iter().find(|a| !a.ip().to_canonical().is_loopback());
        if let (Some(beyond), None) = (beyond, &tls) {
            let text = format!(
                "other machines could connect to {beyond}, and nobody is let in from there \
                 without TLS"
            );
            return Err(Error::new(Kind::Permission, text).fix(
                "Give --tls-cert, --tls-key and --tls-ca, or listen on a loopback address \
                 (127.0.0.1, [::1]) or a unix socket",
            ));
        }
        let mut bound = Vec::new();
        let mut doors = Vec::new();
        for one in found {
            for (at, door) in listen::tcp(&one.to_string(), tls.is_some())? {
                bound.push(at);
                doors.push(door);
            }
        }
        if doors.is_empty() {
            let text = format!("'{}' stands for no address", address.escape_debug());
            return Err(Error::invalid(text));
        }
        let listener = Listener::of(doors, None, Path::new(""), tls)?;
        Ok((bound, listener))
    }

    fn of(
        doors: Vec<listen::Listener>,
        place: Option<Place>,
        path: &Path,
        tls: Option<Tls>,
    ) -> Result<Listener> {
        for door in &doors {
            match door {
                listen::Listener::Unix(_, door) => door.set_nonblocking(true),
                listen::Listener::Tcp(door) => door.set_nonblocking(true),
            }
            .map_err(|e| Error::new(Kind::Io, "let a listener not block").caused_by(e))?;
        }
        Ok(Listener {
            doors,
            _place: place,
            path: path.to_owned(),
            tls,
        })
    }

    /// The next who connects, who is yet to be made sure of ([`Link::handshake`]); it asks `stop`,
    /// too. `None`: stopped. A failure that is not the listener's is logged and waited out.
    pub fn accept(&self, stop: &Stop) -> Result<Option<Link>> {
        while !stop() {
            for door in &self.doors {
                match self.try_accept(door, stop) {
                    Ok(Some(link)) => return Ok(Some(link)),
                    Ok(None) => {}
                    // No descriptor is left, or who connected is gone already.
                    Err(e) => {
                        tracing::warn!(error = %e, "accept failed");
                        thread::sleep(TICK);
                    }
                }
            }
            let doors = self.doors.iter();
            let mut fds: Vec<_> = doors
                .map(|door| PollFd::from_borrowed_fd(fd(door), PollFlags::IN))
                .collect();
            let time = Timespec {
                tv_sec: 0,
                tv_nsec: TICK.subsec_nanos().into(),
            };
            match poll(&mut fds, Some(&time)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => {
                    let e = io::Error::from(e);
                    return Err(Error::new(Kind::Io, "wait for a connection").caused_by(e));
                }
            }
        }
        Ok(None)
    }

    fn try_accept(&self, door: &listen::Listener, stop: &Stop) -> io::Result<Option<Link>> {
        let accepted = match door {
            listen::Listener::Unix(_, door) => door.accept().map(|(socket, _)| {
                let peer = peer_of_unix(&self.path, &socket);
                (OwnedFd::from(socket), peer)
            }),
            listen::Listener::Tcp(door) => door.accept().and_then(|(socket, from)| {
                tune(&socket)?;
                Ok((socket.into(), format!("tcp:{from}")))
            }),
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let mut link = Link::new(Line::new(socket, stop.clone()), peer);
        if let Some(tls) = &self.tls {
            link.secure = Some(Box::new(Secure::server(tls).map_err(io::Error::other)?));
        }
        Ok(Some(link))
    }
}

fn fd(door: &listen::Listener) -> BorrowedFd<'_> {
    match door {
        listen::Listener::Unix(_, door) => door.as_fd(),
        listen::Listener::Tcp(door) => door.as_fd(),
    }
}
