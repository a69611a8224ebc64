//! `.ploop/meta.json`: what the descriptor has no place for. Missing keys mean defaults; keys of
//! snapshots that the descriptor does not know are garbage. It is durable before the descriptor
//! that needs it, so the descriptor's rename stays the only commit point.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind, Result};
use ploop::store::Store;
use serde::{Deserialize, Serialize};

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
    /// Files of this disk's directory that operations of ours made or mean to remove. One that the
    /// descriptor does not name is a leftover.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub files: BTreeSet<String>,
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

/// What is known of a template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateMeta {
    /// When it was imported, in seconds since 1970.
    pub created: u64,
    /// What it was imported from, as the user wrote it.
    pub source: String,
    /// `ext4` when it was built from a root filesystem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<String>,
    /// First byte of the filesystem on the disk.
    #[serde(default)]
    pub partition_offset: u64,
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

    /// What is known of the snapshot `guid`.
    pub fn snapshot(&self, guid: Guid) -> Option<&SnapshotMeta> {
        self.snapshots.get(&guid.to_string())
    }

    /// The name of the snapshot `guid`.
    pub fn name_of(&self, guid: Guid) -> Option<&str> {
        self.snapshot(guid)?.name.as_deref()
    }
}
