//! A new, empty image.

use std::path::Path;
use std::sync::Arc;

use super::header::Header;
use crate::error::Result;
use crate::store::{Store, StoreFile};

/// As [`create`], and nothing is durable on return: for whoever syncs many files at once.
pub fn create_unsynced(
    store: &dyn Store,
    path: &Path,
    header: &Header,
    mode: u32,
) -> Result<Arc<dyn StoreFile>> {
    filled(store, path, mode, |file| fill(file, header))
}

/// Creates `path` with `header`, an empty BAT and permissions `mode`. The file must not exist.
///
/// The BAT is a hole, so the file takes one host block whatever the disk's size. Order: length,
/// header, sync. On return the file's bytes are durable; its name is not until the caller syncs the
/// directory. On error nothing is left behind.
pub fn create(
    store: &dyn Store,
    path: &Path,
    header: &Header,
    mode: u32,
) -> Result<Arc<dyn StoreFile>> {
    filled(store, path, mode, |file| {
        fill(file, header)?;
        file.sync()
    })
}

fn fill(file: &dyn StoreFile, header: &Header) -> Result<()> {
    file.set_len(header.data_start)?;
    file.write_at(header.bytes(), 0)
}

fn filled(
    store: &dyn Store,
    path: &Path,
    mode: u32,
    fill: impl FnOnce(&dyn StoreFile) -> Result<()>,
) -> Result<Arc<dyn StoreFile>> {
    let file = store.create(path, mode)?;
    match fill(file.as_ref()) {
        Ok(()) => Ok(file),
        Err(e) => {
            // The first error is the one to report; a file that cannot be removed is a leftover
            // that the store's collector finds.
            drop(store.remove_file(path));
            Err(e)
        }
    }
}
