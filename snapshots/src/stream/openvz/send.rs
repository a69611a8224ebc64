//! The sending side. It writes to the stream and to nothing else.

use std::io::{Read, Write};

use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::header::CLUSTER_SECTORS_OPENVZ;
use ploop::store::SECTOR;
use serde::Serialize;

use super::wire::{COMMAND, DEVICE, FEATURE_DEVICE, FEATURE_MD5, INIT, Output, SYNC, UMOUNT};
use crate::convert::Progress;
use crate::place::Place;
use crate::stream::source::Opened;

/// Bytes of data in a packet, at most.
const DATA_MAX: usize = 1 << 20;
/// OpenVZ's device is written to in blocks of it.
const BLOCK: u64 = 4096;
/// Cluster of the new image where ours is none that OpenVZ has, in sectors: its default.
const CLUSTER_SECTORS: u32 = 2048;

/// What was sent.
#[derive(Clone, Debug, Serialize)]
pub struct SentDisk {
    /// The size of the device that was sent, in bytes.
    pub size: u64,
    /// Bytes of data.
    pub data: u64,
    /// Bytes of the stream.
    pub bytes: u64,
    /// With MD5s.
    pub md5: bool,
}

/// Sends what a disk, or one of its snapshots, shows to OpenVZ's `ploop copy -d FILE`, or to our own
/// [`super::receive`]: its snapshots, quota and limits do not go along. `replies` is what the receiver
/// answers. Blocks for as long as the receiver does.
///
/// The state is read under the disk's lock; a snapshot also while its disk is in use. On success the
/// receiver said that it has all of it.
///
/// Errors: those of [`crate::stream::send`]; `Unsupported` for a receiver that takes no data of
/// devices; `Io` with the code that the receiver answered.
pub fn send(
    place: &Place<'_>,
    snapshot: Option<&str>,
    out: &mut dyn Write,
    replies: &mut dyn Read,
    progress: Progress<'_>,
) -> Result<SentDisk> {
    let opened = Opened::open(place, snapshot)?;
    let node = match snapshot {
        Some(text) => opened.find(place, text)?,
        None => opened.d.top,
    };
    let image = opened.sent(&opened.chain(node)?, None, false)?;
    let own = opened.d.cluster_sectors;
    let fits = own.is_power_of_two() && CLUSTER_SECTORS_OPENVZ.contains(&own);
    let cluster_sectors = if fits { own } else { CLUSTER_SECTORS };
    let shows = image.record.limit.unwrap_or(image.record.size);
    let size = shows.checked_next_multiple_of(u64::from(cluster_sectors) * SECTOR);
    let size = size.ok_or_else(|| Error::corrupt("the disk is too large").on(place.dir()))?;

    let mut sender = Sender {
        out: Output {
            out,
            replies,
            md5: false,
            bytes: 0,
        },
        waiting: Vec::new(),
        at: 0,
        data: 0,
    };
    sender.handshake()?;
    let mut init = vec![0; cluster_sectors as usize];
    init[..4].copy_from_slice(&INIT.to_le_bytes());
    sender
        .said(COMMAND, size / SECTOR, &init, "make an image")
        .map_err(|e| e.fix(format!("Look at what it said. {OLD}")))?;
    let total = image.data()?;
    let mut looked = 0;
    image.walk(&mut |offset, bytes| {
        looked += bytes.len() as u64;
        progress(looked.min(total), total);
        // What a disk was shrunk by is not shown.
        let shown = usize::try_from(shows.saturating_sub(offset)).unwrap_or(usize::MAX);
        sender.data(offset, &bytes[..shown.min(bytes.len())])
    })?;
    sender.flush()?;
    sender.command(SYNC, "sync")?;
    sender.command(UMOUNT, "detach the image")?;
    sender.said(COMMAND, 0, &[], "finish")?;
    Ok(SentDisk {
        size,
        data: sender.data,
        bytes: sender.out.bytes,
        md5: sender.out.md5,
    })
}

struct Sender<'a> {
    out: Output<'a>,
    /// Data that was not sent yet, and where it begins.
    waiting: Vec<u8>,
    at: u64,
    data: u64,
}

impl Sender<'_> {
    fn handshake(&mut self) -> Result<()> {
        let ours = FEATURE_MD5 | FEATURE_DEVICE;
        let reply = self.out.packet(COMMAND, ours, &SYNC.to_le_bytes())?;
        if reply > 0 {
            return Err(refused("shake hands", reply));
        }
        let theirs = u64::from(reply.unsigned_abs()) & ours;
        // That it takes data of the device 9 does not say, though it does: it answers -1. One that
        // does not refuses to make an image.
        if theirs == 0 {
            return Err(too_old());
        }
        self.out.md5 = theirs & FEATURE_MD5 != 0;
        Ok(())
    }

    fn command(&mut self, command: u32, what: &str) -> Result<()> {
        self.said(COMMAND, 0, &command.to_le_bytes(), what)
    }

    fn said(&mut self, kind: u32, pos: u64, payload: &[u8], what: &str) -> Result<()> {
        match self.out.packet(kind, pos, payload)? {
            0 => Ok(()),
            code => Err(refused(what, code)),
        }
    }

    /// Takes the next data: what follows without a gap goes in one packet.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let follows = offset == self.at + self.waiting.len() as u64;
        if !follows || self.waiting.len() + bytes.len() > DATA_MAX {
            self.flush()?;
            self.at = offset;
        }
        self.waiting.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        self.data += waiting.len() as u64;
        // The end of a disk that is no whole block; the device goes on with zeros.
        let whole = (waiting.len() as u64).next_multiple_of(BLOCK);
        waiting.resize(usize::try_from(whole).unwrap_or(waiting.len()), 0);
        self.said(DEVICE, self.at, &waiting, "write data")?;
        waiting.clear();
        self.waiting = waiting;
        Ok(())
    }
}

/// What is to be done with a receiver that makes no image.
const OLD: &str = "One before version 9 takes nothing but the files of images: make one and copy it: \
                   ploop convert CT ct.hds --to ploop";

fn too_old() -> Error {
    Error::unsupported("the receiver is a `ploop copy` before version 9").fix(OLD)
}

fn refused(what: &str, code: i32) -> Error {
    let what = format!("the receiver failed to {what}: exit code {code} of OpenVZ's ploop");
    Error::new(Kind::Io, what)
        .on("stream")
        .fix("Look at what it said, and into its /var/log/ploop.log; nothing is changed here")
}
