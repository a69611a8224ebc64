//! Damaged images, by base and seed: the same seed makes the same damage everywhere.
//!
//! ```text
//!  base: images of ours, and some of the corpus ── seed ─► one to three wounds ─► a store
//! ```
//!
//! * [`wound`]: the kinds of damage.
//! * [`state`]: every file of a directory, byte for byte.

pub mod state;
pub mod wound;

use std::path::Path;

use ploop::disk::open::Source;
use ploop::format::ploop::Version;
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store};
use ploop_fuzz::base::{Base, CLUSTER, disk, image};
use ploop_fuzz::rng::Rng;

use crate::corpus;

/// Cases of the corpus that are small enough and worth damaging.
const CASES: &[&str] = &[
    "003-v2-1m",
    "005-v1-small-cluster",
    "006-v1-data-off-0",
    "007-preallocated",
    "011-odd-size",
    "012-odd-cluster",
    "013-small-cluster",
    "014-bat-cluster-border",
    "024-shuffled",
    "029-data-off-gap",
    "201-cbt-valid",
    "210-ext-unknown-transit",
    "211-ext-unknown-necessary",
    "213-ext-on-dirty-image",
    "307-conversion-bat-rewritten",
    "401-duplicate-entry",
    "411-v1-misaligned-entry",
    "440-two-defects",
    "102-chain-8",
    "310-conversion-of-chain",
    "324-dirty-everywhere",
];

/// All bases. Panics without the corpus.
pub fn bases() -> Vec<Base> {
    let mut all = vec![
        image("v2", Version::V2, 128, 64),
        image("v1", Version::V1, 64, 40),
        image("v2 with a long table", Version::V2, CLUSTER, 9000),
        disk("disk", false),
        disk("disk with a journal", true),
    ];
    let cases = corpus::cases().into_iter();
    all.extend(
        cases
            .filter(|c| CASES.contains(&c.name.as_str()))
            .map(|c| case(&c)),
    );
    assert_eq!(all.len(), 5 + CASES.len());
    all
}

/// A case of the corpus; its files lie in one directory.
fn case(case: &corpus::Case) -> Base {
    let tmp = case.unpack();
    let store = MemoryStore::new();
    store.create_dir(Path::new("/d")).unwrap();
    let mut targets = Vec::new();
    let mut names: Vec<_> = std::fs::read_dir(tmp.path()).unwrap().flatten().collect();
    names.sort_by_key(|e| e.file_name());
    for entry in names {
        let to = Path::new("/d").join(entry.file_name());
        let bytes = std::fs::read(entry.path()).unwrap();
        store
            .create(&to, 0o600)
            .unwrap()
            .write_at(&bytes, 0)
            .unwrap();
        if to.extension().is_none_or(|e| e != "xml") {
            targets.push(to);
        }
    }
    let path = Path::new("/d").join(case.text("entry"));
    let source = Source {
        descriptor: path.extension().is_some_and(|e| e == "xml"),
        path,
        snapshot: None,
    };
    if !source.descriptor {
        targets = vec![source.path.clone()];
    }
    Base {
        name: case.name.clone(),
        store,
        source,
        targets,
    }
}

/// A damaged copy of one of `bases`, and what was done to it.
pub fn damaged(bases: &[Base], seed: u64) -> (&Base, MemoryStore, Vec<String>) {
    let mut rng = Rng(seed);
    let base = &bases[rng.below(bases.len() as u64) as usize];
    let store = base.store.snapshot();
    let mut what = Vec::new();
    for _ in 0..=rng.below(3) {
        let target = &base.targets[rng.below(base.targets.len() as u64) as usize];
        let file = store.open(target, Access::Write).unwrap();
        let wound = wound::wound(file.as_ref(), &mut rng);
        what.push(format!("{}: {wound}", target.display()));
    }
    (base, store, what)
}
