//! What is on the disk, resized in a raw copy.

use std::sync::Arc;

use ploop::account::GRANULE;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::error::{Error, Result};
use ploop::store::{StoreFile, Trail};

use super::changes::first_extent;
use crate::convert::pieces;
use crate::delete::Watch;
use crate::merge::Progress;
use crate::place::Place;
use crate::rootfs;
use crate::space;
use crate::store::{refuse_full, remove_tree};

/// The copy's name.
const COPY: &str = "disk.raw";
/// Bytes read at a time where zeros are looked for.
const BUFFER: u64 = 1 << 20;

/// A disk whose content is to be resized.
pub(super) struct Inside<'a> {
    pub(super) place: &'a Place<'a>,
    pub(super) disk: &'a Disk,
    /// Bytes that it is to have.
    pub(super) size: u64,
    pub(super) encrypted: bool,
}

/// What it came to.
#[derive(Default)]
pub(super) struct Done {
    /// What the disk is to show; none where that is what it does.
    pub(super) flat: Option<Arc<dyn StoreFile>>,
    /// Bytes of the file system.
    pub(super) filesystem: Option<u64>,
    /// Why it was left.
    pub(super) reason: Option<String>,
}

impl Inside<'_> {
    /// Resizes a copy; with `filesystem` unset, nothing. `None` when `watch` says stop.
    pub(super) fn resize(&self, filesystem: bool, watch: &dyn Watch) -> Result<Option<Done>> {
        let shrinks = self.size < self.disk.size();
        if !filesystem {
            if shrinks {
                self.refuse_data()?;
            }
            return Ok(Some(Done::default()));
        }
        if self.encrypted && shrinks {
            let what = "shrinking what is on an encrypted disk: it cannot be read here";
            return Err(Error::unsupported(what).on(self.place.dir()));
        }
        if self.encrypted {
            return Ok(Some(Done::only("the disk is encrypted")));
        }
        let store = self.place.store();
        let room = self.place.room();
        remove_tree(store, &room)?;
        if let Some(host) = store.space(self.place.dir())? {
            let granules: u64 = space::shown(self.disk)?.values().sum();
            refuse_full(self.place.dir(), granules * GRANULE, host.available)?;
        }
        if let Some(side) = room.parent()
            && store.kind(side)?.is_none()
        {
            store.create_dir(side)?;
        }
        store.create_dir(&room)?;
        let done = self.in_copy(shrinks, watch);
        // Its last name goes; whoever holds it open still reads it.
        let removed = remove_tree(store, &room);
        let done = done.map_err(|e| match e.path() {
            Some(path) if path.starts_with(&room) => e.on(self.place.dir()),
            _ => e,
        })?;
        removed?;
        Ok(done)
    }

    fn in_copy(&self, shrinks: bool, watch: &dyn Watch) -> Result<Option<Done>> {
        let path = self.place.room().join(COPY);
        let file = self.place.store().create(&path, 0o600)?;
        // It can be made again: the reserve is not for it.
        let file = file.for_guests().unwrap_or(file);
        file.set_len(self.disk.size())?;
        if !self.copy(file.as_ref(), watch)? {
            return Ok(None);
        }
        let filesystem = match shrinks {
            true => Ok(rootfs::shrink(&path, self.size)?.filesystem),
            false => {
                let grown = rootfs::grow(&path, self.size)?;
                match grown.filesystem {
                    true => Ok(grown.bytes),
                    false => Err(grown.reason.unwrap_or_default()),
                }
            }
        };
        Ok(Some(match filesystem {
            Ok(bytes) => Done {
                flat: Some(file),
                filesystem: Some(bytes),
                reason: None,
            },
            Err(why) => Done::only(&why),
        }))
    }

    /// False when `watch` says stop.
    fn copy(&self, file: &dyn StoreFile, watch: &dyn Watch) -> Result<bool> {
        let mut trail = Trail::default();
        let progress = |done, total| watch.progress(Progress { done, total });
        let mut stopped = false;
        let copied = pieces(self.disk, &progress, &mut |offset, bytes| {
            if !watch.go_on(bytes.len() as u64) {
                stopped = true;
                return Err(Error::invalid("cancelled"));
            }
            file.write_at(bytes, offset)?;
            trail.wrote(file, offset, bytes.len() as u64);
            Ok(())
        });
        match stopped {
            true => Ok(false),
            false => copied.map(|()| true),
        }
    }

    /// Refuses to cut off anything but zeros.
    fn refuse_data(&self) -> Result<()> {
        let end = self.disk.size();
        let mut buf = vec![0; BUFFER as usize];
        let mut at = self.size;
        while let Some(data) = first_extent(self.disk, at, end)? {
            let n = (end - data).min(BUFFER) as usize;
            self.disk.read(data, &mut buf[..n])?;
            if let Some(i) = buf[..n].iter().position(|&b| b != 0) {
                let what = "there is data behind the new end";
                return Err(Error::unsupported(what)
                    .on(self.place.dir())
                    .at(data + i as u64)
                    .fix("Leave --no-filesystem out to have ext4 made smaller first"));
            }
            at = data + n as u64;
        }
        Ok(())
    }
}

impl Done {
    /// Only the disk has another size.
    fn only(reason: &str) -> Done {
        Done {
            reason: Some(reason.to_owned()),
            ..Done::default()
        }
    }
}
