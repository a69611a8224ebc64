//! Packets, and what is refused of them before anything is done.

use std::io::{self, ErrorKind, Read, Write};

use md5::{Digest, Md5};
use ploop::error::{Error, Kind, Result};

/// Of versions 8 and 9.
pub(super) const MARKER: u32 = 0x4CC0_AC3E;
/// Of versions 6 and 7.
pub(super) const MARKER_OLD: u32 = 0x4CC0_AC3D;

pub(super) const DATA: u32 = 0;
pub(super) const COMMAND: u32 = 1;
pub(super) const DATA_ASYNC: u32 = 2;
pub(super) const DEVICE: u32 = 3;
pub(super) const CBT: u32 = 4;

pub(super) const SYNC: u32 = 0;
pub(super) const INIT: u32 = 2;
pub(super) const INIT_QCOW2: u32 = 3;
pub(super) const UMOUNT: u32 = 5;

pub(super) const FEATURE_MD5: u64 = 1;
pub(super) const FEATURE_DEVICE: u64 = 2;

/// Bytes of a payload at most: the largest cluster that OpenVZ has. None is in memory as a whole.
pub(super) const PAYLOAD_MAX: u32 = 64 << 20;
/// Bytes of it that are handled at a time.
const PIECE: usize = 64 << 10;

/// A packet whose payload was not read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    pub(super) old: bool,
    pub(super) kind: u32,
    pub(super) size: u32,
    pub(super) pos: u64,
    md5: Option<[u8; 16]>,
}

/// What comes.
pub(super) struct Input<'a> {
    input: &'a mut dyn Read,
    buf: Vec<u8>,
    /// Which of the two formats it is; the first packet says so.
    old: Option<bool>,
    pub(super) md5: bool,
    pub(super) bytes: u64,
    /// It ended too early, or reading failed: nobody waits for an answer.
    pub(super) is_cut: bool,
}

impl<'a> Input<'a> {
    pub(super) fn new(input: &'a mut dyn Read) -> Input<'a> {
        Input {
            input,
            buf: vec![0; PIECE],
            old: None,
            md5: false,
            bytes: 0,
            is_cut: false,
        }
    }

    /// The error for what no sender sends.
    pub(super) fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::corrupt(format!("{what}, up to byte {} of the stream", self.bytes))
            .on("stream")
            .fix("Send it again")
    }

    /// The next packet. The versions do not mix.
    pub(super) fn packet(&mut self) -> Result<Packet> {
        let marker = self.number()?;
        let old = match marker {
            MARKER => false,
            MARKER_OLD => true,
            other => {
                let what = format!("{other:#010x} where a packet of `ploop copy` begins");
                return Err(self.wrong(what));
            }
        };
        if *self.old.get_or_insert(old) != old {
            return Err(self.wrong("a packet of another version of `ploop copy`"));
        }
        let kind = if old { DATA } else { self.number()? };
        let size = self.number()?;
        if !old {
            self.number()?;
        }
        let mut pos = [0; 8];
        self.exact(&mut pos)?;
        let md5 = match self.md5 {
            true => {
                let mut md5 = [0; 16];
                self.exact(&mut md5)?;
                Some(md5)
            }
            false => None,
        };
        if size > PAYLOAD_MAX {
            let what = format!("a packet of {size} bytes; {PAYLOAD_MAX} are the most");
            return Err(self.wrong(what));
        }
        Ok(Packet {
            old,
            kind,
            size,
            pos: u64::from_le_bytes(pos),
            md5,
        })
    }

    /// Hands the payload to `sink` in pieces, each with its place in it, and holds it to its MD5
    /// after the last: what was done with it is not to be believed before.
    pub(super) fn payload(
        &mut self,
        packet: &Packet,
        sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut md5 = packet.md5.map(|_| Md5::new());
        let (mut at, size) = (0, packet.size as usize);
        let mut buf = std::mem::take(&mut self.buf);
        while at < size {
            let piece = &mut buf[..PIECE.min(size - at)];
            self.exact(piece)?;
            if let Some(md5) = &mut md5 {
                md5.update(&*piece);
            }
            sink(at as u64, piece)?;
            at += piece.len();
        }
        self.buf = buf;
        if let (Some(md5), Some(said)) = (md5, packet.md5)
            && md5.finalize()[..] != said
        {
            return Err(self.wrong("a packet whose MD5 is another one"));
        }
        Ok(())
    }

    fn number(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.exact(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn exact(&mut self, buf: &mut [u8]) -> Result<()> {
        let read = self.input.read_exact(buf);
        self.is_cut = read.is_err();
        read.map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => self.wrong("the stream was cut"),
            _ => Error::io("read", "stream", e),
        })?;
        self.bytes += buf.len() as u64;
        Ok(())
    }
}

/// The exit code by which OpenVZ's tool knows an error.
pub(super) fn code(e: &Error) -> i32 {
    match e.kind() {
        Kind::Io | Kind::NoSpace => 7,
        Kind::Corrupt => 13,
        _ => 38,
    }
}

/// Writes an answer.
pub(super) fn answer(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    let written = out.write_all(bytes).and_then(|()| out.flush());
    written.map_err(|e| match e.kind() {
        // Not as one of a pipe: it has not enough of our output, it is gone.
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Error::new(
            Kind::Io,
            "the sender closed the stream before it was answered",
        )
        .fix("What it said tells why"),
        _ => Error::io("answer", "the sender", e),
    })
}

/// The bytes before a payload.
pub(super) fn head(kind: u32, size: u32, pos: u64) -> [u8; 24] {
    let mut head = [0; 24];
    head[..4].copy_from_slice(&MARKER.to_le_bytes());
    head[4..8].copy_from_slice(&kind.to_le_bytes());
    head[8..12].copy_from_slice(&size.to_le_bytes());
    head[16..].copy_from_slice(&pos.to_le_bytes());
    head
}

/// Where packets go, and their answers come from.
pub(super) struct Output<'a> {
    pub(super) out: &'a mut dyn Write,
    pub(super) replies: &'a mut dyn Read,
    pub(super) md5: bool,
    pub(super) bytes: u64,
}

impl Output<'_> {
    /// Sends one packet and waits for its answer.
    pub(super) fn packet(&mut self, kind: u32, pos: u64, payload: &[u8]) -> Result<i32> {
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if size > PAYLOAD_MAX {
            return Err(Error::invalid(format!("a packet of {size} bytes")));
        }
        self.write(&head(kind, size, pos))?;
        if self.md5 {
            self.write(&Md5::digest(payload))?;
        }
        self.write(payload)?;
        self.out.flush().map_err(gone)?;
        let mut reply = [0; 4];
        self.replies.read_exact(&mut reply).map_err(gone)?;
        Ok(i32::from_le_bytes(reply))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(gone)
    }
}

fn gone(e: io::Error) -> Error {
    match e.kind() {
        // Not as one of a pipe: whoever reads the stream has not enough of it.
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => Error::new(
            Kind::Io,
            "the receiver closed the stream before its end",
        )
        .fix(
            "What it said tells why. Its answers are read from standard output if that is a socket, \
             else from standard input",
        ),
        _ => Error::io("talk to the receiver", "stream", e),
    }
}
