//! The stream of OpenVZ's `ploop copy`: from and to nodes that have that tool.
//!
//! Written from a description of the format. Packets of `ploop copy` 8 and 9, little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | `0x4CC0AC3E` |
//! | 4 | 4 | type |
//! | 8 | 4 | bytes of the payload |
//! | 12 | 4 | anything |
//! | 16 | 8 | position |
//! | 24 | 16 | MD5 of the payload, if that was agreed on |
//! | | | the payload |
//!
//! | type | payload | position | answered |
//! |---|---|---|---|
//! | 0 | bytes of the image's file | in that file | yes |
//! | 1 | a command: its first 4 bytes | see below | yes |
//! | 2 | as 0 | | no |
//! | 3 | bytes of the device | on the device | yes |
//! | 4 | extents of changed blocks | their start | yes |
//!
//! | command | payload | position |
//! |---|---|---|
//! | 0 handshake | 4 bytes | features, not 0; never with an MD5 |
//! | 0 sync | 4 bytes | 0 |
//! | 2 new ploop image, 3 qcow2 | as many bytes as its cluster has sectors: that is how its cluster is said | the device's size in sectors |
//! | 5 detach | 4 bytes | 0 |
//! | 1 finish | none: of type 1, 0 bytes | 0 |
//!
//! An answer is an `int` on the socket that the stream comes on: 0, or the exit code of OpenVZ's tool
//! for what failed. That to the handshake is the features of both sides, negative (bit 0: MD5, bit 1:
//! data of the device). OpenVZ's 9 answers -1 to every handshake, and takes data of the device all the
//! same. Tools from before the handshake begin with data, and answer it with 0.
//!
//! What is sent is one disk, without its snapshots, in one of two ways:
//!
//! ```text
//!  9      handshake, new image, device data …, sync, …, changed blocks, detach, finish
//!  8, 7   data of the top image's file …, sync, …, its header, closed, finish
//! ```
//!
//! Clusters of zeros are left out when they come first; a file ends before them. The first packet of a
//! file is its beginning.
//!
//! 7 and 6 have packets of 16 bytes, `0x4CC0AC3D`, size (4), position (8): of size 0 the end; of size 4
//! at 0 the sync, which is answered with a line, `SUCCESS` or `FAILURE`.
//!
//! Held to here, and not by that tool: an answer to data counts; an end after a wrong MD5 is not
//! answered with 0. No MD5 covers the bytes before it: what they say is judged, but a position that
//! was damaged on its way, and is still one on the device, is not found.

mod file;
mod receive;
mod send;
mod wire;

use serde::Serialize;

pub use receive::receive;
pub use send::{SentDisk, send};

/// What was received.
#[derive(Clone, Debug, Serialize)]
pub struct Copied {
    /// The container.
    pub name: String,
    /// Its directory.
    pub dir: std::path::PathBuf,
    /// What it shows, in bytes.
    pub size: u64,
    /// Bytes of data that came; what was sent twice counts twice.
    pub data: u64,
    /// Bytes of the stream.
    pub bytes: u64,
    /// Every packet came with its MD5.
    pub md5: bool,
    /// What came was the file of an image, not the device.
    pub file: bool,
    /// Packets of changed blocks, or an image's extension of them, which were dropped.
    pub cbt_dropped: u64,
}
