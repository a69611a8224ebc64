//! Where clients connect: unix sockets and TCP addresses.
//!
//! A unix socket is never, not even for an instant, open to anyone but its owner: its mode is set
//! on the unbound socket, and Linux gives the file that mode when it is bound. A socket file that
//! nobody listens on is replaced; one with a live server is left alone. Both are decided under a
//! lock on the directory, held until this server listens, so that of two servers started at once
//! one wins and the other is told so.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ploop::error::{Error, Kind, Result};
use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect};

/// Longest path of a unix socket that a client can name, in bytes.
const MAX_PATH: usize = 107;

const BACKLOG: i32 = 1024;

/// How long another process may hold the directory before starting fails.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// A listening socket. Dropping it takes its file away first.
#[derive(Debug)]
pub(crate) enum Listener {
    /// A unix socket; the file is `None` when somebody else made it.
    Unix(Option<SocketFile>, UnixListener),
    /// A TCP address.
    Tcp(TcpListener),
}

/// A socket file of ours.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |m: &fs::Metadata| (m.dev(), m.ino()) == self.id;
        if fs::symlink_metadata(&self.path).is_ok_and(|m| ours(&m)) {
            // A file that cannot be removed is replaced at the next start.
            drop(fs::remove_file(&self.path));
        }
    }
}

/// Listens on a unix socket of mode 0600 at `path`. Blocks for at most two seconds.
pub(crate) fn unix(path: &Path) -> Result<Listener> {
    let io = |what: &str, e: Errno| Error::io(what, path, e.into());
    let len = path.as_os_str().len();
    if len == 0 || len > MAX_PATH {
        let text = format!("the path of a unix socket has 1 to {MAX_PATH} bytes, not {len}");
        return Err(Error::invalid(text).on(path).fix("Use a shorter path."));
    }
    let _lock = lock_directory(path)?;
    let address = SocketAddrUnix::new(path).map_err(|e| io("name the socket", e))?;
    let socket = unix_socket(SocketFlags::empty()).map_err(|e| io("make a socket", e))?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|e| io("set the mode", e))?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &address)?;
            bind(&socket, &address).map_err(|e| io("bind the socket", e))?;
        }
        other => other.map_err(|e| io("bind the socket", e))?,
    }
    let meta = fs::symlink_metadata(path).map_err(|e| Error::io("stat", path, e))?;
    let file = SocketFile {
        path: path.to_path_buf(),
        id: (meta.dev(), meta.ino()),
    };
    if meta.mode() & 0o177 != 0 {
        let text = format!(
            "this file system gave the socket mode {:o}",
            meta.mode() & 0o777
        );
        return Err(Error::new(Kind::Permission, text)
            .on(path)
            .fix("Use another directory."));
    }
    rustix::net::listen(&socket, BACKLOG).map_err(|e| io("listen", e))?;
    Ok(Listener::Unix(Some(file), UnixListener::from(socket)))
}

fn unix_socket(flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Locks the directory of `path` against another server that starts at the same time.
fn lock_directory(path: &Path) -> Result<File> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let file = File::open(dir).map_err(|e| Error::io("open the directory", dir, e))?;
    let start = Instant::now();
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK | Errno::INTR) if start.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::WOULDBLOCK) => {
                let text = "another process holds a lock on the directory";
                return Err(Error::new(Kind::InUse, text)
                    .on(dir)
                    .fix("Wait for it, or use a directory of your own."));
            }
            Err(e) => return Err(Error::io("lock the directory", dir, e.into())),
        }
    }
}

/// Removes a socket file that nobody listens on.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<()> {
    let meta = fs::symlink_metadata(path).map_err(|e| Error::io("stat", path, e))?;
    if !meta.file_type().is_socket() {
        let text = "there is a file of that name that is not a socket";
        return Err(Error::new(Kind::Exists, text)
            .on(path)
            .fix("Remove it, or use another path."));
    }
    let io = |e: Errno| Error::io("see who listens", path, e.into());
    let probe = unix_socket(SocketFlags::NONBLOCK).map_err(io)?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        // Connected, or refused only because too many others wait: somebody is there.
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS) => {
            return Err(
                Error::new(Kind::InUse, "the socket is already in use by a live server")
                    .on(path)
                    .fix("Stop that server, or use another path."),
            );
        }
        Err(e) => return Err(io(e)),
    }
    tracing::info!(path = %path.display(), "replacing a socket that nobody listens on");
    fs::remove_file(path).map_err(|e| Error::io("remove", path, e))
}

/// Listens on every address that `address` ("HOST:PORT", IPv6 in brackets) stands for. May block
/// while the name is looked up. Without `insecure`, only loopback addresses are accepted.
pub(crate) fn tcp(address: &str, insecure: bool) -> Result<Vec<(SocketAddr, Listener)>> {
    let found = address.to_socket_addrs().map_err(|e| {
        Error::invalid(format!("'{address}' is not an address"))
            .caused_by(e)
            .fix("Write HOST:PORT, for example 127.0.0.1:10809 or [::1]:10809.")
    })?;
    let mut found: Vec<_> = found.collect();
    found.sort();
    found.dedup();
    if found.is_empty() {
        return Err(Error::invalid(format!("'{address}' stands for no address")));
    }
    for a in &found {
        check_exposure(*a, insecure)?;
    }
    let mut listeners = Vec::new();
    for a in found {
        let failed = |e: io::Error| {
            let kind = match e.kind() {
                io::ErrorKind::AddrInUse => Kind::InUse,
                io::ErrorKind::PermissionDenied => Kind::Permission,
                _ => Kind::Io,
            };
            Error::new(kind, format!("listen on {a}")).caused_by(e)
        };
        let listener = TcpListener::bind(a).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        listeners.push((bound, Listener::Tcp(listener)));
    }
    Ok(listeners)
}

/// Refuses an address that other machines can reach, unless that was asked for.
pub(super) fn check_exposure(address: SocketAddr, insecure: bool) -> Result<()> {
    if insecure || address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    let text = format!(
        "other machines could connect to {address}, and this service has no encryption and asks \
         for no password"
    );
    Err(Error::new(Kind::Permission, text).fix(
        "Listen on a unix socket or on a loopback address (127.0.0.1, [::1]), or add \
         --insecure-listen if the network in front is trusted.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_socket_is_its_owners_alone_whatever_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = unix(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists(), "the file goes with the server");
    }

    #[test]
    fn a_live_server_is_left_alone_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = unix(&path).unwrap();
        let refused = unix(&path).unwrap_err();
        assert_eq!(refused.kind(), Kind::InUse);
        assert!(refused.to_string().contains("already in use"), "{refused}");
        UnixStream::connect(&path).unwrap();
        // A server that was killed leaves its file behind.
        let Listener::Unix(file, listener) = first else {
            panic!()
        };
        std::mem::forget(file);
        drop(listener);
        assert!(path.exists());
        let second = unix(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(second);
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, b"data").unwrap();
        assert_eq!(unix(&path).unwrap_err().kind(), Kind::Exists);
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn dropping_leaves_the_socket_of_a_successor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = unix(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        let second = unix(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
    }

    #[test]
    fn paths_that_no_client_could_name_are_refused() {
        for path in [
            PathBuf::new(),
            PathBuf::from("/tmp/".to_string() + &"x".repeat(103)),
        ] {
            assert_eq!(unix(&path).unwrap_err().kind(), Kind::Invalid);
        }
    }

    #[test]
    fn tcp_beyond_loopback_needs_a_word() {
        for address in [
            "0.0.0.0:0",
            "[::]:0",
            "192.0.2.1:10809",
            "[::ffff:192.0.2.1]:0",
        ] {
            let refused = tcp(address, false).unwrap_err();
            assert_eq!(refused.kind(), Kind::Permission, "{address}");
            assert!(
                refused.to_string().contains("--insecure-listen"),
                "{refused}"
            );
        }
        for address in ["127.0.0.1:0", "[::1]:0", "127.9.9.9:0", "localhost:0"] {
            let got = tcp(address, false).unwrap();
            assert!(got.iter().all(|(a, _)| a.port() != 0), "{address}");
        }
        assert_eq!(tcp("0.0.0.0:0", true).unwrap().len(), 1);
        assert_eq!(tcp("nonsense", false).unwrap_err().kind(), Kind::Invalid);
    }
}
