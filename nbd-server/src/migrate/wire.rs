//! The bytes of a move: frames, both ways, over a link that carries bytes.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 1 | type |
//! | 1 | 3 | 0 |
//! | 4 | 4 | bytes of the payload, [`PAYLOAD_MAX`] at most |
//! | 8 | 4 | CRC-32 of the frame's number (8 bytes, each way counted from 0), the 8 bytes before, and the payload |
//! | 12 | | the payload |
//!
//! All numbers are little-endian. What comes is not believed: a frame is taken when its checksum is
//! right, and its payload is read as it comes, not as its length says.

use std::io::{Read, Write};
use std::time::Duration;

use ploop::error::{Error, Kind, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use snapshots::moving::Luggage;
use snapshots::owner::{Answer, Verdict};
use snapshots::stream::Have;

use super::link::Link;
use crate::control::failure::kind_of;

/// Bytes of a payload, at most: one MiB of data and where it belongs.
pub(super) const PAYLOAD_MAX: usize = (1 << 20) + 64;
/// Bytes of runs that the destination takes: of the bits of all trackers; and of an image whose data
/// comes later, with those that it was told of since the last `Sync`.
pub(super) const RUNS_MAX: usize = 256 << 20;
/// The version of the protocol.
pub(super) const VERSION: u32 = 1;

const HEAD: usize = 12;
/// Bytes that are gathered before they are given to the link.
const GATHER: usize = 256 << 10;
/// Bytes that are asked for at a time.
const STEP: usize = 64 << 10;

/// A link.
pub(super) trait Duplex: Read + Write + Send {
    /// How long the other side may be silent from now on.
    fn be_patient(&mut self, silence: Duration);
}

impl Duplex for Link {
    fn be_patient(&mut self, silence: Duration) {
        self.set_patience(Some(silence));
    }
}

/// A link that is another's now.
struct Dead;

impl Read for Dead {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::NotConnected.into())
    }
}

impl Write for Dead {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::NotConnected.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Err(std::io::ErrorKind::NotConnected.into())
    }
}

impl Duplex for Dead {
    fn be_patient(&mut self, _: Duration) {}
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Type {
    /// To the destination: [`Hello`].
    Hello = 1,
    /// Bytes of a stream (`snapshots::stream`).
    Stream = 2,
    /// All of them came.
    StreamEnd = 3,
    /// A byte offset (8), and bytes.
    Data = 4,
    /// A byte offset (8), and a length (8): zeros.
    Zeros = 5,
    /// To be answered when all before it was done: `Synced`.
    Sync = 6,
    /// A tracker's id (16), and runs of its bits: byte offset (8), length (8) each.
    Bits = 7,
    /// All came. To be answered when it is durable: `Ready`.
    Prepare = 8,
    /// [`Verdict`]; to be answered: `Answer`.
    Says = 9,
    /// The source knows.
    Confirmed = 10,
    /// An image (16), and where it has data (byte offset (8), length (8) each): it comes later.
    Later = 11,
    /// All images were told of: the container is to be opened.
    Open = 12,
    /// An answer to `Want`: the bytes.
    Have = 13,
    /// To the source: [`Welcome`].
    Welcome = 32,
    /// The stream is a container.
    Received = 33,
    Synced = 34,
    Ready = 35,
    /// [`Answer`].
    Answer = 36,
    /// [`Refusal`]; nothing follows, unless it answers `Want`.
    Refused = 37,
    /// `Confirmed` was heard; nothing follows.
    Done = 38,
    /// An image (16), a byte offset (8), a length (8): to be answered: `Have`.
    Want = 39,
    /// Nothing is missing any more. To be answered: `Confirmed`.
    Whole = 40,
}

impl Type {
    const ALL: [Type; 22] = [
        Type::Hello,
        Type::Stream,
        Type::StreamEnd,
        Type::Data,
        Type::Zeros,
        Type::Sync,
        Type::Bits,
        Type::Prepare,
        Type::Says,
        Type::Confirmed,
        Type::Later,
        Type::Open,
        Type::Have,
        Type::Welcome,
        Type::Received,
        Type::Synced,
        Type::Ready,
        Type::Answer,
        Type::Refused,
        Type::Done,
        Type::Want,
        Type::Whole,
    ];
}

/// The first frame of a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Hello {
    pub(super) version: u32,
    /// The move.
    pub(super) id: String,
    /// What the container is, or is to be, called there.
    pub(super) name: String,
    pub(super) purpose: Purpose,
    /// The images' data comes later, when the container was taken.
    #[serde(default)]
    pub(super) later: bool,
    /// What moves beside the images.
    #[serde(default)]
    pub(super) luggage: Luggage,
}

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Purpose {
    /// To move the container.
    Move,
    /// To end a move that was cut.
    Settle,
}

/// What the destination says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Welcome {
    /// Templates that need not be sent.
    pub(super) have: Vec<Have>,
}

/// Why the destination does not go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Refusal {
    pub(super) kind: String,
    pub(super) what: String,
}

impl Refusal {
    pub(super) fn of(e: &Error) -> Refusal {
        Refusal {
            kind: e.kind().name().to_owned(),
            what: e.to_string(),
        }
    }
}

/// [`Verdict`] and [`Answer`] as they are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Said {
    Given,
    Aborted { epoch: u64 },
}

impl From<Verdict> for Said {
    fn from(v: Verdict) -> Said {
        match v {
            Verdict::Given => Said::Given,
            Verdict::Aborted(epoch) => Said::Aborted { epoch },
        }
    }
}

impl From<Said> for Verdict {
    fn from(s: Said) -> Verdict {
        match s {
            Said::Given => Verdict::Given,
            Said::Aborted { epoch } => Verdict::Aborted(epoch),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Answered {
    Taken { epoch: u64 },
    Needs { epoch: u64 },
    Dropped,
    Unknown,
}

impl From<Answer> for Answered {
    fn from(a: Answer) -> Answered {
        match a {
            Answer::Taken(epoch) => Answered::Taken { epoch },
            Answer::Needs(epoch) => Answered::Needs { epoch },
            Answer::Dropped => Answered::Dropped,
            Answer::Unknown => Answered::Unknown,
        }
    }
}

impl From<Answered> for Answer {
    fn from(a: Answered) -> Answer {
        match a {
            Answered::Taken { epoch } => Answer::Taken(epoch),
            Answered::Needs { epoch } => Answer::Needs(epoch),
            Answered::Dropped => Answer::Dropped,
            Answered::Unknown => Answer::Unknown,
        }
    }
}

/// One end.
pub(super) struct Wire {
    link: Box<dyn Duplex>,
    peer: String,
    out: Vec<u8>,
    sent: u64,
    got: u64,
    payload: Vec<u8>,
    /// Bytes that were given to the link.
    bytes: u64,
    broken: std::cell::Cell<bool>,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wire")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Wire {
    pub(super) fn new(link: Box<dyn Duplex>, peer: &str) -> Wire {
        Wire {
            link,
            peer: peer.to_owned(),
            out: Vec::new(),
            sent: 0,
            got: 0,
            payload: Vec::new(),
            bytes: 0,
            broken: std::cell::Cell::new(false),
        }
    }

    /// The link, for somebody else; this one is at its end.
    pub(super) fn take(&mut self) -> Wire {
        let dead = Wire::new(Box::new(Dead), &self.peer);
        std::mem::replace(self, dead)
    }

    /// How long the other side may be silent from now on.
    pub(super) fn be_patient(&mut self, silence: Duration) {
        self.link.be_patient(silence);
    }

    /// Who is at the other end.
    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// True when the link failed.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Bytes that were sent.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes + self.out.len() as u64
    }

    /// Sends a frame, at the latest with [`Wire::flush`].
    pub(super) fn send(&mut self, kind: Type, parts: &[&[u8]]) -> Result<()> {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        if len > PAYLOAD_MAX {
            let what = format!("a frame of {len} bytes; {PAYLOAD_MAX} are possible");
            return Err(Error::invalid(what));
        }
        let head = self.out.len();
        self.out.extend([kind as u8, 0, 0, 0]);
        self.out.extend((len as u32).to_le_bytes());
        let mut sum = crc32fast::Hasher::new();
        sum.update(&self.sent.to_le_bytes());
        sum.update(&self.out[head..]);
        parts.iter().for_each(|p| sum.update(p));
        self.out.extend(sum.finalize().to_le_bytes());
        parts.iter().for_each(|p| self.out.extend_from_slice(p));
        self.sent += 1;
        match self.out.len() >= GATHER {
            true => self.give(),
            false => Ok(()),
        }
    }

    /// Sends a frame with a record, and all before it.
    pub(super) fn say<T: Serialize>(&mut self, kind: Type, record: &T) -> Result<()> {
        let json = serde_json::to_vec(record)
            .map_err(|e| Error::invalid("a record that JSON cannot hold").caused_by(e))?;
        self.send(kind, &[&json])?;
        self.flush()
    }

    fn give(&mut self) -> Result<()> {
        let given = self.link.write_all(&self.out);
        given.map_err(|e| self.lost(e))?;
        self.bytes += self.out.len() as u64;
        self.out.clear();
        Ok(())
    }

    /// Gives all that was sent to the link.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.give()?;
        let flushed = self.link.flush();
        flushed.map_err(|e| self.lost(e))
    }

    fn lost(&self, e: std::io::Error) -> Error {
        self.broken.set(true);
        if e.kind() == std::io::ErrorKind::UnexpectedEof {
            let what = format!("{} closed the link", self.peer);
            return Error::new(Kind::Io, what);
        }
        let what = format!("the link to {} broke", self.peer);
        Error::new(Kind::Io, what).caused_by(e)
    }

    /// Reads the next frame; its payload is [`Wire::payload`]. Errors: `Io` for a link that broke,
    /// `Corrupt` for a frame that is none.
    pub(super) fn read(&mut self) -> Result<Type> {
        let mut head = [0; HEAD];
        let got = self.link.read_exact(&mut head);
        got.map_err(|e| self.lost(e))?;
        let (first, sum) = head.split_at(8);
        let number = |b: &[u8]| {
            let mut four = [0; 4];
            four.copy_from_slice(b);
            u32::from_le_bytes(four)
        };
        let len = number(&first[4..]) as usize;
        if len > PAYLOAD_MAX {
            return Err(self.wrong(&format!("a frame of {len} bytes")));
        }
        self.payload.clear();
        while self.payload.len() < len {
            let at = self.payload.len();
            self.payload.resize(len.min(at + STEP), 0);
            let got = self.link.read_exact(&mut self.payload[at..]);
            got.map_err(|e| self.lost(e))?;
        }
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.got.to_le_bytes());
        hasher.update(first);
        hasher.update(&self.payload);
        if hasher.finalize() != number(sum) {
            return Err(self.wrong("a frame that was damaged, or is out of its place"));
        }
        self.got += 1;
        let kind = Type::ALL.into_iter().find(|t| *t as u8 == first[0]);
        kind.filter(|_| first[1..4] == [0; 3])
            .ok_or_else(|| self.wrong(&format!("a frame of type {}, which is not known", first[0])))
    }

    /// The payload of the frame that was read last.
    pub(super) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Its record.
    pub(super) fn record<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.payload)
            .map_err(|e| self.wrong("not a record that is known here").caused_by(e))
    }

    /// Its first `N` bytes from `at` on, as a number.
    pub(super) fn number(&self, at: usize) -> Result<u64> {
        let bytes = self.payload.get(at..).and_then(|b| b.first_chunk::<8>());
        let bytes = bytes.ok_or_else(|| self.wrong("a frame that is too short"))?;
        Ok(u64::from_le_bytes(*bytes))
    }

    /// Reads a frame that must be of `kind`; one that refuses is the error.
    pub(super) fn expect(&mut self, kind: Type) -> Result<()> {
        match self.read()? {
            found if found == kind => Ok(()),
            Type::Refused => Err(self.refused()?),
            found => Err(self.wrong(&format!("a frame {found:?} where {kind:?} belongs"))),
        }
    }

    /// The refusal that was read last, as an error.
    pub(super) fn refused(&self) -> Result<Error> {
        let refusal: Refusal = self.record()?;
        let kind = kind_of(&refusal.kind);
        // Of a length and with characters that a log can bear.
        let what: String = refusal.what.chars().take(2000).collect();
        let what = what.replace(|c: char| c.is_control(), " ");
        Ok(Error::new(kind, format!("{} refused: {what}", self.peer)))
    }

    /// Reads what comes and drops it. Error: the link's end.
    pub(super) fn skip(&mut self) -> Result<()> {
        self.payload.resize(STEP, 0);
        match self.link.read(&mut self.payload) {
            Ok(0) => Err(self.lost(std::io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(()),
            Err(e) => Err(self.lost(e)),
        }
    }

    /// What the other side did wrong.
    pub(super) fn wrong(&self, what: &str) -> Error {
        Error::corrupt(format!("{} sent {what}", self.peer))
    }
}

/// Bytes of a stream on their way out.
pub(super) struct StreamOut<'w> {
    pub(super) wire: &'w mut Wire,
    /// Asked after each part, with its bytes; an error ends the stream.
    pub(super) go_on: &'w dyn Fn(u64) -> Result<()>,
}

impl Write for StreamOut<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let part = &bytes[..bytes.len().min(PAYLOAD_MAX)];
        let sent = self.wire.send(Type::Stream, &[part]);
        sent.and_then(|()| (self.go_on)(part.len() as u64))
            .map_err(std::io::Error::other)?;
        Ok(part.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Bytes of a stream that come.
pub(super) struct StreamIn<'w> {
    wire: &'w mut Wire,
    at: usize,
    ended: bool,
}

impl<'w> StreamIn<'w> {
    pub(super) fn new(wire: &'w mut Wire) -> StreamIn<'w> {
        wire.payload.clear();
        StreamIn {
            wire,
            at: 0,
            ended: false,
        }
    }
}

impl Read for StreamIn<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        while self.at == self.wire.payload.len() && !self.ended {
            self.at = 0;
            match self.wire.read().map_err(std::io::Error::other)? {
                Type::Stream => {}
                Type::StreamEnd => {
                    self.wire.payload.clear();
                    self.ended = true;
                }
                other => {
                    let what = format!("a frame {other:?} in the middle of a stream");
                    return Err(std::io::Error::other(self.wire.wrong(&what)));
                }
            }
        }
        let n = buf.len().min(self.wire.payload.len() - self.at);
        buf[..n].copy_from_slice(&self.wire.payload[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
pub(super) mod tests;
