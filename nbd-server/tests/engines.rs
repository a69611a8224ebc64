//! Every engine over real sockets, on a disk that takes its time.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use common::sleepy::Sleepy;
use common::{CLUSTER, Running, pattern};
use nbd_server::export::Single;
use nbd_server::wire::greeting::Greeting;
use nbd_server::wire::option::{self, InfoRequest};
use nbd_server::wire::reply::{Simple, Style};
use nbd_server::wire::request::{Request, kind};
use nbd_server::{Config, EngineKind};
use ploop::device::Device;

const SIZE: u64 = 16 << 20;
const DEFERRING: [EngineKind; 2] = [EngineKind::Portable, EngineKind::Uring];

struct Rig {
    device: Arc<Sleepy>,
    server: Running,
}

impl Rig {
    /// A server of a device that is filled, its first cluster cold.
    fn new(engine: EngineKind) -> Rig {
        let device = Sleepy::new(SIZE);
        device.write(0, &pattern(SIZE as usize, 3)).unwrap();
        device.mood.cold.lock().unwrap().push(0..CLUSTER);
        let exports = Arc::new(Single::new(device.clone(), "disk", "").unwrap());
        let config = Config {
            engine,
            ..Config::default()
        };
        let server = Running::start_as(exports, config, |_| ());
        Rig { device, server }
    }

    fn connect(&self) -> Client {
        let mut socket = UnixStream::connect(&self.server.socket).unwrap();
        socket.read_exact(&mut [0; Greeting::LEN]).unwrap();
        let (mut bytes, mut data) = (vec![0, 0, 0, 3], Vec::new());
        InfoRequest::emit("disk", &[], &mut data);
        option::emit(option::kind::GO, &data, &mut bytes);
        socket.write_all(&bytes).unwrap();
        // Replies of a magic number, the option, a kind and a length each; the last is an ACK.
        loop {
            let mut head = [0; 20];
            socket.read_exact(&mut head).unwrap();
            let length = u32::from_be_bytes(*head[16..].first_chunk().unwrap());
            socket.read_exact(&mut vec![0; length as usize]).unwrap();
            if head[12..16] == [0, 0, 0, 1] {
                break;
            }
        }
        Client {
            socket,
            unsent: Vec::new(),
            lengths: HashMap::new(),
            next: 0,
        }
    }

    /// Stops the server and looks for what it left.
    fn stop(self) {
        self.server.stop();
        assert_eq!(self.device.mood.leases.load(SeqCst), 0);
        assert_eq!(Arc::strong_count(&self.device), 1);
    }
}

/// Simple replies, in any order.
struct Client {
    socket: UnixStream,
    unsent: Vec<u8>,
    lengths: HashMap<u64, usize>,
    next: u64,
}

impl Client {
    fn ask(&mut self, kind: u16, offset: u64, length: u64, data: &[u8]) -> u64 {
        self.next += 1;
        let request = Request {
            flags: 0,
            kind,
            cookie: self.next,
            offset,
            length,
        };
        request.emit(Style::Simple, &mut self.unsent);
        self.unsent.extend_from_slice(data);
        let read = if kind == kind::READ { length } else { 0 };
        self.lengths.insert(self.next, read as usize);
        self.next
    }

    fn read(&mut self, offset: u64, length: u64) -> u64 {
        self.ask(kind::READ, offset, length, &[])
    }

    fn flush(&mut self) -> u64 {
        self.ask(kind::FLUSH, 0, 0, &[])
    }

    /// Sends what was asked, in one piece.
    fn send(&mut self) {
        self.socket.write_all(&self.unsent).unwrap();
        self.unsent.clear();
    }

    /// The next answer.
    fn answer(&mut self) -> (u64, Vec<u8>) {
        self.send();
        let mut bytes = [0; Simple::LEN];
        self.socket.read_exact(&mut bytes).unwrap();
        let reply = Simple::parse(&bytes).unwrap();
        assert_eq!(reply.error, 0);
        let length = self.lengths.remove(&reply.cookie);
        let mut data = vec![0; length.expect("an answer that nobody asked for")];
        self.socket.read_exact(&mut data).unwrap();
        (reply.cookie, data)
    }

    fn is_closed(&mut self) -> bool {
        self.socket.read(&mut [0]).unwrap() == 0
    }
}

fn disk(at: u64, len: usize) -> Vec<u8> {
    pattern(SIZE as usize, 3)[at as usize..at as usize + len].to_vec()
}

#[test]
fn what_is_cached_overtakes_what_is_not() {
    for engine in DEFERRING {
        let rig = Rig::new(engine);
        rig.device.mood.hold();
        let mut client = rig.connect();
        let cold = client.read(512, 4096);
        client.send();
        rig.device.mood.until_begun(1);
        for i in 1..20 {
            let warm = client.read(i * CLUSTER, 4096);
            assert_eq!(client.answer(), (warm, disk(i * CLUSTER, 4096)));
        }
        rig.device.mood.release();
        assert_eq!(client.answer(), (cold, disk(512, 4096)));
        rig.stop();
    }
}

#[test]
fn a_connection_that_waits_holds_up_no_other() {
    for engine in EngineKind::ALL {
        let rig = Rig::new(engine);
        rig.device.mood.hold();
        let (mut slow, mut slower, mut quick) = (rig.connect(), rig.connect(), rig.connect());
        let flush = slow.flush();
        let cold = slower.read(0, 4096);
        slow.send();
        slower.send();
        rig.device.mood.until_begun(2);
        for i in 1..20 {
            let warm = quick.read(i * CLUSTER, 4096);
            assert_eq!(quick.answer(), (warm, disk(i * CLUSTER, 4096)));
        }
        rig.device.mood.release();
        assert_eq!(slow.answer().0, flush);
        assert_eq!(slower.answer(), (cold, disk(0, 4096)));
        rig.stop();
    }
}

#[test]
fn stopping_answers_what_waits_for_the_disk() {
    for engine in EngineKind::ALL {
        let rig = Rig::new(engine);
        rig.device.mood.hold();
        let mut client = rig.connect();
        client.read(0, 4096);
        client.flush();
        client.read(CLUSTER, 4096);
        client.send();
        rig.device.mood.until_begun(1);
        let (path, mood) = (rig.server.socket.clone(), rig.device.mood.clone());
        let stopping = std::thread::spawn(move || rig.stop());
        while path.exists() {
            std::thread::yield_now();
        }
        mood.release();
        let mut cookies: Vec<_> = (0..3).map(|_| client.answer().0).collect();
        cookies.sort_unstable();
        assert_eq!(cookies, [1, 2, 3], "{engine}");
        assert!(client.is_closed());
        stopping.join().unwrap();
    }
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    for engine in EngineKind::ALL {
        let rig = Rig::new(engine);
        rig.device.mood.hold();
        let mut client = rig.connect();
        for i in 0..40 {
            client.read(i * 512, 4096);
            client.flush();
        }
        client.send();
        rig.device.mood.until_begun(1);
        drop(client);
        rig.device.mood.release();
        // Others are served as before.
        let mut next = rig.connect();
        next.read(CLUSTER, 512);
        assert_eq!(next.answer().1, disk(CLUSTER, 512));
        rig.stop();
    }
}

#[test]
fn a_client_that_takes_no_answers_holds_no_lease() {
    for engine in DEFERRING {
        for rings in [false, true] {
            let rig = Rig::new(engine);
            let mood = &rig.device.mood;
            mood.rings.store(rings, SeqCst);
            mood.cold.lock().unwrap().push(0..SIZE / 2);
            let mut client = rig.connect();
            for i in 0..200 {
                client.read((i % 16) << 20, 1 << 20);
            }
            client.send();
            let full = |seen: usize| {
                std::thread::sleep(std::time::Duration::from_millis(20));
                let now = mood.begun.load(SeqCst);
                (now, now == seen && mood.leases.load(SeqCst) == 0)
            };
            let (mut seen, mut ended) = (usize::MAX, false);
            while !ended {
                (seen, ended) = full(seen);
            }
            drop(client);
            rig.stop();
        }
    }
}

#[test]
fn a_client_that_only_listens_any_more_gets_its_answers() {
    for engine in EngineKind::ALL {
        let rig = Rig::new(engine);
        rig.device.mood.hold();
        let mut client = rig.connect();
        client.read(0, 8192);
        client.read(CLUSTER, 8192);
        client.flush();
        client.send();
        client.socket.shutdown(Shutdown::Write).unwrap();
        rig.device.mood.until_begun(1);
        rig.device.mood.release();
        let answers: HashMap<_, _> = (0..3).map(|_| client.answer()).collect();
        assert_eq!(answers[&1], disk(0, 8192));
        assert_eq!(answers[&2], disk(CLUSTER, 8192));
        assert!(client.is_closed());
        rig.stop();
    }
}

#[test]
fn many_connections_with_many_requests_each_lose_nothing() {
    for engine in EngineKind::ALL {
        let rig = Rig::new(engine);
        let mood = &rig.device.mood;
        mood.rings.store(true, SeqCst);
        *mood.cold.lock().unwrap() = (0..16).map(|i| i << 20..(i << 20) + 300_000).collect();
        std::thread::scope(|s| {
            for part in 0..4u64 {
                let mut client = rig.connect();
                s.spawn(move || {
                    let base = part * (SIZE / 4);
                    for round in 0..30u8 {
                        let data = pattern(65_536, round);
                        let at = base + u64::from(round) * 70_000;
                        let write = client.ask(kind::WRITE, at, 65_536, &data);
                        while client.answer().0 != write {}
                        let mut wanted = HashMap::new();
                        for i in 0..32u64 {
                            let (from, len) = (at + i * 1000, 4096 + i * 900);
                            let have = data[(i * 1000) as usize..].to_vec();
                            wanted.insert(client.read(from, len), have);
                            if i % 8 == 7 {
                                wanted.insert(client.flush(), Vec::new());
                            }
                        }
                        for _ in 0..36 {
                            let (cookie, got) = client.answer();
                            let have = wanted.remove(&cookie).unwrap();
                            let both = have.len().min(got.len());
                            assert!(got[..both] == have[..both], "{engine} {part} {round}");
                        }
                        assert!(wanted.is_empty());
                    }
                });
            }
        });
        rig.stop();
    }
}
