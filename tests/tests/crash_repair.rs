//! Power cuts while a disk is repaired, and while a repair is taken back: undo brings back what was
//! there, a repair begun anew ends like the first, and nothing but what was named reads otherwise.

#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use fsck::Class;
use fsck::repair::{self, How};
use ploop::disk::open::{OpenOptions, Opener};
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, RecordingStore};
use ploop::store::{Access, Store};
use ploop_fuzz::base::Base;
use ploop_fuzz::files::{Files, files};
use ploop_fuzz::guest::read;
use ploop_tests::crash::env;
use ploop_tests::crash::proof::{Proof, Scenario};
use ploop_tests::damage::bases;

const UNDO: &str = "/undo/first";

/// Files of the repair that sync. Undo's own is not one of them: it may be repeated, so only that
/// all is durable when it has answered counts.
const FILES: &[&str] = &[
    "fsck/src/repair/apply.rs",
    "fsck/src/repair/names.rs",
    "fsck/src/repair/record.rs",
];

fn budget(seeded: u64) -> Budget {
    Budget {
        exhaustive_units: 8,
        seeded: env("PLOOP_STATES", seeded) as usize,
        seed: 0,
    }
}

fn opener(store: &MemoryStore) -> Opener {
    Opener::on(Arc::new(store.clone()))
}

/// Repairs with everything; gives the ranges that were named.
fn apply(opener: &Opener, base: &Base, undo: &str) -> Result<Vec<Range<u64>>, String> {
    let text = |e: ploop::Error| e.to_string();
    let plan = repair::plan(opener, &base.source, &OpenOptions::default()).map_err(text)?;
    if !plan.unrepairable.is_empty() {
        return Err(format!("{:?}", plan.unrepairable));
    }
    let done = repair::apply(opener, &plan, How::Yes, Some(Path::new(undo))).map_err(text)?;
    match done.after.class {
        Class::Clean => {}
        class => return Err(format!("{class:?}: {:?}", done.after.findings)),
    }
    let steps = done.done.iter();
    Ok(steps
        .flat_map(|s| s.lost.iter().chain(&s.suspect).cloned())
        .collect())
}

struct First {
    start: MemoryStore,
    files: Files,
    end: MemoryStore,
    named: Vec<Range<u64>>,
}

/// `answered`: the repair had said that it is done.
fn judge(state: &MemoryStore, base: &Base, first: &First, answered: bool) -> Result<(), String> {
    let shown = read(&first.start, &base.source, None);
    let now = read(state, &base.source, None);
    if let Some(shown) = &shown
        && let Some(at) = shown.lost_in(now.as_ref(), &first.named)
    {
        return Err(format!("byte {at} reads otherwise"));
    }
    if answered && files(state) != files(&first.end) {
        return Err("it was answered and is not all there".into());
    }
    // Taken back.
    let back = state.snapshot();
    match repair::undo(&opener(&back), Path::new(UNDO)) {
        Ok(_) => {}
        // Not there, or not finished: then nothing was changed.
        Err(_) if !answered && files(state) == first.files => {}
        Err(e) => return Err(format!("undo: {e}")),
    }
    if files(&back) != first.files {
        return Err("undo does not bring back what was there".into());
    }
    if answered {
        return Ok(());
    }
    // Begun anew.
    let again = state.snapshot();
    apply(&opener(&again), base, "/undo/second").map_err(|e| format!("again: {e}"))?;
    let (ours, theirs) = (
        read(&first.end, &base.source, None),
        read(&again, &base.source, None),
    );
    let Some(ours) = ours else {
        return Err("the first repair's end cannot be read".into());
    };
    match ours.lost_in(theirs.as_ref(), &[]) {
        Some(at) => Err(format!("begun anew, byte {at} reads otherwise")),
        None => Ok(()),
    }
}

/// Every state of a run, judged; how many there were.
fn sweep(
    log: &RecordingStore,
    budget: &Budget,
    judge: &dyn Fn(&MemoryStore, bool) -> Result<(), String>,
) -> Result<u64, String> {
    let mut states = 0;
    for point in log.crash_points() {
        let answered = !log.marks_before(point).is_empty();
        for state in log.states_at(point, budget) {
            states += 1;
            judge(&state.build(), answered)
                .map_err(|why| format!("{why}\n{state}\n  {}", log.log().join("\n  ")))?;
        }
    }
    Ok(states)
}

/// Repairs `base`, hurt as it is in `start`, through `front`, whose log is `log`.
fn repaired(
    front: Arc<dyn Store>,
    log: &RecordingStore,
    base: &Base,
    start: &MemoryStore,
) -> First {
    let named = apply(&Opener::on(front), base, UNDO).unwrap();
    log.mark(1);
    First {
        files: files(start),
        start: start.snapshot(),
        end: log.snapshot(),
        named,
    }
}

fn taken_back(front: Arc<dyn Store>, log: &RecordingStore) {
    repair::undo(&Opener::on(front), Path::new(UNDO)).unwrap();
    log.mark(1);
}

/// An undo that is cut is done by another one; one that was answered is done.
fn judge_undo(state: &MemoryStore, first: &First, answered: bool) -> Result<(), String> {
    if answered && files(state) != first.files {
        return Err("the undo was answered and is not all there".into());
    }
    repair::undo(&opener(state), Path::new(UNDO)).map_err(|e| format!("undo again: {e}"))?;
    match files(state) == first.files {
        true => Ok(()),
        false => Err("undo again does not bring back what was there".into()),
    }
}

/// All states of one repair and its undo; then each sync of both left out and moved.
fn run(proof: &Proof, base: &Base, start: &MemoryStore) {
    start.create_dir(Path::new("/undo")).unwrap();
    let log = RecordingStore::on(start);
    let first = repaired(log.store(), &log, base, start);
    let judged = |state: &MemoryStore, answered| judge(state, base, &first, answered);
    let mut states = sweep(&log, &budget(20), &judged).unwrap_or_else(|e| panic!("{e}"));
    let back = RecordingStore::on(&first.end);
    taken_back(back.store(), &back);
    let judged = |state: &MemoryStore, answered| judge_undo(state, &first, answered);
    states += sweep(&back, &budget(20), &judged).unwrap_or_else(|e| panic!("undo: {e}"));
    println!("{}: {states} states", base.name);
    proof.add(
        &Scenario {
            name: format!("repair of {}", base.name),
            start: start.snapshot(),
            run: Box::new(|front, log| {
                let first = repaired(front, log, base, start);
                let log = log.clone();
                Box::new(move || {
                    let judged = |s: &MemoryStore, answered| judge(s, base, &first, answered);
                    sweep(&log, &budget(4), &judged).map(drop)
                })
            }),
        },
        FILES,
    );
    proof.add(
        &Scenario {
            name: format!("undo of {}", base.name),
            start: first.end.snapshot(),
            run: Box::new(|front, log| {
                taken_back(front, log);
                let (log, first) = (log.clone(), &first);
                Box::new(move || {
                    let judged = |s: &MemoryStore, answered| judge_undo(s, first, answered);
                    sweep(&log, &budget(4), &judged).map(drop)
                })
            }),
        },
        FILES,
    );
}

fn write(store: &MemoryStore, path: &str, at: u64, bytes: &[u8]) {
    let file = store.open(Path::new(path), Access::Write).unwrap();
    file.write_at(bytes, at).unwrap();
}

fn number(store: &MemoryStore, path: &str, at: u64) -> u32 {
    let mut raw = [0; 4];
    let file = store.open(Path::new(path), Access::Read).unwrap();
    file.read_at(&mut raw, at).unwrap();
    u32::from_le_bytes(raw)
}

/// Everything at once: shared clusters, entries beyond the end, a cut cluster, a slot behind the
/// table, a mark.
fn hurt(store: &MemoryStore, path: &str, entries: u64) {
    let at = |slot: u64| 64 + 4 * slot;
    let set: Vec<u64> = (0..entries)
        .filter(|s| number(store, path, at(*s)) != 0)
        .collect();
    let free: Vec<u64> = (0..entries).filter(|s| !set.contains(s)).take(3).collect();
    let shared = number(store, path, at(set[1]));
    write(store, path, at(free[0]), &shared.to_le_bytes());
    write(store, path, at(free[1]), &shared.to_le_bytes());
    let unit = number(store, path, at(set[2])).abs_diff(number(store, path, at(set[1])));
    let file = store.open(Path::new(path), Access::Write).unwrap();
    let len = file.len().unwrap();
    let most = set
        .iter()
        .map(|s| number(store, path, at(*s)))
        .max()
        .unwrap();
    // Where the first copy comes to be.
    let next = most + unit.clamp(1, 128);
    write(store, path, at(free[2]), &next.to_le_bytes());
    write(store, path, at(entries + 3), &7u32.to_le_bytes());
    write(store, path, 44, &0x746F_6E59u32.to_le_bytes());
    file.set_len(len - 700).unwrap();
}

fn named(all: &[Base], name: &str) -> usize {
    all.iter().position(|b| b.name == name).unwrap()
}

#[test]
fn a_repair_cut_anywhere_is_taken_back_or_done_again() {
    let all = bases();
    let proof = Proof::default();
    let run = |name: &str, hurt: &dyn Fn(&MemoryStore)| {
        let base = &all[named(&all, name)];
        let store = base.store.snapshot();
        hurt(&store);
        run(&proof, base, &store);
    };
    run("v2", &|s| {
        hurt(s, "/d/image.hds", 64);
        // One entry less than there are.
        write(s, "/d/image.hds", 32, &63u32.to_le_bytes());
    });
    run("v1", &|s| hurt(s, "/d/image.hds", 40));
    run("v2 with a long table", &|s| {
        hurt(s, "/d/image.hds", 9000);
    });
    run("411-v1-misaligned-entry", &|_| ());
    for name in ["307-conversion-bat-rewritten", "310-conversion-of-chain"] {
        run(name, &|s| {
            // The first change after the images is that the backup goes.
            for dir in ["/d/.ploop", "/d/.ploop/lost+found"] {
                s.create_dir(Path::new(dir)).unwrap();
            }
        });
    }
    run("201-cbt-valid", &|s| write(s, "/d/root.hds", 56, &[9]));
    run("disk", &|s| {
        hurt(s, "/d/root.hds.top", 30);
        hurt(s, "/d/root.hds", 30);
        // A leftover, and a size that is out of date.
        let copy = s.open(Path::new("/d/root.hds"), Access::Read).unwrap();
        let mut bytes = vec![0; 65_536];
        copy.read_at(&mut bytes, 0).unwrap();
        let orphan = s.create(Path::new("/d/old.hds"), 0o600).unwrap();
        orphan.write_at(&bytes, 0).unwrap();
        let xml = Path::new("/d/DiskDescriptor.xml");
        let mut d = opener(s).read_descriptor(xml).unwrap();
        d.set_disk_sectors(640);
        let file = s.open(xml, Access::Write).unwrap();
        file.set_len(0).unwrap();
        file.write_at(&d.to_xml(), 0).unwrap();
    });
    proof.verdict(FILES);
}
