use std::path::Path;
use std::sync::Arc;

use crate::chain::Chain;
use crate::device::Device;
use crate::disk::Disk;
use crate::format::ploop::journal::Home;
use crate::format::ploop::top::Top;
use crate::format::ploop::{Header, PloopDelta, Version, create};
use crate::store::memory::MemoryStore;
use crate::store::recording::RecordingStore;
use crate::store::{Access, Store};

const CLUSTER: u64 = 32 * 1024;

fn image(store: &Arc<dyn Store>, path: &str) {
    let header = Header::new(Version::V2, 64, 64 * 16).unwrap();
    create(store.as_ref(), Path::new(path), &header, 0o600).unwrap();
}

/// An empty top over data everywhere.
fn over_data(store: Arc<dyn Store>) -> Disk {
    store.create_dir(Path::new("/.ploop")).unwrap();
    for path in ["/base", "/top"] {
        image(&store, path);
    }
    let open = |path: &str| store.open(Path::new(path), Access::Write).unwrap();
    let base = Disk::writable(None, Top::open(open("/base")).unwrap(), None).unwrap();
    base.write(0, &vec![0xBB; 16 * CLUSTER as usize]).unwrap();
    base.close().unwrap();
    let delta = Arc::new(PloopDelta::open(open("/base")).unwrap());
    let chain = Arc::new(Chain::new(vec![delta]).unwrap());
    let home = Home::of(&store, Path::new("/top"));
    let top = Top::open_at(open("/top"), home).unwrap();
    Disk::writable(Some(chain), top, None).unwrap()
}

/// Goal: nothing is left where the table is to be: it would be zeroed. Method: a part that a writer
/// begins while the gate is open, between the beginning and the keeping off.
#[test]
fn a_part_that_a_writer_began_meanwhile_is_moved_too() {
    let disk = over_data(Arc::new(MemoryStore::new()));
    let _arranging = disk.arrange();
    let mut moving = disk.begin_moving().unwrap();
    disk.write(5 * CLUSTER + 700, &[1; 5000]).unwrap();
    let end = moving.top().header().data_start + CLUSTER;
    moving.keep_off(end).unwrap();
    assert_eq!(moving.top().clusters_in(0..end).unwrap(), [5]);
    assert!(moving.shift(5, u64::MAX).unwrap());
    moving.vacate().unwrap();
    assert!(moving.top().lookup(5).unwrap() >= Some(end));
}

/// Goal: never another's bytes. Method: a write that was given up and could not be punched leaves its
/// bytes at the end of the file; that is cut while a journal keeps a tail, and the place used again.
#[test]
fn nothing_is_left_in_the_tail_behind_a_cut() {
    let disk = over_data(Arc::new(MemoryStore::new()));
    disk.write(700, &[1; 5000]).unwrap();
    disk.flush().unwrap();
    let top = disk.top().unwrap();
    let (at, _) = top.allocate(1).unwrap();
    top.file()
        .write_at(&vec![0xAA; CLUSTER as usize], at)
        .unwrap();
    top.give_back(at, 1);
    top.cut().unwrap();
    assert!(top.file().len().unwrap() > at, "no journal");
    assert_eq!(top.allocate(1).unwrap(), (at, 1));
    let mut got = vec![0xEE; CLUSTER as usize];
    top.file().read_at(&mut got, at).unwrap();
    assert!(got.iter().all(|&b| b == 0));
}

/// Goal: a reader that was told a place reads there what it was told. Method: a lease on a cluster
/// that is moved, held until its entry is durable and the old place may be emptied but for it.
#[test]
fn a_place_is_not_emptied_while_a_lease_names_it() {
    let store = RecordingStore::new();
    let disk = over_data(store.store());
    disk.write(5 * CLUSTER, &vec![7; CLUSTER as usize]).unwrap();
    let _arranging = disk.arrange();
    let mut moving = disk.begin_moving().unwrap();
    let mut segments = Vec::new();
    let range = 5 * CLUSTER..6 * CLUSTER;
    let lease = disk.map(range.clone(), &mut segments).unwrap();
    assert!(moving.shift(5, u64::MAX).unwrap());
    let (syncs, logged) = (store.syncs(), store.log().len());
    let punched = || store.log()[logged..].iter().any(|l| l.starts_with("punch"));
    std::thread::scope(|s| {
        let mover = s.spawn(move || moving.vacate().unwrap());
        while store.syncs() < syncs + 2 {
            std::thread::yield_now();
        }
        for _ in 0..200 {
            std::thread::yield_now();
        }
        assert!(!punched());
        let mut got = vec![0; CLUSTER as usize];
        lease.read(&segments[0], 0, &mut got).unwrap();
        assert!(got.iter().all(|&b| b == 7));
        drop(lease);
        mover.join().unwrap();
    });
    assert!(punched());
}
