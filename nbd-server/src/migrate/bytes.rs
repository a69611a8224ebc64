//! The two sides over bytes from anywhere, without a link: for the fuzzer, and for tests of what a power
//! cut leaves. No part of what is kept stable.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use ploop::error::{Error, Result};

use super::Destination;
use super::settle::{Settled, settle_by};
use super::source::{Failed, Moved, Source};
use super::wire::{Duplex, Wire};
use crate::export::Disks;
use crate::serve::Connections;

/// Who is at the other end.
const PEER: &str = "whoever";

/// They come, or the link is at its end: nobody waits.
struct Bytes<T>(T);

impl<T: Read> Read for Bytes<T> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl<T: Write> Write for Bytes<T> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<T: Read + Write + Send> Duplex for Bytes<T> {
    fn be_patient(&mut self, _: Duration) {}
}

fn wire(link: impl Read + Write + Send + 'static) -> Wire {
    Wire::new(Box::new(Bytes(link)), PEER)
}

/// The destination's side of `link`, to its end.
pub fn attend(to: &Arc<Destination>, link: impl Read + Write + Send + 'static) -> Result<()> {
    to.serve(&mut wire(link), &Arc::default())
}

/// The source's side.
pub fn leave(from: Source<'_>, link: impl Read + Write + Send + 'static) -> Result<Moved, Failed> {
    from.run(wire(link))
}

/// The source's side of the end of a move that was cut.
pub fn settle(
    of: (&Disks, &Connections),
    container: &str,
    link: impl Read + Write + Send + 'static,
) -> Result<Settled> {
    settle_by(of, container, |_| Ok(wire(link)))
}

/// The frames that `link` has: their types and payloads; and why there are no more.
pub fn frames(link: impl Read + Write + Send + 'static) -> (Vec<(u8, Vec<u8>)>, Error) {
    let mut wire = wire(link);
    let mut all = Vec::new();
    loop {
        match wire.read() {
            Ok(kind) => all.push((kind as u8, wire.payload().to_vec())),
            Err(e) => return (all, e),
        }
    }
}
