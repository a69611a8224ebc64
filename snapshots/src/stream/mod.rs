//! `ploop send` and `ploop receive`: a disk as a stream of bytes, from one store to another.
//!
//! ```text
//!  send ── preamble ─ disk ─ image … ─┬─ begin ─ data … ─ done ─┬─ … ─ end ── receive
//!          (position, if it goes on) ─┘        each image       ┘
//! ```
//!
//! All numbers are little-endian. The preamble:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `PLOOPSTR` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | features that a receiver must know; bit 0: it goes on where another was cut |
//! | 16 | 16 | id of the stream, random |
//! | 32 | 4 | CRC-32 of the 32 bytes before |
//!
//! and then frames:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 1 | type |
//! | 1 | 3 | 0 |
//! | 4 | 4 | bytes of the payload, 1 MiB at most |
//! | 8 | 8 | its number: 0, 1, 2 … |
//! | 16 | 4 | CRC-32 of the stream's id, the 16 bytes before, and the payload |
//! | 20 | | the payload |
//!
//! | type | payload | when |
//! |---|---|---|
//! | 1 disk | JSON ([`Disk`]) | first |
//! | 2 image | JSON ([`Image`]) | one for each image, parents first |
//! | 3 position | JSON ([`Position`]) | next, if the stream goes on: what lies before it was received |
//! | 4 begin | JSON: `image`, its number | then for each image |
//! | 5 data | byte offset on the disk (8), bytes | ascending, none over the end of a cluster |
//! | 6 done | JSON: `hash` of the image | |
//! | 7 end | JSON: `frames` before it, `hash` of all | last: nothing follows |
//!
//! What an image has no data frame of it does not have. A data frame without bytes is a cluster that
//! reads as zeros, whatever lies below. Blocks of 4096 bytes that are all zeros are not sent. The
//! hash of an image is that of `source::hash`; that of all is SHA-256 over the hash of the records
//! and those of the images of this stream.
//!
//! Checksums find what damages a stream on its way, and a frame of another stream, or in another
//! place. They are no signature: a stream is as much to be trusted as who sends it, and what it can
//! do is make one container, or one snapshot, with any content.

mod base;
mod commit;
pub mod frame;
pub mod manifest;
mod onto;
pub mod openvz;
mod partial;
mod receive;
mod send;
mod source;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use base::{Have, have};
pub(crate) use partial::PREFIX;

pub use manifest::{Base, Disk, Image, Known, Manifest, What};
pub use partial::{Partial, Token, forget, partial, partials};
pub use receive::{ReceiveOptions, Received, receive};
pub use send::{SendOptions, Sent, send, send_below};

/// A place in the data of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The image, by its number.
    pub image: usize,
    /// The byte on the disk, the first of a cluster.
    pub offset: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Begin {
    image: usize,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Done {
    hash: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct End {
    frames: u64,
    hash: String,
}

/// The hash over everything of a stream.
#[derive(Clone, Debug)]
struct Whole(Sha256);

impl Whole {
    fn new(records: &str) -> Whole {
        Whole(Sha256::new_with_prefix(records))
    }

    fn add(&mut self, image: &str) {
        self.0.update(image);
    }

    fn text(self) -> String {
        hex(&self.0.finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
