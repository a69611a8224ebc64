//! Clients that break the protocol, or break off: each is answered as the protocol says or cut, and
//! a good client beside them notices nothing.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nbd_server::session::{MAX_OPTION, MAX_OPTION_SKIP};
use nbd_server::wire::greeting::OPTION_MAGIC;
use nbd_server::wire::option::kind as opt;
use nbd_server::wire::option_reply::kind as answer;
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::kind;
use ploop_tests::client::{Ask, Client};
use ploop_tests::fsx::Rng;
use ploop_tests::server::{Bare, assert_acceptable, qemu_check};

/// A server with a client that must never notice anything.
struct Beside {
    bare: Bare,
    server: ploop_tests::store::Server,
    good: Client,
}

impl Beside {
    fn new() -> Beside {
        let bare = Bare::new("16M", &["-b", "128"]);
        let server = bare.serve(&[]);
        let mut good = Client::open(server.socket(), "root", Style::Structured);
        good.write(0, &[0x77; 8192]);
        Beside { bare, server, good }
    }

    fn socket(&self) -> &Path {
        self.server.socket()
    }

    /// The good client still works, and a new one is let in.
    fn unharmed(&mut self) {
        assert_eq!(self.good.read(0, 8192), [0x77; 8192]);
        let mut new = Client::open(self.socket(), "root", Style::Extended);
        assert_eq!(new.read(0, 512), [0x77; 512]);
    }

    fn end(mut self) {
        self.unharmed();
        self.server.stop();
        qemu_check(self.bare.image());
        assert_acceptable(self.bare.image(), false);
    }
}

/// An option's header alone.
fn header(option: u32, length: u32) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

#[test]
fn unknown_and_malformed_options_are_refused_and_the_handshake_goes_on() {
    let beside = Beside::new();
    let mut client = Client::connect(beside.socket());
    for option in [0, 4, 12, 4711, u32::MAX] {
        let refused = client.option(option, b"whatever");
        assert_eq!(
            (refused.len(), refused[0].0),
            (1, answer::ERR_UNSUP),
            "{option}"
        );
    }
    for (option, data) in [
        (opt::LIST, &b"data"[..]),
        (opt::STRUCTURED_REPLY, b"data"),
        (opt::GO, b""),
        (opt::GO, &[0, 0, 0, 200, b'x']),
        (opt::GO, &[0xff; 64]),
        (opt::INFO, &[0, 0, 0, 1, 0xff, 0, 0]),
        (opt::INFO, &[0, 0, 0, 0, 0xff, 0xff]),
        (opt::STARTTLS, b"now"),
    ] {
        let refused = client.option(option, data);
        assert_eq!(
            (refused.len(), refused[0].0),
            (1, answer::ERR_INVALID),
            "{option} {data:?}"
        );
    }
    client.option(opt::STRUCTURED_REPLY, &[]);
    for data in [
        &[][..],
        &[0xff; 40],
        &[0, 0, 0, 0, 0, 0, 0, 9],
        &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
    ] {
        let refused = client.option(opt::SET_META_CONTEXT, data);
        assert_eq!(
            (refused.len(), refused[0].0),
            (1, answer::ERR_INVALID),
            "{data:?}"
        );
    }
    client.go("root").unwrap();
    beside.end();
}

#[test]
fn an_oversize_option_is_skipped_and_a_huge_one_ends_the_session() {
    let beside = Beside::new();
    let mut client = Client::connect(beside.socket());
    let big = vec![0; MAX_OPTION as usize + 1];
    assert_eq!(client.option(opt::GO, &big)[0].0, answer::ERR_TOO_BIG);
    assert_eq!(client.option(4711, &big)[0].0, answer::ERR_UNSUP);
    let most = vec![0; MAX_OPTION_SKIP as usize];
    assert_eq!(client.option(opt::INFO, &most)[0].0, answer::ERR_TOO_BIG);
    client.go("root").unwrap();
    for length in [MAX_OPTION_SKIP + 1, 1 << 31, u32::MAX] {
        let mut client = Client::connect(beside.socket());
        client.socket.write_all(&header(opt::GO, length)).unwrap();
        assert!(client.is_closed(), "{length} bytes of data");
    }
    let mut client = Client::connect(beside.socket());
    client
        .socket
        .write_all(&header(opt::EXPORT_NAME, 5000))
        .unwrap();
    assert!(client.is_closed(), "EXPORT_NAME has no way to answer");
    beside.end();
}

#[test]
fn garbage_ends_the_session_wherever_it_comes() {
    let mut beside = Beside::new();
    let mut garbage = vec![0; 4096];
    Rng(1).fill(&mut garbage);
    // Instead of the client's flags.
    let mut raw = UnixStream::connect(beside.socket()).unwrap();
    raw.write_all(&[0xff; 64]).unwrap();
    let closed = |raw: &mut UnixStream| {
        let mut rest = Vec::new();
        // A reset is a close, too.
        drop(std::io::Read::read_to_end(raw, &mut rest));
        rest.len()
    };
    assert_eq!(closed(&mut raw), 18, "the greeting and no more");
    // Instead of an option.
    let mut client = Client::connect(beside.socket());
    client.socket.write_all(&garbage).unwrap();
    assert!(client.is_closed());
    // Instead of a request.
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let mut client = Client::open(beside.socket(), "root", style);
        client.socket.write_all(&garbage).unwrap();
        assert!(client.is_closed(), "{style:?}");
        // A request of another style is garbage.
        let mut client = Client::open(beside.socket(), "root", style);
        let other = if style == Style::Extended {
            Style::Simple
        } else {
            Style::Extended
        };
        let mut bytes = Vec::new();
        Ask::new(kind::READ, 0, 0..512).emit(other, 1, &mut bytes);
        client.socket.write_all(&bytes).unwrap();
        assert!(client.is_closed(), "{style:?}");
        beside.unharmed();
    }
    beside.end();
}

/// A client that goes away at every byte of a handshake and of a request.
#[test]
fn hanging_up_half_way_harms_nobody() {
    let mut beside = Beside::new();
    let mut handshake = vec![0, 0, 0, 3];
    handshake.extend(header(opt::STRUCTURED_REPLY, 0));
    let go = [0, 0, 0, 4, b'r', b'o', b'o', b't', 0, 0];
    handshake.extend(header(opt::GO, go.len() as u32));
    handshake.extend(go);
    for cut in 0..=handshake.len() {
        let mut raw = UnixStream::connect(beside.socket()).unwrap();
        raw.write_all(&handshake[..cut]).unwrap();
    }
    beside.unharmed();
    let mut write = Vec::new();
    Ask::write(0, 4096, &[0xee; 4096]).emit(Style::Structured, 1, &mut write);
    for cut in (0..28).chain([28, 29, 2000, write.len() - 1]) {
        let mut client = Client::open(beside.socket(), "root", Style::Structured);
        client.socket.write_all(&write[..cut]).unwrap();
        drop(client);
    }
    beside.unharmed();
    assert_eq!(
        beside.good.read(4096, 4096),
        [0x77; 4096],
        "half a write writes nothing"
    );
    // One that asks for much and takes none of it.
    let mut client = Client::open(beside.socket(), "root", Style::Simple);
    let mut bytes = Vec::new();
    for cookie in 0..64 {
        Ask::new(kind::READ, 0, 0..8 << 20).emit(Style::Simple, cookie, &mut bytes);
    }
    client.socket.write_all(&bytes).unwrap();
    beside.unharmed();
    drop(client);
    beside.end();
}

#[test]
fn random_bytes_after_every_prefix_of_a_session() {
    let mut beside = Beside::new();
    let mut rng = Rng(ploop_tests::fsx::env("PLOOP_SEED", 3));
    for round in 0..300 {
        let style = [Style::Simple, Style::Structured, Style::Extended][round % 3];
        let mut noise = vec![0; 1 + rng.below(300) as usize];
        rng.fill(&mut noise);
        let mut client = match rng.below(3) {
            0 => Client::connect(beside.socket()),
            _ => Client::open(beside.socket(), "root", style),
        };
        // A well-formed start makes the noise reach deeper.
        let mut bytes = Vec::new();
        match rng.below(3) {
            0 => {}
            1 => bytes.extend(header(1 + rng.below(11) as u32, noise.len() as u32)),
            _ => {
                let (kind, at) = (rng.below(9) as u16, rng.bits() >> 1);
                let kind = if kind == kind::WRITE {
                    kind::READ
                } else {
                    kind
                };
                // Reading only: what noise would write, nobody could check.
                let kind = if kind == kind::TRIM || kind == kind::WRITE_ZEROES {
                    9
                } else {
                    kind
                };
                Ask::new(kind, rng.below(64) as u16, at..at + 1).emit(style, 1, &mut bytes);
            }
        }
        bytes.extend(noise);
        // It may be cut in the middle of this.
        drop(client.socket.write_all(&bytes));
    }
    beside.unharmed();
    beside.end();
}
