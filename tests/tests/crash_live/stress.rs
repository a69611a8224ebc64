//! Writers that verify, readers, flushes and a thread that changes the tree, all at once.
//!
//! Each writer has clusters of its own and knows what they hold. At a barrier of the test's own (all
//! writers between two writes) what the disk shows is remembered and a snapshot is taken; so each
//! snapshot must equal it, and goes on doing so while others are deleted and merged. Every other
//! snapshot is taken while writers write: then each cluster is as it was before or after the write
//! that was under way.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use ploop::descriptor::{Descriptor, Guid};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{RealStore, Store};
use ploop_tests::crash::live::going;
use ploop_tests::crash::{CLUSTER, CLUSTER_SECTORS, Rng, env};
use snapshots::delete;
use snapshots::place::Place;
use snapshots::snapshot::{Live, NewSnapshot, take};

const WRITERS: u64 = 4;
const CLUSTERS: u64 = 64;

/// The number that a block holds all over: which write it was.
fn block(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(512)
}

/// The block of each cluster: the least and the greatest number in it. They are one, but where it is
/// being written.
fn blocks(disk: &Disk) -> Vec<(u64, u64)> {
    let read = |cluster: u64| {
        let mut bytes = vec![0; 4096];
        disk.read(cluster * CLUSTER + 4096, &mut bytes).unwrap();
        let (numbers, _) = bytes.as_chunks::<8>();
        let numbers = || numbers.iter().map(|n| u64::from_le_bytes(*n));
        (numbers().min().unwrap(), numbers().max().unwrap())
    };
    (0..CLUSTERS).map(read).collect()
}

/// The same where nobody writes.
fn whole_blocks(disk: &Disk) -> Vec<u64> {
    let whole = |(cluster, (low, high)): (usize, (u64, u64))| {
        assert_eq!(low, high, "the block of cluster {cluster} is torn");
        low
    };
    blocks(disk).into_iter().enumerate().map(whole).collect()
}

/// What a snapshot may hold in each cluster, in order of time: from the first to the last.
type Allowed = Vec<(u64, u64)>;

struct Bench {
    disk: Disk,
    /// Held for reading by each write; for writing when all must be still.
    still: RwLock<()>,
    /// The last write of each cluster that was begun, and that was answered.
    begun: Vec<AtomicU64>,
    answered: Vec<AtomicU64>,
    stop: AtomicBool,
    writes: AtomicU64,
}

impl Bench {
    fn writer(&self, n: u64, seed: u64) {
        let mut rng = Rng(seed + n);
        let mut count = 0;
        while !self.stop.load(Ordering::SeqCst) {
            let cluster = rng.below(CLUSTERS / WRITERS) * WRITERS + n;
            let _still = self.still.read().unwrap();
            count += 1;
            self.begun[cluster as usize].store(count, Ordering::SeqCst);
            let at = cluster * CLUSTER + 4096;
            self.disk.write(at, &block(count)).unwrap();
            let mut back = vec![0; 4096];
            self.disk.read(at, &mut back).unwrap();
            assert_eq!(back, block(count), "cluster {cluster} has lost its write");
            self.answered[cluster as usize].store(count, Ordering::SeqCst);
            if count % 50 == 0 {
                self.disk.flush().unwrap();
            }
        }
        self.writes.fetch_add(count, Ordering::SeqCst);
    }

    fn reader(&self) {
        while !self.stop.load(Ordering::SeqCst) {
            let low: Vec<u64> = self.numbers(&self.answered);
            let seen = blocks(&self.disk);
            let high = self.numbers(&self.begun);
            let allowed = low.into_iter().zip(high).collect();
            check(seen.iter().map(|s| s.0), &allowed, "a read");
            check(seen.iter().map(|s| s.1), &allowed, "a read");
        }
    }

    fn numbers(&self, of: &[AtomicU64]) -> Vec<u64> {
        of.iter().map(|n| n.load(Ordering::SeqCst)).collect()
    }

    fn take(&self, place: &Place<'_>, still: bool) -> (Guid, Allowed) {
        let _still = still.then(|| self.still.write().unwrap());
        let low = self.numbers(&self.answered);
        let live = Live {
            place,
            disk: &self.disk,
        };
        let taken = take(live, &NewSnapshot::default()).unwrap();
        let high = self.numbers(&self.begun);
        let allowed = low.into_iter().zip(high).collect();
        (Guid::parse(&taken.guid).unwrap(), allowed)
    }
}

fn check(seen: impl Iterator<Item = u64>, allowed: &Allowed, what: &str) {
    for (cluster, (value, (low, high))) in seen.zip(allowed).enumerate() {
        assert!(
            (*low..=*high).contains(&value),
            "{what}: cluster {cluster} holds write {value}, not {low} to {high}"
        );
    }
}

fn init(store: &dyn Store, dir: &Path) {
    store.create_dir(dir).unwrap();
    let sectors = CLUSTERS * CLUSTER_SECTORS;
    let header = Header::new(Version::V2, CLUSTER_SECTORS as u32, sectors).unwrap();
    drop(create(store, &dir.join("root.hds"), &header, 0o600).unwrap());
    let d = Descriptor::new_single(
        sectors,
        CLUSTER_SECTORS as u32,
        false,
        Guid::TOP,
        "root.hds",
    );
    let file = store.create(&dir.join(DESCRIPTOR), 0o600).unwrap();
    file.write_at(&d.unwrap().to_xml(), 0).unwrap();
}

fn stress(store: Arc<dyn Store>, dir: &Path) {
    init(store.as_ref(), dir);
    let seed = env("PLOOP_CRASH_SEED", 1);
    let opener = Opener::on(store);
    let source = Source {
        path: dir.join(DESCRIPTOR),
        descriptor: true,
        snapshot: None,
    };
    let place = Place::disk(&opener, &source, &[], false).unwrap();
    let numbers = || (0..CLUSTERS).map(|_| AtomicU64::new(0)).collect();
    let bench = Bench {
        disk: place.open().unwrap(),
        still: RwLock::default(),
        begun: numbers(),
        answered: numbers(),
        stop: AtomicBool::new(false),
        writes: AtomicU64::new(0),
    };
    let time = Duration::from_secs(env("PLOOP_STRESS_SECONDS", 8));
    let (mut taken, mut merged, mut most) = (0u32, 0u32, 0);
    let mut nodes: BTreeMap<String, (Guid, Allowed)> = BTreeMap::new();
    let look = |guid: Guid, allowed: &Allowed| {
        let node = opener.open(&place.source(Some(guid)), &place.open_options(false));
        let seen = whole_blocks(&node.unwrap());
        check(seen.into_iter(), allowed, "a snapshot");
    };
    std::thread::scope(|scope| {
        let bench = &bench;
        for n in 0..WRITERS {
            scope.spawn(move || bench.writer(n, seed));
        }
        scope.spawn(|| bench.reader());
        let stop = Stop(&bench.stop);
        let mut rng = Rng(seed ^ 0xABCD);
        let start = Instant::now();
        while start.elapsed() < time || taken <= 10 || merged <= 5 {
            let live = Live {
                place: &place,
                disk: &bench.disk,
            };
            if nodes.len() < 3 || nodes.len() < 8 && rng.below(2) == 0 {
                let (guid, allowed) = bench.take(&place, taken % 2 == 0);
                nodes.insert(guid.to_string(), (guid, allowed));
                taken += 1;
            } else {
                let n = rng.below(nodes.len() as u64) as usize;
                let name = nodes.keys().nth(n).unwrap().clone();
                let (guid, _) = nodes.remove(&name).unwrap();
                delete::delete(live, guid).unwrap();
                delete::run(live, &going()).unwrap();
                merged += 1;
            }
            most = most.max(nodes.len());
            let n = rng.below(nodes.len() as u64) as usize;
            let (guid, allowed) = nodes.values().nth(n).unwrap();
            look(*guid, allowed);
        }
        drop(stop);
    });
    for (guid, allowed) in nodes.values() {
        look(*guid, allowed);
    }
    let answered = bench.numbers(&bench.answered);
    assert_eq!(whole_blocks(&bench.disk), answered);
    bench.disk.close().unwrap();
    drop(bench.disk);
    let disk = place.open().unwrap();
    assert_eq!(whole_blocks(&disk), answered);
    println!(
        "{} writes, {taken} snapshots, {merged} merged, {most} at once",
        bench.writes.into_inner()
    );
}

/// Lets the threads end, also when the one that changes the tree fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Goal: no race among clients and operations. Method: as the module says, on memory.
#[test]
fn writers_readers_and_a_changing_tree_agree_on_memory() {
    stress(Arc::new(MemoryStore::new()), Path::new("/d"));
}

/// The same on files.
#[test]
fn writers_readers_and_a_changing_tree_agree_on_files() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    stress(RealStore::shared(), &dir.join("d"));
}
