//! Gives the kernel's NBD driver connections over netlink: what `nbd-client` does, and what it
//! cannot, a device that waits for its server to come back. Runs in the guest (`tests/guest`).
//!
//!     kernel_nbd connect NUMBER SOCKET EXPORT CONNECTIONS TIMEOUT DEAD
//!     kernel_nbd reconnect NUMBER SOCKET EXPORT CONNECTIONS
//!     kernel_nbd resize NUMBER SOCKET EXPORT
//!
//! NUMBER is that of /dev/nbdNUMBER. A request that has no answer after TIMEOUT seconds goes to
//! another connection; without any, requests wait DEAD seconds for `reconnect`. `resize` gives the
//! device the size that the export has now; its connections stay. All need the module `nbd`.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]
#![allow(
    clippy::host_endian_bytes,
    reason = "netlink is in the order of the host"
)]

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nbd_server::wire::greeting::{ClientFlags, Greeting};
use nbd_server::wire::option::{self, kind as opt};
use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

/// Message types of netlink, and its flags.
const ERROR: u16 = 2;
const CONTROL: u16 = 0x10;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;

/// The family `nlctrl`: asking for another family's number.
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// The family `nbd` (linux/nbd-netlink.h).
const CONNECT: u8 = 1;
const RECONFIGURE: u8 = 3;
const INDEX: u16 = 1;
const SIZE: u16 = 2;
const BLOCK_SIZE: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_TIMEOUT: u16 = 8;
const SOCKET_ITEM: u16 = 1;
const SOCKET_FD: u16 = 1;
const NESTED: u16 = 1 << 15;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (command, number, socket, export, connections, times) = match args[..] {
        ["connect", n, socket, export, c, timeout, dead] => {
            (CONNECT, n, socket, export, c, Some((timeout, dead)))
        }
        ["reconnect", n, socket, export, c] => (RECONFIGURE, n, socket, export, c, None),
        ["resize", n, socket, export] => return resize(n, socket, export),
        _ => panic!("usage: see the top of tests/src/bin/kernel_nbd.rs"),
    };
    let connections: usize = connections.parse().unwrap();
    let open: Vec<Open> = (0..connections).map(|_| open(socket, export)).collect();

    let mut body = Vec::new();
    attribute(
        INDEX,
        &number.parse::<u32>().unwrap().to_ne_bytes(),
        &mut body,
    );
    let long = |kind, value: u64, body: &mut Vec<u8>| attribute(kind, &value.to_ne_bytes(), body);
    if let Some((timeout, dead)) = times {
        long(SIZE, open[0].size, &mut body);
        long(BLOCK_SIZE, 4096, &mut body);
        long(SERVER_FLAGS, u64::from(open[0].flags), &mut body);
        long(TIMEOUT, timeout.parse().unwrap(), &mut body);
        long(DEAD_TIMEOUT, dead.parse().unwrap(), &mut body);
    }
    let mut sockets = Vec::new();
    for one in &open {
        let mut item = Vec::new();
        attribute(SOCKET_FD, &one.socket.as_raw_fd().to_ne_bytes(), &mut item);
        attribute(SOCKET_ITEM | NESTED, &item, &mut sockets);
    }
    attribute(SOCKETS | NESTED, &sockets, &mut body);

    let kernel = Netlink::open();
    let family = kernel.family("nbd");
    kernel.ask(family, command, &body);
}

fn resize(number: &str, socket: &str, export: &str) {
    let mut body = Vec::new();
    let number: u32 = number.parse().unwrap();
    attribute(INDEX, &number.to_ne_bytes(), &mut body);
    let now = open(socket, export);
    attribute(SIZE, &now.size.to_ne_bytes(), &mut body);
    let kernel = Netlink::open();
    let family = kernel.family("nbd");
    kernel.ask(family, RECONFIGURE, &body);
}

/// A connection that is in transmission.
struct Open {
    socket: UnixStream,
    size: u64,
    flags: u16,
}

/// Opens `export`, by the old end of the handshake: it tells size and flags in one.
fn open(path: &str, export: &str) -> Open {
    let mut socket = UnixStream::connect(path).unwrap();
    let mut greeting = [0; Greeting::LEN];
    socket.read_exact(&mut greeting).unwrap();
    Greeting::parse(&greeting).unwrap();
    let mut out = Vec::new();
    // FIXED_NEWSTYLE and NO_ZEROES.
    ClientFlags(3).emit(&mut out);
    option::emit(opt::EXPORT_NAME, export.as_bytes(), &mut out);
    socket.write_all(&out).unwrap();
    let (mut size, mut flags) = ([0; 8], [0; 2]);
    socket.read_exact(&mut size).unwrap();
    socket.read_exact(&mut flags).unwrap();
    Open {
        socket,
        size: u64::from_be_bytes(size),
        flags: u16::from_be_bytes(flags),
    }
}

/// Appends an attribute: its length, its kind, its bytes, padded to a multiple of 4.
fn attribute(kind: u16, bytes: &[u8], out: &mut Vec<u8>) {
    out.extend((bytes.len() as u16 + 4).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A socket of generic netlink.
struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> Netlink {
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        Netlink(socket_with(family, kind, SocketFlags::CLOEXEC, Some(GENERIC)).unwrap())
    }

    /// The number of a family.
    fn family(&self, name: &str) -> u16 {
        let mut body = Vec::new();
        attribute(FAMILY_NAME, format!("{name}\0").as_bytes(), &mut body);
        let answer = self.ask(CONTROL, GET_FAMILY, &body);
        let mut rest = answer.get(20..).unwrap_or_default();
        while rest.len() >= 4 {
            let word = |at| u16::from_ne_bytes([rest[at], rest[at + 1]]);
            if word(2) == FAMILY_ID {
                return word(4);
            }
            rest = rest
                .get(usize::from(word(0)).next_multiple_of(4)..)
                .unwrap();
        }
        panic!("the kernel does not know the family {name}: is the module loaded?");
    }

    /// Sends a command; what came before its acknowledgement. Panics with the kernel's error.
    fn ask(&self, family: u16, command: u8, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend((20 + body.len() as u32).to_ne_bytes());
        out.extend(family.to_ne_bytes());
        out.extend((REQUEST | ACKNOWLEDGE).to_ne_bytes());
        // Sequence and port: one question is under way at a time.
        out.extend([0; 8]);
        out.extend([command, 1, 0, 0]);
        out.extend(body);
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(&self.0, &out, SendFlags::empty(), &kernel).unwrap();
        let mut data = Vec::new();
        loop {
            let mut buf = [0; 8192];
            let (got, _) = recv(&self.0, &mut buf, RecvFlags::empty()).unwrap();
            let answer = &buf[..got];
            if u16::from_ne_bytes([answer[4], answer[5]]) != ERROR {
                data = answer.to_vec();
                continue;
            }
            let number = i32::from_ne_bytes(*answer[16..].first_chunk().unwrap());
            let error = std::io::Error::from_raw_os_error(-number);
            assert!(number == 0, "the kernel refuses command {command}: {error}");
            return data;
        }
    }
}
