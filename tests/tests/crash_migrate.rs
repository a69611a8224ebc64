//! Power cuts of both hosts at one instant of a move, its whole length. Promise 35: at every instant one
//! side at most can open the container for writing, and with both up again exactly one has it; what was
//! flushed is there.
//!
//! Both stores are recorded, and a clock that ticks with every message marks both: a point of one and a
//! point of the other are one instant where their ticks meet. Whatever both power cuts left is started as
//! `ploopd` starts it, and the move is ended as a service ends it. What is done then is recorded for some
//! of them, and cut again, at every instant. `PLOOP_CRASH_SEEDS=N` draws that many random states of each
//! point.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::ops::RangeInclusive;
use std::os::unix::net::UnixStream;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use nbd_server::export::Disks;
use nbd_server::export::disks::OpenDisk;
use nbd_server::migrate::settle::Settled;
use nbd_server::migrate::source::{Deadline, Failed, Options, Progress, Source, Watch};
use nbd_server::migrate::{Destination, bytes};
use nbd_server::{Config, Connections, Server};
use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::open::Opener;
use ploop::format::ploop::Version;
use ploop::owner::{self, Record, State};
use ploop::store::Store;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::{Rng, env};
use ploop_tests::stream::{DIR, container, host, on, snapshot, write};
use snapshots::Root;
use snapshots::moving;
use snapshots::owner::{Next, verdict};
use snapshots::place::Place;
use snapshots::snapshot::{Live, NewSnapshot};

/// The container, and what it is called at the destination.
const THERE: &str = "there";
const NEW: &str = "new";
const CLUSTER: u64 = 32 << 10;
const SIZE: u64 = 6 * CLUSTER;

/// Where the parts of the story write: before it; flushed during it; not flushed; at the destination.
const BEFORE: u64 = 4096;
const FLUSHED: u64 = CLUSTER + 8192;
const LOOSE: u64 = 3 * CLUSTER;
const AFTER: u64 = 5 * CLUSTER + 512;
const BLOCK: usize = 4096;
/// One in so many cuts is followed by a second one.
const RARE: u64 = 19;

/// Ticks with each message, in both logs.
struct Clock {
    hosts: [RecordingStore; 2],
    now: Mutex<u64>,
}

impl Clock {
    fn of(hosts: [RecordingStore; 2]) -> Arc<Clock> {
        Arc::new(Clock {
            hosts,
            now: Mutex::new(0),
        })
    }

    fn tick(&self) -> u64 {
        let mut now = self.now.lock().unwrap();
        *now += 1;
        self.hosts.iter().for_each(|h| h.mark(*now));
        *now
    }
}

/// One end of the link.
struct Ticking(UnixStream, Arc<Clock>);

impl Read for Ticking {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.0.read(buf)?;
        self.1.tick();
        Ok(n)
    }
}

impl Write for Ticking {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.1.tick();
        self.0.write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A service of a host, as it starts.
struct Service {
    disks: Arc<Disks>,
    connections: Connections,
    to: Arc<Destination>,
    _server: Server,
}

impl Service {
    fn start(store: Arc<dyn Store>) -> Service {
        let (opener, _) = Opener::on(store).arriving();
        let root = Root::on(opener, Path::new(DIR), true, false).unwrap();
        let disks = Arc::new(Disks::new(root, false));
        let server = Server::new(disks.clone(), Config::default());
        moving::clear(disks.root().unwrap()).unwrap();
        let to = Arc::new(Destination::new(disks.clone(), server.connections()));
        to.resume().unwrap();
        Service {
            disks,
            connections: server.connections(),
            to,
            _server: server,
        }
    }

    fn stop(self) {
        self.to.end();
        self.disks.wait_all_closed().unwrap();
    }
}

/// What is done while it moves.
struct During<'a> {
    root: &'a Root,
    disk: Weak<OpenDisk>,
    clock: &'a Clock,
    /// Somebody makes a snapshot who did not know of the move.
    snapshot: bool,
    flushed: Mutex<u64>,
}

impl Watch for During<'_> {
    fn cancelled(&self) -> bool {
        false
    }

    fn pace(&self, _: u64) {}

    fn progress(&self, _: Progress) {}

    fn freeze(&self, _: &mut dyn FnMut() -> ploop::Result<()>) -> ploop::Result<()> {
        let disk = self.disk.upgrade().unwrap();
        disk.write(FLUSHED, &[2; BLOCK])?;
        disk.flush()?;
        if self.snapshot {
            let place = Place::container(self.root, THERE)?;
            let live = Live {
                place: &place,
                disk: disk.disk(),
            };
            snapshots::snapshot::take(live, &NewSnapshot::default())?;
        }
        *self.flushed.lock().unwrap() = self.clock.tick();
        disk.write(LOOSE, &[3; BLOCK])
    }

    fn fed(&self) {}
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct How {
    later: bool,
    keep: bool,
}

/// Over a link to its end.
fn moves(from: &Service, to: &Service, how: How, clock: &Arc<Clock>) -> Result<u64, Failed> {
    moves_with(from, to, how, clock, false)
}

fn moves_with(
    from: &Service,
    to: &Service,
    how: How,
    clock: &Arc<Clock>,
    snapshot: bool,
) -> Result<u64, Failed> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = Options {
        name: NEW.into(),
        downtime: Duration::from_secs(5),
        holder: None,
        keep: how.keep,
        later: how.later,
        brake: true,
    };
    let disk = from.disks.live(THERE).unwrap();
    let during = During {
        root: from.disks.root().unwrap(),
        disk: Arc::downgrade(&disk),
        clock,
        snapshot,
        flushed: Mutex::new(u64::MAX),
    };
    // It is not kept open for clients.
    let _leaves = to.disks.leaving().enter(NEW).unwrap();
    std::thread::scope(|scope| {
        let theirs = Ticking(theirs, clock.clone());
        scope.spawn(|| bytes::attend(&to.to, theirs));
        let source = Source {
            disks: &from.disks,
            connections: &from.connections,
            place: from.disks.place(THERE).unwrap(),
            disk,
            options: &options,
            watch: &during,
            peer: format!("{NEW} unix:/other"),
            deadline: Arc::new(Deadline::default()),
        };
        bytes::leave(source, Ticking(ours, clock.clone())).map(drop)
    })?;
    let flushed = *during.flushed.lock().unwrap();
    Ok(flushed)
}

/// The story, recorded.
struct Story {
    how: How,
    /// The source's host, and the destination's.
    hosts: [RecordingStore; 2],
    /// From which tick on what was written to [`FLUSHED`] and [`AFTER`] has to be there.
    flushed: u64,
    after: u64,
}

/// `lost`: a host, and the sync that it does not do.
fn story(how: How, lost: Option<(usize, u64)>) -> Story {
    let (source, root) = host();
    container(&root, THERE, Version::V2, 64, SIZE);
    write(&root, THERE, BEFORE, &[1; BLOCK]);
    snapshot(&root, THERE, "s");
    write(&root, THERE, 2 * CLUSTER, &[9; BLOCK]);
    drop(root);
    let hosts = [source, host().0].map(|start| RecordingStore::on(&start));
    if let Some((host, sync)) = lost {
        hosts[host].drop_sync(sync);
    }
    let clock = Clock::of(hosts.clone());
    let [from, to] = hosts.clone().map(|h| Service::start(h.store()));
    let flushed = moves(&from, &to, how, &clock).unwrap();
    let disk = to.disks.live(NEW).unwrap();
    disk.write(AFTER, &[4; BLOCK]).unwrap();
    disk.flush().unwrap();
    let after = clock.tick();
    drop(disk);
    from.stop();
    to.stop();
    Story {
        how,
        hosts,
        flushed,
        after,
    }
}

/// A point of one log: in which ticks it was the present, and what a power cut may leave.
struct Point {
    ticks: RangeInclusive<u64>,
    states: Vec<(String, MemoryStore)>,
}

fn points(host: &RecordingStore, seeds: u64) -> Vec<Point> {
    let mut before = 0;
    let mut all = Vec::new();
    for point in host.crash_points() {
        let now = host.marks_before(point).last().copied().unwrap_or(0);
        let units = host.states_at(point, &Budget::default()).units();
        let every: Vec<_> = (0..units).collect();
        let mut kept = vec![Vec::new(), every.clone()];
        let mut rng = Rng(point as u64);
        for _ in 0..seeds {
            kept.push(
                every
                    .iter()
                    .copied()
                    .filter(|_| rng.below(2) == 0)
                    .collect(),
            );
        }
        kept.sort();
        kept.dedup();
        let states = kept.iter().map(|kept| {
            let state = host.state(point, kept);
            (state.to_string(), state.build())
        });
        all.push(Point {
            ticks: before..=now,
            states: states.collect(),
        });
        before = now;
    }
    all
}

fn record(store: &MemoryStore, name: &str) -> Option<Record> {
    let root = on(Arc::new(store.clone()));
    owner::read(root.store(), &root.container(name)).unwrap()
}

fn is_there(store: &MemoryStore, name: &str) -> bool {
    let dir = Path::new(DIR).join("containers").join(name);
    store.kind(&dir).unwrap().is_some()
}

/// Whether a program would open it for writing now, but for data that is still to come.
fn owns(store: &MemoryStore, name: &str) -> bool {
    is_there(store, name) && record(store, name).is_none_or(|r| r.state.owns())
}

/// What it shows where the story writes; `None` where it cannot be opened.
fn shows(store: &MemoryStore, name: &str) -> Result<[Vec<u8>; 4], String> {
    let root = on(Arc::new(store.snapshot()));
    let text = |e: ploop::Error| format!("{name}: {e}");
    let place = Place::container(&root, name).map_err(text)?;
    let disk = place.open().map_err(text)?;
    let mut all = [BEFORE, FLUSHED, LOOSE, AFTER].map(|_| vec![0; BLOCK]);
    for (at, bytes) in [BEFORE, FLUSHED, LOOSE, AFTER].into_iter().zip(&mut all) {
        disk.read(at, bytes).map_err(text)?;
    }
    disk.close().map_err(text)?;
    Ok(all)
}

/// Ends the move that the record of a source is of.
fn settle(from: &Service, to: &Service, clock: &Arc<Clock>) -> Result<Settled, String> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let theirs = Ticking(theirs, clock.clone());
        scope.spawn(|| bytes::attend(&to.to, theirs));
        let of = (from.disks.as_ref(), &from.connections);
        let settled = bytes::settle(of, THERE, Ticking(ours, clock.clone()));
        settled.map_err(|e| format!("it does not end: {e}"))
    })
}

/// Both hosts start again, and end what was cut; the services then, which are to be stopped.
fn start(hosts: &[Arc<dyn Store>; 2], clock: &Arc<Clock>) -> Result<[Service; 2], String> {
    let [from, to] = hosts.clone().map(Service::start);
    let dir = Path::new(DIR).join("containers").join(THERE);
    let record = owner::read(hosts[0].as_ref(), &dir).unwrap();
    if record.is_some_and(|r| verdict(r.state, r.epoch).is_some())
        && settle(&from, &to, clock)? == Settled::InDoubt
    {
        return Err("in doubt with both up".into());
    }
    Ok([from, to])
}

impl Story {
    /// Judges what it shows, as of this tick.
    fn judge(&self, tick: u64, store: &MemoryStore, name: &str) -> Result<(), String> {
        let [before, flushed, loose, after] = shows(store, name)?;
        let all = |bytes: &[u8], value: u8| bytes.iter().all(|b| *b == value);
        let right = |what: &str, bytes: &[u8], value: u8, must: bool| match all(bytes, value)
            || (!must && all(bytes, 0))
        {
            true => Ok(()),
            false => Err(format!("{name}: what was written {what} is {:?}", bytes[0])),
        };
        right("before", &before, 1, true)?;
        let moved = name == NEW;
        right("and flushed", &flushed, 2, moved || tick >= self.flushed)?;
        // What was not flushed may be lost where it was written, and nowhere else.
        if moved {
            right("last", &loose, 3, true)?;
        }
        right("at the destination", &after, 4, moved && tick >= self.after)
    }

    /// Both hosts start again.
    fn starts(&self, tick: u64, [a, b]: [&MemoryStore; 2], again: bool) -> Result<(), String> {
        let cut = [(a, THERE), (b, NEW)];
        if cut.iter().all(|(store, name)| owns(store, name)) {
            return Err("two owners".into());
        }
        let [a, b] = [a, b].map(MemoryStore::snapshot);
        let clock = Clock::of([(); 2].map(|()| RecordingStore::new()));
        let hosts = [&a, &b].map(|s| Arc::new(s.clone()) as Arc<dyn Store>);
        let [from, to] = start(&hosts, &clock)?;
        let moves_again = again && owns(&a, THERE);
        if moves_again {
            moves(&from, &to, self.how, &clock).map_err(|e| format!("moved again: {e:?}"))?;
        }
        from.stop();
        to.stop();
        let kept = [State::Arriving, State::Ready];
        if is_there(&b, NEW) && record(&b, NEW).is_some_and(|r| kept.contains(&r.state)) {
            return Err("what nobody will end is left at the destination".into());
        }
        for store in [&a, &b] {
            let tmp = store.list(&Path::new(DIR).join("tmp")).unwrap();
            if !tmp.is_empty() {
                return Err(format!("{tmp:?} is left"));
            }
        }
        match [owns(&a, THERE), owns(&b, NEW)] {
            [true, false] => self.judge(tick, &a, THERE),
            [false, true] => {
                if is_there(&a, THERE) != self.how.keep {
                    return Err("what the source has of it is not as was asked".into());
                }
                // What was moved again is as it was at the source then.
                self.judge(if moves_again { 0 } else { tick }, &b, NEW)
            }
            owners => Err(format!("owners: {owners:?}")),
        }
    }
}

/// The states in which the source has it, and all; those of the cuts behind a first one.
#[derive(Clone, Copy, Debug, Default)]
struct Swept {
    here: u64,
    states: u64,
    again: u64,
}

/// Looks at a pair of states, as of a tick.
type See<'a> = dyn FnMut(u64, [&MemoryStore; 2]) -> Result<(), String> + 'a;

/// Cuts the hosts at every instant, and looks at each pair of states.
fn cut(hosts: &[RecordingStore; 2], seeds: u64, see: &mut See<'_>) -> Result<(), String> {
    let [a, b] = hosts.each_ref().map(|h| points(h, seeds));
    for p in &a {
        let from = b.partition_point(|q| q.ticks.end() < p.ticks.start());
        let meets = |q: &&Point| q.ticks.start() <= p.ticks.end();
        for q in b[from..].iter().take_while(meets) {
            let tick = *p.ticks.start().max(q.ticks.start());
            for (left, x) in &p.states {
                for (right, y) in &q.states {
                    see(tick, [x, y]).map_err(|e| {
                        format!("tick {tick}: {e}\n source: {left}\n destination: {right}")
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// Cuts the story at every instant; and what is done behind each `rare`th cut, too.
fn sweep(story: &Story, seeds: u64, rare: u64) -> Result<Swept, String> {
    let mut swept = Swept::default();
    cut(&story.hosts, seeds, &mut |tick, cut_once| {
        swept.states += 1;
        swept.here += u64::from(owns(cut_once[0], THERE));
        story.starts(tick, cut_once, swept.states % 7 == 0)?;
        if swept.states % rare != 0 {
            return Ok(());
        }
        let hosts = cut_once.map(RecordingStore::on);
        let clock = Clock::of(hosts.clone());
        let services = start(&hosts.each_ref().map(RecordingStore::store), &clock)?;
        services.into_iter().for_each(Service::stop);
        // As of the first cut: nothing was written since.
        cut(&hosts, 1, &mut |_, cut_twice| {
            swept.again += 1;
            story.starts(tick, cut_twice, false)
        })
    })
    .map_err(|e| format!("{:?}: {e}", story.how))?;
    Ok(swept)
}

fn check(how: How) {
    let swept = sweep(&story(how, None), env("PLOOP_CRASH_SEEDS", 20), RARE).unwrap();
    println!("{how:?}: {swept:?}");
    assert!((1..swept.states).contains(&swept.here));
    assert!(swept.again > 0);
}

#[test]
fn a_move_is_cut_on_both_sides() {
    for keep in [false, true] {
        check(How { later: false, keep });
    }
}

#[test]
fn a_move_whose_data_follows_is_cut_on_both_sides() {
    check(How {
        later: true,
        keep: false,
    });
}

/// Goal: what a snapshot holds that nobody sends is not lost. Method: one is made by somebody who looked
/// before the move began.
#[test]
fn a_snapshot_that_comes_between_ends_the_move() {
    for later in [false, true] {
        let (source, root) = host();
        container(&root, THERE, Version::V2, 64, SIZE);
        drop(root);
        let clock = Clock::of([(); 2].map(|()| RecordingStore::new()));
        let there = host().0;
        let [from, to] = [&source, &there].map(|s| Service::start(Arc::new(s.clone())));
        let how = How { later, keep: false };
        let moved = moves_with(&from, &to, how, &clock, true);
        let Err(Failed::Here(e)) = moved else {
            panic!("{moved:?}");
        };
        assert!(e.to_string().contains("a snapshot was made"), "{e}");
        from.stop();
        to.stop();
        assert!(owns(&source, THERE) && !is_there(&there, NEW));
        let [_, flushed, loose, _] = shows(&source, THERE).unwrap();
        assert_eq!((flushed[0], loose[0]), (2, 3));
    }
}

/// Goal: who waited for his turn while a disk was given away is not told that he has a snapshot of it.
#[test]
fn what_was_given_gets_no_snapshot() {
    let (store, root) = host();
    container(&root, THERE, Version::V2, 64, SIZE);
    let service = Service::start(Arc::new(store.clone()));
    let disk = service.disks.live(THERE).unwrap();
    let record = Record {
        state: State::Given,
        id: Guid::new_v4(),
        epoch: snapshots::owner::BEGUN,
        peer: "there unix:/other".into(),
    };
    owner::Owner::write(root.store(), &root.container(THERE), record).unwrap();
    let place = service.disks.place(THERE).unwrap();
    let live = Live {
        place: &place,
        disk: disk.disk(),
    };
    let taken = snapshots::snapshot::take(live, &NewSnapshot::default());
    assert_eq!(taken.unwrap_err().kind(), ploop::Kind::InUse);
    let tracked = snapshots::tracker::start(live, "t", 1 << 16);
    assert_eq!(tracked.unwrap_err().kind(), ploop::Kind::InUse);
    drop((place, disk));
    service.stop();
}

/// Goal: who removes what is left of a move that was cut looks again when nobody can change it any more.
#[test]
fn what_was_taken_meanwhile_is_not_removed() {
    let (store, root) = host();
    container(&root, THERE, Version::V2, 64, SIZE);
    let record = Record {
        state: State::Taken,
        id: Guid::new_v4(),
        epoch: snapshots::owner::TAKEN,
        peer: "unix:/other".into(),
    };
    let id = record.id;
    owner::Owner::write(root.store(), &root.container(THERE), record).unwrap();
    for at in [State::Arriving, State::Ready] {
        let removed = moving::enact(&root, THERE, (id, at), Next::Remove);
        assert_eq!(removed.unwrap_err().kind(), ploop::Kind::NotFound);
    }
    let other = (Guid::new_v4(), State::Taken);
    moving::enact(&root, THERE, other, Next::Own).unwrap_err();
    assert!(is_there(&store, THERE) && owns(&store, THERE));
}

/// Goal: the sweep sees what is not durable. Method: the story on hosts of which one does not do one of
/// its syncs.
#[test]
fn a_sync_that_is_not_done_is_seen() {
    let how = How {
        later: false,
        keep: false,
    };
    let syncs = story(how, None).hosts.each_ref().map(RecordingStore::syncs);
    for (host, syncs) in syncs.into_iter().enumerate() {
        // A file that is not whole may be more than the sweep itself can read.
        let sees = |sync: &u64| {
            let swept = catch_unwind(|| sweep(&story(how, Some((host, *sync))), 1, RARE));
            !matches!(swept, Ok(Ok(_)))
        };
        let seen: Vec<_> = (0..syncs).filter(sees).collect();
        println!("host {host}: {seen:?} of {syncs} are seen");
        assert!(seen.len() > 5, "of host {host} {seen:?}");
    }
}
