//! The server over real sockets: what a client sees, and what it cannot do.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{FileDevice, Running, pattern};
use nbd_server::export::Single;
use nbd_server::wire::greeting::Greeting;
use nbd_server::wire::option::{self, InfoRequest};
use nbd_server::wire::reply::{Simple, Style};
use nbd_server::wire::request::{Request, kind};
use nbd_server::wire::{greeting, option_reply};
use nbd_server::{Config, ExportInfo, Exports, OpenExport, Server};
use ploop::device::{Device, Extent, ReadLease, Segment, WriteLease, WriteSegment, ZeroMode};

const SIZE: u64 = 16 << 20;

fn disk() -> (Arc<FileDevice>, Arc<Single>) {
    let device = FileDevice::temporary(SIZE);
    let single = Single::new(device.clone(), "disk", "").unwrap();
    (device, Arc::new(single))
}

fn request<S: Write>(socket: &mut S, kind: u16, offset: u64, length: u64, data: &[u8]) {
    let mut bytes = Vec::new();
    let request = Request {
        flags: 0,
        kind,
        cookie: offset,
        offset,
        length,
    };
    request.emit(Style::Simple, &mut bytes);
    bytes.extend_from_slice(data);
    socket.write_all(&bytes).unwrap();
}

fn reply<S: Read>(socket: &mut S) -> Simple {
    let mut bytes = [0; Simple::LEN];
    socket.read_exact(&mut bytes).unwrap();
    Simple::parse(&bytes).unwrap()
}

/// Negotiates with GO; simple replies.
fn go(socket: &mut (impl Read + Write), name: &str) {
    let mut greeting = [0; Greeting::LEN];
    socket.read_exact(&mut greeting).unwrap();
    let (mut bytes, mut data) = (vec![0, 0, 0, 3], Vec::new());
    InfoRequest::emit(name, &[], &mut data);
    option::emit(option::kind::GO, &data, &mut bytes);
    socket.write_all(&bytes).unwrap();
    loop {
        let mut header = [0; option_reply::Header::LEN];
        socket.read_exact(&mut header).unwrap();
        let header = option_reply::Header::parse(&header).unwrap();
        socket
            .read_exact(&mut vec![0; header.length as usize])
            .unwrap();
        if header.kind == option_reply::kind::ACK {
            return;
        }
        assert_eq!(header.kind, option_reply::kind::INFO);
    }
}

fn connect(server: &Running) -> UnixStream {
    let mut socket = UnixStream::connect(&server.socket).unwrap();
    go(&mut socket, "");
    socket
}

/// True when the server has closed the socket. A reset counts: it is no answer.
fn is_closed(socket: &mut UnixStream) -> bool {
    !matches!(socket.read(&mut [0]), Ok(n) if n > 0)
}

#[test]
fn an_independent_client_over_unix_tcp_and_ipv6() {
    let (_, exports) = disk();
    let mut addresses = Vec::new();
    let server = Running::start_with(exports, Config::default(), |server| {
        addresses.extend(server.listen_tcp("127.0.0.1:0", false).unwrap());
        addresses.extend(server.listen_tcp("[::1]:0", false).unwrap());
    });
    fn session(mut socket: impl Read + Write, seed: u8, at: u64) {
        let export = nbd::client::handshake(&mut socket, b"disk").unwrap();
        assert_eq!(export.size, SIZE);
        let mut client = nbd::client::NbdClient::new(&mut socket, &export);
        client.seek(SeekFrom::Start(at)).unwrap();
        client.write_all(&pattern(300_000, seed)).unwrap();
        client.flush().unwrap();
        client.seek(SeekFrom::Start(at)).unwrap();
        let mut back = vec![0; 300_000];
        client.read_exact(&mut back).unwrap();
        assert!(back == pattern(300_000, seed));
    }
    session(UnixStream::connect(&server.socket).unwrap(), 1, 0);
    for (i, address) in addresses.iter().enumerate() {
        session(
            TcpStream::connect(address).unwrap(),
            2 + i as u8,
            (i as u64 + 1) << 20,
        );
    }
    assert_eq!(addresses.len(), 2);
    assert!(matches!(addresses[1], SocketAddr::V6(_)));
    server.stop();
}

#[test]
fn connections_see_each_others_writes_and_one_flush_covers_all() {
    let (device, exports) = disk();
    let server = Running::start(exports, Config::default());
    std::thread::scope(|scope| {
        for n in 0..8u64 {
            let server = &server;
            scope.spawn(move || {
                let mut socket = connect(server);
                for i in 0..16 {
                    let at = (i * 8 + n) * 4096;
                    request(&mut socket, kind::WRITE, at, 4096, &[n as u8 + 1; 4096]);
                    assert_eq!(reply(&mut socket).error, 0);
                }
            });
        }
    });
    let mut socket = connect(&server);
    request(&mut socket, kind::FLUSH, 0, 0, &[]);
    assert_eq!(reply(&mut socket).error, 0);
    assert_eq!(device.flushes.load(Ordering::SeqCst), 1);
    for block in 0..128u64 {
        request(&mut socket, kind::READ, block * 4096, 4096, &[]);
        assert_eq!(reply(&mut socket).error, 0);
        let mut data = [0; 4096];
        socket.read_exact(&mut data).unwrap();
        assert_eq!(data, [(block % 8) as u8 + 1; 4096]);
    }
}

#[test]
fn a_client_that_says_nothing_is_sent_away() {
    let (_, exports) = disk();
    let config = Config {
        handshake_timeout: Duration::from_secs(3),
        ..Config::default()
    };
    let server = Running::start(exports, config);
    let mut silent = UnixStream::connect(&server.socket).unwrap();
    let mut got = Vec::new();
    silent.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), Greeting::LEN);
    // One that drips is no better off.
    let mut slow = UnixStream::connect(&server.socket).unwrap();
    slow.read_exact(&mut [0; Greeting::LEN]).unwrap();
    while slow.write_all(&[0]).is_ok() {
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn one_too_many_waits_for_its_turn() {
    let (_, exports) = disk();
    let server = Running::start(
        exports,
        Config {
            max_connections: 1,
            ..Config::default()
        },
    );
    let first = connect(&server);
    let mut second = UnixStream::connect(&server.socket).unwrap();
    second
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    assert!(second.read(&mut [0]).is_err(), "not even a greeting yet");
    second.set_read_timeout(None).unwrap();
    drop(first);
    go(&mut second, "disk");
}

#[test]
fn a_client_that_breaks_the_protocol_harms_only_itself() {
    let (_, exports) = disk();
    let server = Running::start(exports, Config::default());
    let mut good = connect(&server);
    let mut bad = connect(&server);
    bad.write_all(&[0xff; 64]).unwrap();
    assert!(is_closed(&mut bad));
    let mut bad = UnixStream::connect(&server.socket).unwrap();
    bad.read_exact(&mut [0; Greeting::LEN]).unwrap();
    bad.write_all(&[0xff; 64]).unwrap();
    assert!(is_closed(&mut bad));
    request(&mut good, kind::READ, 0, 512, &[]);
    assert_eq!(reply(&mut good).error, 0);
}

#[test]
fn requests_sent_with_the_last_option_are_not_lost() {
    let (_, exports) = disk();
    let server = Running::start(exports, Config::default());
    let mut socket = UnixStream::connect(&server.socket).unwrap();
    let mut bytes = vec![0, 0, 0, 3];
    option::emit(option::kind::EXPORT_NAME, b"disk", &mut bytes);
    let write = Request {
        flags: 0,
        kind: kind::WRITE,
        cookie: 1,
        offset: 0,
        length: 4096,
    };
    write.emit(Style::Simple, &mut bytes);
    bytes.extend([7; 4096]);
    socket.write_all(&bytes).unwrap();
    socket.read_exact(&mut [0; Greeting::LEN]).unwrap();
    let mut answer = [0; 10];
    socket.read_exact(&mut answer).unwrap();
    let export = greeting::ExportReply::parse(&answer, false).unwrap();
    assert_eq!(export.size, SIZE);
    assert_eq!(
        reply(&mut socket),
        Simple {
            error: 0,
            cookie: 1
        }
    );
}

#[test]
fn stopping_answers_what_came_closes_and_lets_the_device_go() {
    let (device, exports) = disk();
    let server = Running::start(exports.clone(), Config::default());
    let (path, mut idle, mut busy) = (server.socket.clone(), connect(&server), connect(&server));
    let mut waiting = UnixStream::connect(&path).unwrap();
    waiting.read_exact(&mut [0; Greeting::LEN]).unwrap();
    request(&mut busy, kind::WRITE, 0, 4096, &[9; 4096]);
    assert_eq!(reply(&mut busy).error, 0);
    server.stop();
    for socket in [&mut idle, &mut busy, &mut waiting] {
        assert!(is_closed(socket));
    }
    assert!(!path.exists());
    drop(exports);
    assert_eq!(
        Arc::strong_count(&device),
        1,
        "nobody holds the device any more"
    );
    let mut back = [0; 4096];
    device.read(0, &mut back).unwrap();
    assert_eq!(back, [9; 4096]);
}

#[test]
fn stopping_does_not_wait_for_a_client_that_takes_no_answers() {
    let (_, exports) = disk();
    let config = Config {
        stop_grace: Duration::from_millis(200),
        ..Config::default()
    };
    let server = Running::start(exports, config);
    let mut socket = connect(&server);
    socket
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut bytes = Vec::new();
    let read = Request {
        flags: 0,
        kind: kind::READ,
        cookie: 1,
        offset: 0,
        length: SIZE,
    };
    for _ in 0..64 {
        read.emit(Style::Simple, &mut bytes);
    }
    socket.write_all(&bytes).unwrap();
    server.stop();
}

/// Opens block until released; "quick" does not.
#[derive(Debug)]
struct Hanging(Arc<Single>, AtomicBool);

impl Exports for Hanging {
    fn list(&self) -> ploop::Result<Vec<ExportInfo>> {
        self.0.list()
    }
    fn open(&self, name: &str) -> ploop::Result<OpenExport> {
        while name == "slow" && !self.1.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.0.open("")
    }
}

#[test]
fn an_export_that_hangs_in_opening_holds_up_nobody_else() {
    let (_, single) = disk();
    let exports = Arc::new(Hanging(single, AtomicBool::new(false)));
    let config = Config {
        handshake_timeout: Duration::from_secs(3),
        ..Config::default()
    };
    let server = Running::start(exports.clone(), config);
    let mut slow = UnixStream::connect(&server.socket).unwrap();
    let mut bytes = vec![0, 0, 0, 3];
    option::emit(option::kind::EXPORT_NAME, b"slow", &mut bytes);
    slow.write_all(&bytes).unwrap();
    let mut quick = UnixStream::connect(&server.socket).unwrap();
    go(&mut quick, "quick");
    let mut got = Vec::new();
    slow.read_to_end(&mut got).unwrap();
    assert_eq!(
        got.len(),
        Greeting::LEN,
        "the deadline counts while an export is opened"
    );
    exports.1.store(true, Ordering::SeqCst);
}

/// A device with a defect: it panics.
#[derive(Debug)]
struct Panicking;

impl Device for Panicking {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
    fn cluster_bytes(&self) -> u64 {
        4096
    }
    fn map(&self, _: Range<u64>, _: &mut Vec<Segment>) -> ploop::Result<ReadLease> {
        panic!("a defect that the test made")
    }
    fn prepare(&self, _: Range<u64>, _: &mut Vec<WriteSegment>) -> ploop::Result<WriteLease> {
        panic!("a defect that the test made")
    }
    fn zero(&self, _: Range<u64>, _: ZeroMode) -> ploop::Result<()> {
        Ok(())
    }
    fn discard(&self, _: Range<u64>) -> ploop::Result<()> {
        Ok(())
    }
    fn flush(&self) -> ploop::Result<()> {
        Ok(())
    }
    fn allocation(&self, _: Range<u64>, _: usize, _: &mut Vec<Extent>) -> ploop::Result<()> {
        Ok(())
    }
}

#[test]
fn a_panic_ends_one_connection_and_not_the_server() {
    let exports = Single::new(Arc::new(Panicking), "disk", "").unwrap();
    let server = Running::start(Arc::new(exports), Config::default());
    let mut other = connect(&server);
    let mut socket = connect(&server);
    request(&mut socket, kind::READ, 0, 512, &[]);
    assert!(is_closed(&mut socket));
    request(&mut other, kind::TRIM, 0, 512, &[]);
    assert_eq!(reply(&mut other).error, 0);
    server.stop();
}

#[test]
fn a_server_without_a_place_to_listen_is_refused() {
    let (_, exports) = disk();
    assert!(Server::new(exports, Config::default()).run().is_err());
}

/// Runs itself again as a service with one passed socket, and stops it by signal.
#[test]
fn socket_activation_and_sigterm() {
    if std::env::var_os(SERVICE).is_some() {
        return activated_service();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("activated");
    let listener = UnixListener::bind(&path).unwrap();
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3<&0 0</dev/null";
    let me = std::env::current_exe().unwrap();
    let mut child = Command::new("sh")
        .args(["-c", script, "sh", me.to_str().unwrap()])
        .args(["--exact", "socket_activation_and_sigterm", "--nocapture"])
        .env(SERVICE, "1")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .spawn()
        .unwrap();
    let mut socket = UnixStream::connect(&path).unwrap();
    go(&mut socket, "disk");
    request(&mut socket, kind::READ, 0, 512, &[]);
    assert_eq!(reply(&mut socket).error, 0);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(
        path.exists(),
        "a socket that systemd made is not ours to remove"
    );
}

/// Set for the process that is the service of [`socket_activation_and_sigterm`].
const SERVICE: &str = "PLOOP_TEST_SERVICE";

fn activated_service() {
    let (_, exports) = disk();
    let mut server = Server::new(exports, Config::default());
    assert_eq!(server.listen_activated(false).unwrap(), 1);
    assert!(
        server.listen_activated(false).is_err(),
        "they can be taken once"
    );
    server.run().unwrap();
}
