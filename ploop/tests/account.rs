//! The charge of a disk is what its files hold: after any operations, and after any crash.
//!
//! What a user would lose: a container that takes more of its host than it may, one that is refused
//! what it has a right to, and a figure on a bill that nobody can check.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ploop::account::{Account, GRANULE};
use ploop::device::{Device, ZeroMode};
use ploop::disk::Disk;
use ploop::format::ploop::held::granules_in;
use ploop::format::ploop::top::Found;
use ploop::format::ploop::{Header, Version};
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Calls, Fault, RecordingStore};
use ploop::store::{Access, Store};
use ploop::{Error, Kind};

use common::{TOP, make, open};

const CLUSTER: u64 = 64 * 1024;
/// So many that the table has two blocks; only the first and the last of them are used.
const CLUSTERS: u64 = 1040;
const USED: u64 = 40;

fn seeds() -> Range<u64> {
    match std::env::var("PLOOP_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
    {
        Some(seed) => seed..seed + 1,
        None => 0..40,
    }
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn store(below: bool) -> Arc<dyn Store> {
    let store = Arc::new(MemoryStore::new());
    fill(store.as_ref(), below);
    store
}

fn fill(store: &dyn Store, below: bool) {
    let header = Header::new(Version::V2, 128, CLUSTERS * 128).unwrap();
    let write = |base: &Disk| {
        for k in (0..USED)
            .map(|k| some_byte(&mut Rng(k)) / CLUSTER)
            .filter(|k| k % 3 != 0)
        {
            base.write(k * CLUSTER + 4096 * (k % 7), &vec![9; 30_000])
                .unwrap();
        }
        // Data that is all zeros, which copies leave out.
        base.write(CLUSTER, &vec![0; CLUSTER as usize]).unwrap();
    };
    make(store, &header, below.then_some(&write));
}

/// Granules that hold data, and those that are to: an independent count.
fn truth(store: &Arc<dyn Store>, disk: &Disk) -> u64 {
    let count = |path: &Path| {
        let file = store.open(path, Access::Read).unwrap();
        granules_in(file.as_ref(), 0..file.len().unwrap()).unwrap()
    };
    let journal = Path::new("/disk/.ploop/journal.top");
    let journal = match store.kind(journal).unwrap() {
        Some(_) => count(journal),
        None => 0,
    };
    count(Path::new(TOP)) + journal + missing(disk) + unwritten(store, disk)
}

/// Granules of parts that a copy from below is to fill.
fn missing(disk: &Disk) -> u64 {
    let top = disk.top().unwrap();
    let parts = top.parts().older_than(u64::MAX, usize::MAX).into_iter();
    let missing = parts.filter_map(|k| top.parts().get(k)).map(|p| {
        let file = top.file();
        let of = |r: Range<u64>| {
            let held = granules_in(
                file.as_ref(),
                p.offset + r.start * GRANULE..p.offset + r.end * GRANULE,
            );
            r.end - r.start - held.unwrap()
        };
        p.present.missing().into_iter().map(of).sum::<u64>()
    });
    missing.sum()
}

/// Blocks of the BAT that entries in memory need and that are not written.
fn unwritten(store: &Arc<dyn Store>, disk: &Disk) -> u64 {
    let file = store.open(Path::new(TOP), Access::Read).unwrap();
    let top = disk.top().unwrap();
    let needs = |k: &u64| top.find(*k).unwrap() != Found::Below;
    let blocks: BTreeSet<u64> = (0..CLUSTERS)
        .filter(needs)
        .map(|k| Header::slot_offset(k) / GRANULE)
        .collect();
    let empty =
        |b: &&u64| granules_in(file.as_ref(), **b * GRANULE..(**b + 1) * GRANULE).unwrap() == 0;
    blocks.iter().filter(empty).count() as u64
}

/// A byte of the first or the last clusters.
fn some_byte(rng: &mut Rng) -> u64 {
    match rng.below(USED * CLUSTER) {
        at if at < USED / 2 * CLUSTER => at,
        at => at + (CLUSTERS - USED) * CLUSTER,
    }
}

fn step(rng: &mut Rng, disk: &Disk) -> Result<(), Error> {
    let trace = std::env::var_os("PLOOP_TRACE").is_some();
    let at = some_byte(rng);
    let len = match rng.below(4) {
        0 => 4096,
        1 => rng.below(9000) + 1,
        2 => rng.below(3 * CLUSTER) + 1,
        _ => CLUSTER,
    };
    let at = if rng.below(2) == 0 {
        at / 4096 * 4096
    } else {
        at
    };
    let at = if rng.below(4) == 0 {
        at / CLUSTER * CLUSTER
    } else {
        at
    };
    let range = at..(at + len).min(CLUSTERS * CLUSTER);
    let kind = rng.below(12);
    if trace {
        println!("{kind}: {range:?}, cluster {}..", range.start / CLUSTER);
    }
    match kind {
        0..=5 => disk.write(at, &vec![7; (range.end - at) as usize]),
        6 => disk.zero(range, ZeroMode::default()),
        7..=8 => disk.discard(range),
        9 => disk.flush(),
        10 => disk.complete(u64::MAX, 3),
        _ => {
            // Given up before its bytes are written, or after some are.
            let mut segments = Vec::new();
            let lease = disk.prepare(range, &mut segments)?;
            if rng.below(2) == 0 {
                lease.file().write_at(&[5; 512], segments[0].file_offset)?;
            }
            drop(lease);
            Ok(())
        }
    }
}

/// Goal: the account says what is there, whatever was done. Method: random operations, compared with
/// a count of the files; a part counts with what it is to hold.
#[test]
fn the_charge_is_what_the_files_hold() {
    for seed in seeds() {
        let below = seed % 2 == 0;
        let (store, mut rng) = (store(below), Rng(seed));
        let mut account = Arc::new(Account::default());
        let mut disk = open(&store, &account);
        disk.top().unwrap().count().unwrap();
        for i in 0..400 {
            step(&mut rng, &disk).unwrap();
            let (used, truth) = (account.used() / GRANULE, truth(&store, &disk));
            if std::env::var_os("PLOOP_TRACE").is_some() {
                println!("step {i}: {used} {truth} {}", used as i64 - truth as i64);
            }
            // What a write that was given up had paid for in place stays until the next opening.
            assert!(used >= truth, "seed {seed}, step {i}: {used} for {truth}");
            match rng.below(60) {
                0 => disk.close().unwrap(),
                1 => drop(disk),
                _ => continue,
            }
            // Opened again, closed or not, it is exact.
            account = Arc::default();
            disk = open(&store, &account);
            // What nothing names behind the last cluster goes with the first change.
            disk.top().unwrap().before_change().unwrap();
            let (used, truth) = (account.used() / GRANULE, self::truth(&store, &disk));
            assert_eq!(used, truth, "seed {seed}, step {i}, opened again");
        }
    }
}

/// Goal: exact while it is open, too, where no write was given up.
#[test]
fn the_charge_is_exact_all_the_time() {
    for seed in seeds() {
        let below = seed % 2 == 1;
        let (store, mut rng) = (store(below), Rng(seed + 1000));
        let account = Arc::new(Account::default());
        let disk = open(&store, &account);
        disk.top().unwrap().count().unwrap();
        for i in 0..400 {
            let at = some_byte(&mut rng) / 512 * 512;
            let len = rng.below(2 * CLUSTER) + 1;
            let range = at..(at + len).min(CLUSTERS * CLUSTER);
            match rng.below(8) {
                0..=3 => disk.write(at, &vec![7; (range.end - at) as usize]).unwrap(),
                4 => disk.zero(range, ZeroMode::default()).unwrap(),
                5 => disk.discard(range).unwrap(),
                6 => disk.flush().unwrap(),
                _ => disk.complete(u64::MAX, 3).unwrap(),
            }
            let (used, truth) = (account.used() / GRANULE, truth(&store, &disk));
            assert_eq!(used, truth, "seed {seed}, step {i}");
        }
        disk.close().unwrap();
        assert_eq!(account.used() / GRANULE, truth(&store, &disk));
    }
}

/// Goal: nobody gets beyond his limit, whatever he tries; what he has he may write to; what he gives
/// back he may take again.
#[test]
fn a_limit_holds_and_what_is_there_can_be_written() {
    for seed in seeds() {
        let below = seed % 2 == 0;
        let (store, mut rng) = (store(below), Rng(seed + 77));
        let account = Arc::new(Account::default());
        let disk = open(&store, &account);
        disk.top().unwrap().count().unwrap();
        let limit = rng.below(200) + 20;
        account.set_limit(Some(limit * GRANULE));
        let mut refused = 0;
        for i in 0..400 {
            match step(&mut rng, &disk) {
                Ok(()) => {}
                Err(e) if e.kind() == Kind::NoSpace => refused += 1,
                Err(e) => panic!("seed {seed}, step {i}: {e}"),
            }
            // Journals are beside it: no flush fails for want of room.
            let used = account.used() / GRANULE;
            let there = truth(&store, &disk);
            assert!(used >= there, "seed {seed}, step {i}: {used} for {there}");
            let journal = Path::new("/disk/.ploop/journal.top");
            let journal = match store.kind(journal).unwrap() {
                Some(_) => store.open(journal, Access::Read).unwrap().len().unwrap() / GRANULE,
                None => 0,
            };
            assert!(
                used <= limit + journal,
                "seed {seed}, step {i}: {used} of {limit}"
            );
        }
        assert!(refused > 0, "seed {seed}: a limit of {limit} was never met");
        // All is taken: what holds data is written in place, in every cluster that has it.
        account.set_limit(Some(0));
        disk.flush().unwrap();
        disk.complete(u64::MAX, usize::MAX).unwrap();
        let top = disk.top().unwrap();
        for k in 0..CLUSTERS {
            let Some(offset) = top.lookup(k).unwrap() else {
                continue;
            };
            for g in 0..CLUSTER / GRANULE {
                let at = offset + g * GRANULE;
                let held = granules_in(top.file().as_ref(), at..at + GRANULE).unwrap() == 1;
                let wrote = disk.write(k * CLUSTER + g * GRANULE, &[3; 4096]);
                match held {
                    true => wrote.unwrap(),
                    // What was paid for by a write that was given up may be written, too.
                    false => drop(wrote.is_err_and(|e| e.kind() == Kind::NoSpace)),
                }
            }
        }
        disk.flush().unwrap();
        disk.close().unwrap();
    }
}

/// Goal: a disk whose count failed can be counted again, and is charged once for all. Method: a
/// crash leaves parts and a journal; each call of the count fails once.
#[test]
fn what_could_not_be_counted_is_counted_by_the_next_try() {
    let memory = MemoryStore::new();
    let start: Arc<dyn Store> = Arc::new(memory.clone());
    fill(start.as_ref(), true);
    let disk = open(&start, &Arc::default());
    for k in 0..USED {
        let at = some_byte(&mut Rng(k)) / CLUSTER * CLUSTER;
        disk.write(at + 3 * GRANULE, &[7; 5000]).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    for n in 0.. {
        let record = RecordingStore::on(&memory);
        let store = record.store();
        let account = Arc::new(Account::default());
        let disk = open(&store, &account);
        let top = disk.top().unwrap();
        record.count(Calls::All);
        record.fail_at(n, Fault::Eio);
        let counted = top.count();
        let reached = record.calls() > n;
        record.clear_faults();
        assert_eq!(counted.is_err(), reached, "call {n}");
        top.count().unwrap();
        // What no entry names goes with the first change.
        top.before_change().unwrap();
        assert_eq!(account.used() / GRANULE, truth(&store, &disk), "call {n}");
        if !reached {
            assert!(n > 10, "{n} calls");
            assert!(top.parts().count() > 0);
            return;
        }
    }
}

/// Goal: what was charged for a write that was given up is paid back by a close, also when the close
/// could not count at first. Method: each call of the close fails once, and it is tried again.
#[test]
fn a_close_that_could_not_count_counts_when_it_is_tried_again() {
    let memory = MemoryStore::new();
    let start: Arc<dyn Store> = Arc::new(memory.clone());
    fill(start.as_ref(), false);
    let mut again = 0;
    for n in 0.. {
        let record = RecordingStore::on(&memory);
        let store = record.store();
        let account = Arc::new(Account::default());
        let disk = open(&store, &account);
        disk.write(0, &[7; 5000]).unwrap();
        let mut segments = Vec::new();
        drop(
            disk.prepare(2 * GRANULE..8 * GRANULE, &mut segments)
                .unwrap(),
        );
        assert!(account.used() / GRANULE > truth(&store, &disk));
        record.count(Calls::All);
        record.fail_at(n, Fault::Eio);
        let closed = disk.close();
        let reached = record.calls() > n;
        record.clear_faults();
        let closed = match closed {
            Ok(()) => true,
            Err(_) => {
                let closed = disk.close();
                let stuck = |e: &Error| e.kind() == Kind::Latched;
                assert!(closed.as_ref().err().is_none_or(stuck), "call {n}");
                again += u32::from(closed.is_ok());
                closed.is_ok()
            }
        };
        if closed {
            assert_eq!(account.used() / GRANULE, truth(&store, &disk), "call {n}");
        }
        if !reached {
            assert!(again > 0);
            return;
        }
    }
}
