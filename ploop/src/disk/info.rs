//! What a disk or an image is, without opening it for use: no locks, nothing written.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::open::{Format, OpenOptions, Opener, Source};
use crate::descriptor::{Descriptor, Guid, Temporary};
use crate::error::Result;
use crate::format::Delta;
use crate::format::ploop::delta::read_header;
use crate::format::qcow2::Qcow2Delta;
use crate::store::{Access, StoreFile};

/// A disk or an image, as `ploop info --json` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// What was named.
    pub path: PathBuf,
    /// Format of the top image: `raw`, `ploop` or `qcow2`.
    pub format: &'static str,
    /// Version of the format; 0 for raw.
    pub version: u32,
    /// Virtual size in bytes; of a disk that was shrunk less than its images have.
    pub virtual_size: u64,
    /// Cluster size in bytes; 0 for a raw image without a descriptor.
    pub cluster_size: u64,
    /// The top image is marked in use: it is open, or was not closed cleanly.
    pub in_use: bool,
    /// Bytes of data in the disk's images, holes left out.
    pub data: u64,
    /// The GUID of the top, for a disk.
    pub top_guid: Option<String>,
    /// Images from base to top of the whole tree, in the descriptor's order.
    pub images: Vec<ImageInfo>,
    /// The key that the guest's data is encrypted with, if it is.
    pub encryption_key: Option<String>,
}

/// One image of an [`Info`].
#[derive(Clone, Debug, Serialize)]
pub struct ImageInfo {
    /// Its file.
    pub file: PathBuf,
    /// Its GUID, for an image of a disk.
    pub guid: Option<String>,
    /// Its parent's GUID; none for a base.
    pub parent: Option<String>,
    /// Marked by an operation that was to remove it.
    pub temporary: bool,
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub file_size: u64,
    /// Bytes of data in the file.
    pub data: u64,
    /// Marked in use.
    pub in_use: bool,
}

/// One image's own facts: format, version, virtual size, cluster size.
struct Facts {
    format: Format,
    version: u32,
    cluster: u64,
    image: ImageInfo,
}

impl Opener {
    /// Describes `source`. Errors as for opening, except that nothing needs to be free.
    pub fn describe(&self, source: &Source, options: &OpenOptions) -> Result<Info> {
        if source.descriptor {
            return self.describe_disk(source, options);
        }
        let real = self.store().resolve(&source.path)?;
        let format = self.format_of(&real, options)?;
        let facts = self.facts(&real, format, 0)?;
        Ok(info(source.path.clone(), facts, None))
    }

    fn describe_disk(&self, source: &Source, options: &OpenOptions) -> Result<Info> {
        let d = self.read_descriptor(&source.path)?;
        let node = self.node(&d, source)?;
        let files = self.files_of_tree(&d, &source.path, options)?;
        let mut images = Vec::new();
        let mut top = None;
        for (guid, path) in files {
            let shot = d.shot(guid);
            let is_base = shot.is_some_and(|s| s.parent == Guid::NONE);
            let format = match is_base && d.base_is_raw() {
                true => Format::Raw,
                false => Format::Ploop,
            };
            let cluster = u64::from(d.cluster_sectors) * crate::store::SECTOR;
            let mut facts = self.facts(&path, format, cluster)?;
            facts.image.guid = Some(guid.to_string());
            facts.image.parent = shot.filter(|_| !is_base).map(|s| s.parent.to_string());
            facts.image.temporary = shot.is_some_and(|s| s.temporary != Temporary::No);
            images.push(facts.image.clone());
            if guid == node {
                top = Some(facts);
            }
        }
        let top = top.ok_or_else(|| {
            crate::Error::corrupt(format!("no image for {node}")).on(&source.path)
        })?;
        let xml = self.store().resolve(&source.path)?;
        let dir = xml.parent().unwrap_or(std::path::Path::new("/"));
        let limit = self.side(dir)?.size_limit(&d, node)?;
        let mut info = info(source.path.clone(), top, Some(&d));
        info.virtual_size = limit.unwrap_or(u64::MAX).min(info.virtual_size);
        info.data = images.iter().map(|i| i.data).sum();
        info.images = images;
        Ok(info)
    }

    fn facts(&self, path: &Path, format: Format, cluster: u64) -> Result<Facts> {
        let file = self.store().open(path, Access::Read)?;
        let mut image = ImageInfo {
            file: path.to_path_buf(),
            guid: None,
            parent: None,
            temporary: false,
            virtual_size: file.len()?,
            file_size: file.len()?,
            data: data_bytes(file.as_ref())?,
            in_use: false,
        };
        let (version, cluster) = match format {
            Format::Raw => (0, cluster),
            Format::Ploop => {
                let (header, _) = read_header(file.as_ref())?;
                image.virtual_size = header.size();
                image.in_use = header.dirty();
                (header.version.number(), header.cluster_bytes())
            }
            Format::Qcow2 => {
                let delta = Qcow2Delta::open(file)?;
                image.virtual_size = delta.size();
                image.in_use = delta.is_dirty();
                (delta.version(), delta.cluster_bytes())
            }
        };
        Ok(Facts {
            format,
            version,
            cluster,
            image,
        })
    }
}

fn info(path: PathBuf, top: Facts, d: Option<&Descriptor>) -> Info {
    Info {
        path,
        format: top.format.name(),
        version: top.version,
        virtual_size: top.image.virtual_size,
        cluster_size: top.cluster,
        in_use: top.image.in_use,
        data: top.image.data,
        top_guid: d.map(|d| d.top.to_string()),
        images: vec![top.image],
        encryption_key: d.and_then(|d| d.encryption_key()).map(str::to_owned),
    }
}

/// Bytes of a file that are not in holes.
pub fn data_bytes(file: &dyn StoreFile) -> Result<u64> {
    let len = file.len()?;
    let (mut at, mut sum) = (0, 0);
    while at < len
        && let Some(data) = file.next_data(at, len)?
    {
        sum += data.end - data.start;
        at = data.end;
    }
    Ok(sum)
}
