//! Tree operations under clients, and what is promised at every instant of them.
//!
//! ```text
//!   Scene ──► FrontStore ──► RecordingStore          each call of the operation is seen first:
//!               │ watcher        │ log, marks        clients write, read and flush in between
//!               └─ Driver ───────┴─► Promise (at a point) ──► judge
//! ```
//!
//! What a snapshot must read is what the disk showed at its barrier: when the top's file changed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use ploop::Result;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::store::Store;
use ploop::store::recording::{Budget, RecordingStore};
use snapshots::delete::{self, Watch};
use snapshots::merge::{self, Merge, Progress, Step};
use snapshots::place::Place;
use snapshots::snapshot::{self, Live, NewSnapshot};

use super::fixture::words_of;
use super::front::{Call, FrontStore, Kind};
use super::history::{Asked, History, payload};
use super::promise::{Depth, Promise};
use super::scene::{Host, Op, Scene};
use super::sweep::Tally;
use super::{CLUSTER, CLUSTER_SECTORS, Rng, SECTOR};

/// What clients do while an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clients {
    /// Of what they write where.
    pub seed: u64,
    /// Before every how many changes and syncs of the operation one of them writes; 0: never.
    pub write_every: u64,
    /// The same for a flush, which another thread waits for.
    pub flush_every: u64,
}

impl Clients {
    /// Nobody: as offline.
    pub const NONE: Clients = Clients {
        seed: 0,
        write_every: 0,
        flush_every: 0,
    };
}

/// Shared by the operation and its watcher.
struct Shared {
    scene: Scene,
    record: RecordingStore,
    history: History,
    disks: Mutex<Vec<Arc<Disk>>>,
    contents: Mutex<BTreeMap<(usize, String), Vec<u64>>>,
    tops: Mutex<Vec<PathBuf>>,
    taking: Mutex<Option<&'static str>>,
    rng: Mutex<Rng>,
    clients: Clients,
    calls: AtomicU64,
    flushers: Mutex<Vec<JoinHandle<()>>>,
    /// A flush is asked for and not answered.
    flushing: Arc<AtomicBool>,
}

/// A program that has the disks of a scene open, and its clients.
pub struct Driver {
    shared: Arc<Shared>,
    host: Host,
    /// Marks of each operation: its number in the history.
    marks: Vec<u64>,
}

struct Going;

impl Watch for Going {
    fn go_on(&self, _: u64) -> bool {
        true
    }
    fn progress(&self, _: Progress) {}
}

/// Never pauses.
pub fn going() -> impl Watch {
    Going
}

impl Driver {
    /// Opens the disks of `scene` through `front`, whose log is that of `record`.
    pub fn new(
        scene: &Scene,
        front: Arc<dyn Store>,
        record: &RecordingStore,
        clients: Clients,
    ) -> Driver {
        let host = Host::on(front, scene.plan.shared).unwrap();
        let open = |k| Arc::new(host.place(k).unwrap().open().unwrap());
        // Nobody can write a disk that is a raw image.
        let opened = match scene.plan.is_bare_raw() {
            true => 0,
            false => scene.plan.disks,
        };
        let disks: Vec<Arc<Disk>> = (0..opened).map(open).collect();
        let tops = disks.iter().map(|d| d.top_file().unwrap()).collect();
        let shared = Shared {
            history: History::new(record, Arc::new(scene.initial.clone()), true),
            record: record.clone(),
            disks: Mutex::new(disks),
            contents: Mutex::new(scene.contents.clone()),
            tops: Mutex::new(tops),
            taking: Mutex::new(None),
            rng: Mutex::new(Rng(clients.seed)),
            clients,
            calls: AtomicU64::new(0),
            flushers: Mutex::default(),
            flushing: Arc::default(),
            scene: scene.clone(),
        };
        Driver {
            shared: Arc::new(shared),
            host,
            marks: Vec::new(),
        }
    }

    /// The history of its clients.
    pub fn history(&self) -> &History {
        &self.shared.history
    }

    /// Disk `k`.
    pub fn disk(&self, k: usize) -> Arc<Disk> {
        self.shared.disks.lock().unwrap()[k].clone()
    }

    /// Where disk `k` is.
    pub fn place(&self, k: usize) -> Place<'_> {
        self.host.place(k).unwrap()
    }

    /// Lets clients act before the calls that this thread makes through `front`.
    pub fn among(&self, front: &FrontStore) {
        let (shared, job) = (self.shared.clone(), std::thread::current().id());
        front.watch(move |call| {
            if std::thread::current().id() == job {
                shared.before(call);
            }
            Ok(())
        });
    }

    /// One client's write of two sectors, to a place that the seed draws.
    pub fn write(&self) -> Result<()> {
        self.shared.write()
    }

    /// One client's write to a sector of a disk.
    pub fn write_at(&self, k: usize, sector: u64) -> Result<()> {
        self.shared.write_at(k, sector, 2)
    }

    /// Another program's write to the raw image that a disk is; nobody syncs it.
    pub fn write_raw(&self, sector: u64) -> Result<()> {
        let place = self.place(0);
        let raw = place.store().open(
            &place.file_of(&place.descriptor()?.images[0])?,
            ploop::store::Access::Write,
        )?;
        let id = self
            .shared
            .history
            .begin(Asked::Write(sector..sector + 1), false);
        raw.write_at(&payload(id, sector..sector + 1), sector * SECTOR)?;
        self.shared.history.ok(id);
        Ok(())
    }

    /// A flush of all disks.
    pub fn flush(&self) -> Result<()> {
        self.shared.flush()
    }

    /// Does operation `n` of the scene.
    pub fn op(&mut self, n: usize) -> Result<()> {
        debug_assert_eq!(n, self.marks.len());
        let op = self.shared.scene.plan.ops[n].clone();
        let id = self.shared.history.begin(Asked::Write(0..0), false);
        self.marks.push(id);
        let done = self.perform(&op);
        // What the last call of it was followed by.
        self.shared.see_barrier();
        *self.shared.taking.lock().unwrap() = None;
        match &done {
            Ok(()) => self.shared.history.ok(id),
            Err(_) => self.shared.history.failed(id),
        }
        done
    }

    /// The next operation was done before this began.
    pub fn skip(&mut self) {
        let id = self.shared.history.begin(Asked::Write(0..0), false);
        self.marks.push(id);
        self.shared.history.ok(id);
    }

    /// The same again, after an error: as good as the first try.
    pub fn again(&mut self, n: usize) -> Result<()> {
        let op = self.shared.scene.plan.ops[n].clone();
        let done = self.perform(&op);
        self.shared.see_barrier();
        *self.shared.taking.lock().unwrap() = None;
        if done.is_ok() {
            let id = self.shared.history.begin(Asked::Write(0..0), false);
            self.shared.history.ok(id);
            self.marks[n] = id;
        }
        done
    }

    fn perform(&self, op: &Op) -> Result<()> {
        let disks = self.shared.disks.lock().unwrap().clone();
        let places: Vec<Place<'_>> = (0..disks.len()).map(|k| self.place(k)).collect();
        let all: Vec<Live<'_>> = places
            .iter()
            .zip(&disks)
            .map(|(place, disk)| Live { place, disk })
            .collect();
        match op {
            Op::Create(name) => {
                let new = NewSnapshot {
                    name: Some((*name).into()),
                    ..NewSnapshot::default()
                };
                if all.is_empty() {
                    let shown = self.host.reads(0, None)?;
                    let mut contents = self.shared.contents.lock().unwrap();
                    contents.insert((0, (*name).to_owned()), shown);
                    return snapshot::take_offline(&self.place(0), &new).map(drop);
                }
                *self.shared.taking.lock().unwrap() = Some(name);
                snapshot::take_group(&all, &new).map(drop)
            }
            Op::Delete(name) => {
                let (d, meta) = (places[0].descriptor()?, places[0].meta()?);
                let node = places[0].find(&d, &meta, name)?;
                delete::delete(all[0], node).map(drop)
            }
            Op::Run(fine) => run(all[0], *fine),
        }
    }

    /// Closes the disks in order.
    pub fn close(&self) -> Result<()> {
        self.join();
        for disk in self.shared.disks.lock().unwrap().iter() {
            disk.close()?;
        }
        Ok(())
    }

    /// Waits for the flushes that are under way.
    pub fn join(&self) {
        let threads = std::mem::take(&mut *self.shared.flushers.lock().unwrap());
        for thread in threads {
            thread.join().unwrap();
        }
    }

    /// The process ends; the rest of what was promised stays.
    pub fn die(&self) {
        self.join();
        self.shared.disks.lock().unwrap().clear();
        self.shared.history.death();
    }

    /// Opens the disks again through `front`, as a new process. Reads everything.
    pub fn reopen(&mut self, front: Arc<dyn Store>) -> Result<()> {
        self.host = Host::on(front, self.shared.scene.plan.shared)?;
        let mut disks = Vec::new();
        let mut words = Vec::new();
        for k in 0..self.shared.scene.plan.disks {
            let disk = self.host.place(k)?.open()?;
            words.extend(words_of(&disk).map_err(ploop::Error::corrupt)?);
            disks.push(Arc::new(disk));
        }
        let seen = self
            .shared
            .history
            .begin(Asked::Seen(Arc::new(words)), false);
        self.shared.history.ok(seen);
        *self.shared.tops.lock().unwrap() = disks.iter().map(|d| d.top_file().unwrap()).collect();
        *self.shared.disks.lock().unwrap() = disks;
        Ok(())
    }

    /// What the disks show now, for this process.
    pub fn words(&self) -> std::result::Result<Vec<u64>, String> {
        let disks = self.shared.disks.lock().unwrap().clone();
        let each: std::result::Result<Vec<_>, _> = disks.iter().map(|d| words_of(d)).collect();
        Ok(each?.concat())
    }

    /// What is promised at `point` of the log.
    pub fn promise(&self, point: usize) -> Promise {
        let marks = self.shared.record.marks_before(point);
        let plan = &self.shared.scene.plan;
        let start: BTreeSet<(usize, String)> = self.shared.scene.contents.keys().cloned().collect();
        let (mut must, mut may) = (start.clone(), start);
        for (id, op) in self.marks.iter().zip(&plan.ops) {
            // As the history marks them: begun, and answered.
            let (begun, answered) = (marks.contains(&(id * 4)), marks.contains(&(id * 4 + 1)));
            match op {
                Op::Create(name) if begun => {
                    for k in 0..plan.disks {
                        may.insert((k, (*name).to_owned()));
                        if answered {
                            must.insert((k, (*name).to_owned()));
                        }
                    }
                }
                Op::Delete(name) if begun => {
                    must.remove(&(0, (*name).to_owned()));
                    if answered {
                        may.remove(&(0, (*name).to_owned()));
                    }
                }
                _ => {}
            }
        }
        Promise {
            disks: plan.disks,
            shared: plan.shared,
            sectors: self.shared.scene.sectors,
            view: self.shared.history.view(point),
            must,
            may,
            contents: self.shared.contents.lock().unwrap().clone(),
            synced: true,
        }
    }

    /// Judges all states of the run at the points from `first` on; every `work_every`th also by
    /// working with it.
    pub fn check(
        &self,
        first: usize,
        budget: &Budget,
        work_every: u64,
    ) -> std::result::Result<Tally, String> {
        let record = &self.shared.record;
        let mut tally = Tally::default();
        for point in self.shared.history.points() {
            if point < first {
                continue;
            }
            let promise = self.promise(point);
            let states = record.states_at(point, budget);
            tally.points += 1;
            tally.exhaustive += u64::from(states.units() <= budget.exhaustive_units);
            for state in states {
                tally.states += 1;
                let depth = match tally.states.is_multiple_of(work_every) {
                    true => Depth::Work,
                    false => Depth::Look,
                };
                promise.judge(&state.build(), depth).map_err(|why| {
                    let history = self.shared.history.lines().join("\n  ");
                    let log = record.log();
                    let log: Vec<_> = (0..).zip(log).map(|(n, l)| format!("{n:4} {l}")).collect();
                    format!(
                        "{why}\non {} {:?}: {state}\n  {history}\nlog:\n  {}",
                        self.shared.scene.plan.name,
                        self.shared.clients,
                        log.join("\n  ")
                    )
                })?;
            }
        }
        Ok(tally)
    }
}

/// Goes on with all that waits.
fn run(live: Live<'_>, fine: bool) -> Result<()> {
    if fine {
        in_small_steps(live)?;
    }
    delete::run(live, &Going).map(drop)
}

/// Merges a cluster at a time, and pauses once after the first.
fn in_small_steps(live: Live<'_>) -> Result<()> {
    let mut paused = false;
    loop {
        let d = live.place.descriptor()?;
        let waiting = merge::waiting(live.place, &d)?;
        let Some(&node) = waiting.iter().find(|g| d.children(**g).len() == 1) else {
            return Ok(());
        };
        let mut merge = Merge::begin(live.place, live.disk, node)?;
        while merge.step(CLUSTER)? == Step::More {
            if !paused {
                paused = true;
                merge.pause()?;
                merge = Merge::begin(live.place, live.disk, node)?;
            }
        }
    }
}

impl Shared {
    /// Before a call of the operation.
    fn before(self: &Arc<Shared>, call: &Call<'_>) {
        self.see_barrier();
        // While the file grows, who wants another cluster of it waits: this very thread would.
        if call.kind == Kind::Look || call.what == "set length" {
            return;
        }
        let n = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let due = |every: u64| every > 0 && n.is_multiple_of(every);
        if due(self.clients.write_every) {
            self.write_beside();
        }
        if due(self.clients.flush_every) && !self.flushing.swap(true, Ordering::SeqCst) {
            let (shared, flushing) = (self.clone(), self.flushing.clone());
            let (asked, asking) = std::sync::mpsc::channel();
            let thread = std::thread::spawn(move || {
                let id = shared.history.begin(Asked::Flush, false);
                asked.send(()).unwrap();
                let disks = shared.disks.lock().unwrap().clone();
                let done = disks.iter().try_for_each(|d| d.flush());
                match done {
                    Ok(()) => shared.history.ok(id),
                    Err(_) => shared.history.failed(id),
                }
                flushing.store(false, Ordering::SeqCst);
            });
            asking.recv().unwrap();
            self.flushers.lock().unwrap().push(thread);
        }
    }

    /// Remembers what a snapshot must read, if its barrier was just passed.
    fn see_barrier(&self) {
        let disks = self.disks.lock().unwrap().clone();
        let mut tops = self.tops.lock().unwrap();
        for (k, disk) in disks.iter().enumerate() {
            let top = disk.top_file().unwrap();
            if top == tops[k] {
                continue;
            }
            tops[k] = top;
            let name = self.taking.lock().unwrap().expect("a snapshot is taken");
            let words = words_of(disk).unwrap_or_else(|e| panic!("at the barrier: {e}"));
            let mut contents = self.contents.lock().unwrap();
            contents.insert((k, name.to_owned()), words);
        }
    }

    fn write(&self) -> Result<()> {
        let (k, sector) = self.draw();
        self.write_at(k, sector, 2)
    }

    /// The same, in the middle of a call of the operation: a write to the cluster that it is at work
    /// on waits for it, on a thread of its own.
    fn write_beside(self: &Arc<Shared>) {
        let (k, sector) = self.draw();
        let disk = self.disks.lock().unwrap().get(k).cloned();
        let top = disk.and_then(|disk| disk.top().ok());
        if top.is_some_and(|top| top.busy.is_held(sector / CLUSTER_SECTORS)) {
            let shared = self.clone();
            let thread = std::thread::spawn(move || drop(shared.write_at(k, sector, 2)));
            self.flushers.lock().unwrap().push(thread);
        } else {
            drop(self.write_at(k, sector, 2));
        }
    }

    /// A disk and a sector of it.
    fn draw(&self) -> (usize, u64) {
        let mut rng = self.rng.lock().unwrap();
        let clusters = self.scene.sectors / CLUSTER_SECTORS;
        let at = rng.below(clusters) * CLUSTER_SECTORS + rng.below(8) * 7;
        (rng.below(self.scene.plan.disks as u64) as usize, at)
    }

    fn write_at(&self, k: usize, sector: u64, count: u64) -> Result<()> {
        let disk = self.disks.lock().unwrap().get(k).cloned();
        let Some(disk) = disk else { return Ok(()) };
        let first = k as u64 * self.scene.sectors + sector;
        let id = self
            .history
            .begin(Asked::Write(first..first + count), false);
        let done = disk.write(sector * SECTOR, &payload(id, first..first + count));
        match &done {
            Ok(()) => self.history.ok(id),
            Err(_) => self.history.failed(id),
        }
        done
    }

    fn flush(&self) -> Result<()> {
        let disks = self.disks.lock().unwrap().clone();
        let id = self.history.begin(Asked::Flush, false);
        let done = disks.iter().try_for_each(|d| d.flush());
        match &done {
            Ok(()) => self.history.ok(id),
            Err(_) => self.history.failed(id),
        }
        done
    }
}
