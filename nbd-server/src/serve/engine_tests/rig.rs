//! A client of an engine: asks in bytes, reads the answers whole.

use std::collections::HashMap;
use std::sync::Arc;

use crate::serve::engine::{Engine, Turn};
use crate::session::transmission::Rules;
use crate::testing::FileDevice;
use crate::wire::chunk::{self, kind as chunk_kind};
use crate::wire::reply::{Chunk, DONE, Simple, Style};
use crate::wire::request::{Request, flag, kind};

pub(super) const SIZE: u64 = 64 << 20;
pub(super) const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

/// An engine with its device, fed and read like a client would.
pub(super) struct Rig {
    pub(super) device: Arc<FileDevice>,
    pub(super) engine: Engine,
    pub(super) style: Style,
    pub(super) cookie: u64,
}

/// A whole answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) error: u32,
    pub(super) error_at: Option<u64>,
    pub(super) text: String,
    /// (offset, bytes) of data; for holes, zeros.
    pub(super) content: Vec<(u64, Vec<u8>)>,
    pub(super) holes: usize,
    /// Of the first context.
    pub(super) extents: Vec<chunk::Extent>,
    /// Of the second.
    pub(super) depths: Vec<chunk::Extent>,
}

impl Reply {
    pub(super) fn data(&self) -> Vec<u8> {
        assert_eq!((self.error, self.text.as_str()), (0, ""));
        let mut content = self.content.clone();
        content.sort();
        for pair in content.windows(2) {
            assert_eq!(
                pair[0].0 + pair[0].1.len() as u64,
                pair[1].0,
                "gap or overlap"
            );
        }
        content.into_iter().flat_map(|c| c.1).collect()
    }
}

impl Rig {
    pub(super) fn new(style: Style) -> Rig {
        Rig::over(FileDevice::temporary(SIZE), style)
    }

    pub(super) fn over(device: Arc<FileDevice>, style: Style) -> Rig {
        let engine = Engine::new(device.clone(), Rules::over(device.as_ref(), style));
        Rig {
            device,
            engine,
            style,
            cookie: 0,
        }
    }

    pub(super) fn bytes(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        length: u64,
        data: &[u8],
    ) -> Vec<u8> {
        self.cookie += 1;
        let cookie = self.cookie;
        let extra = if self.style == Style::Extended && kind == kind::WRITE {
            flag::PAYLOAD_LEN
        } else {
            0
        };
        let mut bytes = Vec::new();
        Request {
            flags: flags | extra,
            kind,
            cookie,
            offset,
            length,
        }
        .emit(self.style, &mut bytes);
        bytes.extend_from_slice(data);
        bytes
    }

    pub(super) fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u64) -> Reply {
        let bytes = self.bytes(kind, flags, offset, length, &[]);
        self.answer(&bytes, length)
    }

    pub(super) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> Reply {
        let bytes = self.bytes(kind::WRITE, flags, offset, data.len() as u64, data);
        self.answer(&bytes, 0)
    }

    pub(super) fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        self.ask(kind::READ, 0, offset, length).data()
    }

    pub(super) fn answer(&mut self, bytes: &[u8], length: u64) -> Reply {
        let mut out = Vec::new();
        let (used, turn) = self.engine.run(bytes, &mut out).unwrap();
        assert_eq!(used, bytes.len());
        assert!(matches!(turn, Turn::NeedMore(_)), "{turn:?}");
        let simple_data = if self.style == Style::Simple {
            length
        } else {
            0
        };
        let (reply, len) = decode(&out, self.cookie, simple_data as usize);
        assert_eq!(len, out.len(), "bytes after the answer");
        reply
    }
}

/// Decodes one answer; `length` is the data of a simple READ.
pub(super) fn decode(bytes: &[u8], cookie: u64, length: usize) -> (Reply, usize) {
    let (mut reply, mut at) = (Reply::default(), 0);
    loop {
        let into = &mut reply;
        let (of, done, len) = part(&bytes[at..], |_| length, move |_| into);
        assert_eq!(of, cookie);
        at += len;
        if done {
            return (reply, at);
        }
    }
}

/// Decodes whole answers whose parts may be mixed, in the order of their ends; `lengths` has the
/// READs.
pub(super) fn decode_all(bytes: &[u8], lengths: &HashMap<u64, usize>) -> Vec<(u64, Reply)> {
    let (mut begun, mut over) = (HashMap::<u64, Reply>::new(), Vec::new());
    let mut at = 0;
    while at < bytes.len() {
        let length = |cookie| lengths.get(&cookie).copied().unwrap_or(0);
        let all = &mut begun;
        let (cookie, done, len) = part(&bytes[at..], length, move |c| all.entry(c).or_default());
        at += len;
        if done {
            let reply = begun.remove(&cookie).unwrap();
            assert!(over.iter().all(|(c, _)| *c != cookie), "{cookie} again");
            over.push((cookie, reply));
        }
    }
    assert!(begun.is_empty(), "half an answer");
    over
}

/// Decodes a simple reply or a chunk into the reply of its cookie. Returns that, whether it was the
/// last of it, and its length.
fn part<'a>(
    bytes: &[u8],
    length: impl Fn(u64) -> usize,
    reply: impl FnOnce(u64) -> &'a mut Reply,
) -> (u64, bool, usize) {
    if let Ok(simple) = Simple::parse(bytes) {
        let reply = reply(simple.cookie);
        reply.error = simple.error;
        let length = length(simple.cookie);
        let has_data = simple.error == 0 && length > 0 && bytes.len() >= Simple::LEN + length;
        let end = Simple::LEN + if has_data { length } else { 0 };
        if has_data {
            reply.content.push((0, bytes[Simple::LEN..end].to_vec()));
        }
        return (simple.cookie, true, end);
    }
    let (header, style) = Chunk::parse(bytes).unwrap();
    let reply = reply(header.cookie);
    let at = Chunk::header_len(style);
    let payload = &bytes[at..at + header.length as usize];
    match header.kind {
        chunk_kind::NONE => assert_eq!((header.flags, payload.len()), (DONE, 0)),
        chunk_kind::OFFSET_DATA => {
            let (offset, data) = chunk::parse_data(payload).unwrap();
            reply.content.push((offset, data.to_vec()));
        }
        chunk_kind::OFFSET_HOLE => {
            let (offset, len) = chunk::parse_hole(payload).unwrap();
            assert_ne!(len, 0);
            reply.content.push((offset, vec![0; len as usize]));
            reply.holes += 1;
        }
        chunk_kind::BLOCK_STATUS | chunk_kind::BLOCK_STATUS_EXT => {
            assert_eq!(header.kind, chunk::status_kind(style));
            let (id, extents) = chunk::parse_status(style, payload).unwrap();
            match id {
                1 => reply.extents = extents,
                2 => reply.depths = extents,
                id => panic!("context {id}"),
            }
        }
        k => {
            let with_offset = k == chunk_kind::ERROR_OFFSET;
            let (error, text, offset) = chunk::parse_error(payload, with_offset).unwrap();
            (reply.error, reply.error_at, reply.text) = (error, offset, text.into());
        }
    }
    (header.cookie, header.flags & DONE != 0, at + payload.len())
}

pub(super) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed | 1)
        .collect()
}
