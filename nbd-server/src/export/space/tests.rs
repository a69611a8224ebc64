//! A store in memory, on a host whose room the test sets.

use std::sync::atomic::AtomicU64;

use ploop::Result;
use ploop::store::memory::MemoryStore;
use ploop::store::{self, Access};

use super::*;

const MIB: u64 = 1 << 20;
const TOTAL: u64 = 1000 * MIB;

/// Says what the test says; its files are in memory, and what the reserve holds is taken off.
#[derive(Debug)]
struct Told {
    inner: MemoryStore,
    free: AtomicU64,
}

impl Store for Told {
    ploop::delegate! {
        open, create, rename, rename_new, hard_link, remove_file, create_dir, remove_dir, sync_dir,
        file_system, list, kind, resolve,
    }

    fn space(&self, path: &Path) -> Result<Option<store::Space>> {
        let reserve = match self.inner.open(&path.join("reserve"), Access::Read) {
            Ok(file) => file.host_bytes()?,
            Err(_) => 0,
        };
        Ok(Some(store::Space {
            total: TOTAL,
            available: self.free.load(Relaxed).saturating_sub(reserve),
        }))
    }
}

struct Rig {
    host: Arc<Told>,
    space: Arc<Space>,
    reserve: Arc<Reserve>,
}

fn rig(free: u64, options: &Options) -> Rig {
    let host = Arc::new(Told {
        inner: MemoryStore::new(),
        free: AtomicU64::new(free),
    });
    let dir = Path::new("/");
    let reserve = Arc::new(Reserve::of(host.clone(), dir));
    let looked_at = Host {
        dir: dir.into(),
        store: host.clone(),
        reserve: Some(reserve.clone()),
    };
    // No thread: the test is the clock.
    let space = Space::new(looked_at, options);
    space.tick();
    Rig {
        host,
        space,
        reserve,
    }
}

impl Rig {
    fn free(&self, bytes: u64) {
        self.host.free.store(bytes, Relaxed);
    }

    fn take(&self, bytes: u64) -> Result<()> {
        self.space.budget().take(bytes / GRANULE).map(drop)
    }
}

fn options() -> Options {
    Options {
        reserve: Some(Amount::Bytes(8 * MIB)),
        space_soft: Some(Amount::Bytes(100 * MIB)),
        space_hard: Some(Amount::Bytes(20 * MIB)),
        on_full: None,
    }
}

#[test]
fn nobody_gets_what_is_below_the_hard_mark_or_in_reserve() {
    let rig = rig(200 * MIB, &options());
    assert_eq!(rig.reserve.held().unwrap(), 8 * MIB);
    rig.space.tick();
    assert!(rig.take(172 * MIB + GRANULE).is_err());
    rig.take(172 * MIB).unwrap();
    // What a flush needed of it is the reserve's, not a container's.
    assert!(rig.reserve.give_up(3 * MIB));
    rig.free(31 * MIB);
    assert!(rig.take(3 * MIB + GRANULE).is_err());
    rig.take(3 * MIB).unwrap();
    let status = rig.space.status();
    assert_eq!(status.reserve_used, (1, 3 * MIB));
    assert_eq!((status.seen.reserve, status.seen.free), (5 * MIB, 23 * MIB));
}

#[test]
fn the_reserve_comes_back_when_nobody_needs_it_and_before_anybody_gets_more() {
    let rig = rig(200 * MIB, &options());
    rig.free(8 * MIB);
    assert!(rig.reserve.give_up(8 * MIB));
    // Somebody else has taken what was given up.
    rig.free(0);
    rig.space.tick();
    rig.space.tick();
    assert_eq!(rig.reserve.held().unwrap(), 0);
    rig.free(5 * MIB);
    rig.space.tick();
    assert_eq!(rig.reserve.held().unwrap(), 5 * MIB);
    assert!(rig.take(GRANULE).is_err());
    rig.free(60 * MIB);
    assert!(rig.reserve.give_up(MIB));
    rig.space.tick();
    assert_eq!(rig.reserve.held().unwrap(), 4 * MIB, "it was just needed");
    rig.space.tick();
    assert_eq!(rig.reserve.held().unwrap(), 8 * MIB);
    assert!(rig.take(32 * MIB + GRANULE).is_err());
    rig.take(32 * MIB).unwrap();
}

#[derive(Debug, Default)]
struct Woken(Mutex<Vec<u64>>);

impl super::Told for Woken {
    fn granted(&self, ticket: u64) {
        self.0.lock().unwrap().push(ticket);
    }
}

#[test]
fn who_waits_is_told_once_when_there_is_room_and_not_after_leaving() {
    let rig = rig(28 * MIB, &options());
    rig.space.tick();
    let woken = Arc::new(Woken::default());
    let who: Arc<dyn super::Told> = woken.clone();
    let told = || std::mem::take(&mut *woken.0.lock().unwrap());
    let first = rig.space.wait(&who, false);
    let second = rig.space.wait(&who, false);
    rig.space.tick();
    assert!(told().is_empty());
    rig.space.leave(|t| t == second);
    assert_eq!(rig.space.status().waiting, (1, 2));
    rig.free(40 * MIB);
    rig.space.tick();
    rig.space.tick();
    assert_eq!(told(), [first]);
    let again = rig.space.wait(&who, true);
    assert_ne!(again, first);
    assert_eq!(rig.space.status().waiting, (1, 2));
}

#[test]
fn each_mark_is_counted_when_it_is_crossed() {
    let rig = rig(500 * MIB, &options());
    let crossed = |free: u64| {
        rig.free(free * MIB);
        rig.space.tick();
        rig.space.tick();
        let status = rig.space.status();
        (status.level, status.crossed)
    };
    assert_eq!(crossed(500), (Level::Plenty, (0, 0)));
    assert_eq!(crossed(100), (Level::Low, (1, 0)));
    assert_eq!(crossed(109), (Level::Low, (1, 0)));
    assert_eq!(crossed(10), (Level::Full, (1, 1)));
    assert_eq!(crossed(300), (Level::Plenty, (1, 1)));
    assert_eq!(crossed(10), (Level::Full, (2, 2)));
    assert!(rig.take(GRANULE).is_err());
    assert_eq!(crossed(300), (Level::Plenty, (2, 2)));
    rig.take(GRANULE).unwrap();
}
