//! The handshake of a client, passed on option by option.
//!
//! | option | |
//! |---|---|
//! | `STARTTLS` | refused here: the holder cannot repeat what it cannot read |
//! | `GO`, `EXPORT_NAME` | `GO` at the server, after the export's life was asked for |
//! | `STRUCTURED_REPLY`, `EXTENDED_HEADERS`, `SET_META_CONTEXT` | passed on, and kept when accepted |
//! | `LIST`, `INFO`, `LIST_META_CONTEXT` | passed on |
//! | `ABORT` | answered here |
//! | others | `ERR_UNSUP`, here |
//!
//! Answers go to the client when all of an option's are there; a server that goes away before is
//! replaced by the next one, which is told what was agreed on so far. Transmission flags that the
//! holder does not know are taken out of what the client is told.

use std::time::Duration;

use crate::hold::agree::{Agreed, Answer, Failed, Server, contexts};
use crate::hold::dial::{Dialer, HANDSHAKE, PAUSE_MAX, PAUSE_MIN};
use crate::hold::line::Line;
use crate::hold::terms::{Named, Terms};
use crate::session::{MAX_OPTION, MAX_OPTIONS};
use crate::wire::greeting::{ClientFlags, ExportReply, Greeting, handshake_flag};
use crate::wire::option::{self, InfoRequest, MetaRequest, info, kind};
use crate::wire::option_reply::{self, kind as answer};
use crate::wire::reply::Style;
use crate::wire::{self, string};

/// A client whose handshake is over, and its first server.
#[derive(Debug)]
pub(super) struct Met {
    pub(super) client: Line,
    pub(super) terms: Terms,
    pub(super) first: Agreed,
}

/// What was agreed on so far.
#[derive(Debug)]
struct Chosen {
    style: Style,
    /// For which export, the queries, and what they gave.
    contexts: Option<(String, Vec<String>, Vec<Named>)>,
}

/// A client in its handshake.
struct Relay<'d> {
    client: Line,
    dialer: &'d Dialer,
    server: Server,
    chosen: Chosen,
    /// The contexts as the server at hand numbers them.
    numbered: Vec<Named>,
    no_zeroes: bool,
    /// Before another server is tried: one that is there each time, and goes away over an option each
    /// time, is not asked without end and rest.
    pause: Duration,
}

/// Why a handshake is over that waited for a server.
const WENT_AWAY: &str = "the client went away before there was a server";

fn hung_up(e: &std::io::Error) -> String {
    format!("the client went away in its handshake: {e}")
}

fn malformed(e: wire::Error) -> String {
    match e {
        wire::Error::Malformed(why) => why.into(),
        wire::Error::NeedMore(_) => "the data is too short".into(),
    }
}

fn too_slow(_: tokio::time::error::Elapsed) -> String {
    let seconds = HANDSHAKE.as_secs();
    format!("the client took more than {seconds} s for a step of its handshake")
}

/// Takes a client through its handshake. `None`: it wanted no more than that. Error: why it is over.
pub(super) async fn receive(mut client: Line, dialer: &Dialer) -> Result<Option<Met>, String> {
    let server = tokio::select! {
        server = greeted(dialer) => server?,
        () = client.closed() => return Err(WENT_AWAY.into()),
    };
    let mut out = Vec::new();
    let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    Greeting { flags }.emit(&mut out);
    let hello = async {
        client.send(&out).await?;
        client.need(ClientFlags::LEN).await
    };
    let hello = tokio::time::timeout(HANDSHAKE, hello).await;
    hello.map_err(too_slow)?.map_err(|e| hung_up(&e))?;
    let flags = ClientFlags::parse(&client.input.split_to(ClientFlags::LEN)).map_err(malformed)?;
    if flags.unknown() != 0 {
        return Err(format!(
            "client flags {:#x} were not offered",
            flags.unknown()
        ));
    }
    let mut relay = Relay {
        client,
        dialer,
        server,
        chosen: Chosen {
            style: Style::Simple,
            contexts: None,
        },
        numbered: Vec::new(),
        no_zeroes: flags.no_zeroes(),
        pause: Duration::ZERO,
    };
    for _ in 0..MAX_OPTIONS {
        let (option, data) = relay.next_option().await?;
        match option {
            kind::ABORT => {
                let mut out = Vec::new();
                option_reply::ack(option, &mut out);
                relay.send(&out).await?;
                return Ok(None);
            }
            kind::GO | kind::EXPORT_NAME => {
                if let Some((terms, life)) = relay.enter(option, &data).await? {
                    let contexts = terms.contexts.iter();
                    let ids = contexts.filter_map(|told| {
                        let found = relay.numbered.iter().find(|n| n.name == told.name)?;
                        Some((found.id, told.id))
                    });
                    let ids = ids.collect();
                    let first = Agreed {
                        line: relay.server.line,
                        life,
                        ids,
                    };
                    return Ok(Some(Met {
                        client: relay.client,
                        terms,
                        first,
                    }));
                }
            }
            _ => relay.pass(option, &data).await?,
        }
    }
    Err(format!("more than {MAX_OPTIONS} options"))
}

async fn greeted(dialer: &Dialer) -> Result<Server, String> {
    dialer
        .until_there(async |line| Server::greet(line).await)
        .await
}

impl Relay<'_> {
    async fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        let sent = tokio::time::timeout(HANDSHAKE, self.client.send(bytes)).await;
        sent.map_err(too_slow)?.map_err(|e| hung_up(&e))
    }

    async fn next_option(&mut self) -> Result<(u32, Vec<u8>), String> {
        let next = tokio::time::timeout(HANDSHAKE, self.read_option()).await;
        next.map_err(too_slow)?
    }

    async fn read_option(&mut self) -> Result<(u32, Vec<u8>), String> {
        let gone = |e| hung_up(&e);
        self.client.need(option::Header::LEN).await.map_err(gone)?;
        let header = option::Header::parse(&self.client.input).map_err(malformed)?;
        if header.length > MAX_OPTION {
            let name = kind::name(header.option);
            return Err(format!(
                "option {name} with {} bytes of data",
                header.length
            ));
        }
        let len = option::Header::LEN + header.length as usize;
        self.client.need(len).await.map_err(gone)?;
        let whole = self.client.input.split_to(len);
        Ok((header.option, whole[option::Header::LEN..].to_vec()))
    }

    async fn refuse(&mut self, option: u32, kind: u32, text: &str) -> Result<(), String> {
        let mut out = Vec::new();
        option_reply::error(option, kind, text, &mut out);
        self.send(&out).await
    }

    /// A server that knows what was agreed on, in the place of one that went away.
    async fn replace(&mut self) -> Result<(), String> {
        let pause = self.pause;
        self.pause = (2 * pause).clamp(PAUSE_MIN, PAUSE_MAX);
        let chosen = &self.chosen;
        let again = async |line| {
            let mut server = Server::greet(line).await?;
            server.set_style(chosen.style).await?;
            let mut numbered = Vec::new();
            if let Some((export, queries, told)) = &chosen.contexts {
                numbered = contexts(&server.set_contexts(export, queries).await?)?;
                let lost = told
                    .iter()
                    .find(|t| numbered.iter().all(|n| n.name != t.name));
                if let Some(lost) = lost {
                    let what = format!("the server has no context {} any more", lost.name);
                    return Err(Failed::Refused(what));
                }
            }
            Ok((server, numbered))
        };
        let found = async {
            tokio::time::sleep(pause).await;
            self.dialer.until_there(again).await
        };
        (self.server, self.numbered) = tokio::select! {
            found = found => found?,
            () = self.client.closed() => return Err(WENT_AWAY.into()),
        };
        Ok(())
    }

    async fn ask(&mut self, option: u32, data: &[u8]) -> Result<Vec<Answer>, String> {
        loop {
            match self.server.ask(option, data).await {
                Ok(answers) => return Ok(answers),
                Err(Failed::Lost(_)) => self.replace().await?,
                Err(Failed::Refused(why) | Failed::Gone(why) | Failed::Ended(why)) => {
                    return Err(why);
                }
            }
        }
    }

    async fn pass(&mut self, option: u32, data: &[u8]) -> Result<(), String> {
        let request = match option {
            kind::STARTTLS => {
                let text = "the holder does not pass TLS on";
                return self.refuse(option, answer::ERR_POLICY, text).await;
            }
            kind::SET_META_CONTEXT => match MetaRequest::parse(data) {
                Ok(request) => Some(request),
                Err(e) => {
                    self.chosen.contexts = None;
                    return self
                        .refuse(option, answer::ERR_INVALID, &malformed(e))
                        .await;
                }
            },
            kind::LIST | kind::INFO | kind::LIST_META_CONTEXT => None,
            kind::STRUCTURED_REPLY | kind::EXTENDED_HEADERS => None,
            _ => {
                let text = format!("option {option} is not known to the holder");
                return self.refuse(option, answer::ERR_UNSUP, &text).await;
            }
        };
        let answers = self.ask(option, data).await?;
        let accepted = answers.last().is_some_and(|a| a.kind == answer::ACK);
        match (option, request) {
            (kind::STRUCTURED_REPLY, _) if accepted && self.chosen.style == Style::Simple => {
                self.chosen.style = Style::Structured;
            }
            (kind::EXTENDED_HEADERS, _) if accepted => self.chosen.style = Style::Extended,
            (_, Some(request)) => {
                self.chosen.contexts = None;
                self.numbered = Vec::new();
                if accepted {
                    let broken = |_| "the server broke the protocol: a context without a name";
                    let found = contexts(&answers).map_err(broken)?;
                    let queries = request.queries().map(str::to_owned).collect();
                    self.numbered = found.clone();
                    self.chosen.contexts = Some((request.name.to_owned(), queries, found));
                }
            }
            _ => {}
        }
        let mut out = Vec::new();
        for mut a in answers {
            if option == kind::INFO {
                hide_unknown(&mut a);
            }
            a.emit(option, &mut out);
        }
        self.send(&out).await
    }

    /// Ends the handshake; `None` when the server does not let the client in, which was told so.
    async fn enter(
        &mut self,
        option: u32,
        data: &[u8],
    ) -> Result<Option<(Terms, Option<String>)>, String> {
        let (export, wanted) = match option {
            kind::GO => match InfoRequest::parse(data) {
                Ok(request) => {
                    let asked = |w: &u16| request.wants(*w);
                    let known = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
                    (request.name, known.into_iter().filter(asked).collect())
                }
                Err(e) => {
                    let text = malformed(e);
                    self.refuse(option, answer::ERR_INVALID, &text).await?;
                    return Ok(None);
                }
            },
            _ => (string(data).map_err(malformed)?, Vec::new()),
        };
        let (life, answers, entered) = loop {
            let both = async {
                // Before GO, on the same connection: the life is that of the disk that GO gives.
                let life = self.server.life(export).await?;
                let (answers, entered) = self.server.enter(export, &wanted).await?;
                Ok((life, answers, entered))
            };
            match both.await {
                Ok(done) => break done,
                Err(Failed::Lost(_)) => self.replace().await?,
                Err(Failed::Refused(why) | Failed::Gone(why) | Failed::Ended(why)) => {
                    return Err(why);
                }
            }
        };
        let mut out = Vec::new();
        let Some(entered) = entered else {
            if option == kind::EXPORT_NAME {
                return Err(format!("the server does not let it into '{export}'"));
            }
            answers.iter().for_each(|a| a.emit(option, &mut out));
            self.send(&out).await?;
            return Ok(None);
        };
        if option == kind::EXPORT_NAME {
            let reply = ExportReply {
                size: entered.size,
                flags: entered.flags,
            };
            reply.emit(!self.no_zeroes, &mut out);
        } else {
            answers.iter().for_each(|a| a.emit(option, &mut out));
        }
        self.send(&out).await?;
        let chosen = self.chosen.contexts.take();
        let (queries, told) = match chosen {
            Some((name, queries, told)) if name == export => (queries, told),
            _ => (Vec::new(), Vec::new()),
        };
        let terms = Terms {
            export: export.to_owned(),
            style: self.chosen.style,
            size: entered.size,
            flags: entered.flags,
            minimum: entered.minimum,
            maximum: entered.maximum,
            wanted,
            queries,
            contexts: told,
        };
        Ok(Some((terms, life)))
    }
}

/// Takes flags that the holder does not know out of a size and flags.
fn hide_unknown(a: &mut Answer) {
    let is_export = a.kind == answer::INFO && a.data.starts_with(&info::EXPORT.to_be_bytes());
    if let Some(flags) = a.data.get_mut(10..12).filter(|_| is_export) {
        let known = u16::from_be_bytes([flags[0], flags[1]]) & crate::hold::terms::KNOWN;
        flags.copy_from_slice(&known.to_be_bytes());
    }
}
