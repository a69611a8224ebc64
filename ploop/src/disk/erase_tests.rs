//! What an erase pays back, when something comes between its halves.

use std::path::Path;

use super::*;
use crate::account::{Account, GRANULE as UNIT};
use crate::device::Device;
use crate::format::ploop::held::granules_in;
use crate::format::ploop::{Header, Version, create};
use crate::store::recording::{Calls, Fault, RecordingStore};
use crate::store::{Access, Store};

const CLUSTER: u64 = 64 << 10;
const FILES: [&str; 2] = ["/first", "/second"];

fn top(store: &dyn Store, path: &str, account: &Arc<Account>) -> Top {
    let header = Header::new(Version::V2, 128, 128 * 8).unwrap();
    create(store, Path::new(path), &header, 0o600).unwrap();
    let top = Top::open(store.open(Path::new(path), Access::Write).unwrap()).unwrap();
    let top = top.charged_to(account.clone()).unwrap();
    top.count().unwrap();
    top
}

/// Granules that the files hold.
fn held(store: &dyn Store) -> u64 {
    let of = |path: &&str| {
        let file = store.open(Path::new(path), Access::Read).unwrap();
        granules_in(file.as_ref(), 0..file.len().unwrap()).unwrap()
    };
    FILES.iter().map(of).sum()
}

/// Goal: what a snapshot keeps stays charged. Method: a barrier between the two halves of a discard;
/// without it the account would be short of a cluster for as long as the disk is open.
#[test]
fn a_discard_that_a_barrier_comes_between_keeps_the_charge() {
    let store = RecordingStore::new();
    let account = Arc::new(Account::default());
    let disk = Disk::writable(None, top(&store, FILES[0], &account), None).unwrap();
    let new = Arc::new(top(&store, FILES[1], &account));
    new.before_change().unwrap();
    disk.write(0, &vec![7; 2 * CLUSTER as usize]).unwrap();
    disk.flush().unwrap();
    assert_eq!(account.used() / UNIT, held(&store));

    let released = disk.release(0..CLUSTER, How::Discard).unwrap();
    assert!(released.as_ref().is_some_and(|r| r.1 == CLUSTER / UNIT));
    let sealing = disk.barrier().push_top(new).unwrap();
    disk.erase_released(0..CLUSTER, How::Discard, released)
        .unwrap();
    sealing.seal().unwrap();
    sealing.committed();
    disk.flush().unwrap();

    let mut bytes = vec![1; 2 * CLUSTER as usize];
    disk.read(0, &mut bytes).unwrap();
    assert!(bytes[..CLUSTER as usize].iter().all(|&b| b == 0));
    assert!(bytes[CLUSTER as usize..].iter().all(|&b| b == 7));
    assert_eq!(account.used() / UNIT, held(&store));
    // Going back with the snapshot gives up exactly what is there.
    account.set_sealed(0);
    disk.close().unwrap();
    let file = store.open(Path::new(FILES[1]), Access::Read).unwrap();
    let rest = granules_in(file.as_ref(), 0..file.len().unwrap()).unwrap();
    assert_eq!(account.used() / UNIT, rest);
}

/// Goal: a discard that fails leaves the charge of what stays, and its place can be written to and
/// given up afterwards. Method: each call of the second half fails once.
#[test]
fn a_discard_that_fails_keeps_the_charge_of_what_stays() {
    for n in 0.. {
        let store = RecordingStore::new();
        let account = Arc::new(Account::default());
        let disk = Disk::writable(None, top(&store, FILES[0], &account), None).unwrap();
        drop(top(&store, FILES[1], &Arc::default()));
        let second = Path::new(FILES[1]);
        let empty = store.open(second, Access::Read).unwrap();
        let aside = granules_in(empty.as_ref(), 0..empty.len().unwrap()).unwrap();
        disk.write(0, &vec![7; 2 * CLUSTER as usize]).unwrap();
        disk.flush().unwrap();
        let released = disk.release(0..CLUSTER, How::Discard).unwrap();
        store.count(Calls::All);
        store.fail_at(n, Fault::Eio);
        let erased = disk.erase_released(0..CLUSTER, How::Discard, released);
        let reached = store.calls() > n;
        store.clear_faults();
        assert_eq!(erased.is_err(), reached, "call {n}");
        let there = held(&store) - aside;
        assert!(account.used() / UNIT >= there, "call {n}");
        if !reached {
            assert!(n > 0);
            return;
        }
        disk.write(0, &vec![8; CLUSTER as usize]).unwrap();
        disk.discard(0..CLUSTER).unwrap();
        disk.close().unwrap();
        assert_eq!(account.used() / UNIT, held(&store) - aside, "call {n}");
    }
}
