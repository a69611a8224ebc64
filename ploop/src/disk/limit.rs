//! What opening must know of a disk's side metadata: its trackers, and what it shows as its size where
//! that is less than its images have.
//!
//! Sizes must not shrink up a chain, so a disk that was shrunk keeps its images' size and has a
//! limit: in `sizes` of `.ploop/meta.json`, by node. A node is named by its GUID, the top by its
//! image's file: that is another one after every change of what the disk shows, so the descriptor's
//! rename stays the only commit point. Behind the limit a disk holds zeros only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::open::Opener;
use crate::descriptor::{Descriptor, Guid};
use crate::error::{Error, Kind, Result};
use crate::format::ploop::top::Top;
use crate::store::{Access, SECTOR, StoreFile, read_exact};
use crate::tracker::side::Home;
use crate::tracker::{self, Id, Known, Tracker, Tracking};

/// The side metadata of a disk, in its directory.
const META: &str = ".ploop/meta.json";
/// The directory of all of it.
const SIDE: &str = ".ploop";
/// Bytes of it that are read at most.
const META_MAX: u64 = 64 << 20;

/// As much of the side metadata as opening needs.
#[derive(Default, Deserialize)]
pub(super) struct Side {
    #[serde(default)]
    sizes: BTreeMap<String, u64>,
    /// By id.
    #[serde(default)]
    trackers: BTreeMap<String, Known>,
    #[serde(skip)]
    path: PathBuf,
}

/// How the size limit of a node is named in the side metadata.
pub fn size_key(d: &Descriptor, node: Guid) -> String {
    match d.image(node).filter(|_| node == d.top) {
        Some(image) => image.file.clone(),
        None => node.to_string(),
    }
}

impl Opener {
    /// The side metadata of the disk in `dir`. Error: `Corrupt` for what cannot be read.
    pub(super) fn side(&self, dir: &Path) -> Result<Side> {
        let path = dir.join(META);
        if self.store().kind(&path)?.is_none() {
            return Ok(Side::default());
        }
        let file = self.store().open(&path, Access::Read)?;
        let len = file.len()?;
        if len > META_MAX {
            let what = format!("{len} bytes; {META_MAX} is the limit");
            return Err(Error::new(Kind::Corrupt, what).on(path));
        }
        let mut bytes = vec![0; len as usize];
        read_exact(file.as_ref(), &mut bytes, 0)?;
        let mut side: Side = serde_json::from_slice(&bytes).map_err(|e| {
            Error::new(Kind::Corrupt, "not the metadata of a disk")
                .on(&path)
                .caused_by(e)
        })?;
        side.path = path;
        Ok(side)
    }

    /// Where the trackers of the disk in `dir` are while it is in use.
    fn trackers_home(&self, dir: &Path) -> Home {
        Home::new(self.store(), dir.join(SIDE))
    }

    /// The trackers of the disk in `dir`, whose top is `file`; as the image has them, if nobody has
    /// the disk in use. Writes nothing.
    pub fn trackers(&self, dir: &Path, file: &dyn StoreFile) -> Result<Vec<Tracker>> {
        let (header, _) = crate::format::ploop::delta::read_header(file)?;
        let known = self.side(dir)?.trackers()?;
        tracker::load(Some(&self.trackers_home(dir)), file, &header, &known)
    }

    /// Lets `top`, in the disk directory `dir`, keep the disk's trackers: those that it has.
    pub fn track(&self, dir: &Path, top: &Top) -> Result<()> {
        let home = self.trackers_home(dir);
        let known = self.side(dir)?.trackers()?;
        let trackers = tracker::load(Some(&home), top.file().as_ref(), top.header(), &known)?;
        let tracking = Tracking::new(Some(home), top.header().size(), trackers);
        top.track(Some(Arc::new(tracking)));
        Ok(())
    }
}

impl Side {
    /// What `node` of the disk shows at most, in bytes. Error: `Corrupt` for a limit that no disk can
    /// have.
    pub(super) fn size_limit(&self, d: &Descriptor, node: Guid) -> Result<Option<u64>> {
        let limit = self.sizes.get(&size_key(d, node)).copied();
        match limit {
            Some(bytes) if bytes == 0 || !bytes.is_multiple_of(SECTOR) => {
                let what = format!("a disk of {bytes} bytes: not a multiple of {SECTOR}");
                Err(Error::new(Kind::Corrupt, what).on(&self.path))
            }
            limit => Ok(limit),
        }
    }

    fn trackers(&self) -> Result<Vec<(Id, Known)>> {
        let known = self.trackers.iter();
        let known = known.map(|(id, known)| Ok((Id::parse(id)?, *known)));
        let known = known.collect::<Result<Vec<_>>>();
        known.map_err(|e| Error::new(Kind::Corrupt, e.what()).on(&self.path))
    }
}
