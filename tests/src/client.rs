//! An NBD client in a hundred lines, able to misbehave: options and requests go out exactly as the
//! test wrote them.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nbd_server::wire::chunk::{self, Extent, kind as chunk_kind};
use nbd_server::wire::greeting::Greeting;
use nbd_server::wire::option::{self, InfoRequest, MetaRequest, kind as opt};
use nbd_server::wire::option_reply::{self, kind as answer};
use nbd_server::wire::reply::{Chunk, DONE, SIMPLE_MAGIC, Simple, Style};
use nbd_server::wire::request::{Request, flag, kind};

use crate::fsx::Link;

/// A request with its data.
#[derive(Clone, PartialEq, Eq)]
pub struct Ask {
    /// The command.
    pub kind: u16,
    /// Its flags.
    pub flags: u16,
    /// Where.
    pub range: Range<u64>,
    /// The payload of a WRITE.
    pub data: Vec<u8>,
}

impl std::fmt::Debug for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Range { start, end } = self.range;
        write!(
            f,
            "command {} flags {:#x} at {start} len {}",
            self.kind,
            self.flags,
            end - start
        )
    }
}

impl Ask {
    /// A request without data.
    pub fn new(kind: u16, flags: u16, range: Range<u64>) -> Ask {
        Ask {
            kind,
            flags,
            range,
            data: Vec::new(),
        }
    }

    /// A WRITE.
    pub fn write(flags: u16, at: u64, data: &[u8]) -> Ask {
        let range = at..at + data.len() as u64;
        Ask {
            data: data.to_vec(),
            ..Ask::new(kind::WRITE, flags, range)
        }
    }

    /// Appends its bytes.
    pub fn emit(&self, style: Style, cookie: u64, out: &mut Vec<u8>) {
        let has_payload = style == Style::Extended && self.kind == kind::WRITE;
        let request = Request {
            flags: self.flags | if has_payload { flag::PAYLOAD_LEN } else { 0 },
            kind: self.kind,
            cookie,
            offset: self.range.start,
            length: self.range.end - self.range.start,
        };
        request.emit(style, out);
        out.extend_from_slice(&self.data);
    }
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The error number, or 0.
    pub error: u32,
    /// Its text, where the style has one.
    pub text: String,
    /// (offset, bytes) of the data; a hole is zeros.
    pub content: Vec<(u64, Vec<u8>)>,
    /// The extents of the first context.
    pub extents: Vec<Extent>,
    /// Those of the others, by their ids.
    pub others: BTreeMap<u32, Vec<Extent>>,
}

impl Reply {
    /// The data of a READ of `range`: all of it, once.
    pub fn data(&self, range: &Range<u64>) -> Vec<u8> {
        assert_eq!((self.error, self.text.as_str()), (0, ""));
        let mut content = self.content.clone();
        content.sort();
        let mut data = Vec::new();
        for (offset, bytes) in content {
            assert_eq!(
                offset,
                range.start + data.len() as u64,
                "a gap or an overlap"
            );
            data.extend_from_slice(&bytes);
        }
        assert_eq!(
            data.len() as u64,
            range.end - range.start,
            "the answer to {range:?}"
        );
        data
    }
}

/// Reads the answers of `asks`, whose cookies are their places; in any order. An error is one of
/// `from`; an answer that breaks the protocol is a panic.
pub fn read_replies(from: &mut dyn Read, asks: &[Ask]) -> io::Result<Vec<Reply>> {
    let mut replies = vec![None; asks.len()];
    let mut partial = vec![Reply::default(); asks.len()];
    while replies.iter().any(Option::is_none) {
        let (cookie, done) = read_piece(from, asks, &mut partial)?;
        assert!(
            replies[cookie].is_none(),
            "{:?} is answered twice",
            asks[cookie]
        );
        if done {
            replies[cookie] = Some(std::mem::take(&mut partial[cookie]));
        }
    }
    Ok(replies.into_iter().flatten().collect())
}

/// Reads one simple reply or one chunk; its cookie, and whether the answer is complete.
fn read_piece(
    from: &mut dyn Read,
    asks: &[Ask],
    partial: &mut [Reply],
) -> io::Result<(usize, bool)> {
    let mut head = vec![0; Simple::LEN];
    from.read_exact(&mut head)?;
    if head.starts_with(&SIMPLE_MAGIC.to_be_bytes()) {
        let simple = Simple::parse(&head).unwrap();
        let cookie = simple.cookie as usize;
        let (ask, reply) = (&asks[cookie], &mut partial[cookie]);
        reply.error = simple.error;
        if simple.error == 0 && ask.kind == kind::READ {
            let mut data = vec![0; (ask.range.end - ask.range.start) as usize];
            from.read_exact(&mut data)?;
            reply.content.push((ask.range.start, data));
        }
        return Ok((cookie, true));
    }
    let extended = head.starts_with(&nbd_server::wire::reply::EXTENDED_MAGIC.to_be_bytes());
    let style = if extended {
        Style::Extended
    } else {
        Style::Structured
    };
    head.resize(Chunk::header_len(style), 0);
    from.read_exact(&mut head[Simple::LEN..])?;
    let (header, _) = Chunk::parse(&head).unwrap();
    let mut payload = vec![0; header.length as usize];
    from.read_exact(&mut payload)?;
    let cookie = header.cookie as usize;
    take_chunk(&header, style, &payload, &mut partial[cookie]);
    Ok((cookie, header.flags & DONE != 0))
}

fn take_chunk(header: &Chunk, style: Style, payload: &[u8], reply: &mut Reply) {
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
        }
        k if k == chunk::status_kind(style) => {
            let (id, extents) = chunk::parse_status(style, payload).unwrap();
            match id {
                1 => reply.extents = extents,
                id => assert_eq!(reply.others.insert(id, extents), None, "context {id} twice"),
            }
        }
        k => {
            let with_offset = k == chunk_kind::ERROR_OFFSET;
            assert!(with_offset || k == chunk_kind::ERROR, "chunk of kind {k}");
            let (error, text, _) = chunk::parse_error(payload, with_offset).unwrap();
            (reply.error, reply.text) = (error, text.into());
        }
    }
}

/// A connection to a server's unix socket.
#[derive(Debug)]
pub struct Client {
    /// The socket, to say what no client should.
    pub socket: UnixStream,
    style: Style,
    /// Bytes of the export, once it is open.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
}

impl Drop for Client {
    /// A process that another test starts has a copy of the socket for an instant: closing ours would not
    /// hang up.
    fn drop(&mut self) {
        // It may be closed already.
        drop(self.socket.shutdown(Shutdown::Both));
    }
}

/// How long a server may take for anything before the test says that it hangs.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(300);

impl Client {
    /// Connects, takes the greeting and sends the client's flags; no option yet.
    pub fn connect(path: &Path) -> Client {
        let mut socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut greeting = [0; Greeting::LEN];
        socket.read_exact(&mut greeting).unwrap();
        assert_eq!(Greeting::parse(&greeting).unwrap().flags, 3);
        socket.write_all(&[0, 0, 0, 3]).unwrap();
        Client {
            socket,
            style: Style::Simple,
            size: 0,
            flags: 0,
        }
    }

    /// Connects and opens an export; `base:allocation` is selected where the style allows it.
    pub fn open(path: &Path, export: &str, style: Style) -> Client {
        Client::open_with(path, export, style, &["base:allocation"])
    }

    /// The same with these contexts, all of which there must be. Their ids are in that order, or the
    /// server's order is another: then it is a panic.
    pub fn open_with(path: &Path, export: &str, style: Style, contexts: &[&str]) -> Client {
        let mut client = Client::connect(path);
        let (wanted, mut meta) = match style {
            Style::Simple => (None, Vec::new()),
            Style::Structured => (Some(opt::STRUCTURED_REPLY), Vec::new()),
            Style::Extended => (Some(opt::EXTENDED_HEADERS), Vec::new()),
        };
        if let Some(option) = wanted {
            assert_eq!(client.option(option, &[]).last().unwrap().0, answer::ACK);
            MetaRequest::emit(export, contexts, &mut meta);
            let answers = client.option(opt::SET_META_CONTEXT, &meta);
            let said = answers
                .last()
                .map(|(_, text)| String::from_utf8_lossy(text));
            assert_eq!(answers.len(), contexts.len() + 1, "{export:?}: {said:?}");
            for (id, (context, (_, data))) in (1u32..).zip(contexts.iter().zip(&answers)) {
                let told = [&id.to_be_bytes(), context.as_bytes()].concat();
                assert_eq!(*data, told, "{context}");
            }
        }
        client.go(export).unwrap();
        client.style = style;
        client
    }

    /// Sends an option as it is given, whatever it is.
    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = Vec::new();
        option::emit(option, data, &mut bytes);
        self.socket.write_all(&bytes).unwrap();
    }

    /// Sends an option and reads its answers, up to the last: (kind, data) each.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send_option(option, data);
        self.answers(option)
    }

    /// Reads the answers of an option that was sent.
    pub fn answers(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut answers = Vec::new();
        loop {
            let mut head = [0; option_reply::Header::LEN];
            self.socket.read_exact(&mut head).unwrap();
            let head = option_reply::Header::parse(&head).unwrap();
            assert_eq!(head.option, option);
            let mut data = vec![0; head.length as usize];
            self.socket.read_exact(&mut data).unwrap();
            answers.push((head.kind, data));
            if head.kind == answer::ACK || answer::is_error(head.kind) {
                return answers;
            }
        }
    }

    /// Opens an export by GO. The error is the answer's kind and text.
    pub fn go(&mut self, export: &str) -> Result<(), (u32, String)> {
        let mut data = Vec::new();
        InfoRequest::emit(export, &[], &mut data);
        let answers = self.option(opt::GO, &data);
        let (kind, text) = answers.last().unwrap();
        if *kind != answer::ACK {
            return Err((*kind, String::from_utf8_lossy(text).into_owned()));
        }
        // NBD_INFO_EXPORT: u16 kind, u64 size, u16 flags.
        let info = answers
            .iter()
            .find(|(k, d)| *k == answer::INFO && d[..2] == [0, 0]);
        let info = &info.unwrap().1;
        self.size = u64::from_be_bytes(*info[2..].first_chunk().unwrap());
        self.flags = u16::from_be_bytes(*info[10..].first_chunk().unwrap());
        Ok(())
    }

    /// Sends the requests and reads their answers; an error when the server went away.
    pub fn try_exchange(&mut self, asks: &[Ask]) -> io::Result<Vec<Reply>> {
        let mut bytes = Vec::new();
        for (cookie, ask) in asks.iter().enumerate() {
            ask.emit(self.style, cookie as u64, &mut bytes);
        }
        self.socket.write_all(&bytes)?;
        read_replies(&mut self.socket, asks)
    }

    /// Takes the next reply, to a request that answers without data; its cookie.
    pub fn next_answered(&mut self) -> u64 {
        // A simple reply, or a chunk without payload: in both the cookie is there.
        let mut head = [0; 16];
        self.socket.read_exact(&mut head).unwrap();
        if !head.starts_with(&SIMPLE_MAGIC.to_be_bytes()) {
            self.socket.read_exact(&mut [0; 4]).unwrap();
        }
        u64::from_be_bytes(*head[8..].first_chunk().unwrap())
    }

    /// One request, one answer.
    pub fn ask(&mut self, ask: Ask) -> Reply {
        self.exchange(&[ask]).remove(0)
    }

    /// READ.
    pub fn read(&mut self, at: u64, len: u64) -> Vec<u8> {
        self.ask(Ask::new(kind::READ, 0, at..at + len))
            .data(&(at..at + len))
    }

    /// WRITE; must succeed.
    pub fn write(&mut self, at: u64, data: &[u8]) {
        let reply = self.ask(Ask::write(0, at, data));
        assert_eq!(reply.error, 0, "{}", reply.text);
    }

    /// FLUSH; must succeed.
    pub fn flush(&mut self) {
        let reply = self.ask(Ask::new(kind::FLUSH, 0, 0..0));
        assert_eq!(reply.error, 0, "{}", reply.text);
    }

    /// DISC, and what a server does then: it closes, and nothing more comes.
    pub fn disconnect(mut self) {
        let mut bytes = Vec::new();
        Ask::new(kind::DISC, 0, 0..0).emit(self.style, 0, &mut bytes);
        self.socket.write_all(&bytes).unwrap();
        assert!(self.is_closed());
    }

    /// Waits until the server closes; false when something comes instead. A reset is a close.
    pub fn is_closed(&mut self) -> bool {
        match self.socket.read(&mut [0]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

impl Link for Client {
    fn style(&self) -> Style {
        self.style
    }

    fn exchange(&mut self, asks: &[Ask]) -> Vec<Reply> {
        self.try_exchange(asks).unwrap()
    }
}
