//! Connecting, with an end to it.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use ploop::error::{Error, Kind, Result};
use rustix::event::PollFlags;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::address::host;
use super::child::Child;
use super::line::{Line, turn, wait};
use super::secure::Secure;
use super::{Address, Link, Stop, Tls};

/// Longest path in the address of a unix socket.
const MAX_PATH: usize = 107;
/// Pause before a listener whose queue is full is tried again.
const PAUSE: Duration = Duration::from_millis(10);
/// Silence after which the host of the other side is asked whether it is there.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Connects to `address`; the handshake of TLS is not done.
pub(super) fn connect(
    address: &Address,
    tls: Option<&Tls>,
    stop: Stop,
    until: Instant,
) -> Result<Link> {
    let name = address.to_string();
    let failed = |e: io::Error| {
        let kind = match e.kind() {
            ErrorKind::NotFound => Kind::NotFound,
            ErrorKind::PermissionDenied => Kind::Permission,
            _ => Kind::Io,
        };
        Error::new(kind, format!("connect to {name}")).caused_by(e)
    };
    match address {
        Address::Unix(path) => {
            let socket = unix(path, &stop, Some(until)).map_err(failed)?;
            let peer = peer_of_unix(path, &socket);
            Ok(Link::new(Line::new(socket, stop), peer))
        }
        Address::Tcp(at) => {
            let secure = match tls {
                None => None,
                Some(tls) => {
                    let host = host(at).map_err(|why| Error::invalid(format!("{name}: {why}")))?;
                    Some(Box::new(Secure::client(tls, host)?))
                }
            };
            let found = resolve(at, &stop, until).map_err(failed)?;
            if secure.is_none() {
                check_dial(&name, &found)?;
            }
            let socket = tcp(&found, &stop, until).map_err(failed)?;
            let mut link = Link::new(Line::new(socket, stop), name);
            link.secure = secure;
            Ok(link)
        }
        Address::Exec(command) => {
            let (socket, child) = Child::start(command).map_err(failed)?;
            let mut link = Link::new(Line::new(socket, stop), name);
            link.child = Some(child);
            Ok(link)
        }
    }
}

/// Refuses to go beyond loopback without TLS.
pub(super) fn check_dial(name: &str, found: &[SocketAddr]) -> Result<()> {
    let beyond = found.iter().find(|a| !a.ip().to_canonical().is_loopback());
    let Some(beyond) = beyond else {
        return Ok(());
    };
    let text = format!("{name} is another host ({beyond}), and is not reached without TLS");
    Err(Error::new(Kind::Permission, text).fix(
        "Give --tls-cert, --tls-key and --tls-ca, or go through a command of yours, as in \
         exec:ssh HOST ploop migrate-receive",
    ))
}

/// The addresses of HOST:PORT. Asking for a name may take any time, so that a thread does it, which
/// is left behind if it takes too long.
fn resolve(at: &str, stop: &Stop, until: Instant) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = at.parse::<SocketAddr>() {
        return Ok(vec![address]);
    }
    let (send, receive) = mpsc::channel();
    let name = at.to_owned();
    thread::Builder::new()
        .name("link-resolve".into())
        .spawn(move || {
            let found = name.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
            // Nobody may wait for it any more.
            send.send(found).ok();
        })?;
    loop {
        match receive.recv_timeout(turn(stop, Some(until))?) {
            Ok(Ok(found)) if found.is_empty() => {
                return Err(io::Error::other("the name stands for no address"));
            }
            Ok(found) => return found,
            Err(RecvTimeoutError::Timeout) => {}
            Err(e) => return Err(io::Error::other(e)),
        }
    }
}

/// A connection to the first of `addresses` that takes one; each gets its share of the time.
fn tcp(addresses: &[SocketAddr], stop: &Stop, until: Instant) -> io::Result<OwnedFd> {
    let mut failed = io::Error::other("there is no address");
    for (n, address) in addresses.iter().enumerate() {
        let now = Instant::now();
        let share = until.saturating_duration_since(now) / (addresses.len() - n) as u32;
        match tcp_one(address, stop, now + share) {
            Ok(socket) => return Ok(socket),
            Err(e) => failed = e,
        }
    }
    Err(failed)
}

fn tcp_one(address: &SocketAddr, stop: &Stop, until: Instant) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket(family)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => loop {
            wait(&socket, PollFlags::OUT, stop, Some(until))?;
            sockopt::socket_error(&socket)??;
            // Without an error it is either connected, or still under way.
            if rustix::net::getpeername(&socket).is_ok() {
                break;
            }
        },
        Err(e) => return Err(e.into()),
    }
    tune(&socket)?;
    Ok(socket)
}

/// Small messages go out at once, and a host that vanished is noticed.
pub(super) fn tune(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEPALIVE)?;
    Ok(())
}

/// A connection to the unix socket at `path`.
pub(super) fn unix(path: &Path, stop: &Stop, until: Option<Instant>) -> io::Result<OwnedFd> {
    let place = Place::of(path)?;
    let address = SocketAddrUnix::new(&place.path)?;
    let socket = socket(AddressFamily::UNIX)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::AGAIN) => thread::sleep(turn(stop, until)?.min(PAUSE)),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(
        family,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

/// The process at the other end of the unix socket `path`.
pub(super) fn peer_of_unix(path: &Path, socket: impl AsFd) -> String {
    let name = format!("unix:{}", path.display());
    match sockopt::socket_peercred(socket) {
        Ok(who) => format!(
            "{name} (pid {}, uid {})",
            who.pid.as_raw_nonzero(),
            who.uid.as_raw()
        ),
        Err(_) => name,
    }
}

/// A name for a socket that fits into an address, good while this is held. A store may lie deeper
/// than an address is long: then the directory is opened and the socket named through it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    _dir: Option<File>,
}

impl Place {
    pub(super) fn of(path: &Path) -> io::Result<Place> {
        let (true, Some(dir), Some(name)) = (
            path.as_os_str().len() > MAX_PATH,
            path.parent(),
            path.file_name(),
        ) else {
            return Ok(Place {
                path: path.to_owned(),
                _dir: None,
            });
        };
        let dir = File::options()
            .read(true)
            .custom_flags(OFlags::PATH.bits() as i32)
            .open(dir)?;
        let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string());
        Ok(Place {
            path: short.join(name),
            _dir: Some(dir),
        })
    }
}
