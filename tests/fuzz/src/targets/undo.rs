//! The undo file of a repair. Input: bit 0 of the first byte: the records get their right
//! checksums; then the file.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use fsck::repair::{self, How};
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store};

use crate::base::disk;
use crate::files::{below, files};

/// Where the undo file is.
pub const UNDO: &str = "/undo";
const START: usize = 12;
const HEAD: usize = 12;

/// A disk that was repaired: entries, length, mark, descriptor, a file that was put away.
pub fn repaired() -> &'static MemoryStore {
    static STORE: OnceLock<MemoryStore> = OnceLock::new();
    STORE.get_or_init(|| {
        let base = disk("a repaired disk", false);
        damage(&base.store);
        repair(&base.store, &base.source);
        base.store.create_dir(Path::new("/other")).unwrap();
        let other = base.store.create(Path::new("/other/file"), 0o600).unwrap();
        other.write_at(b"somebody's", 0).unwrap();
        base.store
    })
}

fn damage(store: &MemoryStore) {
    let open = |path: &str| store.open(Path::new(path), Access::Write).unwrap();
    let base = open("/d/root.hds");
    let mut table = [0; 30 * 4];
    base.read_at(&mut table, 64).unwrap();
    let set = |at: &usize| table[at * 4..at * 4 + 4] != [0; 4];
    let used: Vec<usize> = (0..30).filter(set).collect();
    // One beyond the end, one twice.
    let at = |slot: usize| 64 + 4 * slot as u64;
    base.write_at(&[0xff, 0xff, 0, 0], at(used[0])).unwrap();
    base.write_at(&table[used[1] * 4..used[1] * 4 + 4], at(used[2]))
        .unwrap();
    let len = base.len().unwrap();
    base.write_at(&[9; 700], len).unwrap();
    let top = open("/d/root.hds.top");
    top.write_at(b"Ynot", 44).unwrap();
    let xml = open("/d/DiskDescriptor.xml");
    let mut text = vec![0; xml.len().unwrap() as usize];
    xml.read_at(&mut text, 0).unwrap();
    let text = String::from_utf8(text).unwrap();
    let stale = text.replace("<Disk_size>1920<", "<Disk_size>1919<");
    assert_ne!(text, stale);
    xml.write_at(stale.as_bytes(), 0).unwrap();
    let left = store.create(Path::new("/d/root.hds.left"), 0o600).unwrap();
    left.write_at(&[3; 300], 0).unwrap();
}

fn repair(store: &MemoryStore, source: &Source) {
    let opener = Opener::on(Arc::new(store.clone()));
    let plan = repair::plan(&opener, source, &OpenOptions::default()).unwrap();
    let done = repair::apply(&opener, &plan, How::Yes, Some(Path::new(UNDO))).unwrap();
    assert_eq!(done.after.class, fsck::Class::Clean);
}

/// Every record is made to fit its checksum.
fn sum_up(bytes: &mut [u8]) {
    let mut at = START;
    while let Some(record) = bytes.get_mut(at..)
        && record.len() >= HEAD
    {
        let len = u32::from_le_bytes([record[4], record[5], record[6], record[7]]) as usize;
        let Some(payload) = record.get(HEAD..).and_then(|r| r.get(..len)) else {
            return;
        };
        let mut hash = crc32fast::Hasher::new();
        hash.update(&record[..8]);
        hash.update(payload);
        let sum = hash.finalize();
        record[8..12].copy_from_slice(&sum.to_le_bytes());
        at += HEAD + len;
    }
}

/// Takes it back, twice. What is refused changes nothing, and no other directory is reached.
pub fn run(input: &[u8]) {
    let Some((&flags, bytes)) = input.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if flags & 1 != 0 {
        sum_up(&mut bytes);
    }
    let store = repaired().snapshot();
    let file = store.open(Path::new(UNDO), Access::Write).unwrap();
    file.set_len(0).unwrap();
    file.write_at(&bytes, 0).unwrap();
    drop(file);
    let all = |store: &MemoryStore| below(store, Path::new("/"));
    let outside = |store: &MemoryStore| -> Vec<_> {
        let mut all = all(store);
        all.retain(|path: &PathBuf, _| !path.starts_with("/d"));
        all.into_iter().collect()
    };
    let (before, others) = (files(&store), outside(&store));
    let undo = || repair::undo(&Opener::on(Arc::new(store.clone())), Path::new(UNDO));
    match undo() {
        Err(e) => assert!(files(&store) == before, "refused, and changed: {e}"),
        Ok(_) => {
            let once = files(&store);
            // One that contradicts itself may be refused now.
            drop(undo());
            assert!(files(&store) == once, "a second time it is another disk");
        }
    }
    assert!(outside(&store) == others, "it reached another directory");
}
