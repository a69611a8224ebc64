//! `send`, `receive`: streams on standard output and input.

mod openvz;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use ploop::disk::open::Opener;
use ploop::{Error, Result};
use serde_json::json;
use snapshots::Root;
use snapshots::place::Place;
use snapshots::stream::{self, Have, Partial, ReceiveOptions, SendOptions};

use super::tree::PLAIN;
use crate::args;
use crate::output::{Bar, duration, line, note, print_json, size, table};

/// Bytes between the stream and us.
const BUFFER: usize = 256 << 10;
/// Bytes of the list of what the other side has, at most.
const HAVE_MAX: u64 = 16 << 20;

pub(crate) fn send(root: &Path, s: &args::Send) -> Result<()> {
    if io::stdout().is_terminal() {
        return Err(
            Error::invalid("a stream is nothing to be shown on a terminal")
                .fix("Send it to a file or a pipe: ploop send CT | ssh HOST ploop receive CT"),
        );
    }
    let (source, options) = super::locate(root, &s.disk, &PLAIN)?;
    let what = SendOptions {
        snapshot: source.snapshot.clone(),
        from: s.from.clone(),
        have: s.have.as_deref().map_or(Ok(Vec::new()), read_have)?,
        reference: s.reference.clone(),
        resume: s.resume.as_deref().map(str::parse).transpose()?,
    };
    let mut out = Throttled {
        out: BufWriter::with_capacity(BUFFER, raw_stdout()?),
        rate: s.rate,
        began: Instant::now(),
        bytes: 0,
    };
    let bar = Bar::new(true);
    let began = Instant::now();
    let progress = |done, total| bar.at("send", done, Some(total));
    let (store, opener);
    let place = match super::container_of(&source) {
        Some((dir, name)) => {
            store = Root::open(&dir, false)?;
            Place::container(&store, &name)?
        }
        None => {
            opener = Opener::host();
            Place::disk(&opener, &source, &options.allow, true)?.called(&s.disk)
        }
    };
    if s.openvz {
        return openvz::send(s, &place, what.snapshot.as_deref(), &mut out, &progress);
    }
    let sent = stream::send(&place, &what, &mut out, &progress)?;
    drop(bar);
    let took = began.elapsed();
    // Beside the stream, which has standard output.
    if s.json.json {
        let seconds = took.as_secs_f64();
        return note(
            json!({
                "images": sent.images, "data": sent.data, "bytes": sent.bytes,
                "base": sent.base, "seconds": seconds,
            })
            .to_string(),
        );
    }
    let base = match &sent.base {
        Some(base) => format!(" on {base}"),
        None => String::new(),
    };
    note(format!(
        "{}: {} images{base}, {} in {}",
        s.disk,
        sent.images,
        size(sent.bytes),
        duration(took)
    ))
}

fn read_have(path: &Path) -> Result<Vec<Have>> {
    let failed = |e| Error::io("read", path, e);
    let mut text = Vec::new();
    let input: Box<dyn Read> = match path == Path::new("-") {
        true => Box::new(io::stdin()),
        false => Box::new(File::open(path).map_err(failed)?),
    };
    input
        .take(HAVE_MAX)
        .read_to_end(&mut text)
        .map_err(failed)?;
    serde_json::from_slice(&text).map_err(|e| {
        Error::invalid("not a list of templates")
            .on(path)
            .caused_by(e)
            .fix("`ploop receive --list-have` prints it where the stream goes")
    })
}

pub(crate) fn receive(root: &Path, r: &args::Receive) -> Result<()> {
    if r.list_have {
        return print_json(&stream::have(&Root::open(root, false)?)?);
    }
    if r.list_cut {
        return list_cut(root, r);
    }
    if let Some(name) = &r.resume_token {
        return line(stream::partial(&Root::open(root, false)?, name)?.token);
    }
    if let Some(name) = &r.forget {
        return stream::forget(&Root::open(root, false)?, name);
    }
    let name = r.name.as_deref().unwrap_or_default();
    if io::stdin().is_terminal() {
        return Err(Error::invalid("a stream does not come from a terminal")
            .fix("Give it one by a pipe: ploop send CT | ploop --root OTHER receive CT"));
    }
    snapshots::name::check(name)?;
    let root = Root::open(root, true)?;
    if r.openvz {
        return openvz::receive(&root, name, r);
    }
    let bar = Bar::new(true);
    let began = Instant::now();
    let options = ReceiveOptions {
        arriving: None,
        resumable: r.resumable,
    };
    let mut input = BufReader::with_capacity(BUFFER, io::stdin().lock());
    let progress = |done, total| bar.at("receive", done, Some(total));
    let done = stream::receive(&root, name, options, &mut input, &progress)?;
    drop(bar);
    let took = began.elapsed();
    if r.json.json {
        return print_json(&json!({
            "name": done.name, "dir": done.dir, "size": done.size, "images": done.images,
            "data": done.data, "bytes": done.bytes, "snapshot": done.snapshot,
            "current": done.current, "seconds": took.as_secs_f64(),
        }));
    }
    line(format!(
        "container {name}: {} of {} in {}",
        size(done.data),
        size(done.size),
        duration(took)
    ))?;
    match (&done.snapshot, done.current) {
        (Some(guid), false) => line(format!(
            "It shows what it did before. To the snapshot that came: ploop snapshot switch {name} \
             {guid}"
        )),
        _ => Ok(()),
    }
}

fn list_cut(root: &Path, r: &args::Receive) -> Result<()> {
    let all = stream::partials(&Root::open(root, false)?)?;
    if r.json.json {
        return print_json(&all);
    }
    let row = |p: Partial| {
        let images = format!("{} of {}", p.done, p.images);
        vec![p.name, p.of, images, p.error.unwrap_or(p.token)]
    };
    let header = ["NAME", "OF", ">IMAGES", "TOKEN"];
    table(&header, all.into_iter().map(row).collect())
}

/// Standard output, not by way of `Stdout`, which looks for lines.
fn raw_stdout() -> Result<File> {
    let out = io::stdout().as_fd().try_clone_to_owned();
    out.map(File::from)
        .map_err(|e| Error::io("open", "standard output", e))
}

/// Writes no faster than it may.
struct Throttled<W> {
    out: W,
    rate: Option<u64>,
    began: Instant,
    bytes: u64,
}

impl<W: Write> Write for Throttled<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buf)?;
        self.bytes += n as u64;
        if let Some(rate) = self.rate.filter(|r| *r > 0) {
            let due = Duration::from_secs_f64(self.bytes as f64 / rate as f64);
            if let Some(early) = due.checked_sub(self.began.elapsed()) {
                self.out.flush()?;
                std::thread::sleep(early);
            }
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
