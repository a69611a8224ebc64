//! Every file of a directory, byte for byte; directories of ours that hold none do not count.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::path::{Path, PathBuf};

use ploop::store::{Access, RealStore, StoreFile, read_or_zero};
use sha2::{Digest, Sha256};

use crate::corpus::hex;

/// Length and digest of every file, by its path.
pub type State = BTreeMap<PathBuf, (u64, String)>;

/// A digest of all bytes of a file; holes are not read.
pub fn digest(file: &dyn StoreFile) -> String {
    let len = file.len().unwrap();
    let mut hash = Sha256::new();
    let mut block = [0u8; 4096];
    let mut at = 0;
    while let Some(data) = file.next_data(at, len).unwrap() {
        at = data.start / 4096 * 4096;
        while at < data.end {
            read_or_zero(file, &mut block, at).unwrap();
            if block.iter().any(|&b| b != 0) {
                hash.update(at.to_le_bytes());
                hash.update(block);
            }
            at += 4096;
        }
    }
    hex(hash)
}

/// Everything below `dir`; links are not followed.
pub fn walk(dir: &Path) -> Vec<(PathBuf, Metadata)> {
    let mut out = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = std::fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                todo.push(path.clone());
            }
            out.push((path, meta));
        }
    }
    out
}

/// The files below `dir`, without the lock of a disk.
pub fn state(dir: &Path) -> State {
    let store = RealStore::shared();
    let mut out = State::new();
    for (path, meta) in walk(dir) {
        if meta.is_file() && !path.ends_with(".ploop/lock") {
            let file = store.open(&path, Access::Read).unwrap();
            out.insert(path, (meta.len(), digest(file.as_ref())));
        }
    }
    out
}
