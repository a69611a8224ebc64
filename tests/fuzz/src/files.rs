//! Every file of a store in memory, byte for byte; directories of ours that hold none do not count.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ploop::store::memory::MemoryStore;
use ploop::store::{Access, EntryKind, Store, StoreFile, read_or_zero};

const PAGE: u64 = 4096;

/// The bytes of a file: its length, and its pages that are not all zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    len: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

/// Every file, by its path.
pub type Files = BTreeMap<PathBuf, Bytes>;

/// The bytes of one file; holes are not read.
pub fn bytes(file: &dyn StoreFile) -> Bytes {
    let len = file.len().unwrap();
    let mut out = Bytes {
        len,
        pages: BTreeMap::new(),
    };
    let mut at = 0;
    while let Some(data) = file.next_data(at, len).unwrap() {
        at = data.start / PAGE * PAGE;
        while at < data.end {
            let mut page = vec![0; PAGE as usize];
            read_or_zero(file, &mut page, at).unwrap();
            if page.iter().any(|&b| b != 0) {
                out.pages.insert(at, page);
            }
            at += PAGE;
        }
    }
    out
}

/// The files below `/d`.
pub fn files(store: &MemoryStore) -> Files {
    below(store, Path::new("/d"))
}

/// The files below `dir`.
pub fn below(store: &MemoryStore, dir: &Path) -> Files {
    let mut out = Files::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for name in store.list(&dir).unwrap() {
            let path = dir.join(name);
            match store.kind(&path).unwrap() {
                Some(EntryKind::Dir) => todo.push(path),
                _ => {
                    let file = store.open(&path, Access::Read).unwrap();
                    out.insert(path, bytes(file.as_ref()));
                }
            }
        }
    }
    out
}
