//! `send --openvz`, `receive --openvz`. OpenVZ's tool has one socket for the stream and the answers; by
//! two pipes it is the same.

use std::fs::File;
use std::io::{self, BufReader, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::time::Instant;

use ploop::{Error, Result};
use serde_json::json;
use snapshots::Root;
use snapshots::place::Place;
use snapshots::stream::openvz;

use super::{BUFFER, raw_stdout};
use crate::args;
use crate::output::{Bar, duration, note, size};

fn raw_stdin() -> Result<File> {
    let input = io::stdin().as_fd().try_clone_to_owned();
    input
        .map(File::from)
        .map_err(|e| Error::io("open", "standard input", e))
}

fn is_socket(file: &File) -> bool {
    file.metadata().is_ok_and(|m| m.file_type().is_socket())
}

pub(super) fn send(
    s: &args::Send,
    place: &Place<'_>,
    snapshot: Option<&str>,
    out: &mut dyn Write,
    progress: &dyn Fn(u64, u64),
) -> Result<()> {
    let stdout = raw_stdout()?;
    let mut replies = match is_socket(&stdout) {
        true => stdout,
        false => raw_stdin()?,
    };
    if replies.is_terminal() {
        return Err(Error::invalid("answers do not come from a terminal").fix(
            "Join it with the receiver both ways: socat EXEC:'ploop send CT --openvz' \
                 EXEC:'ssh NODE ploop copy -d FILE'",
        ));
    }
    let began = Instant::now();
    let sent = openvz::send(place, snapshot, out, &mut replies, progress)?;
    let took = began.elapsed();
    if s.json.json {
        return note(
            json!({
                "size": sent.size, "data": sent.data, "bytes": sent.bytes, "md5": sent.md5,
                "seconds": took.as_secs_f64(),
            })
            .to_string(),
        );
    }
    note(format!(
        "{}: {} of {} in {}, as OpenVZ's ploop sends{}",
        s.disk,
        size(sent.data),
        size(sent.size),
        duration(took),
        without(sent.md5),
    ))
}

fn without(md5: bool) -> &'static str {
    if md5 {
        ""
    } else {
        "; without checksums, which the other side does not have"
    }
}

pub(super) fn receive(root: &Root, name: &str, r: &args::Receive) -> Result<()> {
    let input = raw_stdin()?;
    let mut replies = match is_socket(&input) {
        true => raw_stdin()?,
        false => raw_stdout()?,
    };
    if replies.is_terminal() {
        return Err(
            Error::invalid("answers are nothing to be shown on a terminal").fix(
                "Join it with the sender both ways: socat EXEC:'ssh NODE ploop copy -s DEVICE' \
             EXEC:'ploop receive CT --openvz'",
            ),
        );
    }
    let bar = Bar::new(true);
    let began = Instant::now();
    let mut input = BufReader::with_capacity(BUFFER, input);
    let progress = |done, _| bar.at("receive", done, None);
    let done = openvz::receive(root, name, &mut input, &mut replies, &progress)?;
    drop(bar);
    let took = began.elapsed();
    // Standard output has the answers.
    if r.json.json {
        return note(
            json!({
                "name": done.name, "dir": done.dir, "size": done.size, "data": done.data,
                "bytes": done.bytes, "md5": done.md5, "file": done.file,
                "cbt_dropped": done.cbt_dropped, "seconds": took.as_secs_f64(),
            })
            .to_string(),
        );
    }
    note(format!(
        "container {name}: {} of {} in {}{}",
        size(done.data),
        size(done.size),
        duration(took),
        without(done.md5),
    ))?;
    if done.file {
        note(
            "What came was the file of one image: a disk that had snapshots there is not whole without \
             their files",
        )?;
    }
    if done.cbt_dropped > 0 {
        note(
            "The list of changed blocks (CBT) that came along was dropped: its backups begin anew",
        )?;
    }
    Ok(())
}
