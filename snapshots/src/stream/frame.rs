//! Frames: how bytes of a stream are held together. Knows nothing of what they mean.

use std::io::{ErrorKind, Read, Write};

use ploop::error::{Error, Kind, Result};
use uuid::Uuid;

/// A stream begins with it.
pub const MAGIC: &[u8; 8] = b"PLOOPSTR";
/// The only version that there is.
pub const VERSION: u32 = 1;
/// Feature bit: the stream goes on where an earlier one was cut.
pub const CONTINUES: u32 = 1 << 0;
/// Bytes of the preamble.
pub const PREAMBLE_BYTES: usize = 36;
/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 20;
/// Bytes of the largest payload: what a receiver has in memory at a time.
pub const PAYLOAD_MAX: usize = 1 << 20;

/// Bytes of the header that the checksum covers; the rest of it is the checksum.
const COVERED: usize = HEADER_BYTES - 4;
/// How a stream is called in errors.
const SHOWN: &str = "stream";

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// The disk: JSON.
    Disk = 1,
    /// One image of it: JSON.
    Image = 2,
    /// Where a stream goes on: JSON.
    Position = 3,
    /// The data of an image begins.
    Begin = 4,
    /// Some of it.
    Data = 5,
    /// All of it was sent.
    Done = 6,
    /// Nothing follows.
    End = 7,
}

impl Type {
    fn of(number: u8) -> Option<Type> {
        let all = [
            Type::Disk,
            Type::Image,
            Type::Position,
            Type::Begin,
            Type::Data,
            Type::Done,
            Type::End,
        ];
        all.into_iter().find(|t| *t as u8 == number)
    }

    /// How it is called in errors.
    pub fn name(self) -> &'static str {
        match self {
            Type::Disk => "disk",
            Type::Image => "image",
            Type::Position => "position",
            Type::Begin => "begin",
            Type::Data => "data",
            Type::Done => "done",
            Type::End => "end",
        }
    }
}

/// Covers a header's first bytes and the payload, and ties both to their stream.
fn checksum(id: Uuid, head: &[u8], payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(id.as_bytes());
    crc.update(head);
    crc.update(payload);
    crc.finalize()
}

fn preamble(id: Uuid, features: u32) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&features.to_le_bytes());
    bytes[16..32].copy_from_slice(id.as_bytes());
    let crc = crc32fast::hash(&bytes[..32]);
    bytes[32..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Writes frames.
pub struct Writer<'a> {
    out: &'a mut dyn Write,
    id: Uuid,
    sequence: u64,
    bytes: u64,
}

impl<'a> Writer<'a> {
    /// Begins a stream with a new id.
    pub fn begin(out: &'a mut dyn Write, features: u32) -> Result<Writer<'a>> {
        Writer::with_id(out, Uuid::new_v4(), features)
    }

    /// The same with an id that was chosen.
    pub fn with_id(out: &'a mut dyn Write, id: Uuid, features: u32) -> Result<Writer<'a>> {
        let mut writer = Writer {
            out,
            id,
            sequence: 0,
            bytes: 0,
        };
        writer.put(&preamble(id, features))?;
        Ok(writer)
    }

    /// Writes one frame. Error: `Invalid` for a payload above [`PAYLOAD_MAX`].
    pub fn frame(&mut self, kind: Type, parts: &[&[u8]]) -> Result<()> {
        self.raw(kind as u8, &parts.concat())
    }

    /// The same with any number for its type.
    pub fn raw(&mut self, kind: u8, payload: &[u8]) -> Result<()> {
        if payload.len() > PAYLOAD_MAX {
            let what = format!(
                "a record of {} bytes; a frame holds {PAYLOAD_MAX}",
                payload.len()
            );
            return Err(Error::invalid(what));
        }
        let mut head = [0; HEADER_BYTES];
        head[0] = kind;
        head[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        head[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        let crc = checksum(self.id, &head[..COVERED], payload);
        head[COVERED..].copy_from_slice(&crc.to_le_bytes());
        self.put(&head)?;
        self.put(payload)?;
        self.sequence += 1;
        Ok(())
    }

    /// Frames so far.
    pub fn frames(&self) -> u64 {
        self.sequence
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Hands on what was written.
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().map_err(failed)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(failed)
    }
}

fn failed(e: std::io::Error) -> Error {
    // Half a stream is no success, as half a list would be.
    if e.kind() == ErrorKind::BrokenPipe {
        let what = "whoever reads the stream closed it before its end";
        return Error::new(Kind::Io, what).fix("What it said tells why");
    }
    Error::io("write", SHOWN, e)
}

/// Reads frames, each whole and in its place, or not at all.
pub struct Reader<'a> {
    input: &'a mut dyn Read,
    id: Uuid,
    features: u32,
    sequence: u64,
    at: u64,
    payload: Vec<u8>,
    /// The frame in `payload` is to be read again.
    again: Option<Type>,
    broken: bool,
}

impl<'a> Reader<'a> {
    /// Reads the preamble. Errors: `Corrupt` for what is no stream, `Unsupported` for a version or
    /// a feature that is not known here.
    pub fn begin(input: &'a mut dyn Read) -> Result<Reader<'a>> {
        let mut reader = Reader {
            input,
            id: Uuid::nil(),
            features: 0,
            sequence: 0,
            at: 0,
            payload: Vec::new(),
            again: None,
            broken: false,
        };
        let mut bytes = [0; PREAMBLE_BYTES];
        reader.fill(&mut bytes)?;
        if &bytes[..8] != MAGIC {
            return Err(Error::corrupt("this is no stream of `ploop send`").on(SHOWN));
        }
        if crc32fast::hash(&bytes[..32]) != u32_of(&bytes[32..]) {
            return Err(reader.damaged("the checksum of its first bytes does not fit"));
        }
        let version = u32_of(&bytes[8..12]);
        if version != VERSION {
            let what = format!("a stream of version {version}; version {VERSION} is read here");
            return Err(Error::unsupported(what)
                .on(SHOWN)
                .fix("Send with the version of ploop that receives, or receive with a newer one"));
        }
        reader.features = u32_of(&bytes[12..16]);
        let unknown = reader.features & !CONTINUES;
        if unknown != 0 {
            let what = format!(
                "the stream needs feature bit {}, which is not known here",
                unknown.trailing_zeros()
            );
            return Err(Error::unsupported(what)
                .on(SHOWN)
                .fix("Receive with a newer version of ploop"));
        }
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[16..32]);
        reader.id = Uuid::from_bytes(id);
        Ok(reader)
    }

    /// True when it goes on where an earlier one was cut.
    pub fn continues(&self) -> bool {
        self.features & CONTINUES != 0
    }

    /// Frames so far.
    pub fn frames(&self) -> u64 {
        self.sequence - u64::from(self.again.is_some())
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.at
    }

    /// The stream ended too early, or a frame came damaged: what came before it is whole.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The next frame; its payload is [`Reader::payload`] then. Error: `Corrupt`.
    pub fn read(&mut self) -> Result<Type> {
        if let Some(kind) = self.again.take() {
            return Ok(kind);
        }
        let start = self.at;
        let mut head = [0; HEADER_BYTES];
        self.fill(&mut head)?;
        let len = u32_of(&head[4..8]) as usize;
        if len > PAYLOAD_MAX {
            let what = format!("a frame of {len} bytes; {PAYLOAD_MAX} is the limit");
            return Err(self.damaged(&what).at(start));
        }
        let mut payload = std::mem::take(&mut self.payload);
        payload.resize(len, 0);
        let filled = self.fill(&mut payload);
        self.payload = payload;
        filled?;
        if checksum(self.id, &head[..COVERED], &self.payload) != u32_of(&head[COVERED..]) {
            let what = "the checksum of a frame does not fit";
            return Err(self.damaged(what).at(start));
        }
        let mut number = [0; 8];
        number.copy_from_slice(&head[8..16]);
        let number = u64::from_le_bytes(number);
        if number != self.sequence {
            let what = format!("frame {number} where frame {} belongs", self.sequence);
            return Err(self.damaged(&what).at(start));
        }
        self.sequence += 1;
        match Type::of(head[0]).filter(|_| head[1..4] == [0; 3]) {
            Some(kind) => Ok(kind),
            None => {
                let what = format!("a frame of type {}, which is not known here", head[0]);
                Err(Error::unsupported(what).on(SHOWN).at(start))
            }
        }
    }

    /// Gives the frame that was read last once more.
    pub fn put_back(&mut self, kind: Type) {
        self.again = Some(kind);
    }

    /// The bytes of the last frame.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The next frame, which must be a `want`.
    pub fn expect(&mut self, want: Type) -> Result<()> {
        let kind = self.read()?;
        if kind == want {
            return Ok(());
        }
        let (is, want) = (kind.name(), want.name());
        Err(self.wrong(&format!("a frame `{is}` where `{want}` belongs")))
    }

    /// Nothing may follow.
    pub fn end(&mut self) -> Result<()> {
        let mut one = [0];
        loop {
            return match self.input.read(&mut one) {
                Ok(0) => Ok(()),
                Ok(_) => Err(self.wrong("something follows the end of the stream")),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => Err(Error::io("read", SHOWN, e)),
            };
        }
    }

    /// The error for frames that came as they were sent and contradict each other.
    pub fn wrong(&self, what: &str) -> Error {
        Error::corrupt(what).on(SHOWN).at(self.at)
    }

    fn damaged(&mut self, what: &str) -> Error {
        self.broken = true;
        Error::corrupt(what)
            .on(SHOWN)
            .fix("It was damaged on its way: send it again")
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.input.read(&mut buf[done..]) {
                Ok(0) => {
                    self.broken = true;
                    let what = "the stream ends before its end";
                    return Err(Error::corrupt(what)
                        .on(SHOWN)
                        .at(self.at)
                        .fix("What the sender said tells why"));
                }
                Ok(n) => {
                    done += n;
                    self.at += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => {
                    self.broken = true;
                    return Err(Error::io("read", SHOWN, e));
                }
            }
        }
        Ok(())
    }
}

fn u32_of(bytes: &[u8]) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[..4]);
    u32::from_le_bytes(four)
}
