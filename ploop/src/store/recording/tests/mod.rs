//! What a power cut leaves: case by case (`units`), with failing calls (`faults`), and at random
//! against a plain definition (`model`).

mod faults;
mod model;
mod units;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::{Budget, RecordingStore};
use crate::store::memory::MemoryStore;
use crate::store::{Access, SECTOR, Store, StoreFile};

const S: usize = SECTOR as usize;

fn p(path: &str) -> &Path {
    Path::new(path)
}

/// A store with the file `/f`, `len` bytes of `a`, all durable.
fn with_file(len: usize) -> (RecordingStore, Arc<dyn StoreFile>) {
    let base = MemoryStore::new();
    base.create(p("/f"), 0o600)
        .unwrap()
        .write_at(&vec![b'a'; len], 0)
        .unwrap();
    let rec = RecordingStore::on(&base);
    let file = rec.open(p("/f"), Access::Write).unwrap();
    (rec, file)
}

/// What is under a name: the whole content, with runs of a byte written as `a2` (two sectors),
/// `a+3` (three bytes), and zeros as `0`.
fn text(store: &dyn Store, path: &str) -> String {
    let Ok(file) = store.open(p(path), Access::Read) else {
        return "-".into();
    };
    let mut bytes = vec![0xee; file.len().unwrap() as usize];
    assert_eq!(file.read_at(&mut bytes, 0).unwrap(), bytes.len());
    let run = |run: &[u8]| {
        let letter = if run[0] == 0 { '0' } else { char::from(run[0]) };
        match run.len() {
            n if n.is_multiple_of(S) => format!("{letter}{}", n / S),
            n => format!("{letter}+{n}"),
        }
    };
    bytes
        .chunk_by(|a, b| a == b)
        .map(run)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Every outcome at the end of the log, and a check that no state comes twice.
fn outcomes(rec: &RecordingStore, look: impl Fn(&MemoryStore) -> String) -> Vec<String> {
    let states = rec.states_at(usize::MAX, &Budget::default());
    let seen: Vec<String> = states.map(|state| look(&state.build())).collect();
    let distinct: BTreeSet<String> = seen.iter().cloned().collect();
    assert_eq!(distinct.len(), seen.len(), "a state came twice: {seen:?}");
    distinct.into_iter().collect()
}

fn of_f(rec: &RecordingStore) -> Vec<String> {
    outcomes(rec, |store| text(store, "/f"))
}
