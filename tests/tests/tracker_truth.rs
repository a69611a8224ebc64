//! The truth about trackers: a container that is written to, snapshotted, merged, gone back and killed
//! with the real programs, over and over, beside a model that knows every granule.
//!
//! What a user would lose: the change that an increment, or a move, leaves out. After each start,
//! and before each end, every tracker has every granule that was written since it was cleared;
//! after an end that was asked for, nothing else, unless a kill or a switch came since.
//!
//! `PLOOP_TRACKER_SECONDS=3600` for an hour of it, `PLOOP_TRACKER_SEED` for another one.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nbd_server::wire::reply::Style;
use nbd_server::wire::request::kind;
use ploop::disk::open::Opener;
use ploop::store::Access;
use ploop_tests::client::{Ask, Client};
use ploop_tests::crash::{Rng, env};
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::store::Rig;

const SECTOR: u64 = 512;
/// Of the disk.
const SIZE: u64 = 64 << 20;
/// Of a write or a zero at most.
const MOST: u64 = 128;
/// What a tracker begins with: one that is finer than a cluster, the default, and one that is coarser.
const GRANULARITIES: [u64; 3] = [4096, 65536, 4 << 20];
/// Of a read.
const STEP: usize = 8 << 20;
const TRACKERS: usize = 5;
const SNAPSHOTS: usize = 4;

/// What a tracker must have, and what it may have: granules.
struct Truth {
    granularity: u64,
    must: Vec<bool>,
    may: Vec<bool>,
}

impl Truth {
    fn new(granularity: u64) -> Truth {
        let none = vec![false; (SIZE / granularity) as usize];
        Truth {
            granularity,
            must: none.clone(),
            may: none,
        }
    }

    /// What is in `at..at + len` was written.
    fn written(&mut self, at: u64, len: u64) {
        let granules =
            (at / self.granularity) as usize..=((at + len - 1) / self.granularity) as usize;
        self.must[granules.clone()].fill(true);
        self.may[granules].fill(true);
    }
}

/// The container, and all that is known of it.
struct World {
    rig: Rig,
    rng: Rng,
    trackers: BTreeMap<String, Truth>,
    /// Which write each sector shows; 0 is zeros, 1 the template.
    now: Vec<u32>,
    writes: u32,
    snapshots: BTreeMap<String, Vec<u32>>,
    named: u32,
    tally: BTreeMap<&'static str, u32>,
    /// What was done in this round and the one before.
    lately: [Vec<String>; 2],
}

impl World {
    fn new(seed: u64) -> World {
        let rig = Rig::new();
        rig.small_template("t", &["ct"]);
        let mut world = World {
            rig,
            rng: Rng(seed),
            trackers: BTreeMap::new(),
            now: Vec::new(),
            writes: 1,
            snapshots: BTreeMap::new(),
            named: 0,
            tally: BTreeMap::new(),
            lately: Default::default(),
        };
        for granularity in GRANULARITIES {
            world.start(granularity);
        }
        world
    }

    fn name(&mut self, first: char) -> String {
        self.named += 1;
        format!("{first}{}", self.named)
    }

    fn did(&mut self, what: &'static str, to: impl std::fmt::Display) {
        *self.tally.entry(what).or_default() += 1;
        self.lately[1].push(format!("{what} {to}"));
    }

    fn any(&mut self, of: &[String]) -> String {
        of[self.rng.below(of.len() as u64) as usize].clone()
    }

    fn start(&mut self, granularity: u64) {
        let name = self.name('t');
        let size = granularity.to_string();
        self.rig
            .run(["tracker", "start", "ct", &name, "--granularity", &size]);
        self.did("started", format_args!("{name} of {granularity}"));
        self.trackers.insert(name, Truth::new(granularity));
    }

    fn stop(&mut self) {
        let names: Vec<_> = self.trackers.keys().cloned().collect();
        let name = self.any(&names);
        self.rig.run(["tracker", "stop", "ct", &name]);
        self.trackers.remove(&name);
        self.did("stopped", name);
    }

    fn clear(&mut self) {
        let names: Vec<_> = self.trackers.keys().cloned().collect();
        let name = self.any(&names);
        self.rig.run(["tracker", "clear", "ct", &name]);
        let new = Truth::new(self.trackers[&name].granularity);
        self.did("cleared", &name);
        self.trackers.insert(name, new);
    }

    /// One is added to another of its granularity, where there are two.
    fn merge(&mut self) {
        let names: Vec<_> = self.trackers.keys().cloned().collect();
        let from = self.any(&names);
        let granularity = self.trackers[&from].granularity;
        let alike =
            |name: &&String| **name != from && self.trackers[*name].granularity == granularity;
        let Some(into) = names.iter().find(alike) else {
            return;
        };
        self.rig.run(["tracker", "merge", "ct", &from, into]);
        let (must, may) = {
            let from = &self.trackers[&from];
            (from.must.clone(), from.may.clone())
        };
        self.did("merged", format_args!("{from} into {into}"));
        let into = self.trackers.get_mut(into).unwrap();
        let add =
            |to: &mut [bool], more: &[bool]| to.iter_mut().zip(more).for_each(|(t, m)| *t |= m);
        add(&mut into.must, &must);
        add(&mut into.may, &may);
    }

    fn write(&mut self, client: &mut Client) {
        let len = (1 + self.rng.below(MOST)) * SECTOR;
        let at = self.rng.below((SIZE - len) / SECTOR + 1) * SECTOR;
        let sectors = (at / SECTOR) as usize..((at + len) / SECTOR) as usize;
        self.writes += 1;
        if self.rng.below(4) == 0 {
            let reply = client.ask(Ask::new(kind::WRITE_ZEROES, 0, at..at + len));
            assert_eq!(reply.error, 0, "{}", reply.text);
            self.now[sectors].fill(0);
            self.did("zeroed", format_args!("{at}, {len}"));
        } else {
            client.write(at, &self.writes.to_le_bytes().repeat((len / 4) as usize));
            self.now[sectors].fill(self.writes);
            let stamp = self.writes;
            self.did("written", format_args!("{at}, {len}: {stamp}"));
        }
        self.trackers.values_mut().for_each(|t| t.written(at, len));
    }

    fn snapshot(&mut self, daemon: &Daemon) {
        let name = self.name('s');
        take(&daemon.api(), "ct", &name);
        self.did("snapshots", &name);
        self.snapshots.insert(name, self.now.clone());
    }

    /// A snapshot goes, and its images are merged under the client.
    fn delete(&mut self) {
        let names: Vec<_> = self.snapshots.keys().cloned().collect();
        let name = self.any(&names);
        self.rig.run(["snapshot", "delete", "ct", &name]);
        self.snapshots.remove(&name);
        self.did("snapshots deleted", name);
    }

    /// What reads otherwise than before must be there; a switch may say so of more.
    fn switch(&mut self) {
        let names: Vec<_> = self.snapshots.keys().cloned().collect();
        let name = self.any(&names);
        self.rig
            .run(["snapshot", "switch", "ct", &name, "--discard"]);
        let then = self.snapshots[&name].clone();
        for (sector, (was, is)) in self.now.iter().zip(&then).enumerate() {
            if was != is {
                let at = sector as u64 * SECTOR;
                self.trackers
                    .values_mut()
                    .for_each(|t| t.written(at, SECTOR));
            }
        }
        self.trackers.values_mut().for_each(|t| t.may.fill(true));
        self.now = then;
        self.did("switched", name);
    }

    fn step(&mut self, daemon: &Daemon, client: &mut Client) {
        match self.rng.below(60) {
            0 => self.snapshot(daemon),
            1 if self.snapshots.len() > SNAPSHOTS => self.delete(),
            2 => self.clear(),
            3 => self.merge(),
            4 if self.trackers.len() < TRACKERS => {
                let of = self.rng.below(GRANULARITIES.len() as u64);
                self.start(GRANULARITIES[of as usize]);
            }
            5 if self.trackers.len() > 2 => self.stop(),
            6 | 7 => client.flush(),
            _ => self.write(client),
        }
    }

    /// What the disk shows. What a kill took back was not flushed; a stop takes nothing back.
    fn look(&mut self, client: &mut Client, killed: bool, what: &str) {
        let mut shown = Vec::new();
        for at in (0..SIZE).step_by(STEP) {
            let data = client.read(at, STEP as u64);
            shown.extend(data.chunks(SECTOR as usize).map(|sector| {
                let (word, _) = sector.split_first_chunk().unwrap();
                let stamp = u32::from_le_bytes(*word);
                let whole = sector.chunks(4).all(|w| w == word) && stamp <= self.writes;
                if whole { stamp } else { 1 }
            }));
        }
        assert!(
            killed || self.now == shown,
            "{what}: the disk shows something else"
        );
        self.now = shown;
    }

    /// Every bit of every tracker, as clients see it.
    fn hold_served(&self, daemon: &Daemon, what: &str) {
        for (name, truth) in &self.trackers {
            let context = format!("qemu:dirty-bitmap:{name}");
            let mut client =
                Client::open_with(daemon.socket(), "ct", Style::Structured, &[&context]);
            let mut runs = Vec::new();
            let mut at = 0;
            while at < SIZE {
                let reply = client.ask(Ask::new(kind::BLOCK_STATUS, 0, at..SIZE));
                assert_eq!(reply.error, 0, "{what}: {}", reply.text);
                for extent in reply.extents {
                    runs.push((at..at + extent.len, extent.flags == 1));
                    at += extent.len;
                }
            }
            client.disconnect();
            hold(name, truth, runs, &format!("{what}, served"));
        }
    }

    /// The same of what lies in the files.
    fn hold_stored(&self, what: &str) {
        let opener = Opener::host();
        let top = self.rig.top("ct");
        let file = opener.store().open(&top, Access::Read).unwrap();
        let stored = opener.trackers(top.parent().unwrap(), file.as_ref());
        let stored = stored.unwrap();
        let listed = self.rig.json(["tracker", "list", "ct", "--json"]);
        let listed = listed.as_array().unwrap();
        assert_eq!(listed.len(), self.trackers.len(), "{what}");
        for said in listed {
            let name = said["name"].as_str().unwrap();
            let of = |t: &&ploop::tracker::Tracker| said["id"] == t.id.to_string();
            let bits = &stored.iter().find(of).unwrap().bits;
            let runs: Vec<_> = bits.runs(0..SIZE).collect();
            let dirty = runs.iter().filter(|run| run.1);
            let dirty: u64 = dirty.map(|(run, _)| run.end - run.start).sum();
            assert_eq!(said["dirty"], dirty, "{what}: {name}");
            hold(name, &self.trackers[name], runs, &format!("{what}, stored"));
        }
    }
}

/// Panics unless `runs`, which cover the disk, have what `truth` must have and no more than it may.
fn hold(name: &str, truth: &Truth, runs: Vec<(std::ops::Range<u64>, bool)>, what: &str) {
    let (mut at, mut lacks, mut more) = (0, Vec::new(), Vec::new());
    for (run, dirty) in runs {
        assert_eq!(run.start, at, "{what}: {name}");
        at = run.end;
        for granule in run.start / truth.granularity..run.end.div_ceil(truth.granularity) {
            match dirty {
                true if !truth.may[granule as usize] => more.push(granule),
                false if truth.must[granule as usize] => lacks.push(granule),
                _ => {}
            }
        }
    }
    assert_eq!(at, SIZE, "{what}: {name}");
    let of = truth.may.len();
    assert!(
        lacks.is_empty() && more.is_empty(),
        "{name}, {of} granules of {}: lacks {lacks:?}; nobody wrote {more:?}; {what}",
        truth.granularity
    );
}

/// Goal: promise 28 with the real programs. Method: as the module says, until the time is over.
#[test]
fn no_life_of_a_container_makes_a_tracker_lie() {
    let seed = env("PLOOP_TRACKER_SEED", 1);
    let end = Instant::now() + Duration::from_secs(env("PLOOP_TRACKER_SECONDS", 10));
    let mut world = World::new(seed);
    let run = std::panic::AssertUnwindSafe(|| live(&mut world, seed, end));
    if let Err(failed) = std::panic::catch_unwind(run) {
        let lately = world.lately.concat().join("\n");
        println!(
            "{lately}\nthe store stays at {}",
            world.rig.root().display()
        );
        std::mem::forget(world);
        std::panic::resume_unwind(failed);
    }
    println!("{:?}", world.tally);
    // Clean, or as the last kill left it.
    let checked = world.rig.ploop().args(["check", "ct"]).output().unwrap();
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{checked:?}");
}

fn live(world: &mut World, seed: u64, end: Instant) {
    let (mut rounds, mut killed) = (0, true);
    while rounds < 12 || Instant::now() < end {
        let at = |what: &str| format!("PLOOP_TRACKER_SEED={seed}, round {rounds}, {what}");
        let daemon = Daemon::start(&world.rig);
        world.hold_served(&daemon, &at("started"));
        let mut client = daemon.open("ct");
        world.look(&mut client, killed, &at("started"));
        for _ in 0..40 {
            world.step(&daemon, &mut client);
        }
        world.hold_served(&daemon, &at("written"));
        killed = world.rng.below(2) == 0;
        if killed {
            daemon.kill();
            world.trackers.values_mut().for_each(|t| t.may.fill(true));
            world.did("killed", rounds);
        } else {
            client.disconnect();
            let log = daemon.stop();
            world.hold_stored(&at(&format!("stopped: {log}")));
            if world.rng.below(4) == 0 && !world.snapshots.is_empty() {
                world.switch();
                world.hold_stored(&at("switched"));
            }
        }
        world.lately.rotate_left(1);
        world.lately[1].clear();
        rounds += 1;
    }
}
