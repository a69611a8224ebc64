//! The receiving side: nothing that comes is believed, and nothing is seen before all of it came.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use ploop::descriptor::Guid;
use ploop::device::{Device as _, ZeroMode};
use ploop::disk::Disk;
use ploop::error::{Error, Result};
use ploop::format::ploop::create;
use ploop::format::ploop::top::Top;
use ploop::store::SECTOR;

use super::Copied;
use super::file::Incoming;
use super::wire::{
    self, CBT, COMMAND, DATA, DATA_ASYNC, DEVICE, FEATURE_DEVICE, FEATURE_MD5, INIT, INIT_QCOW2,
    Input, Packet, SYNC, UMOUNT, answer,
};
use crate::convert::Progress;
use crate::limits::Limits;
use crate::name;
use crate::store::Root;
use crate::stream::commit;
use crate::stream::manifest::{Disk as Record, Image, Manifest, What};

/// Makes container `name`, of one image in format version 2, of what `ploop copy` sends; answers go to
/// `replies`. Durable on return, and before the sender is told so. Blocks for as long as the sender
/// does; `progress` gets bytes of data that came.
///
/// 1. in a work directory: the image, or the file that comes; the detach closes and syncs it;
/// 2. at the end of the stream, where a file came: it is checked, and what it shows is copied to a
///    new image, closed, synced;
/// 3. the rest as [`crate::stream::receive`] makes a container, COMMIT by the rename of its directory;
/// 4. the end is answered.
///
/// Cut before 3's commit there is nothing of it. Cut before 4, the sender does not know that the
/// container is there. A sync is answered at once: nothing of what came outlives a crash before the
/// commit.
///
/// Errors: `Corrupt` for a stream that is damaged or cut, or says what no disk can be; `Unsupported`
/// for qcow2 and for what is not known; `Exists`; `NoSpace`. The sender is told, by an exit code.
pub fn receive(
    root: &Root,
    name: &str,
    input: &mut dyn Read,
    replies: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<Copied> {
    name::check(name)?;
    commit::refuse_taken(root, name)?;
    let work = {
        let _alone = root.lock(true)?;
        root.collect_tmp()?;
        root.work()?
    };
    let mut receiver = Receiver {
        root,
        room: work.path(),
        input: Input::new(input),
        shaken: None,
        state: State::Nothing,
        data: 0,
        cbt: 0,
        progress,
    };
    let mut old = false;
    let end = loop {
        let next = receiver.input.packet();
        let done = next.and_then(|p| {
            old = p.old;
            Ok((p, receiver.take(&p)?))
        });
        match done {
            Ok((_, Answer::End)) => break receiver.finish(name),
            Ok((_, Answer::None)) => {}
            Ok((_, Answer::Line)) => answer(replies, b"SUCCESS\n")?,
            Ok((_, Answer::Code(code))) => answer(replies, &code.to_le_bytes())?,
            Err(e) => break Err(e),
        }
    };
    match &end {
        // Only the end of a stream has no answer there.
        Ok(_) if old => {}
        Ok(_) => answer(replies, &0i32.to_le_bytes()).map_err(|e| {
            let what = format!("container {name} is there, but the sender could not be told");
            e.while_doing(what)
        })?,
        Err(_) if receiver.input.is_cut => {}
        Err(e) => {
            let said = match old {
                true => answer(replies, b"FAILURE\n"),
                false => answer(replies, &wire::code(e).to_le_bytes()),
            };
            // The first error is the one to report.
            drop(said);
        }
    }
    end
}

/// What a packet is answered with.
enum Answer {
    Code(i32),
    Line,
    None,
    End,
}

/// How far it is.
enum State {
    Nothing,
    /// Data of the device goes there.
    Device {
        disk: Disk,
        size: u64,
        manifest: Manifest,
    },
    /// It is closed.
    Detached {
        size: u64,
        manifest: Manifest,
    },
    /// The file of an image comes.
    File(Incoming),
}

struct Receiver<'a> {
    root: &'a Root,
    room: &'a Path,
    input: Input<'a>,
    /// The features agreed on; `None` before the first packet.
    shaken: Option<u64>,
    state: State,
    data: u64,
    cbt: u64,
    progress: Progress<'a>,
}

impl Receiver<'_> {
    fn take(&mut self, packet: &Packet) -> Result<Answer> {
        let first = self.shaken.is_none();
        self.shaken.get_or_insert(0);
        match packet.kind {
            COMMAND if packet.size == 0 => Ok(Answer::End),
            DATA if packet.old && packet.size == 0 => Ok(Answer::End),
            _ if packet.size == 0 => Err(self.input.wrong("a packet without data")),
            COMMAND => self.command(packet, first),
            // Of the first bytes of an image there are never so few.
            DATA if packet.old && (packet.size, packet.pos) == (4, 0) => {
                self.input.payload(packet, &mut |_, _| Ok(()))?;
                Ok(Answer::Line)
            }
            DATA | DATA_ASYNC => {
                self.file_data(packet)?;
                Ok(match packet.old || packet.kind == DATA_ASYNC {
                    true => Answer::None,
                    false => Answer::Code(0),
                })
            }
            DEVICE => {
                self.device_data(packet)?;
                Ok(Answer::Code(0))
            }
            CBT => {
                if !matches!(self.state, State::Device { .. }) {
                    return Err(self.input.wrong("changed blocks of no image"));
                }
                self.input.payload(packet, &mut |_, _| Ok(()))?;
                self.cbt += 1;
                Ok(Answer::Code(0))
            }
            other => {
                let what = format!("a packet of type {other}; 0 to 4 are known");
                Err(Error::unsupported(what).on("stream"))
            }
        }
    }

    fn command(&mut self, packet: &Packet, first: bool) -> Result<Answer> {
        let mut command = [0; 4];
        if packet.size < 4 {
            return Err(self.input.wrong("a command of less than 4 bytes"));
        }
        // No piece but the last is shorter than 4 bytes.
        self.input.payload(packet, &mut |at, piece| {
            if let (0, Some(head)) = (at, piece.first_chunk()) {
                command = *head;
            }
            Ok(())
        })?;
        match u32::from_le_bytes(command) {
            SYNC if packet.pos == 0 => Ok(Answer::Code(0)),
            SYNC if !first => Err(self.input.wrong("a handshake in the middle of a stream")),
            SYNC => {
                let common = packet.pos & (FEATURE_MD5 | FEATURE_DEVICE);
                self.shaken = Some(common);
                self.input.md5 = common & FEATURE_MD5 != 0;
                Ok(Answer::Code(-(common as i32)))
            }
            INIT => {
                self.init(packet)?;
                Ok(Answer::Code(0))
            }
            INIT_QCOW2 => Err(Error::unsupported("the sender's disk is qcow2")
                .on("stream")
                .fix("Copy its file as it is, and: ploop template import NAME FILE")),
            UMOUNT => {
                self.detach()?;
                Ok(Answer::Code(0))
            }
            other => {
                let what = format!("command {other} of `ploop copy`, which no sender sends");
                Err(Error::unsupported(what).on("stream"))
            }
        }
    }

    /// A new image: `size` of the packet is its cluster, `pos` its size.
    fn init(&mut self, packet: &Packet) -> Result<()> {
        if !matches!(self.state, State::Nothing) {
            return Err(self.input.wrong("a second image"));
        }
        let size = packet.pos.checked_mul(SECTOR);
        let size = size.ok_or_else(|| self.input.wrong("an image of more than 2^64 bytes"))?;
        let (disk, manifest) = self.image(packet.size, size)?;
        self.state = State::Device {
            disk,
            size,
            manifest,
        };
        Ok(())
    }

    /// Makes the image, of whole clusters; what it shows is `size`.
    fn image(&self, cluster_sectors: u32, size: u64) -> Result<(Disk, Manifest)> {
        let cluster = u64::from(cluster_sectors) * SECTOR;
        let padded = size.checked_next_multiple_of(cluster);
        let padded = padded.ok_or_else(|| self.input.wrong("an image of 2^64 bytes"))?;
        let image = Image {
            guid: Guid::TOP.to_string(),
            parent: None,
            version: 2,
            size: padded,
            limit: Some(size).filter(|s| *s < padded),
            meta: None,
            temporary: false,
        };
        let header = image.header(cluster_sectors);
        let header = header.map_err(|e| self.input.wrong(e))?;
        let manifest = Manifest {
            disk: Record {
                name: String::new(),
                what: What::Tree,
                cluster_sectors,
                images: 1,
                base: None,
                quota: None,
                limits: Limits::default(),
            },
            images: vec![image],
        };
        manifest.check().map_err(|e| self.input.wrong(e))?;
        let file = create(self.root.store(), &self.room.join("0"), &header, 0o600)?;
        Ok((Disk::writable(None, Top::open(file)?, None)?, manifest))
    }

    fn device_data(&mut self, packet: &Packet) -> Result<()> {
        let State::Device { disk, size, .. } = &self.state else {
            return Err(self.input.wrong("data of a device that is not there"));
        };
        let Packet { pos, size: len, .. } = *packet;
        let whole = pos.is_multiple_of(SECTOR) && u64::from(len).is_multiple_of(SECTOR);
        if !whole || pos.checked_add(len.into()).is_none_or(|end| end > *size) {
            let what = format!("{len} bytes at byte {pos} of a device of {size}");
            return Err(self.input.wrong(what));
        }
        let (data, progress) = (&mut self.data, self.progress);
        self.input.payload(packet, &mut |at, piece| {
            let start = pos + at;
            *data += piece.len() as u64;
            progress(*data, *data);
            match piece.iter().all(|b| *b == 0) {
                true => disk.zero(start..start + piece.len() as u64, ZeroMode::default()),
                false => disk.write(start, piece),
            }
        })
    }

    fn detach(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.state, State::Nothing) {
            State::Device {
                disk,
                size,
                manifest,
            } => {
                disk.close()?;
                self.state = State::Detached { size, manifest };
                Ok(())
            }
            _ => Err(self.input.wrong("a detach of no image")),
        }
    }

    fn file_data(&mut self, packet: &Packet) -> Result<()> {
        if matches!(self.state, State::Nothing) {
            let path = self.room.join("file");
            self.state = State::File(Incoming::new(self.root, path)?);
        }
        let State::File(file) = &mut self.state else {
            return Err(self.input.wrong("data of a file beside a device"));
        };
        let (pos, end) = (packet.pos, file.end());
        if pos.checked_add(packet.size.into()).is_none_or(|e| e > end) {
            let what = format!(
                "{} bytes at byte {pos} of an image's file, which may have {end}",
                packet.size
            );
            return Err(self.input.wrong(what));
        }
        let (data, progress) = (&mut self.data, self.progress);
        self.input.payload(packet, &mut |at, piece| {
            *data += piece.len() as u64;
            progress(*data, *data);
            file.write(pos + at, piece)
        })?;
        file.wrote(pos)
    }

    /// Steps 2 and 3.
    fn finish(&mut self, name: &str) -> Result<Copied> {
        let mut file = false;
        if matches!(self.state, State::Device { .. }) {
            self.detach()?;
        }
        let (size, manifest) = match std::mem::replace(&mut self.state, State::Nothing) {
            State::Detached { size, manifest } => (size, manifest),
            State::File(incoming) => {
                file = true;
                let header = incoming.check()?;
                let size = header.size();
                self.cbt += u64::from(header.extension_sector != 0);
                let (disk, manifest) = self.image(header.cluster_sectors, size)?;
                incoming.pour(self.root, &disk, self.progress)?;
                disk.close()?;
                (size, manifest)
            }
            _ => return Err(self.input.wrong("an end before anything came")),
        };
        commit::container(self.root, name, self.room, &manifest, &[], None)?;
        Ok(Copied {
            name: name.to_owned(),
            dir: self.dir(name),
            size,
            data: self.data,
            bytes: self.input.bytes,
            md5: self.input.md5,
            file,
            cbt_dropped: self.cbt,
        })
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.root.container(name)
    }
}
