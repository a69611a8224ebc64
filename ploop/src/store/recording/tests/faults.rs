//! Failing, lying and overlapping calls, and the protocol that must survive them.

use std::sync::Arc;

use super::*;
use crate::error::{Kind, Result};
use crate::store::recording::{Calls, Fault, Tear};

#[test]
fn a_sync_after_a_failed_one_saves_nothing_of_before() {
    let (rec, file) = with_file(2 * S);
    file.write_at(&[b'b'; S], 0).unwrap();
    rec.fail_sync(0, Fault::Eio);
    assert_eq!(file.sync().unwrap_err().kind(), Kind::Io);
    file.write_at(&[b'c'; S], SECTOR).unwrap();
    file.sync().unwrap();
    assert_eq!(of_f(&rec), ["a1 c1", "b1 c1"]);
    file.write_at(&[b'd'; S], 0).unwrap();
    file.sync().unwrap();
    assert_eq!(
        of_f(&rec),
        ["d1 c1"],
        "what is written anew is durable again"
    );

    rec.create(p("/g"), 0o600).unwrap();
    rec.fail_sync(3, Fault::Eio);
    assert!(rec.sync_dir(p("/")).is_err());
    rec.sync_dir(p("/")).unwrap();
    assert_eq!(outcomes(&rec, |store| text(store, "/g")), ["", "-"]);
}

#[test]
fn a_dropped_sync_does_nothing_and_the_next_one_does() {
    let (rec, file) = with_file(S);
    rec.drop_sync(0);
    file.write_at(&[b'b'; S], 0).unwrap();
    file.sync().unwrap();
    assert_eq!(of_f(&rec), ["a1", "b1"]);
    file.sync().unwrap();
    assert_eq!(of_f(&rec), ["b1"]);
    assert_eq!(rec.syncs(), 2);
    assert_eq!(rec.log()[1..], ["sync /f (dropped)", "sync /f"]);
}

#[test]
fn a_sync_covers_only_what_came_before_its_start() {
    let (rec, file) = with_file(2 * S);
    file.write_at(&[b'b'; S], 0).unwrap();
    let inside = Arc::clone(&file);
    rec.during_sync(move |n| {
        if n == 0 {
            inside.write_at(&[b'c'; S], SECTOR).unwrap();
        }
    });
    file.sync().unwrap();
    assert_eq!(of_f(&rec), ["b1 a1", "b1 c1"]);
    file.sync().unwrap();
    assert_eq!(of_f(&rec), ["b1 c1"]);
}

#[test]
fn a_sync_that_the_power_cut_overtakes_makes_nothing_durable() {
    let (rec, file) = with_file(S);
    file.write_at(&[b'b'; S], 0).unwrap();
    rec.fail_at(2, Fault::Crash);
    let inside = rec.clone();
    rec.during_sync(move |_| assert!(inside.create_dir(p("/d")).is_err()));
    assert!(file.sync().is_err());
    let look = |store: &MemoryStore| format!("{} {:?}", text(store, "/f"), store.kind(p("/d")));
    assert_eq!(
        outcomes(&rec, look).len(),
        4,
        "the data and the directory, each there or not"
    );
}

/// Replaces `/f` by `new` in the only right way, and marks the end.
fn replace(rec: &RecordingStore) -> Result<()> {
    let temp = rec.create(p("/f.new"), 0o600)?;
    temp.write_at(&[b'b'; 2 * S], 0)?;
    temp.sync()?;
    rec.rename(p("/f.new"), p("/f"))?;
    rec.sync_dir(p("/"))?;
    rec.mark(1);
    Ok(())
}

/// The states of all points that break the promise of a replace.
fn broken(rec: &RecordingStore) -> Vec<String> {
    let mut broken = Vec::new();
    for point in rec.crash_points() {
        let done = rec.marks_before(point).contains(&1);
        for state in rec.states_at(point, &Budget::default()) {
            let found = text(&state.build(), "/f");
            if found != "b2" && (done || found != "a2") {
                broken.push(found);
            }
        }
    }
    broken
}

#[test]
fn replacing_a_file_needs_each_of_its_syncs() {
    let (rec, _) = with_file(2 * S);
    replace(&rec).unwrap();
    assert_eq!(broken(&rec), [""; 0]);
    for (sync, damage) in [(0, "b1 01"), (1, "a2")] {
        let (rec, _) = with_file(2 * S);
        rec.drop_sync(sync);
        replace(&rec).unwrap();
        let broken = broken(&rec);
        assert!(
            broken.iter().any(|found| found == damage),
            "sync {sync}: {broken:?}"
        );
    }
}

#[test]
fn a_replace_that_fails_anywhere_breaks_nothing() {
    let calls = {
        let (rec, _) = with_file(2 * S);
        replace(&rec).unwrap();
        rec.calls()
    };
    assert_eq!(calls, 5);
    for fault in [Fault::Eio, Fault::Enospc, Fault::Crash] {
        for n in 0..calls {
            let (rec, _) = with_file(2 * S);
            rec.fail_at(n, fault);
            let kind = if fault == Fault::Enospc {
                Kind::NoSpace
            } else {
                Kind::Io
            };
            assert_eq!(replace(&rec).unwrap_err().kind(), kind);
            assert_eq!(broken(&rec), [""; 0], "{fault:?} at call {n}");
            assert_eq!(rec.create_dir(p("/later")).is_ok(), fault != Fault::Crash);
        }
    }
}

#[test]
fn a_failing_write_applies_a_prefix() {
    for (tear, left) in [
        (Tear::Nothing, "a4"),
        (Tear::Half, "b2 a2"),
        (Tear::Bytes(S), "b1 a3"),
    ] {
        let (rec, file) = with_file(4 * S);
        rec.tear(tear);
        rec.fail_from(1, Fault::Enospc);
        file.set_len(4 * SECTOR).unwrap();
        assert_eq!(
            file.write_at(&[b'b'; 4 * S], 0).unwrap_err().kind(),
            Kind::NoSpace
        );
        assert_eq!(text(&rec.snapshot(), "/f"), left);
        assert!(file.sync().is_err(), "from then on");
        rec.clear_faults();
        file.sync().unwrap();
        assert!(of_f(&rec).contains(&left.to_string()));
    }
}

#[test]
fn the_change_in_flight_at_a_crash_may_have_happened() {
    let (rec, file) = with_file(S);
    rec.fail_at(0, Fault::Crash);
    assert!(file.write_at(&[b'b'; S], 0).is_err());
    assert!(
        file.read_at(&mut [0], 0).is_err(),
        "after the power cut nothing answers"
    );
    assert!(rec.kind(p("/f")).is_err());
    assert!(file.sync().is_err() && rec.sync_dir(p("/")).is_err());
    assert_eq!(of_f(&rec), ["a1", "b1"]);
}

#[test]
fn reads_fail_only_when_all_calls_count() {
    let (rec, file) = with_file(S);
    rec.fail_from(0, Fault::Eio);
    assert!(file.read_at(&mut [0], 0).is_ok() && rec.calls() == 0);
    rec.count(Calls::All);
    assert!(file.read_at(&mut [0], 0).is_err() && file.len().is_err());
    assert!(rec.open(p("/f"), Access::Read).is_err() && rec.list(p("/")).is_err());
    assert_eq!(rec.calls(), 4);
}

#[test]
fn refused_calls_leave_no_trace() {
    let (rec, file) = with_file(S);
    assert_eq!(rec.create(p("/f"), 0o600).unwrap_err().kind(), Kind::Exists);
    assert_eq!(
        rec.rename(p("/x"), p("/f")).unwrap_err().kind(),
        Kind::NotFound
    );
    assert_eq!(
        rec.rename_new(p("/f"), p("/f")).unwrap_err().kind(),
        Kind::Exists
    );
    rec.rename(p("/f"), p("/f")).unwrap();
    file.punch(9 * SECTOR, SECTOR).unwrap();
    let read_only = rec.open(p("/f"), Access::Read).unwrap();
    assert!(read_only.write_at(b"x", 0).is_err() && read_only.set_len(0).is_err());
    assert_eq!(rec.log(), [""; 0]);
}

#[test]
fn what_a_thread_has_synced_survives_whatever_the_others_do() {
    let rec = RecordingStore::new();
    std::thread::scope(|scope| {
        for t in 0..4u64 {
            let rec = rec.clone();
            scope.spawn(move || {
                let file = rec.create(p(&format!("/{t}")), 0o600).unwrap();
                rec.sync_dir(p("/")).unwrap();
                for round in 1..=5u8 {
                    file.write_at(&[round; S], 0).unwrap();
                    file.sync().unwrap();
                    rec.mark(t << 8 | u64::from(round));
                }
            });
        }
    });
    let budget = Budget {
        seeded: 50,
        ..Budget::default()
    };
    for point in rec.crash_points() {
        for state in rec.states_at(point, &budget) {
            let store = state.build();
            for mark in rec.marks_before(point) {
                let file = store
                    .open(p(&format!("/{}", mark >> 8)), Access::Read)
                    .unwrap();
                let mut byte = [0];
                assert_eq!(file.read_at(&mut byte, 0).unwrap(), 1, "{state}");
                assert!(u64::from(byte[0]) >= mark & 255, "{state}");
            }
        }
    }
    assert_eq!(rec.states_at(usize::MAX, &budget).count(), 1);
}

#[test]
fn a_large_unsynced_write_stays_cheap() {
    let (rec, file) = with_file(1 << 20);
    file.write_at(&vec![b'b'; 1 << 20], 0).unwrap();
    let states = rec.states_at(usize::MAX, &Budget::default());
    assert_eq!(states.units(), 2048);
    assert!(states.take(3000).count() == 3000);
}
