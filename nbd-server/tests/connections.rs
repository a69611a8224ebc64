//! Who is connected is known, and can be made to let go.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use common::{FileDevice, Running};
use nbd_server::wire::greeting::Greeting;
use nbd_server::wire::option::{self, InfoRequest};
use nbd_server::{Config, Connections, ExportInfo, Exports, OpenExport};
use ploop::device::{Device, Extent, ReadLease, Segment, WriteLease, WriteSegment, ZeroMode};
use ploop::{Error, Kind, Result};

const LONG: Duration = Duration::from_secs(60);

/// Devices that are counted while they are held, and say on which thread they were let go.
#[derive(Debug, Default)]
struct Counted {
    open: Arc<AtomicUsize>,
    dropped: Arc<Mutex<Vec<ThreadId>>>,
    /// Opening `slow` waits for this.
    gate: Mutex<Option<Receiver<()>>>,
}

#[derive(Debug)]
struct Held(Arc<FileDevice>, Arc<AtomicUsize>, Arc<Mutex<Vec<ThreadId>>>);

impl Drop for Held {
    fn drop(&mut self) {
        self.2.lock().unwrap().push(std::thread::current().id());
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Device for Held {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn cluster_bytes(&self) -> u64 {
        self.0.cluster_bytes()
    }
    fn map(&self, r: std::ops::Range<u64>, s: &mut Vec<Segment>) -> Result<ReadLease> {
        self.0.map(r, s)
    }
    fn prepare(&self, r: std::ops::Range<u64>, s: &mut Vec<WriteSegment>) -> Result<WriteLease> {
        self.0.prepare(r, s)
    }
    fn commit(&self, lease: WriteLease) -> Result<()> {
        self.0.commit(lease)
    }
    fn zero(&self, r: std::ops::Range<u64>, mode: ZeroMode) -> Result<()> {
        self.0.zero(r, mode)
    }
    fn discard(&self, r: std::ops::Range<u64>) -> Result<()> {
        self.0.discard(r)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
    fn allocation(&self, r: std::ops::Range<u64>, n: usize, e: &mut Vec<Extent>) -> Result<()> {
        self.0.allocation(r, n, e)
    }
}

impl Exports for Counted {
    fn list(&self) -> Result<Vec<ExportInfo>> {
        Ok(Vec::new())
    }

    fn open(&self, name: &str) -> Result<OpenExport> {
        if name == "none" {
            return Err(Error::new(Kind::NotFound, "none"));
        }
        self.open.fetch_add(1, Ordering::SeqCst);
        let file = FileDevice::temporary(1 << 20);
        let device = Held(file, self.open.clone(), self.dropped.clone());
        if name == "slow"
            && let Some(gate) = self.gate.lock().unwrap().take()
        {
            gate.recv().unwrap();
        }
        Ok(OpenExport {
            gate: None,
            space: None,
            lives: None,
            device: Arc::new(device),
            name: name.strip_prefix("alias of ").unwrap_or(name).to_owned(),
            description: String::new(),
        })
    }
}

struct Rig {
    exports: Arc<Counted>,
    connections: Connections,
    running: Running,
}

impl Rig {
    fn new() -> Rig {
        let exports = Arc::new(Counted::default());
        let mut connections = None;
        let running = Running::start_with(exports.clone(), Config::default(), |server| {
            connections = Some(server.connections());
        });
        Rig {
            exports,
            connections: connections.unwrap(),
            running,
        }
    }

    /// A client that has gone as far as `kind` of that export.
    fn client(&self, kind: u32, name: &str) -> UnixStream {
        let mut socket = begin(&self.running.socket, kind, name);
        let mut magic = [0; 20];
        socket.read_exact(&mut magic).unwrap();
        socket
    }

    fn gate(&self) -> Sender<()> {
        let (gate, waits) = channel();
        *self.exports.gate.lock().unwrap() = Some(waits);
        gate
    }

    fn open(&self) -> usize {
        self.exports.open.load(Ordering::SeqCst)
    }

    fn wait_open(&self, count: usize) {
        let start = Instant::now();
        while self.open() != count {
            assert!(
                start.elapsed() < LONG,
                "{} are open, not {count}",
                self.open()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn wait_clients(&self, count: usize) {
        let start = Instant::now();
        while self.connections.list().len() != count {
            assert!(start.elapsed() < LONG);
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn begin(path: &Path, kind: u32, name: &str) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    let mut greeting = [0; Greeting::LEN];
    socket.read_exact(&mut greeting).unwrap();
    let (mut bytes, mut data) = (vec![0, 0, 0, 3], Vec::new());
    InfoRequest::emit(name, &[], &mut data);
    option::emit(kind, &data, &mut bytes);
    socket.write_all(&bytes).unwrap();
    socket
}

fn is_cut(mut socket: UnixStream) -> bool {
    let mut rest = Vec::new();
    // A reset is an end, too; a timeout is none.
    match socket.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn who_is_connected_is_known_and_ends_when_told() {
    let rig = Rig::new();
    let a: Vec<_> = (0..3).map(|_| rig.client(option::kind::GO, "a")).collect();
    let mut b = rig.client(option::kind::GO, "b");
    rig.wait_clients(4);
    let list = rig.connections.list();
    assert!(list.iter().all(|c| c.peer.contains("pid")), "{list:?}");
    assert_eq!(rig.connections.clients()["a"], 3);
    assert_eq!(rig.connections.end("a", LONG).unwrap(), 3);
    assert_eq!(rig.open(), 1, "nobody holds it any more");
    assert!(a.into_iter().all(is_cut));
    assert_eq!(rig.connections.end("a", LONG).unwrap(), 0);
    // The other one was not touched: it still answers.
    b.write_all(&[0; 1]).unwrap();
    let id = rig.connections.list()[0].id;
    rig.connections.end_id(id, LONG).unwrap();
    assert_eq!(rig.open(), 0);
    let gone = rig.connections.end_id(id, LONG).unwrap_err();
    assert_eq!(gone.kind(), Kind::NotFound);
    let names: Vec<_> = rig
        .connections
        .totals()
        .into_iter()
        .map(|(n, _)| n)
        .collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn a_handshake_that_holds_an_export_is_ended_too() {
    let rig = Rig::new();
    let info = rig.client(option::kind::INFO, "alias of a");
    rig.wait_open(1);
    assert!(rig.connections.list().is_empty(), "it uses nothing yet");
    assert_eq!(rig.connections.end("b", LONG).unwrap(), 0);
    assert_eq!(rig.connections.end("a", LONG).unwrap(), 1);
    assert_eq!(rig.open(), 0);
    assert!(is_cut(info));
    // One that was refused holds nothing.
    let none = rig.client(option::kind::INFO, "none");
    assert_eq!(rig.connections.end("none", LONG).unwrap(), 0);
    drop(none);
}

#[test]
fn an_export_that_is_being_opened_counts_as_held() {
    let rig = Rig::new();
    let gate = rig.gate();
    let slow = begin(&rig.running.socket, option::kind::GO, "slow");
    rig.wait_open(1);
    let held = rig.connections.end("slow", Duration::from_millis(20));
    assert_eq!(held.unwrap_err().kind(), Kind::InUse);
    gate.send(()).unwrap();
    rig.wait_open(0);
    assert!(is_cut(slow));
    // The place goes after the export: this waits for it, if it is still there.
    rig.connections.end("slow", LONG).unwrap();
    assert_eq!(rig.connections.end("slow", LONG).unwrap(), 0);
}

#[test]
fn an_export_is_never_let_go_on_the_thread_that_all_share() {
    let rig = Rig::new();
    for kind in [option::kind::INFO, option::kind::GO] {
        for _ in 0..20 {
            drop(rig.client(kind, "a"));
            // Gone before the answer can be read.
            drop(begin(&rig.running.socket, kind, "a"));
        }
    }
    rig.wait_open(0);
    let Rig {
        exports, running, ..
    } = rig;
    let shared = running.thread_id();
    running.stop();
    let dropped = exports.dropped.lock().unwrap();
    assert!(!dropped.is_empty());
    assert!(!dropped.contains(&shared));
}
