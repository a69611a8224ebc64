//! Streams of OpenVZ's `ploop copy`, byte by byte.

use std::io::Write;
use std::ops::Range;

use md5::{Digest, Md5};
use ploop::Result;
use ploop::store::recording::RecordingStore;
use snapshots::Root;
use snapshots::stream::openvz::{self, Copied};

use crate::stream::on;

/// Types of packets.
pub const COMMAND: u32 = 1;
/// Data of the device.
pub const DEVICE: u32 = 3;

/// Commands.
pub const SYNC: u32 = 0;
/// A new ploop image.
pub const INIT: u32 = 2;
/// A new qcow2 image.
pub const INIT_QCOW2: u32 = 3;
/// Attach; sent by nobody.
pub const MOUNT: u32 = 4;
/// Detach.
pub const UMOUNT: u32 = 5;

/// A stream that is being written.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Packets have an MD5 from here on.
    pub md5: bool,
    /// Packets that are answered.
    pub answered: usize,
    heads: Vec<Range<usize>>,
    payloads: Vec<Range<usize>>,
}

impl Stream {
    /// One that begins with the handshake.
    pub fn new(md5: bool) -> Stream {
        let mut s = Stream::empty();
        s.packet(COMMAND, if md5 { 3 } else { 2 }, &SYNC.to_le_bytes());
        s.md5 = md5;
        s
    }

    /// One without anything.
    pub fn empty() -> Stream {
        Stream::default()
    }

    /// A packet of versions 8 and 9.
    pub fn packet(&mut self, kind: u32, pos: u64, payload: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend(0x4CC0_AC3Eu32.to_le_bytes());
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((payload.len() as u32).to_le_bytes());
        // What a C compiler leaves there.
        self.bytes.extend([0xA5; 4]);
        self.bytes.extend(pos.to_le_bytes());
        self.heads.push(start..self.bytes.len());
        if self.md5 {
            self.bytes.extend(&Md5::digest(payload)[..]);
        }
        let start = self.bytes.len();
        self.bytes.extend(payload);
        self.payloads.push(start..self.bytes.len());
        self.answered += usize::from(kind != 2);
    }

    /// A packet of version 7.
    pub fn old(&mut self, pos: u64, payload: &[u8]) {
        self.bytes.extend(0x4CC0_AC3Du32.to_le_bytes());
        self.bytes.extend((payload.len() as u32).to_le_bytes());
        self.bytes.extend(pos.to_le_bytes());
        self.bytes.extend(payload);
    }

    /// A new image: its cluster is said by the length of the payload.
    pub fn init(&mut self, cluster_sectors: u32, sectors: u64) {
        let mut payload = vec![0; cluster_sectors as usize];
        payload[..4].copy_from_slice(&INIT.to_le_bytes());
        self.packet(COMMAND, sectors, &payload);
    }

    /// Any other command.
    pub fn command(&mut self, command: u32) {
        self.packet(COMMAND, 0, &command.to_le_bytes());
    }

    /// The end.
    pub fn finish(&mut self) {
        self.packet(COMMAND, 0, &[]);
    }

    /// Its bytes, with this one where a C compiler leaves what it likes.
    pub fn with_gaps(&self, byte: u8) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for head in &self.heads {
            bytes[head.start + 12..head.start + 16].fill(byte);
        }
        bytes
    }

    /// Whether the byte is one of a head, which no MD5 covers.
    pub fn is_head(&self, at: usize) -> bool {
        self.heads.iter().any(|r| r.contains(&at))
    }

    /// Whether the byte is one of the upper ones of the new image's size.
    pub fn is_size(&self, at: usize) -> bool {
        let init = self.payloads.iter().position(|r| r.len() >= 64);
        init.is_some_and(|n| (self.heads[n].start + 18..self.heads[n].end).contains(&at))
    }

    /// Whether the byte is one of a payload, but for its first and last ones.
    pub fn is_inside(&self, at: usize) -> bool {
        let inside = |r: &Range<usize>| (r.start + 4..r.end.saturating_sub(1)).contains(&at);
        self.payloads.iter().any(inside)
    }
}

/// Receives a stream; and the bytes that were answered.
pub fn received(root: &Root, name: &str, stream: &[u8]) -> (Result<Copied>, Vec<u8>) {
    let mut replies = Vec::new();
    let done = openvz::receive(root, name, &mut { stream }, &mut replies, &|_, _| ());
    (done, replies)
}

/// Answers as numbers.
pub fn codes(replies: &[u8]) -> Vec<i32> {
    let (codes, rest) = replies.as_chunks::<4>();
    assert!(rest.is_empty());
    codes.iter().map(|c| i32::from_le_bytes(*c)).collect()
}

/// Clusters of [`as_file`], in bytes.
const CLUSTER: usize = 64 * 512;

/// A file as versions before 9 send it: whole, some of it again, its header closed at last.
pub fn as_file(file: &[u8], mut send: impl FnMut(u64, &[u8])) {
    let mut dirty = file[..4096].to_vec();
    dirty[44..48].copy_from_slice(&0x746F_6E59u32.to_le_bytes());
    send(0, &dirty);
    for (n, piece) in file.chunks(CLUSTER).enumerate().skip(1) {
        send((n * CLUSTER) as u64, piece);
    }
    send(4096, &file[4096..CLUSTER]);
    send(0, &file[..4096]);
}

/// Answers that are noted in the log when all of them are given.
struct Told<'a> {
    log: &'a RecordingStore,
    left: usize,
}

impl Write for Told<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.left -= buf.len();
        if self.left == 0 {
            self.log.mark(1);
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Receives a stream on a store that is recorded.
pub fn recorded(log: &RecordingStore, s: &Stream) -> Result<Copied> {
    let mut told = Told {
        log,
        left: 4 * s.answered,
    };
    let root = on(log.store());
    openvz::receive(&root, "dst", &mut &s.bytes[..], &mut told, &|_, _| ())
}
