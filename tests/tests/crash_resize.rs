//! Power cuts while a disk is resized: promise 3, one commit point.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use ploop::device::Device;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, RecordingStore};
use ploop::store::{Access, Store};
use ploop::verify::{Class, class_of, scan_image};
use ploop_tests::crash::fixture::words_of;
use ploop_tests::crash::proof::{Proof, Scenario, Verdict};
use ploop_tests::crash::sweep::Tally;
use ploop_tests::crash::tree::{self, Operation};
use ploop_tests::crash::{CLUSTER, CLUSTER_SECTORS};
use snapshots::delete::Watch;
use snapshots::merge::Progress;
use snapshots::place::Place;
use snapshots::resize::{ResizeOptions, offline};

const NAME: &str = "a";
/// Clusters that the disk has at the start.
const FIRST: u64 = 3;
/// Clusters that it is given, one after the other, and whether it stands alone then.
const LIFE: [(u64, bool); 5] = [(5, false), (2, false), (4, false), (6, false), (3, true)];

struct Patient;

impl Watch for Patient {
    fn go_on(&self, _: u64) -> bool {
        true
    }

    fn progress(&self, _: Progress) {}
}

/// A store with a container whose last cluster is empty, over a template's that is not.
fn start() -> MemoryStore {
    let store = tree::start();
    let root = tree::open(Arc::new(store.clone())).unwrap();
    for operation in [Operation::Found, Operation::Import, Operation::Create(NAME)] {
        tree::perform(&root, operation).unwrap();
    }
    let place = Place::container(&root, NAME).unwrap();
    let disk = place.open().unwrap();
    disk.write(CLUSTER, &ploop_tests::crash::history::payload(77, 64..66))
        .unwrap();
    disk.zero(2 * CLUSTER..3 * CLUSTER, Default::default())
        .unwrap();
    disk.close().unwrap();
    store
}

fn resize(store: Arc<dyn Store>, clusters: u64, before: u64, flatten: bool) {
    let root = tree::open(store).unwrap();
    let place = Place::container(&root, NAME).unwrap();
    let options = ResizeOptions {
        size: clusters * CLUSTER,
        shrink: clusters < before,
        flatten,
        filesystem: false,
    };
    let done = offline(&place, &options, &Patient).unwrap().unwrap();
    assert_eq!((done.size, done.note), (clusters * CLUSTER, None));
}

/// The sizes before and after each step.
fn steps() -> Vec<(u64, u64, bool)> {
    let sizes = [FIRST].into_iter().chain(LIFE.iter().map(|l| l.0));
    sizes
        .zip(LIFE)
        .map(|(before, (after, flatten))| (before, after, flatten))
        .collect()
}

fn run(front: &Arc<dyn Store>, log: &RecordingStore) {
    for (n, (before, after, flatten)) in (0..).zip(steps()) {
        log.mark(2 * n);
        resize(front.clone(), after, before, flatten);
        log.mark(2 * n + 1);
    }
}

/// What the container shows, in clusters and words.
fn shows(store: &MemoryStore) -> Result<(u64, Vec<u64>), String> {
    let root = tree::open(Arc::new(store.clone())).map_err(|e| e.to_string())?;
    let place = Place::container(&root, NAME).map_err(|e| e.to_string())?;
    let options = place.open_options(false);
    let disk = root.opener().open(&place.source(None), &options);
    let disk = disk.map_err(|e| e.to_string())?;
    Ok((disk.size() / CLUSTER, words_of(&disk)?))
}

/// The container has a size that it may have, and its bytes; the next operation makes it what it
/// says, and leaves one image of the container's own, sound, and nothing else.
fn judge(state: &MemoryStore, may: &BTreeSet<u64>, content: &[u64]) -> Result<(), String> {
    let expect = |clusters: u64, words: &[u64]| {
        let mut all = content.to_vec();
        all.resize((clusters * CLUSTER_SECTORS) as usize, 0);
        match words == all {
            true => Ok(()),
            false => Err(format!("of {clusters} clusters it shows other bytes")),
        }
    };
    let (clusters, words) = shows(state)?;
    if !may.contains(&clusters) {
        return Err(format!("{clusters} clusters, of {may:?}"));
    }
    expect(clusters, &words)?;
    resize(Arc::new(state.clone()), 7, clusters, false);
    let (clusters, words) = shows(state)?;
    expect(clusters, &words)?;
    let root = tree::open(Arc::new(state.clone())).unwrap();
    let place = Place::container(&root, NAME).unwrap();
    // What the last one left to the next.
    let held = place.open().map_err(|e| e.to_string())?;
    place.sweep().map_err(|e| e.to_string())?;
    held.close().map_err(|e| e.to_string())?;
    let d = place.descriptor().map_err(|e| e.to_string())?;
    let own: Vec<_> = d.images.iter().filter(|i| Place::owns(i)).collect();
    let names = state.list(place.dir()).map_err(|e| e.to_string())?;
    let files = names.iter().filter(|n| **n != Path::new(".ploop")).count();
    let side = state.list(&place.dir().join(".ploop")).unwrap();
    if own.len() != 1 || files != 2 || side.iter().any(|n| n == Path::new("work")) {
        return Err(format!("left are {names:?}, {side:?}, of images {own:?}"));
    }
    let file = state.open(&place.dir().join(&own[0].file), Access::Read);
    let scan = scan_image(file.map_err(|e| e.to_string())?.as_ref()).map_err(|e| e.to_string())?;
    match class_of(&scan.findings) {
        Class::Clean => Ok(()),
        _ => Err(format!("{:?}", scan.findings)),
    }
}

fn check(store: &RecordingStore, content: &[u64], budget: &Budget) -> Result<Tally, String> {
    let mut tally = Tally::default();
    for point in 0..=store.log().len() {
        let marks = store.marks_before(point);
        let mut may = BTreeSet::from([FIRST]);
        for (n, (_, after, _)) in (0..).zip(steps()) {
            if marks.contains(&(2 * n + 1)) {
                may.clear();
            }
            if marks.contains(&(2 * n)) {
                may.insert(after);
            }
        }
        let states = store.states_at(point, budget);
        tally.points += 1;
        tally.exhaustive += u64::from(states.units() <= budget.exhaustive_units);
        for state in states {
            tally.states += 1;
            judge(&state.build(), &may, content).map_err(|why| {
                let log = store.log().join("\n  ");
                format!("{why}\n{state}\nlog:\n  {log}")
            })?;
        }
    }
    Ok(tally)
}

/// The words of the smallest size that the disk has.
fn content(start: &MemoryStore) -> Vec<u64> {
    let (_, mut words) = shows(start).unwrap();
    words.truncate((2 * CLUSTER_SECTORS) as usize);
    words
}

/// Goal: a disk has its old size or its new one, and its bytes, wherever a power cut comes; after it
/// resizing goes on, and nothing is left over. Method: growing, shrinking, growing into and beyond what
/// was cut, flattening; all states after every change and sync.
#[test]
fn a_disk_has_the_old_size_or_the_new_one() {
    let start = start();
    let content = content(&start);
    assert!(content.iter().any(|w| *w != 0));
    let store = RecordingStore::on(&start);
    run(&store.store(), &store);
    let budget = Budget {
        exhaustive_units: 7,
        seeded: 16,
        seed: 0,
    };
    let tally = check(&store, &content, &budget).unwrap_or_else(|e| panic!("{e}"));
    println!("{tally}");
}

/// Goal: no sync of it can be taken out or moved. Method: the same with every sync dropped, hastened
/// and delayed.
#[test]
fn every_sync_of_resizing_is_needed_where_it_is() {
    const FILES: &[&str] = &["snapshots/src/resize/commit.rs"];
    let scenario = Scenario {
        name: "a disk resized".into(),
        start: start(),
        run: Box::new(|front, store| {
            run(&front, store);
            let store = store.clone();
            let budget = Budget {
                exhaustive_units: 6,
                seeded: 10,
                seed: 0,
            };
            let content = content(&start());
            Box::new(move || check(&store, &content, &budget).map(drop)) as Verdict<'_>
        }),
    };
    let proof = Proof::default();
    proof.add(&scenario, FILES);
    proof.verdict(FILES);
}
