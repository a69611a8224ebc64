//! Trackers of a disk whose tree changes under them: no written granule is ever forgotten, and as
//! long as the disk is closed cleanly, none is there that was not written.
//!
//! Seeded: `PLOOP_TRACKER_SEED=N` repeats a run, `PLOOP_TRACKER_SEEDS=N` makes so many of them.

use std::collections::{BTreeMap, BTreeSet};

use ploop::Kind;
use ploop::descriptor::Guid;
use ploop::device::{Device, ZeroMode};
use ploop::disk::Disk;
use ploop::format::ploop::Version;
use ploop::store::memory::MemoryStore;
use ploop::tracker::Id;
use snapshots::delete::{self, Watch};
use snapshots::merge::Progress;
use snapshots::place::Place;
use snapshots::snapshot::{Live, NewSnapshot, take};
use snapshots::tracker;

use crate::common::{CLUSTER, Host};
use crate::switch;

struct Quiet;

impl Watch for Quiet {
    fn go_on(&self, _: u64) -> bool {
        true
    }
    fn progress(&self, _: Progress) {}
}

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// What is known of a tracker.
struct Known {
    granularity: u64,
    /// What the disk showed when it was begun or cleared.
    then: Vec<u8>,
    /// Granules that were written since, and no others; `None` after a kill.
    exact: Option<BTreeSet<u64>>,
}

/// What the disk shows, and its trackers by name.
struct Model {
    shows: Vec<u8>,
    trackers: BTreeMap<String, Known>,
}

impl Model {
    fn wrote(&mut self, start: u64, end: u64) {
        for known in self.trackers.values_mut() {
            let granules = start / known.granularity..end.div_ceil(known.granularity);
            if let Some(exact) = &mut known.exact {
                exact.extend(granules);
            }
        }
    }

    fn check(&mut self, place: &Place<'_>, disk: &Disk, what: &str) {
        let all = tracker::list(place, Some(disk)).unwrap();
        let names: Vec<&String> = all.iter().map(|t| &t.name).collect();
        assert_eq!(names, self.trackers.keys().collect::<Vec<_>>(), "{what}");
        for told in &all {
            let known = &self.trackers[&told.name];
            let bits = disk.tracker(Id::parse(&told.id).unwrap()).unwrap().bits;
            let g = known.granularity;
            let runs = bits.runs(0..bits.size()).filter(|run| run.1);
            let set: BTreeSet<u64> = runs
                .flat_map(|(r, _)| r.start / g..r.end.div_ceil(g))
                .collect();
            let old = known.then.chunks(g as usize);
            for (k, (now, old)) in self.shows.chunks(g as usize).zip(old).enumerate() {
                // A disk that grew has zeros behind what there was then.
                let (same, rest) = now.split_at(old.len().min(now.len()));
                let differs = same != &old[..same.len()] || rest.iter().any(|&b| b != 0);
                assert!(
                    !differs || set.contains(&(k as u64)),
                    "{what}: granule {k} of {} was written",
                    told.name
                );
            }
            if let Some(exact) = &known.exact {
                assert_eq!(&set, exact, "{what}: {}", told.name);
            }
        }
    }
}

/// Goal: promise 6 through everything that a disk's tree goes through.
#[test]
fn no_change_is_forgotten_whatever_the_tree_does() {
    let first = env("PLOOP_TRACKER_SEED", 1);
    for seed in first..first + env("PLOOP_TRACKER_SEEDS", 60) {
        run(seed);
    }
}

fn run(seed: u64) {
    let mut rng = Rng(seed);
    let version = [Version::V1, Version::V2][rng.below(2) as usize];
    let host = Host::on(MemoryStore::shared());
    let mut clusters = 40;
    host.init_of(version, clusters);
    let mut model = Model {
        shows: vec![0; (clusters * CLUSTER) as usize],
        trackers: BTreeMap::new(),
    };
    let place = host.place();
    let mut disk = Some(place.open().unwrap());
    let mut nodes: Vec<Guid> = Vec::new();
    for step in 0..60 {
        let open = disk.as_ref().unwrap();
        let live = Live {
            place: &place,
            disk: open,
        };
        let size = model.shows.len() as u64;
        let at = rng.below(size / 512) * 512 + rng.below(2) * 100;
        let end = (at + 1 + rng.below(CLUSTER * 2)).min(size);
        let op = rng.below(20);
        match op {
            0..=5 => {
                let byte = rng.below(250) as u8 + 1;
                open.write(at, &vec![byte; (end - at) as usize]).unwrap();
                model.shows[at as usize..end as usize].fill(byte);
                model.wrote(at, end);
            }
            6 => {
                open.zero(at..end, ZeroMode::default()).unwrap();
                model.shows[at as usize..end as usize].fill(0);
                model.wrote(at, end);
            }
            7 => {
                open.discard(at..end).unwrap();
                open.read(at, &mut model.shows[at as usize..end as usize])
                    .unwrap();
                model.wrote(at, end);
            }
            8 => {
                let name = format!("t{}", rng.below(3));
                let granularity = 512 << rng.below(8);
                let begun = tracker::start(live, &name, granularity);
                if model.trackers.contains_key(&name) {
                    assert_eq!(begun.unwrap_err().kind(), Kind::Exists);
                } else {
                    begun.unwrap();
                    let known = Known {
                        granularity,
                        then: model.shows.clone(),
                        exact: Some(BTreeSet::new()),
                    };
                    model.trackers.insert(name, known);
                }
            }
            9 => {
                if let Some((name, known)) = model.trackers.iter_mut().next() {
                    tracker::clear(live, name).unwrap();
                    known.then = model.shows.clone();
                    known.exact = Some(BTreeSet::new());
                }
            }
            10 if rng.below(3) == 0 => {
                if let Some((name, _)) = model.trackers.pop_last() {
                    tracker::stop(live, &name).unwrap();
                }
            }
            11..=12 => {
                let taken = take(live, &NewSnapshot::default()).unwrap();
                nodes.push(Guid::parse(&taken.guid).unwrap());
            }
            13 if !nodes.is_empty() => {
                let node = nodes.remove(rng.below(nodes.len() as u64) as usize);
                delete::delete(live, node).unwrap();
                delete::run(live, &Quiet).unwrap();
            }
            14 => {
                clusters += 1 + rng.below(3);
                let _arranging = open.arrange();
                open.grow(clusters * CLUSTER).unwrap();
                model.shows.resize((clusters * CLUSTER) as usize, 0);
                // What is new counts, too.
                model.wrote(size, clusters * CLUSTER);
            }
            15 => open.flush().unwrap(),
            16 if !nodes.is_empty() => {
                open.close().unwrap();
                drop(disk.take());
                let node = nodes[rng.below(nodes.len() as u64) as usize];
                let kept = switch::to(&host, node).unwrap().kept;
                nodes.extend(kept.map(|k| Guid::parse(&k.guid).unwrap()));
                let now = place.open().unwrap();
                model.shows.resize(now.size() as usize, 0);
                clusters = now.size() / CLUSTER;
                now.read(0, &mut model.shows).unwrap();
                // What differs is a matter of maps: at least what reads otherwise.
                for known in model.trackers.values_mut() {
                    known.exact = None;
                }
                disk = Some(now);
            }
            17..=18 => {
                open.close().unwrap();
                drop(disk.take());
                disk = Some(place.open().unwrap());
            }
            _ => {
                // Killed: what was written is there, or not; and what was never flushed may go.
                drop(disk.take());
                let now = place.open().unwrap();
                now.read(0, &mut model.shows).unwrap();
                for known in model.trackers.values_mut() {
                    known.exact = None;
                }
                disk = Some(now);
            }
        }
        let what = format!("PLOOP_TRACKER_SEED={seed}, step {step}, operation {op}");
        model.check(&place, disk.as_ref().unwrap(), &what);
    }
}

/// Goal: after a rollback a tracker has what differs, and not the whole disk.
#[test]
fn a_rollback_sets_what_differs_and_no_more() {
    let host = Host::on(MemoryStore::shared());
    host.init_of(Version::V2, 1000);
    let place = host.place();
    let disk = place.open().unwrap();
    disk.write(0, &[1; 4096]).unwrap();
    let live = Live {
        place: &place,
        disk: &disk,
    };
    let node = take(live, &NewSnapshot::default()).unwrap().guid;
    disk.write(500 * CLUSTER, &[2; 4096]).unwrap();
    tracker::start(live, "t", 65536).unwrap();
    disk.write(700 * CLUSTER, &[3; 4096]).unwrap();
    disk.close().unwrap();
    drop(disk);
    switch::to(&host, node).unwrap();
    let told = &tracker::list(&place, None).unwrap()[0];
    assert_eq!((told.name.as_str(), told.dirty), ("t", 2 * 65536));
    assert_eq!(host.shows(None).unwrap()[500 * CLUSTER as usize], 0);
}
