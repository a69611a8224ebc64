//! One file a target; each says what its input is.

pub mod descriptor;
pub mod header;
pub mod image;
pub mod journal;
pub mod migrate;
pub mod qcow2;
pub mod stream;
pub mod undo;

use std::path::Path;

use ploop::disk::open::Source;
use ploop::store::Store;
use ploop::store::memory::MemoryStore;

/// Guest bytes that a target reads.
const LOOK: u64 = 4 << 20;

/// A store with an empty `/d`.
fn store() -> MemoryStore {
    let store = MemoryStore::new();
    store.create_dir(Path::new("/d")).unwrap();
    store
}

fn image_at(path: &str) -> Source {
    Source {
        path: path.into(),
        descriptor: false,
        snapshot: None,
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}
