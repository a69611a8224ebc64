//! `.ploop/meta.json`: what the descriptor has no place for. Missing keys mean defaults; keys of
//! snapshots that the descriptor does not know are garbage. It is durable before the descriptor
//! that needs it, so the descriptor's rename stays the only commit point.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ploop::descriptor::{Descriptor, Guid};
use ploop::disk::open::size_key;
use ploop::error::{Error, Kind, Result};
use ploop::store::Store;
use serde::{Deserialize, Serialize};

use crate::backup::{Base, Pending};
use crate::limits::Limits;
use crate::store::{read_small, write_new};

const BYTES_MAX: u64 = 64 << 20;
const FILE: &str = "meta.json";
const TEMPORARY: &str = "meta.json.tmp";

/// Side metadata of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// The disk's id in a store, which its references on layers bear: a UUID, the same for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Present in templates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateMeta>,
    /// Names and descriptions, by the snapshot's GUID.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub snapshots: BTreeMap<String, SnapshotMeta>,
    /// What the disk may take of its host, in bytes; no limit when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<u64>,
    /// Images of this disk that became layers of the store: they stay charged to it for as long as
    /// its descriptor lists them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub charged: BTreeSet<String>,
    /// Files of this disk's directory that operations of ours made or mean to remove. One that the
    /// descriptor does not name is a leftover.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub files: BTreeSet<String>,
    /// What nodes show as their size, in bytes, where that is less than their images have: they were
    /// shrunk. By GUID, the top's by its image's file ([`size_key`]).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sizes: BTreeMap<String, u64>,
    /// Who tracks its writes, by the id that files have; the bits are with the top's image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub trackers: BTreeMap<String, TrackerMeta>,
    /// Backups that have not ended, by the GUID of the snapshot that each is of.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub backups: BTreeMap<String, Pending>,
    /// Of its I/O.
    #[serde(default, skip_serializing_if = "Limits::is_default")]
    pub limits: Limits,
    /// What another version wrote.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// What is known of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// Its name; unique among the snapshots of the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A text for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// When it was made, in seconds since 1970.
    #[serde(default)]
    pub created: u64,
    /// The group that it was made with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Group>,
    /// The hash of what it shows, where that is known: it was received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// What another version wrote.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// Snapshots of several disks at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The same in all of them.
    pub id: String,
    /// Every disk of the group. The group is whole when each of them has its snapshot.
    pub members: Vec<String>,
}

/// What is known of a tracker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackerMeta {
    /// Its name; unique among the trackers of the disk.
    pub name: String,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// When it was started, in seconds since 1970.
    #[serde(default)]
    pub started: u64,
    /// The backup after which everything that was written has its bit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<Base>,
    /// What another version wrote.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// What is known of a template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateMeta {
    /// When it was imported, in seconds since 1970.
    pub created: u64,
    /// What it was imported from, as the user wrote it.
    pub source: String,
    /// `ext4` when it was built from a root filesystem, or given quota.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<String>,
    /// First byte of the filesystem on the disk.
    #[serde(default)]
    pub partition_offset: u64,
    /// The filesystem counts by user and group.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub user_quota: bool,
    /// What `ploop template verify` compares with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// The id of the container whose snapshot it is; it stands on the layers, but uses nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// What another version wrote.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

impl Meta {
    /// Reads the metadata of the disk in `dir`; defaults when there is none.
    pub fn read(store: &dyn Store, dir: &Path) -> Result<Meta> {
        let path = Meta::path(dir);
        if store.kind(&path)?.is_none() {
            return Ok(Meta::default());
        }
        let bytes = read_small(store, &path, BYTES_MAX)?;
        serde_json::from_slice(&bytes).map_err(|e| {
            Error::new(Kind::Corrupt, "not the metadata of a disk")
                .on(path)
                .caused_by(e)
        })
    }

    /// Writes the metadata of the disk in `dir`, in the place of what is there. Durable on return.
    pub fn write(&self, store: &dyn Store, dir: &Path) -> Result<()> {
        let side = dir.join(".ploop");
        if store.kind(&side)?.is_none() {
            store.create_dir(&side)?;
            store.sync_dir(dir)?;
        }
        let text = self.to_json()?;
        let temporary = side.join(TEMPORARY);
        match store.remove_file(&temporary) {
            Err(e) if e.kind() != Kind::NotFound => return Err(e),
            _ => {}
        }
        write_new(store, &temporary, &text)?;
        store.rename(&temporary, &side.join(FILE))?;
        store.sync_dir(&side)
    }

    /// Where the metadata of the disk in `dir` is.
    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join(".ploop").join(FILE)
    }

    /// The file's bytes.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|e| Error::invalid("metadata that JSON cannot hold").caused_by(e))
    }

    /// What `node` shows at most; what its image has, if there is nothing here.
    pub fn size_of(&self, d: &Descriptor, node: Guid) -> Option<u64> {
        self.sizes.get(&size_key(d, node)).copied()
    }

    /// The unfinished backup that has the tracker with this id.
    pub fn backup_with(&self, tracker: &str) -> Option<&Pending> {
        let has = |p: &&Pending| p.tracker.as_ref().is_some_and(|u| u.id == tracker);
        self.backups.values().find(has)
    }

    /// What is known of the snapshot `guid`.
    pub fn snapshot(&self, guid: Guid) -> Option<&SnapshotMeta> {
        self.snapshots.get(&guid.to_string())
    }

    /// The name of the snapshot `guid`.
    pub fn name_of(&self, guid: Guid) -> Option<&str> {
        self.snapshot(guid)?.name.as_deref()
    }
}
