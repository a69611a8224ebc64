//! `.ploop/meta.json`: what the descriptor has no place for. Missing keys mean defaults.

use std::path::Path;

use ploop::error::{Error, Kind, Result};
use ploop::store::Store;
use serde::{Deserialize, Serialize};

use crate::store::{read_small, write_new};

const BYTES_MAX: u64 = 1 << 20;

/// Side metadata of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// Present in templates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) template: Option<TemplateMeta>,
}

/// What is known of a template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TemplateMeta {
    /// When it was imported, in seconds since 1970.
    pub(crate) created: u64,
    /// What it was imported from, as the user wrote it.
    pub(crate) source: String,
    /// `ext4` when it was built from a root filesystem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) filesystem: Option<String>,
    /// First byte of the filesystem on the disk.
    #[serde(default)]
    pub(crate) partition_offset: u64,
}

impl Meta {
    /// Reads the metadata of the disk in `dir`; defaults when there is none.
    pub(crate) fn read(store: &dyn Store, dir: &Path) -> Result<Meta> {
        let path = dir.join(".ploop/meta.json");
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

    /// Writes the metadata of a new disk in `dir`, durable but for the name of `.ploop` itself.
    pub(crate) fn write_new(&self, store: &dyn Store, dir: &Path) -> Result<()> {
        let side = dir.join(".ploop");
        store.create_dir(&side)?;
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::invalid("metadata that JSON cannot hold").caused_by(e))?;
        write_new(store, &side.join("meta.json"), &text)?;
        store.sync_dir(&side)
    }
}
