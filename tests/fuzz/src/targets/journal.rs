//! The journal of an image that was not closed. Input: bit 0 of the first byte: the records get
//! their right checksums; then the file.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use ploop::disk::open::{OpenOptions, Opener};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, SECTOR, Store};

use super::LOOK;
use crate::base::{Base, disk};
use crate::guest::read_to;
use crate::trial::Trial;

/// The journal of [`base`].
pub const JOURNAL: &str = "/d/.ploop/journal.root.hds.top";
const HEAD: usize = 64;
const RECORD_MAX: usize = 64 * 1024;

/// The disk whose journal is replaced.
pub fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| disk("a disk with a journal", true))
}

/// Every record on its border is made to fit its checksum.
fn sum_up(bytes: &mut [u8]) {
    for start in (0..bytes.len()).step_by(SECTOR as usize) {
        let record = &mut bytes[start..];
        if record.len() < HEAD || !record.starts_with(b"ploopjrn") {
            continue;
        }
        let len = u32::from_le_bytes([record[12], record[13], record[14], record[15]]) as usize;
        if (HEAD..=RECORD_MAX.min(record.len())).contains(&len) {
            let sum = crc32fast::hash(&record[12..len]);
            record[8..12].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

/// Checks, reads, replays, closes, repairs. What was read before the replay is read after it.
pub fn run(input: &[u8]) {
    let Some((&flags, journal)) = input.split_first() else {
        return;
    };
    let mut journal = journal.to_vec();
    if flags & 1 != 0 {
        sum_up(&mut journal);
    }
    let base = base();
    let store = base.store.snapshot();
    let file = store.open(Path::new(JOURNAL), Access::Write).unwrap();
    file.set_len(0).unwrap();
    file.write_at(&journal, 0).unwrap();
    drop(file);
    let trial = Trial {
        store: &store,
        source: &base.source,
        look: LOOK,
        about: "a journal",
    };
    trial.check();
    trial.repair();
    replay(base, &store);
}

fn replay(base: &Base, store: &MemoryStore) {
    let Some(shown) = read_to(store, &base.source, None, LOOK) else {
        return;
    };
    let copy = store.snapshot();
    let options = OpenOptions {
        write: true,
        ..OpenOptions::default()
    };
    let opener = Opener::on(Arc::new(copy.clone()));
    let disk = opener
        .open(&base.source, &options)
        .unwrap_or_else(|e| panic!("it can be read, and not opened for writing: {e}"));
    disk.close().unwrap_or_else(|e| panic!("close: {e}"));
    drop(disk);
    let now = read_to(&copy, &base.source, None, LOOK);
    if let Some(at) = shown.lost_in(now.as_ref(), &[]) {
        panic!("byte {at} reads otherwise after the replay");
    }
    let trial = Trial {
        store: &copy,
        source: &base.source,
        look: LOOK,
        about: "a journal, replayed",
    };
    trial.check();
}
