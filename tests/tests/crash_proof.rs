//! The crash tests prove themselves: a build that leaves out, hastens or delays any sync of the
//! writable image is red (promises 1, 2 and 3).

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device;
use ploop::disk::open::{DESCRIPTOR, Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::recording::Budget;
use ploop::store::{SECTOR, Store};
use ploop_tests::crash::front::{FrontStore, Kind, killed};
use ploop_tests::crash::proof::{Proof, Scenario, Verdict, judged};
use ploop_tests::crash::{CLUSTER_SECTORS, Fixture, History, Runner, Shape, Step, workload};
use snapshots::merge::{Merge, Step as MergeStep};
use snapshots::place::Place;
use snapshots::snapshot::{NewSnapshot, take_offline};

const FILES: &[&str] = &[
    "ploop/src/format/ploop/top.rs",
    "ploop/src/format/ploop/durable.rs",
    "ploop/src/format/ploop/journal/mod.rs",
];

/// The same for a process that is killed when it is about to sync for the first time after it did
/// `what` to its journal `times` times; another one does `next`.
fn killed_scenario<'a>(
    fx: &'a Fixture,
    (what, times): (&'static str, u32),
    steps: &'a [Step],
    next: &'a [Step],
) -> Scenario<'a> {
    Scenario {
        name: format!("killed after {what} {times}, {}", fx.name),
        start: fx.start.clone(),
        run: Box::new(move |front, store| {
            let history = History::new(store, fx.initial.clone(), fx.closed());
            let first = FrontStore::new(front.clone());
            let seen = AtomicU32::new(0);
            first.watch(move |call| {
                let journal = call.path.to_string_lossy().contains("journal.");
                if call.what == what && journal {
                    seen.fetch_add(1, Ordering::SeqCst);
                }
                match seen.load(Ordering::SeqCst) >= times && call.kind == Kind::Sync {
                    true => Err(killed(call.path)),
                    false => Ok(()),
                }
            });
            let mut runner = Runner::new(fx, Arc::new(first), &history);
            assert!(steps.iter().any(|step| runner.step(step).is_err()));
            runner.die();
            Runner::new(fx, front, &history).run(next);
            judged(fx, store, history)
        }),
    }
}

const DISK: &str = "/d";
const MERGED_CLUSTERS: u64 = 6;
/// Sectors of a cluster there.
const SECTORS: u32 = CLUSTER_SECTORS as u32;

/// A disk that is all data, with one snapshot of it.
fn with_snapshot() -> MemoryStore {
    let memory = MemoryStore::new();
    let store: Arc<dyn Store> = Arc::new(memory.clone());
    let size = MERGED_CLUSTERS * CLUSTER_SECTORS;
    let header = Header::new(Version::V2, SECTORS, size).unwrap();
    let dir = Path::new(DISK);
    store.create_dir(dir).unwrap();
    drop(create(store.as_ref(), &dir.join("root.hds"), &header, 0o600).unwrap());
    let d = Descriptor::new_single(size, SECTORS, false, Guid::TOP, "root.hds").unwrap();
    let xml = store.create(&dir.join(DESCRIPTOR), 0o600).unwrap();
    xml.write_at(&d.to_xml(), 0).unwrap();
    with_place(&store, |place| {
        let disk = place.open().unwrap();
        disk.write(0, &vec![1; (size * SECTOR) as usize]).unwrap();
        disk.close().unwrap();
        drop(disk);
        take_offline(place, &NewSnapshot::default()).unwrap();
    });
    memory
}

fn with_place<T>(store: &Arc<dyn Store>, f: impl FnOnce(&Place<'_>) -> T) -> T {
    let opener = Opener::on(store.clone());
    let source = Source::parse(store.as_ref(), DISK).unwrap();
    f(&Place::disk(&opener, &source, &[], false).unwrap())
}

/// A snapshot is merged into the top, which has a journal; then the power goes, and the journal is
/// lost, or looked at by nobody.
fn merge_scenario<'a>() -> Scenario<'a> {
    Scenario {
        name: "merge into a top with a journal".into(),
        start: with_snapshot(),
        run: Box::new(|front, store| {
            with_place(&front, |place| {
                let cluster = CLUSTER_SECTORS * SECTOR;
                let d = place.descriptor().unwrap();
                let snapshot = d.shot(d.top).unwrap().parent;
                let disk = place.open().unwrap();
                disk.write(5 * cluster + 4096, &[7; 4096]).unwrap();
                disk.flush().unwrap();
                let mut merge = Merge::begin(place, &disk, snapshot).unwrap();
                while merge.step(cluster).unwrap() == MergeStep::More {}
            });
            let store = store.clone();
            let check = move || {
                let budget = Budget {
                    exhaustive_units: 4,
                    seeded: 10,
                    seed: 1,
                };
                for point in 0..=store.log().len() {
                    for state in store.states_at(point, &budget) {
                        let memory = state.build();
                        no_zeros(memory.snapshot(), true).map_err(|e| format!("{e}: {state}"))?;
                        no_zeros(memory, false).map_err(|e| format!("{e}: {state}"))?;
                    }
                }
                Ok(())
            };
            Box::new(check) as Verdict<'a>
        }),
    }
}

fn no_zeros(memory: MemoryStore, with_journal: bool) -> Result<(), String> {
    let store: Arc<dyn Store> = Arc::new(memory);
    let side = Path::new(DISK).join(".ploop");
    for name in store.list(&side).unwrap_or_default() {
        if !with_journal && name.to_string_lossy().starts_with("journal.") {
            store.remove_file(&side.join(name)).unwrap();
        }
    }
    with_place(&store, |place| {
        let disk = match place.open() {
            Ok(disk) => disk,
            Err(e) if with_journal => return Err(format!("refused: {e}")),
            Err(_) => return Ok(()),
        };
        let mut got = vec![0; disk.size() as usize];
        match disk.read(0, &mut got) {
            Ok(()) if got.contains(&0) => Err(format!("zeros, with its journal: {with_journal}")),
            Err(e) if with_journal => Err(format!("unreadable: {e}")),
            _ => Ok(()),
        }
    })
}

/// Goal: no sync of the writable image can be taken out or moved. Method: every story with every
/// sync dropped, hastened and delayed, until each line of the code that syncs was noticed.
#[test]
fn every_sync_of_the_writable_image_is_needed_where_it_is() {
    let stories = workload::stories();
    let proof = Proof::default();
    let all = |version, overlay, shape| {
        let fx = Fixture::new(version, shape, overlay, workload::STORY_CLUSTERS);
        for (name, steps) in &stories {
            proof.add(&Scenario::of(&fx, name, steps), FILES);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            all(Version::V2, true, Shape::Empty);
            all(Version::V1, true, Shape::Tail);
        });
        scope.spawn(|| {
            all(Version::V1, false, Shape::Dirty);
            all(Version::V2, true, Shape::Holes);
        });
    });
    let c = CLUSTER_SECTORS;
    let fx = Fixture::new(Version::V2, Shape::Empty, true, workload::STORY_CLUSTERS);
    let whole = [Step::Write(0, c), Step::Flush];
    let part = |at| [Step::Write(c + at, 1), Step::Flush];
    // The record that is in the cache only names an entry.
    let appended = [&part(9)[..], &whole].concat();
    // So does the journal that has taken the place of another in the cache only.
    let renamed = [&[9, 20, 30, 40].map(part).concat()[..], &whole].concat();
    // The journal has ended in the cache only.
    let closed = [&part(9)[..], &[Step::Close]].concat();
    let close = [Step::Close];
    let more = [&whole[..], &close].concat();
    for (when, steps, next) in [
        (("write", 2), &appended, &close[..]),
        (("rename", 2), &renamed, &close),
        (("write", 2), &closed, &close),
        (("write", 2), &closed, &more),
    ] {
        proof.add(&killed_scenario(&fx, when, steps, next), FILES);
    }
    proof.add(&merge_scenario(), FILES);
    proof.verdict(FILES);
}
