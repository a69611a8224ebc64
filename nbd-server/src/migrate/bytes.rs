//! The two sides over bytes from anywhere, without a link: for the fuzzer, and for tests of what a power
//! cut leaves. No part of what is kept stable.

use std::io::{Read, Write};
use std::sync::Arc;

use ploop::error::{Error, Result};

use super::Destination;
use super::settle::{Settled, settle_by};
use super::source::{Failed, Moved, Source};
use super::wire::Wire;
use crate::export::Disks;
use crate::serve::Connections;

/// Who is at the other end.
const PEER: &str = "whoever";

/// The destination's side of `link`, to its end.
pub fn attend(to: &Arc<Destination>, link: impl Read + Write + Send + 'static) -> Result<()> {
    let mut wire = Wire::new(Box::new(link), PEER);
    to.serve(&mut wire, &Arc::default())
}

/// The source's side.
pub fn leave(from: Source<'_>, link: impl Read + Write + Send + 'static) -> Result<Moved, Failed> {
    from.run(Wire::new(Box::new(link), PEER))
}

/// The source's side of the end of a move that was cut.
pub fn settle(
    of: (&Disks, &Connections),
    container: &str,
    link: impl Read + Write + Send + 'static,
) -> Result<Settled> {
    settle_by(of, container, |_| Ok(Wire::new(Box::new(link), PEER)))
}

/// The frames that `link` has: their types and payloads; and why there are no more.
pub fn frames(link: impl Read + Write + Send + 'static) -> (Vec<(u8, Vec<u8>)>, Error) {
    let mut wire = Wire::new(Box::new(link), PEER);
    let mut all = Vec::new();
    loop {
        match wire.read() {
            Ok(kind) => all.push((kind as u8, wire.payload().to_vec())),
            Err(e) => return (all, e),
        }
    }
}
