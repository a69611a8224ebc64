//! The reserve of a store on a host whose blocks are counted.
//!
//! What a user would lose: a flush, a snapshot or a merge that fails because somebody else filled the
//! host; or the reserve itself, to a container that writes.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ploop::Kind;
use ploop::account::GRANULE;
use ploop::chain::Chain;
use ploop::descriptor::{Descriptor, Guid};
use ploop::device::{Device, ZeroMode};
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, Opener, Source};
use ploop::format::ploop::journal::Home;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{self as fmt, Header, PloopDelta, Version};
use ploop::host::Budget;
use ploop::store::memory::MemoryStore;
use ploop::store::reserved::{Reserved, STEP};
use ploop::store::{Access, Store};
use ploop_tests::crash::full::FullStore;
use snapshots::delete::Watch;
use snapshots::merge::Progress;
use snapshots::place::Place;
use snapshots::resize::{ResizeOptions, offline};

const DIR: &str = "/store";
const CLUSTER: u64 = 64 << 10;

fn host(free: u64) -> (FullStore, Arc<Reserved>) {
    let full = FullStore::new(&MemoryStore::new(), free / GRANULE);
    for dir in ["/store", "/store/tmp", "/store/.ploop", "/else"] {
        full.create_dir(Path::new(dir)).unwrap();
    }
    let store = Reserved::new(Arc::new(full.clone()), Path::new(DIR));
    (full, Arc::new(store))
}

#[test]
fn what_must_not_fail_is_helped_and_clients_imports_and_others_are_not() {
    let (full, store) = host(10 * STEP);
    let reserve = store.reserve();
    reserve.fill(4 * STEP, u64::MAX).unwrap();
    assert_eq!(
        (reserve.held().unwrap(), full.free()),
        (4 * STEP, 6 * STEP / GRANULE)
    );
    let create = |path: &str| store.create(Path::new(path), 0o600).unwrap();
    let file = create("/store/image");
    let clients = file.for_guests().unwrap();
    let outside = [create("/store/tmp/import"), create("/else/export")];
    file.write_at(&vec![1; 6 * STEP as usize], 0).unwrap();
    assert_eq!(full.free(), 0);
    for file in outside.iter().chain([&clients]) {
        let full = file.write_at(&[2; 5000], 10 * STEP).unwrap_err();
        assert!(full.is_host_full(), "{full}");
        assert!(file.reserve(20 * STEP, 5000).unwrap_err().is_host_full());
    }
    assert_eq!(reserve.used(), (0, 0));
    file.write_at(&[3; 5000], 10 * STEP).unwrap();
    assert_eq!(reserve.used(), (1, STEP));
    // What a step left over is used before the next.
    file.reserve(12 * STEP, STEP / 2).unwrap();
    assert_eq!(reserve.used(), (1, STEP));
    file.reserve(14 * STEP, 2 * STEP).unwrap();
    assert_eq!((reserve.used().0, reserve.held().unwrap()), (2, STEP));
    // In steps, as far as it goes; and then it is full for everybody.
    let all = file.write_at(&vec![4; 4 * STEP as usize], 20 * STEP);
    assert_eq!(all.unwrap_err().kind(), Kind::NoSpace);
    assert_eq!(reserve.held().unwrap(), 0);
    // It comes back as far as there is room, and goes when it is not wanted.
    full.add(3 * STEP / GRANULE);
    reserve.fill(4 * STEP, 2 * STEP).unwrap();
    assert_eq!(reserve.held().unwrap(), 2 * STEP);
    reserve.fill(4 * STEP, STEP).unwrap();
    assert_eq!((reserve.held().unwrap(), full.free()), (3 * STEP, 0));
    reserve.fill(STEP, 0).unwrap();
    assert_eq!(reserve.held().unwrap(), STEP);
    reserve.fill(0, 0).unwrap();
    assert!(store.kind(Path::new("/store/reserve")).unwrap().is_none());
}

/// A disk over a full template, drawing on `budget`.
fn disk(store: &Arc<dyn Store>, clusters: u64, budget: &Arc<Budget>) -> Disk {
    let header = Header::new(Version::V2, 128, clusters * 128).unwrap();
    for name in ["/store/base", "/store/top"] {
        fmt::create(store.as_ref(), Path::new(name), &header, 0o600).unwrap();
    }
    let open = |name, home, below| {
        let file = store.open(Path::new(name), Access::Write).unwrap();
        Disk::writable(below, Top::open_at(file, home).unwrap(), None).unwrap()
    };
    let base = open("/store/base", None, None);
    for k in 0..clusters {
        base.write(k * CLUSTER, &vec![9; CLUSTER as usize]).unwrap();
    }
    base.close().unwrap();
    let file = store.open(Path::new("/store/base"), Access::Read).unwrap();
    let chain = Chain::new(vec![Arc::new(PloopDelta::open(file).unwrap())]).unwrap();
    let home = Home::of(store, Path::new("/store/top"));
    let disk = open("/store/top", home, Some(Arc::new(chain)));
    disk.account().unwrap().draw_on(budget.clone());
    disk
}

/// Goal: promise 5, with a reserve: a container that writes until the host is full has every flush
/// answered and touches nothing of the reserve. Method: first writes, overwrites, zeros that keep their
/// room, with a flush after each, on a host with room for 0, 1, 2 … blocks.
#[test]
fn a_disk_on_a_full_host_flushes_and_takes_nothing_of_the_reserve() {
    let mut refused = 0;
    for blocks in 0..60 {
        let (full, store) = host(100 * STEP);
        let reserved: Arc<dyn Store> = store.clone();
        let budget = Arc::new(Budget::of(DIR));
        let disk = disk(&reserved, 40, &budget);
        store.reserve().fill(3 * STEP, u64::MAX).unwrap();
        // Others take the rest.
        let filler = full.create(Path::new("/else/filler"), 0o600).unwrap();
        let rest = full.free() - blocks;
        filler.reserve(0, rest * GRANULE).unwrap();
        let mut expect = vec![9; (40 * CLUSTER) as usize];
        for k in 0..40u64 {
            let at = k * CLUSTER + (k % 3) * 5000;
            let bytes = vec![k as u8; 3000];
            let before = store.reserve().used();
            let done = match k % 4 {
                3 => disk.zero(
                    at..at + 3000,
                    ZeroMode {
                        keep_space: true,
                        ..ZeroMode::default()
                    },
                ),
                _ => disk.write(at, &bytes),
            };
            match done {
                Ok(()) => {
                    let fill = if k % 4 == 3 { 0 } else { k as u8 };
                    expect[at as usize..at as usize + 3000].fill(fill);
                }
                Err(e) => {
                    assert!(e.is_host_full(), "{blocks} blocks: {e}");
                    refused += 1;
                }
            }
            assert_eq!(
                store.reserve().used(),
                before,
                "by a client, {blocks} blocks"
            );
            disk.flush()
                .unwrap_or_else(|e| panic!("{blocks} blocks: {e}"));
            let mut read = vec![0; expect.len()];
            disk.read(0, &mut read).unwrap();
            assert!(read == expect, "{blocks} blocks, after cluster {k}");
        }
        disk.close()
            .unwrap_or_else(|e| panic!("{blocks} blocks: {e}"));
        // Nothing is said to be on its way to the host for ever.
        assert_eq!(budget.landed(), budget.taken());
    }
    assert!(refused > 100, "{refused}");
}

/// Somebody fills the host as soon as something is copied.
struct Fills<'a>(&'a FullStore, AtomicBool);

impl Fills<'_> {
    fn all_but(&self, blocks: u64) {
        let filler = Path::new("/else/filler");
        let filler = match self.0.kind(filler).unwrap() {
            None => self.0.create(filler, 0o600).unwrap(),
            Some(_) => self.0.open(filler, Access::Write).unwrap(),
        };
        let (at, len) = (filler.len().unwrap(), self.0.free() - blocks);
        filler.reserve(at, len * GRANULE).unwrap();
        filler.set_len(at + len * GRANULE).unwrap();
    }
}

impl Watch for Fills<'_> {
    fn go_on(&self, _: u64) -> bool {
        if !self.1.swap(true, Ordering::Relaxed) {
            self.all_but(2);
        }
        true
    }
    fn progress(&self, _: Progress) {}
}

/// Goal: the copy that a resize works on can be made again: on a full host it ends, and what flushes
/// and deletions live on is still there. Method: a host that is full before, and one that fills up.
#[test]
fn a_resize_that_the_host_has_no_room_for_takes_nothing_of_the_reserve() {
    let (full, store) = host(60 * STEP);
    let dir = Path::new("/store/ct");
    store.create_dir(dir).unwrap();
    let header = Header::new(Version::V2, 128, 128 * 128).unwrap();
    drop(fmt::create(store.as_ref(), &dir.join("root.hds"), &header, 0o600).unwrap());
    let d = Descriptor::new_single(128 * 128, 128, false, Guid::TOP, "root.hds").unwrap();
    let path = dir.join(DESCRIPTOR);
    let xml = store.create(&path, 0o600).unwrap();
    xml.write_at(&d.to_xml(), 0).unwrap();
    let opener = Opener::on(store.clone());
    let source = Source {
        path,
        descriptor: true,
        snapshot: None,
    };
    let place = Place::disk(&opener, &source, &[], false).unwrap();
    let disk = place.open().unwrap();
    disk.write(0, &vec![7; 20 * STEP as usize]).unwrap();
    disk.close().unwrap();
    drop(disk);
    let reserve = store.reserve();
    reserve.fill(4 * STEP, u64::MAX).unwrap();
    let options = ResizeOptions {
        size: 200 * CLUSTER,
        shrink: false,
        flatten: false,
        filesystem: true,
    };
    let fills = Fills(&full, AtomicBool::new(false));
    fills.all_but(20 * STEP / GRANULE);
    // Where it can be foreseen, nothing is copied, and nobody else sees a full host.
    let e = offline(&place, &options, &fills).unwrap_err();
    assert_eq!(e.kind(), Kind::NoSpace, "{e}");
    assert!(!fills.1.load(Ordering::Relaxed), "{e}");
    full.add(20 * STEP / GRANULE);
    let e = offline(&place, &options, &fills).unwrap_err();
    assert!(e.is_host_full(), "{e}");
    assert!(fills.1.load(Ordering::Relaxed));
    assert_eq!(
        (reserve.used(), reserve.held().unwrap()),
        ((0, 0), 4 * STEP)
    );
    assert_eq!(place.open().unwrap().size(), 128 * CLUSTER);
}
