//! What a stream says of a disk before its data, and which of it a receiver believes.

use std::collections::{HashMap, HashSet};

use ploop::descriptor::{Guid, MAX_IMAGES};
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::{Header, Version};
use ploop::store::SECTOR;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::limits::Limits;
use crate::meta::{Group, SnapshotMeta};
use crate::name;

use super::frame::{Reader, Type, Writer};
use super::hex;

/// Bytes of all records of one stream, at most.
const RECORDS_MAX: usize = 8 << 20;

/// The disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// How it was called, for people.
    pub name: String,
    /// Whether its tree comes, or one state.
    pub what: What,
    /// Cluster of all its images, in sectors.
    pub cluster_sectors: u32,
    /// Images that come.
    pub images: usize,
    /// What the receiver must have, and the first image stands on.
    pub base: Option<Base>,
    /// What the disk may take of its host, in bytes.
    pub quota: Option<u64>,
    /// Of its I/O.
    pub limits: Limits,
}

/// What comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Every snapshot, and the writable top, which comes last.
    Tree,
    /// One snapshot, as one image.
    State,
}

/// What is not sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Base {
    /// A template.
    Template {
        /// The hash of what it shows.
        content: String,
        /// Its size in bytes.
        size: u64,
    },
    /// A snapshot of the container that is received into.
    Snapshot {
        /// Its node.
        guid: String,
        /// The hash of what it shows.
        content: String,
    },
}

/// What is known of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Known {
    /// Its name.
    pub name: Option<String>,
    /// A text for people.
    pub description: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The group that it was made with.
    pub group: Option<Group>,
}

impl From<&SnapshotMeta> for Known {
    fn from(meta: &SnapshotMeta) -> Known {
        Known {
            name: meta.name.clone(),
            description: meta.description.clone(),
            created: meta.created,
            group: meta.group.clone(),
        }
    }
}

impl From<&Known> for SnapshotMeta {
    fn from(known: &Known) -> SnapshotMeta {
        SnapshotMeta {
            name: known.name.clone(),
            description: known.description.clone(),
            created: known.created,
            group: known.group.clone(),
            ..SnapshotMeta::default()
        }
    }
}

/// One image. Parents come before their children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Its node.
    pub guid: String,
    /// The node that it stands on: of an image before it, or none: the base.
    pub parent: Option<String>,
    /// Version of its format: 1 or 2.
    pub version: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// What it shows at most, if it was shrunk.
    pub limit: Option<u64>,
    /// What is known of the snapshot.
    pub meta: Option<Known>,
    /// It is to be merged away: nobody asked for this snapshot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub temporary: bool,
}

impl Image {
    /// The header of a new image like it.
    pub fn header(&self, cluster_sectors: u32) -> Result<Header> {
        let version = match self.version {
            1 => Version::V1,
            2 => Version::V2,
            other => {
                let what = format!("an image of version {other}; 1 and 2 are known");
                return Err(Error::unsupported(what));
            }
        };
        if !self.size.is_multiple_of(SECTOR) {
            let what = format!("an image of {} bytes, which are no sectors", self.size);
            return Err(Error::corrupt(what));
        }
        Header::new(version, cluster_sectors, self.size / SECTOR)
    }
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The disk.
    pub disk: Disk,
    /// Its images.
    pub images: Vec<Image>,
}

impl Manifest {
    /// Writes it.
    pub fn send(&self, out: &mut Writer<'_>) -> Result<()> {
        out.frame(Type::Disk, &[&json(&self.disk)?])?;
        for image in &self.images {
            let record = json(image)?;
            out.frame(Type::Image, &[&record])
                .map_err(|e| e.while_doing(format_args!("send snapshot {}", image.guid)))?;
        }
        Ok(())
    }

    /// Reads and checks one.
    pub fn receive(input: &mut Reader<'_>) -> Result<Manifest> {
        input.expect(Type::Disk)?;
        let mut bytes = input.payload().len();
        let disk: Disk = parse(input)?;
        if disk.images == 0 || disk.images > MAX_IMAGES {
            let what = format!("{} images; 1 to {MAX_IMAGES} are possible", disk.images);
            return Err(input.wrong(&what));
        }
        let mut images = Vec::new();
        while images.len() < disk.images {
            input.expect(Type::Image)?;
            bytes += input.payload().len();
            if bytes > RECORDS_MAX {
                let what = format!("records of more than {RECORDS_MAX} bytes");
                return Err(input.wrong(&what));
            }
            images.push(parse(input)?);
        }
        let manifest = Manifest { disk, images };
        manifest.check().map_err(|e| e.on("stream"))?;
        Ok(manifest)
    }

    /// The hash by which a stream that goes on is known to be of the same disk.
    pub fn hash(&self) -> Result<String> {
        let mut sha = Sha256::new();
        sha.update(json(self)?);
        Ok(hex(&sha.finalize()))
    }

    /// Refuses what no disk of ours can be.
    pub fn check(&self) -> Result<()> {
        let disk = &self.disk;
        if disk.images != self.images.len() {
            return Err(Error::corrupt("the number of images is another one"));
        }
        disk.limits.check()?;
        if let Some(key) = disk.limits.other.keys().next() {
            let what = format!("a limit {key:?}, which is not known here");
            return Err(Error::unsupported(what));
        }
        if let Some(Base::Snapshot { guid, .. }) = &disk.base {
            Guid::parse(guid)?;
            if disk.what == What::Tree {
                return Err(Error::corrupt("a whole tree on a snapshot"));
            }
        }
        if self.images.windows(2).any(|i| i[0].version != i[1].version) {
            return Err(Error::corrupt("images of two versions in one disk"));
        }
        let mut sizes: HashMap<Guid, u64> = HashMap::new();
        let mut names = HashSet::new();
        for (n, image) in self.images.iter().enumerate() {
            let is_top = disk.what == What::Tree && n + 1 == self.images.len();
            let guid = image.check(disk, is_top, &sizes)?;
            let name = image.meta.as_ref().and_then(|m| m.name.as_deref());
            if name.is_some_and(|name| !names.insert(name)) {
                return Err(Error::corrupt("two snapshots have one name"));
            }
            if sizes.insert(guid, image.size).is_some() {
                return Err(Error::corrupt(format!("two images have the GUID {guid}")));
            }
        }
        if disk.what == What::State && self.images.len() != 1 {
            return Err(Error::corrupt("a state of several images"));
        }
        Ok(())
    }
}

impl Image {
    fn check(&self, disk: &Disk, is_top: bool, before: &HashMap<Guid, u64>) -> Result<Guid> {
        let guid = Guid::parse(&self.guid)?;
        // Written as we write it: it becomes a part of a file's name.
        let is_plain = self.guid == guid.to_string();
        if !is_plain || guid == Guid::NONE || (guid == Guid::TOP) != is_top {
            return Err(Error::corrupt(format!("an image with the GUID {guid}")));
        }
        self.header(disk.cluster_sectors)?;
        let below = match (&self.parent, &disk.base) {
            (Some(parent), _) => *before.get(&Guid::parse(parent)?).ok_or_else(|| {
                Error::corrupt(format!("the parent {parent} of an image is not before it"))
            })?,
            (None, Some(Base::Template { size, .. })) => *size,
            (None, _) if before.is_empty() => 0,
            (None, _) => return Err(Error::corrupt("two images without a parent")),
        };
        if self.size < below {
            let what = format!("an image of {} bytes on one of {below}", self.size);
            return Err(Error::corrupt(what));
        }
        if let Some(limit) = self.limit
            && (limit == 0 || limit > self.size || !limit.is_multiple_of(SECTOR))
        {
            let what = format!("an image of {} bytes that shows {limit}", self.size);
            return Err(Error::corrupt(what));
        }
        if is_top && self.meta.is_some() {
            return Err(Error::corrupt("the top has a snapshot's name"));
        }
        if self.temporary && (is_top || disk.what != What::Tree || self.meta.is_some()) {
            return Err(Error::corrupt("what is to be merged away is asked for"));
        }
        if let Some(name) = self.meta.as_ref().and_then(|m| m.name.as_deref()) {
            name::check(name)?;
            if Guid::parse(name).is_ok() {
                return Err(Error::corrupt(format!("{name:?} reads as a GUID")));
            }
        }
        Ok(guid)
    }
}

/// A record as bytes.
pub(super) fn json<T: Serialize>(record: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(record)
        .map_err(|e| Error::new(Kind::Invalid, "a record that JSON cannot hold").caused_by(e))
}

/// The record in the frame that was read last.
pub(super) fn parse<T: for<'de> Deserialize<'de>>(input: &Reader<'_>) -> Result<T> {
    serde_json::from_slice(input.payload())
        .map_err(|e| input.wrong("not a record that is known here").caused_by(e))
}
