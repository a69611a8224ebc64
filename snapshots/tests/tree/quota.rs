//! The tree of a disk that is under a limit: what a full one may still do, and what becomes of it when
//! the charge cannot be counted.

use std::path::Path;

use ploop::Kind;
use ploop::account::GRANULE;
use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::format::ploop::Version;
use ploop::format::ploop::held::granules_in;
use ploop::store::Access;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Calls, Fault, RecordingStore};
use snapshots::delete::{self, Deleted, Watch};
use snapshots::merge::Progress;
use snapshots::place::Place;
use snapshots::quota;
use snapshots::snapshot::{Live, NewSnapshot, take};

use crate::common::{CLUSTER, DIR, Host};

/// So many that the table has three blocks of 4 KiB.
const MANY: u64 = 2500;

struct Quiet;

impl Watch for Quiet {
    fn go_on(&self, _: u64) -> bool {
        true
    }
    fn progress(&self, _: Progress) {}
}

/// Granules that hold data in the disk's images: an independent count.
fn held(host: &Host) -> u64 {
    let d = host.place().descriptor().unwrap();
    let of = |file: &String| {
        let path = Path::new(DIR).join(file);
        let file = host.store().open(&path, Access::Read).unwrap();
        granules_in(file.as_ref(), 0..file.len().unwrap()).unwrap()
    };
    d.images.iter().map(|i| of(&i.file)).sum()
}

fn charged(disk: &Disk) -> u64 {
    disk.account().unwrap().used() / GRANULE
}

fn snap(place: &Place<'_>, disk: &Disk) -> Guid {
    let taken = take(Live { place, disk }, &NewSnapshot::default()).unwrap();
    Guid::parse(&taken.guid).unwrap()
}

/// Goal: a full container's way out, which is merging, is never refused. Method: what is merged needs
/// blocks of the top's table that it does not have, at a limit that is reached; then far below it.
#[test]
fn a_full_quota_refuses_no_merge_that_needs_a_block_of_the_table() {
    for limit in [None, Some(0)] {
        let host = Host::on(MemoryStore::shared());
        host.init_of(Version::V2, MANY);
        let place = host.place();
        let disk = place.open().unwrap();
        for cluster in [1, 1200, 2400] {
            disk.write(cluster * CLUSTER, &vec![7; CLUSTER as usize])
                .unwrap();
        }
        let node = snap(&place, &disk);
        disk.write(2 * CLUSTER, &[8; 4096]).unwrap();
        disk.flush().unwrap();
        quota::set_limit(&place, Some(&disk), Some(1 << 30)).unwrap();
        let account = disk.account().unwrap();
        let limit = limit.unwrap_or(account.used());
        quota::set_limit(&place, Some(&disk), Some(limit)).unwrap();
        let refused = disk.write(3 * CLUSTER, &[1; 4096]).unwrap_err();
        assert_eq!(refused.kind(), Kind::NoSpace);
        let live = Live {
            place: &place,
            disk: &disk,
        };
        assert_eq!(delete::delete(live, node).unwrap(), Deleted::Merging);
        assert_eq!(delete::run(live, &Quiet).unwrap().removed, 1);
        for (cluster, fill) in [(1, 7), (2, 8), (1200, 7), (2400, 7)] {
            let mut byte = [0];
            disk.read(cluster * CLUSTER, &mut byte).unwrap();
            assert_eq!(byte, [fill], "cluster {cluster}");
        }
        disk.flush().unwrap();
        assert_eq!(place.descriptor().unwrap().images.len(), 1);
        disk.close().unwrap();
        assert_eq!(charged(&disk), held(&host), "limit {limit}");
    }
}

/// Goal: a full container can go on writing over what it has while it moves, and gets no more by that.
#[test]
fn the_snapshot_of_a_move_is_not_held_against_who_writes() {
    let host = Host::on(MemoryStore::shared());
    host.init_of(Version::V2, MANY);
    let place = host.place();
    let disk = place.open().unwrap();
    let write =
        |cluster: u64, fill: u8| disk.write(cluster * CLUSTER, &vec![fill; CLUSTER as usize]);
    (1..4).for_each(|cluster| write(cluster, 7).unwrap());
    disk.flush().unwrap();
    quota::set_limit(&place, Some(&disk), Some(1 << 30)).unwrap();
    let account = disk.account().unwrap();
    let limit = account.used();
    quota::set_limit(&place, Some(&disk), Some(limit)).unwrap();
    let node = snap(&place, &disk);
    assert_eq!(write(1, 8).unwrap_err().kind(), Kind::NoSpace);
    let live = Live {
        place: &place,
        disk: &disk,
    };
    delete::delete(live, node).unwrap();
    assert_eq!(delete::run(live, &Quiet).unwrap().removed, 1);
    let passing = NewSnapshot {
        passing: true,
        ..NewSnapshot::default()
    };
    take(live, &passing).unwrap();
    (1..4).for_each(|cluster| write(cluster, 8).unwrap());
    assert_eq!(write(4, 8).unwrap_err().kind(), Kind::NoSpace);
    assert_eq!(account.limit(), Some(limit), "as it is shown");
    assert_eq!(delete::run(live, &Quiet).unwrap().removed, 1);
    assert_eq!(write(4, 8).unwrap_err().kind(), Kind::NoSpace);
    write(1, 9).unwrap();
    assert!(account.used() <= limit, "{} of {limit}", account.used());
    disk.close().unwrap();
    assert_eq!(charged(&disk), held(&host));
}

/// A disk on `record` with a limit, if it has one, and a leaf beside its top.
fn with_leaf(host: &Host, limited: bool) -> Guid {
    host.init_of(Version::V2, MANY);
    host.write(CLUSTER, CLUSTER, 1);
    host.snap("a");
    host.write(CLUSTER, CLUSTER, 2);
    host.snap("b");
    host.write(2 * CLUSTER, CLUSTER, 3);
    let kept = crate::switch::to(host, "a").unwrap().kept.unwrap();
    if limited {
        quota::set_limit(&host.place(), None, Some(1 << 30)).unwrap();
    }
    Guid::parse(&kept.guid).unwrap()
}

/// Goal: a deletion that is done is not called a failure because of the charge. Method: each call that
/// only a limited disk makes after it fails once.
#[test]
fn a_deletion_is_done_whatever_becomes_of_the_count() {
    let run = |limited: bool, fail: Option<u64>| {
        let record = RecordingStore::new();
        let host = Host::on(record.store());
        let node = with_leaf(&host, limited);
        let place = host.place();
        let disk = place.open().unwrap();
        quota::arm(&place, &disk).unwrap();
        let before = charged(&disk);
        record.count(Calls::All);
        if let Some(n) = fail {
            record.fail_at(n, Fault::Eio);
        }
        let live = Live {
            place: &place,
            disk: &disk,
        };
        let deleted = delete::delete(live, node);
        let calls = record.calls();
        record.clear_faults();
        assert_eq!(deleted.unwrap(), Deleted::Gone, "call {fail:?}");
        assert!(place.descriptor().unwrap().shot(node).is_none());
        if limited {
            let now = charged(&disk);
            assert!(now >= held(&host), "call {fail:?}");
            assert!(now == before || now == held(&host), "call {fail:?}");
            assert!(now < before || fail.is_some());
            // What failed is made good by the next count.
            quota::set_limit(&place, Some(&disk), Some(1 << 20)).unwrap();
            assert_eq!(charged(&disk), held(&host), "call {fail:?}");
        }
        calls
    };
    let (without, with) = (run(false, None), run(true, None));
    assert!(
        with > without + 2,
        "{with} calls, {without} without a limit"
    );
    for n in without..with {
        run(true, Some(n));
    }
}

/// Goal: a limit that is refused is not in force at the next start. Method: each call of setting it
/// fails once; as long as it has changed nothing, nothing is stored.
#[test]
fn a_limit_is_stored_only_after_the_charge_was_counted() {
    let mut before_any_change = 0;
    for n in 0.. {
        let record = RecordingStore::new();
        let host = Host::on(record.store());
        with_leaf(&host, false);
        let place = host.place();
        let disk = place.open().unwrap();
        let changes = record.log().len();
        record.count(Calls::All);
        record.fail_at(n, Fault::Eio);
        let set = quota::set_limit(&place, Some(&disk), Some(1 << 20));
        let reached = record.calls() > n;
        let changed = record.log().len() > changes;
        record.clear_faults();
        let stored = place.meta().unwrap().quota;
        let limit = disk.account().unwrap().limit();
        if set.is_err() {
            assert_eq!(limit, None, "call {n}");
            if !changed {
                assert_eq!(stored, None, "call {n}");
                before_any_change += 1;
            }
        } else {
            assert_eq!((stored, limit), (Some(1 << 20), Some(1 << 20)), "call {n}");
            assert!(charged(&disk) >= held(&host), "call {n}");
        }
        if !reached {
            break;
        }
        // The same again, as a user would.
        quota::set_limit(&place, Some(&disk), Some(1 << 20)).unwrap();
        assert_eq!(place.meta().unwrap().quota, Some(1 << 20));
        assert_eq!(charged(&disk), held(&host), "call {n}");
    }
    assert!(before_any_change > 5, "{before_any_change}");
}
