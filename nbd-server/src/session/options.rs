//! What each option does, once its data is all there.

use ploop::error::Error;

use crate::export::{Exports, OpenExport};
use crate::session::context::{self, Context};
use crate::session::handshake::{Handshake, Step};
use crate::session::{MAX_CONTEXTS, Negotiated, block_sizes, errno, transmission_flags};
use crate::wire::greeting::ExportReply;
use crate::wire::option::{InfoRequest, MetaRequest, info, kind};
use crate::wire::option_reply::{self as answer, kind as reply};
use crate::wire::reply::Style;
use crate::wire::{self, string};

/// An answer that is an error: its kind and its text.
type Refused = (u32, String);

fn malformed(e: wire::Error) -> Refused {
    match e {
        wire::Error::Malformed(why) => (reply::ERR_INVALID, why.into()),
        wire::Error::NeedMore(_) => (reply::ERR_INVALID, "the data is too short".into()),
    }
}

fn failed(e: &Error) -> Refused {
    (errno::of_option(e.kind()), e.what().to_owned())
}

impl Handshake {
    /// Answers one option.
    pub(super) fn answer(
        &mut self,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
        exports: &dyn Exports,
    ) -> Step {
        if self.shutting_down && !matches!(option, kind::ABORT | kind::EXPORT_NAME) {
            self.refuse_shutting_down(option, out);
            return Step::Again;
        }
        let done = match option {
            kind::EXPORT_NAME => return self.export_name(data, out, exports),
            kind::ABORT => {
                answer::ack(option, out);
                return Step::Closed("aborted by the client".into());
            }
            kind::GO => match self.go(data, out, exports) {
                Ok(negotiated) => return Step::Negotiated(Box::new(negotiated)),
                Err(refused) => Err(refused),
            },
            kind::INFO => self.info(option, data, out, exports).map(drop),
            kind::LIST => Self::list(data, out, exports),
            kind::STRUCTURED_REPLY | kind::EXTENDED_HEADERS => self.set_style(option, data),
            kind::LIST_META_CONTEXT => self.list_contexts(data, out, exports),
            kind::SET_META_CONTEXT => self.set_contexts(data, out, exports),
            kind::STARTTLS if data.is_empty() => {
                Err((reply::ERR_POLICY, "this server does not offer TLS".into()))
            }
            kind::STARTTLS => Err((reply::ERR_INVALID, "STARTTLS has no data".into())),
            _ => {
                Self::refuse_unknown(option, out);
                return Step::Again;
            }
        };
        match done {
            Ok(()) => answer::ack(option, out),
            Err((kind, text)) => answer::error(option, kind, &text, out),
        }
        Step::Again
    }

    /// The export of that name, opened once for a run of options that name it.
    fn open(&mut self, name: &str, exports: &dyn Exports) -> Result<&OpenExport, Error> {
        if self
            .opened
            .as_ref()
            .is_none_or(|(opened, _)| opened != name)
        {
            // The one before goes first: a client holds one export open, not all it asks about.
            self.opened = None;
            self.opened = Some((name.into(), exports.open(name)?));
        }
        match &self.opened {
            Some((_, export)) => Ok(export),
            None => Err(Error::invalid("no export is open")),
        }
    }

    fn negotiated(&mut self, name: &str, export: OpenExport) -> Negotiated {
        let contexts = match self.selected.take() {
            Some((selected_for, contexts)) if selected_for == name => contexts,
            _ => Vec::new(),
        };
        Negotiated {
            size: export.device.size(),
            export,
            style: self.style(),
            no_zeroes: self.no_zeroes,
            contexts,
        }
    }

    fn export_name(&mut self, data: &[u8], out: &mut Vec<u8>, exports: &dyn Exports) -> Step {
        if self.shutting_down {
            return Step::Closed("the server is shutting down".into());
        }
        if self.extended {
            return Step::Closed("EXPORT_NAME after extended headers".into());
        }
        let name = match string(data) {
            Ok(name) => name,
            Err(e) => return Step::Closed(malformed(e).1),
        };
        let export = match self.open(name, exports) {
            Ok(export) => export.clone(),
            Err(e) => return Step::Closed(e.to_string()),
        };
        let flags = transmission_flags(export.device.read_only(), self.style());
        let negotiated = self.negotiated(name, export);
        ExportReply {
            size: negotiated.size,
            flags,
        }
        .emit(!self.no_zeroes, out);
        Step::Negotiated(Box::new(negotiated))
    }

    fn go(
        &mut self,
        data: &[u8],
        out: &mut Vec<u8>,
        exports: &dyn Exports,
    ) -> Result<Negotiated, Refused> {
        let (name, export, size) = self.info(kind::GO, data, out, exports)?;
        answer::ack(kind::GO, out);
        let negotiated = self.negotiated(name, export);
        // The client was told this size, even if the device has grown since.
        Ok(Negotiated { size, ..negotiated })
    }

    /// Appends the information of INFO and GO; returns the name asked for, the export and the size
    /// that was told.
    fn info<'d>(
        &mut self,
        option: u32,
        data: &'d [u8],
        out: &mut Vec<u8>,
        exports: &dyn Exports,
    ) -> Result<(&'d str, OpenExport, u64), Refused> {
        let request = InfoRequest::parse(data).map_err(malformed)?;
        let style = self.style();
        let export = self
            .open(request.name, exports)
            .map_err(|e| failed(&e))?
            .clone();
        let size = export.device.size();
        let flags = transmission_flags(export.device.read_only(), style);
        answer::info_export(option, size, flags, out);
        if request.wants(info::NAME) {
            answer::info_text(option, info::NAME, &export.name, out);
        }
        if request.wants(info::DESCRIPTION) && !export.description.is_empty() {
            answer::info_text(option, info::DESCRIPTION, &export.description, out);
        }
        if request.wants(info::BLOCK_SIZE) {
            answer::info_block_size(option, block_sizes(export.device.cluster_bytes()), out);
        }
        Ok((request.name, export, size))
    }

    fn list(data: &[u8], out: &mut Vec<u8>, exports: &dyn Exports) -> Result<(), Refused> {
        if !data.is_empty() {
            return Err((reply::ERR_INVALID, "LIST has no data".into()));
        }
        for export in exports.list().map_err(|e| failed(&e))? {
            // A clipped name would name another export, or none.
            if string(export.name.as_bytes()).is_ok() {
                answer::server(kind::LIST, &export.name, &export.description, out);
            }
        }
        Ok(())
    }

    fn set_style(&mut self, option: u32, data: &[u8]) -> Result<(), Refused> {
        if !data.is_empty() {
            return Err((
                reply::ERR_INVALID,
                format!("{} has no data", kind::name(option)),
            ));
        }
        if option == kind::EXTENDED_HEADERS {
            self.extended = true;
        } else if self.extended {
            let text = "extended headers are in use already".into();
            return Err((reply::ERR_EXT_HEADER_REQD, text));
        }
        self.structured = true;
        Ok(())
    }

    fn meta<'d>(
        &mut self,
        data: &'d [u8],
        exports: &dyn Exports,
    ) -> Result<(MetaRequest<'d>, Vec<Context>), Refused> {
        let parsed = MetaRequest::parse(data);
        let for_life = |r: &MetaRequest<'_>| r.queries().eq([context::LIFE]);
        if self.style() == Style::Simple && !parsed.as_ref().is_ok_and(for_life) {
            let text = "metadata contexts need structured replies first".into();
            return Err((reply::ERR_INVALID, text));
        }
        let request = parsed.map_err(malformed)?;
        let export = self.open(request.name, exports);
        let contexts = export.and_then(|export| Context::all_of(export, exports));
        Ok((request, contexts.map_err(|e| failed(&e))?))
    }

    fn list_contexts(
        &mut self,
        data: &[u8],
        out: &mut Vec<u8>,
        exports: &dyn Exports,
    ) -> Result<(), Refused> {
        let (request, contexts) = self.meta(data, exports)?;
        let all = request.queries().next().is_none();
        for context in contexts {
            if all || request.queries().any(|q| context.listed_by(q)) {
                answer::meta_context(kind::LIST_META_CONTEXT, 0, context.name(), out);
            }
        }
        if request.queries().any(|q| q == context::LIFE)
            && let Some(lives) = &self
                .open(request.name, exports)
                .map_err(|e| failed(&e))?
                .lives
        {
            let name = format!(
                "{}:{}",
                context::LIFE,
                lives.life().map_err(|e| failed(&e))?
            );
            answer::meta_context(kind::LIST_META_CONTEXT, 0, &name, out);
        }
        Ok(())
    }

    fn set_contexts(
        &mut self,
        data: &[u8],
        out: &mut Vec<u8>,
        exports: &dyn Exports,
    ) -> Result<(), Refused> {
        // The old selection goes even when the new one fails.
        self.selected = None;
        let (request, mut contexts) = self.meta(data, exports)?;
        contexts.retain(|c| request.queries().any(|q| c.selected_by(q)));
        if contexts.len() > MAX_CONTEXTS {
            let text = format!("{} contexts are more than {MAX_CONTEXTS}", contexts.len());
            return Err((reply::ERR_TOO_BIG, text));
        }
        for (id, context) in (1..).zip(&contexts) {
            answer::meta_context(kind::SET_META_CONTEXT, id, context.name(), out);
        }
        self.selected = Some((request.name.into(), contexts));
        Ok(())
    }
}
