//! The holder as a client: what it says to a server, at first and again.

use std::io;

use crate::hold::dial::HANDSHAKE;
use crate::hold::line::Line;
use crate::hold::terms::{KNOWN, Named, Terms};
use crate::session::context::LIFE;
use crate::wire::greeting::{ClientFlags, ExportReply, Greeting, handshake_flag};
use crate::wire::option::{self, InfoRequest, MetaRequest, info, kind};
use crate::wire::option_reply::{Header, kind as answer};
use crate::wire::reply::Style;
use crate::wire::{self, string};

/// Most bytes of answers to one option: a list of some hundred thousand exports.
const ANSWERS_MAX: usize = 16 << 20;

/// Why there is no agreement with a server.
#[derive(Debug)]
pub(super) enum Failed {
    /// It went away, or was not there.
    Lost(io::Error),
    /// It does not serve the export now.
    Refused(String),
    /// It has no such export.
    Gone(String),
    /// It has another one, or breaks the protocol: trying again is no use.
    Ended(String),
}

impl From<io::Error> for Failed {
    fn from(e: io::Error) -> Failed {
        Failed::Lost(e)
    }
}

fn broken(why: &str) -> Failed {
    Failed::Ended(format!("the server broke the protocol: {why}"))
}

fn malformed(e: wire::Error) -> Failed {
    match e {
        wire::Error::Malformed(why) => broken(why),
        wire::Error::NeedMore(_) => broken("an answer that is too short"),
    }
}

/// One answer to an option.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

impl Answer {
    /// Appends it as an answer to `option`.
    pub(super) fn emit(&self, option: u32, out: &mut Vec<u8>) {
        let length = u32::try_from(self.data.len()).unwrap_or(u32::MAX);
        let header = Header {
            option,
            kind: self.kind,
            length,
        };
        header.emit(out);
        out.extend_from_slice(&self.data);
    }

    /// The text of an error.
    fn text(&self) -> String {
        match string(&self.data) {
            Ok("") | Err(_) => format!("error {:#x}", self.kind),
            Ok(text) => text.to_owned(),
        }
    }
}

/// The last of an option's answers.
fn last(answers: &[Answer]) -> Result<&Answer, Failed> {
    answers.last().ok_or_else(|| broken("no answer"))
}

/// The contexts among the answers to a query for them.
pub(super) fn contexts(answers: &[Answer]) -> Result<Vec<Named>, Failed> {
    let of = |a: &Answer| match a.data.split_first_chunk::<4>() {
        Some((id, name)) => Ok(Named {
            id: u32::from_be_bytes(*id),
            name: string(name).map_err(malformed)?.to_owned(),
        }),
        None => Err(broken("a context without a number")),
    };
    let named = answers.iter().filter(|a| a.kind == answer::META_CONTEXT);
    named.map(of).collect()
}

/// What a server said of an export that it lets us enter.
#[derive(Debug)]
pub(super) struct Entered {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) minimum: Option<u32>,
    pub(super) maximum: Option<u32>,
}

/// A server in its handshake.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) line: Line,
    zeroes: bool,
}

impl Server {
    /// Takes its greeting and sends the client's flags.
    pub(super) async fn greet(mut line: Line) -> Result<Server, Failed> {
        line.need(Greeting::LEN).await?;
        let greeting = Greeting::parse(&line.input.split_to(Greeting::LEN)).map_err(malformed)?;
        if greeting.flags & handshake_flag::FIXED_NEWSTYLE == 0 {
            let what = "the server does not speak the fixed newstyle handshake";
            return Err(Failed::Ended(what.into()));
        }
        let flags = greeting.flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        let mut out = Vec::new();
        ClientFlags(flags.into()).emit(&mut out);
        line.send(&out).await?;
        Ok(Server {
            line,
            zeroes: flags & handshake_flag::NO_ZEROES == 0,
        })
    }

    /// Sends an option; its answers, up to the one that ends them. `Lost` when they take too long, or
    /// when the server says that it shuts down.
    pub(super) async fn ask(&mut self, option: u32, data: &[u8]) -> Result<Vec<Answer>, Failed> {
        let late = |_| Failed::Lost(io::ErrorKind::TimedOut.into());
        let all = self.answers(option, data);
        let answers = tokio::time::timeout(HANDSHAKE, all).await.map_err(late)??;
        match last(&answers)?.kind {
            answer::ERR_SHUTDOWN => Err(Failed::Lost(io::ErrorKind::ConnectionAborted.into())),
            _ => Ok(answers),
        }
    }

    async fn answers(&mut self, option: u32, data: &[u8]) -> Result<Vec<Answer>, Failed> {
        let mut out = Vec::new();
        option::emit(option, data, &mut out);
        self.line.send(&out).await?;
        let (mut answers, mut bytes) = (Vec::new(), 0);
        loop {
            self.line.need(Header::LEN).await?;
            let header = Header::parse(&self.line.input).map_err(malformed)?;
            if header.option != option {
                return Err(broken("an answer to another option"));
            }
            let len = Header::LEN.saturating_add(header.length as usize);
            bytes += len;
            if bytes > ANSWERS_MAX {
                return Err(broken("more answers to an option than anybody needs"));
            }
            self.line.need(len).await?;
            let whole = self.line.input.split_to(len);
            let data = whole[Header::LEN..].to_vec();
            let kind = header.kind;
            answers.push(Answer { kind, data });
            if kind == answer::ACK || answer::is_error(kind) {
                return Ok(answers);
            }
        }
    }

    /// The life of an export, if the server tells.
    pub(super) async fn life(&mut self, export: &str) -> Result<Option<String>, Failed> {
        let mut data = Vec::new();
        MetaRequest::emit(export, &[LIFE], &mut data);
        let answers = self.ask(kind::LIST_META_CONTEXT, &data).await?;
        if last(&answers)?.kind != answer::ACK {
            return Ok(None);
        }
        let told = contexts(&answers)?;
        let life = told
            .iter()
            .find_map(|c| c.name.strip_prefix(LIFE)?.strip_prefix(':'));
        Ok(life.map(str::to_owned))
    }

    /// Ends the handshake with an export. With the answers, where they say that the server will not.
    pub(super) async fn enter(
        &mut self,
        export: &str,
        wanted: &[u16],
    ) -> Result<(Vec<Answer>, Option<Entered>), Failed> {
        let mut data = Vec::new();
        InfoRequest::emit(export, wanted, &mut data);
        let mut answers = self.ask(kind::GO, &data).await?;
        match last(&answers)?.kind {
            answer::ACK => {}
            answer::ERR_UNSUP => {
                let late = |_| Failed::Lost(io::ErrorKind::TimedOut.into());
                let entered = tokio::time::timeout(HANDSHAKE, self.export_name(export));
                let entered = entered.await.map_err(late)??;
                let mut info = info::EXPORT.to_be_bytes().to_vec();
                info.extend(entered.size.to_be_bytes());
                info.extend(entered.flags.to_be_bytes());
                let answers = [(answer::INFO, info), (answer::ACK, Vec::new())];
                let answers = answers.map(|(kind, data)| Answer { kind, data });
                return Ok((answers.into(), Some(entered)));
            }
            _ => return Ok((answers, None)),
        }
        let mut entered = None;
        let (mut minimum, mut maximum) = (None, None);
        for a in answers.iter_mut().filter(|a| a.kind == answer::INFO) {
            let word = |at: usize| a.data.get(at..).and_then(|d| d.first_chunk::<4>().copied());
            match a.data.first_chunk::<2>().map(|b| u16::from_be_bytes(*b)) {
                Some(info::EXPORT) => {
                    let reply = ExportReply::parse(&a.data[2..], false).map_err(malformed)?;
                    let flags = reply.flags & KNOWN;
                    entered = Some((reply.size, flags));
                    a.data.truncate(10);
                    a.data.extend(flags.to_be_bytes());
                }
                Some(info::BLOCK_SIZE) => {
                    minimum = word(2).map(u32::from_be_bytes);
                    maximum = word(10).map(u32::from_be_bytes);
                }
                _ => {}
            }
        }
        let (size, flags) = entered.ok_or_else(|| broken("GO without a size"))?;
        let entered = Entered {
            size,
            flags,
            minimum,
            maximum,
        };
        Ok((answers, Some(entered)))
    }

    async fn export_name(&mut self, export: &str) -> Result<Entered, Failed> {
        let mut out = Vec::new();
        option::emit(kind::EXPORT_NAME, export.as_bytes(), &mut out);
        self.line.send(&out).await?;
        loop {
            match ExportReply::parse(&self.line.input, self.zeroes) {
                Ok(reply) => {
                    let mut used = Vec::new();
                    reply.emit(self.zeroes, &mut used);
                    drop(self.line.input.split_to(used.len()));
                    return Ok(Entered {
                        size: reply.size,
                        flags: reply.flags & KNOWN,
                        minimum: None,
                        maximum: None,
                    });
                }
                Err(wire::Error::NeedMore(n)) => self.line.need(n).await?,
                Err(e) => return Err(malformed(e)),
            }
        }
    }

    /// Agrees on a style. Error: `Ended` when the server does not have it.
    pub(super) async fn set_style(&mut self, style: Style) -> Result<(), Failed> {
        let option = match style {
            Style::Simple => return Ok(()),
            Style::Structured => kind::STRUCTURED_REPLY,
            Style::Extended => kind::EXTENDED_HEADERS,
        };
        let answers = self.ask(option, &[]).await?;
        match last(&answers)?.kind {
            answer::ACK => Ok(()),
            _ => {
                let name = kind::name(option);
                let what = format!("the server does not have {name}, which the client uses");
                Err(Failed::Ended(what))
            }
        }
    }

    /// Asks for contexts; the answers.
    pub(super) async fn set_contexts(
        &mut self,
        export: &str,
        queries: &[String],
    ) -> Result<Vec<Answer>, Failed> {
        let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
        let mut data = Vec::new();
        MetaRequest::emit(export, &queries, &mut data);
        self.ask(kind::SET_META_CONTEXT, &data).await
    }
}

/// A server that keeps a client's terms.
#[derive(Debug)]
pub(super) struct Agreed {
    pub(super) line: Line,
    pub(super) life: Option<String>,
    /// Contexts as the server and as the client number them.
    pub(super) ids: Vec<(u32, u32)>,
}

/// The handshake of a client once more, with another server or the same one.
pub(super) async fn again(line: Line, terms: &Terms) -> Result<Agreed, Failed> {
    let mut server = Server::greet(line).await?;
    server.set_style(terms.style).await?;
    let mut found = Vec::new();
    if !terms.contexts.is_empty() {
        let answers = server.set_contexts(&terms.export, &terms.queries).await?;
        refused(&answers)?;
        found = contexts(&answers)?;
    }
    let life = match terms.read_only() {
        true => None,
        false => server.life(&terms.export).await?,
    };
    let (answers, entered) = server.enter(&terms.export, &terms.wanted).await?;
    refused(&answers)?;
    let entered = entered.ok_or_else(|| broken("no answer"))?;
    let new = Terms {
        size: entered.size,
        flags: entered.flags,
        minimum: entered.minimum,
        maximum: entered.maximum,
        contexts: found,
        ..terms.clone()
    };
    let ids = terms.kept_by(&new).map_err(Failed::Ended)?;
    Ok(Agreed {
        line: server.line,
        life,
        ids,
    })
}

/// Error: what an option was refused for.
fn refused(answers: &[Answer]) -> Result<(), Failed> {
    let last = last(answers)?;
    match last.kind {
        answer::ACK => Ok(()),
        // It is up and knows its exports: nobody waits for one that is not there.
        answer::ERR_UNKNOWN => Err(Failed::Gone(format!(
            "the server has no such export any more: {}",
            last.text()
        ))),
        _ => Err(Failed::Refused(last.text())),
    }
}
