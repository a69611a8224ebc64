//! A descriptor's bytes as a small tree of elements, or a refusal.
//!
//! This is where hostile input ends. What comes out is UTF-8, well formed, free of DTDs (no entity
//! exists but XML's own five, so nothing expands), at most [`MAX_DEPTH`] deep, [`MAX_ELEMENTS`]
//! large and [`MAX_TEXT`] bytes wide in any one text or tag. Memory is bounded by these constants
//! and by the length of the input, never by anything that the input says.

use std::borrow::Cow;

use quick_xml::Reader;
use quick_xml::escape::{resolve_predefined_entity, unescape};
use quick_xml::events::{BytesDecl, BytesRef, BytesStart, Event};

use super::{Defect, shown};
use crate::error::{Error, Result};

/// Bytes of the largest document that is read.
pub(super) const MAX_BYTES: usize = 16 << 20;
/// Bytes of the longest text of one element, and of the longest start tag.
pub(super) const MAX_TEXT: usize = 4096;
/// Levels of elements, the root being the first.
const MAX_DEPTH: usize = 32;
/// Elements of a document: room for the most images that are read, and as much again.
const MAX_ELEMENTS: usize = 1 << 18;

/// Characters of foreign text that a message repeats.
const MAX_SHOWN: usize = 120;

const BOM: &[u8] = b"\xef\xbb\xbf";
const WHITE: [char; 4] = [' ', '\t', '\r', '\n'];

/// An element that was read whole.
#[derive(Debug)]
pub(super) struct Element<'a> {
    pub(super) name: &'a str,
    /// Offset of its `<` in the bytes given to [`read`].
    pub(super) at: u64,
    /// The inside of its start tag: name and attributes.
    pub(super) tag: &'a str,
    /// The element as it stands in the document, from `<` to the last `>`.
    pub(super) raw: &'a str,
    /// Its own text with references resolved; empty if that is only white space between children.
    pub(super) text: Cow<'a, str>,
    pub(super) children: Vec<Element<'a>>,
}

/// Reads a document; returns its root.
pub(super) fn read(bytes: &[u8]) -> Result<Element<'_>> {
    let (doc, base) = decode(bytes)?;
    let mut reader = Reader::from_str(doc);
    reader.config_mut().check_comments = true;
    let mut tree = Tree {
        doc,
        base,
        open: Vec::new(),
        root: None,
        elements: 0,
    };
    loop {
        let from = reader.buffer_position() as usize;
        let event = reader.read_event().map_err(|e| {
            let what = format!(
                "the descriptor is not well-formed XML: {}",
                clip(&e.to_string())
            );
            Defect::NotWellFormed
                .refuse(what)
                .at(base + reader.error_position())
                .fix(RESTORE)
        })?;
        let to = reader.buffer_position() as usize;
        match event {
            Event::Start(tag) => tree.start(&tag, from)?,
            Event::Empty(tag) => {
                tree.start(&tag, from)?;
                tree.end(to);
            }
            Event::End(_) => tree.end(to),
            Event::Text(text) => tree.text(text.xml10_content(), from)?,
            Event::CData(text) => tree.text(text.xml10_content(), from)?,
            Event::GeneralRef(name) => tree.text(tree.resolve(&name, from)?, from)?,
            Event::Decl(decl) => tree.declaration(&decl, from)?,
            Event::DocType(_) => {
                let what = "the descriptor has a DOCTYPE: document types and entities are refused";
                return Err(tree
                    .refuse(Defect::Dtd, what, from)
                    .fix("Remove the DOCTYPE from the file"));
            }
            Event::Comment(_) | Event::PI(_) => {}
            Event::Eof => return tree.finish(),
        }
    }
}

pub(super) const RESTORE: &str = "Restore DiskDescriptor.xml from a backup";

/// The document as text, and how many bytes of a byte order mark stand before it.
fn decode(bytes: &[u8]) -> Result<(&str, u64)> {
    if bytes.is_empty() {
        return Err(Defect::NotWellFormed
            .refuse("the descriptor is empty")
            .at(0)
            .fix(RESTORE));
    }
    if bytes.len() > MAX_BYTES {
        let what = format!(
            "the descriptor is {} bytes long; more than {MAX_BYTES} are not read",
            bytes.len()
        );
        return Err(Defect::TooLarge.refuse(what));
    }
    let utf16 = matches!(
        bytes,
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'<', 0, ..] | [0, b'<', ..]
    );
    if utf16 {
        return Err(
            Error::unsupported("the descriptor is in UTF-16; only UTF-8 is read")
                .at(0)
                .fix("Convert it: iconv -f UTF-16 -t UTF-8, and correct its encoding declaration"),
        );
    }
    let body = bytes.strip_prefix(BOM).unwrap_or(bytes);
    let base = (bytes.len() - body.len()) as u64;
    let doc = std::str::from_utf8(body).map_err(|e| {
        Defect::BadEncoding
            .refuse("the descriptor is not valid UTF-8")
            .at(base + e.valid_up_to() as u64)
            .fix(RESTORE)
    })?;
    // A second byte order mark would be text before the root, but the reader skips it unseen.
    let stray = doc.starts_with('\u{feff}').then_some((0, '\u{feff}'));
    if let Some((at, c)) = stray.or_else(|| doc.char_indices().find(|&(_, c)| !allowed(c))) {
        let what = format!(
            "the descriptor is not XML: character U+{:04X} in it",
            u32::from(c)
        );
        return Err(Defect::NotWellFormed
            .refuse(what)
            .at(base + at as u64)
            .fix(RESTORE));
    }
    Ok((doc, base))
}

/// XML 1.0's Char.
pub(super) fn allowed(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..)
}

struct Tree<'a> {
    doc: &'a str,
    base: u64,
    open: Vec<Element<'a>>,
    root: Option<Element<'a>>,
    elements: usize,
}

impl<'a> Tree<'a> {
    fn refuse(&self, defect: Defect, what: impl Into<String>, at: usize) -> Error {
        defect.refuse(what).at(self.base + at as u64)
    }

    /// Opens the element whose start tag begins at `from`.
    fn start(&mut self, start: &BytesStart<'_>, from: usize) -> Result<()> {
        let tag = self
            .doc
            .get(from + 1..from + 1 + start.len())
            .unwrap_or_default();
        if tag.len() > MAX_TEXT {
            let what = format!(
                "a start tag of {} bytes; the limit is {MAX_TEXT}",
                tag.len()
            );
            return Err(self.refuse(Defect::TooLarge, what, from));
        }
        let name = tag.get(..start.name().as_ref().len()).unwrap_or_default();
        if !is_name(name) {
            let what = format!("{} is not the name of an XML element", shown(name));
            return Err(self.refuse(Defect::NotWellFormed, what, from));
        }
        if self.open.is_empty() && self.root.is_some() {
            return Err(self.refuse(
                Defect::NotWellFormed,
                format!("a second root element <{}>", clip(name)),
                from,
            ));
        }
        if self.open.len() == MAX_DEPTH {
            let what = format!("elements are nested deeper than {MAX_DEPTH} levels");
            return Err(self.refuse(Defect::TooLarge, what, from));
        }
        if self.elements == MAX_ELEMENTS {
            let what = format!("the descriptor has more than {MAX_ELEMENTS} elements");
            return Err(self.refuse(Defect::TooLarge, what, from));
        }
        self.attributes(start, name, from)?;
        if let Some(parent) = self.open.last_mut()
            && is_white(&parent.text)
        {
            parent.text = Cow::Borrowed("");
        }
        self.elements += 1;
        self.open.push(Element {
            name,
            at: self.base + from as u64,
            tag,
            raw: "",
            text: Cow::Borrowed(""),
            children: Vec::new(),
        });
        Ok(())
    }

    /// Attributes carry nothing we use, but are written back: they must be well formed.
    fn attributes(&self, start: &BytesStart<'_>, name: &str, from: usize) -> Result<()> {
        for attribute in start.attributes() {
            let good = attribute.is_ok_and(|a| {
                let plain = !a.value.contains('<');
                let value = unescape(&a.value);
                plain && is_name(a.key.as_ref()) && value.is_ok_and(|v| v.chars().all(allowed))
            });
            if !good {
                let what = format!("a malformed attribute in <{}>", clip(name));
                return Err(self.refuse(Defect::NotWellFormed, what, from));
            }
        }
        Ok(())
    }

    /// Closes the innermost element, whose end tag ends before `to`. The reader has matched names.
    fn end(&mut self, to: usize) {
        let Some(mut done) = self.open.pop() else {
            return;
        };
        let from = (done.at - self.base) as usize;
        done.raw = self.doc.get(from..to).unwrap_or_default();
        if !done.children.is_empty() && is_white(&done.text) {
            done.text = Cow::Borrowed("");
        }
        match self.open.last_mut() {
            Some(parent) => parent.children.push(done),
            None => self.root = Some(done),
        }
    }

    /// Adds text to the innermost element.
    fn text(&mut self, text: Cow<'_, str>, from: usize) -> Result<()> {
        let Some(element) = self.open.last_mut() else {
            if is_white(&text) {
                return Ok(());
            }
            return Err(self.refuse(
                Defect::NotWellFormed,
                "text outside of the root element",
                from,
            ));
        };
        if element.text.len() + text.len() > MAX_TEXT {
            let what = format!(
                "the text of <{}> is longer than {MAX_TEXT} bytes",
                clip(element.name)
            );
            let defect = match element.name {
                "File" | "Parent" => Defect::BadPath,
                _ => Defect::TooLarge,
            };
            return Err(self.refuse(defect, what, from));
        }
        element.text.to_mut().push_str(&text);
        Ok(())
    }

    fn resolve(&self, name: &BytesRef<'_>, from: usize) -> Result<Cow<'a, str>> {
        if let Some(text) = resolve_predefined_entity(name) {
            return Ok(Cow::Borrowed(text));
        }
        match name.resolve_char_ref() {
            Ok(Some(c)) if allowed(c) => Ok(Cow::Owned(c.to_string())),
            _ => {
                let what = format!("&{}; stands for no character", clip(name));
                Err(self
                    .refuse(Defect::NotWellFormed, what, from)
                    .fix("Write the character itself"))
            }
        }
    }

    fn declaration(&self, decl: &BytesDecl<'_>, from: usize) -> Result<()> {
        if from != 0 {
            return Err(self.refuse(
                Defect::NotWellFormed,
                "an XML declaration that is not at the start",
                from,
            ));
        }
        if !decl.version().is_ok_and(|v| v == "1.0") {
            return Err(self.refuse(
                Defect::NotWellFormed,
                "the XML declaration does not say version 1.0",
                from,
            ));
        }
        let encoding = match decl.encoding() {
            None => return Ok(()),
            Some(Ok(name)) => name,
            Some(Err(_)) => {
                return Err(self.refuse(
                    Defect::BadEncoding,
                    "a malformed encoding declaration",
                    from,
                ));
            }
        };
        // In these, plain ASCII reads as in UTF-8.
        let superset = ["us-ascii", "iso-8859-1"]
            .iter()
            .any(|n| encoding.eq_ignore_ascii_case(n));
        if encoding.eq_ignore_ascii_case("utf-8") || superset && self.doc.is_ascii() {
            return Ok(());
        }
        let what = format!(
            "the descriptor declares encoding {}, not UTF-8",
            shown(&encoding)
        );
        Err(self
            .refuse(Defect::BadEncoding, what, from)
            .fix("Convert the file to UTF-8 and correct its first line"))
    }

    fn finish(mut self) -> Result<Element<'a>> {
        if let Some(open) = self.open.pop() {
            let what = format!("the descriptor ends inside <{}>", clip(open.name));
            return Err(self
                .refuse(Defect::NotWellFormed, what, self.doc.len())
                .fix(RESTORE));
        }
        let root = self.root.take();
        root.ok_or_else(|| {
            self.refuse(Defect::NotWellFormed, "the descriptor has no element", 0)
                .fix(RESTORE)
        })
    }
}

pub(super) fn is_white(text: &str) -> bool {
    text.bytes()
        .all(|b| matches!(b, b' ' | b'\t' | b'\r' | b'\n'))
}

/// Without the white space that XML tools put around values.
pub(super) fn trim(text: &str) -> &str {
    text.trim_matches(WHITE)
}

fn is_name(name: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || matches!(c, '_' | ':') || !c.is_ascii();
    let rest = |c: char| first(c) || c.is_ascii_digit() || matches!(c, '-' | '.');
    name.starts_with(first) && name.chars().all(rest)
}

/// The start of a text that may hold anything, fit for a message.
pub(super) fn clip(text: &str) -> String {
    let mut chars = text.chars();
    let mut out = String::new();
    for c in chars.by_ref().take(MAX_SHOWN) {
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    if chars.next().is_some() {
        out.push('…');
    }
    out
}
