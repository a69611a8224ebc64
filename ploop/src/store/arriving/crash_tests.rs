use std::path::Path;
use std::sync::Arc;

use super::tests::{Origin, Random, noise};
use super::*;
use crate::format::ploop::delta::read_header;
use crate::format::ploop::{Header, Version, create};
use crate::store::memory::MemoryStore;
use crate::store::recording::{Budget, Fault, RecordingStore};

const IMAGE: &str = "/disk/image";
const CLUSTER: u64 = 32 << 10;
const LEN: u64 = CLUSTER * 3;

/// A complete image; the data area has no meaning.
fn image(store: &dyn Store) -> Vec<u8> {
    store.create_dir(Path::new("/disk")).unwrap();
    let header = Header::new(Version::V2, 64, 64 * 2).unwrap();
    create(store, Path::new(IMAGE), &header, 0o600).unwrap();
    let file = store.open(Path::new(IMAGE), Access::Write).unwrap();
    let data = noise(LEN - CLUSTER, &mut Random(1));
    file.write_at(&data, CLUSTER).unwrap();
    let mut bytes = vec![0; LEN as usize];
    read_exact(file.as_ref(), &mut bytes, 0).unwrap();
    bytes
}

/// The same, with holes that the record does not say yet.
fn holes(store: &dyn Store) -> Vec<Range<u64>> {
    let ranges = vec![
        CLUSTER..CLUSTER + 2 * GRANULE,
        CLUSTER + 4 * GRANULE..CLUSTER + 5 * GRANULE,
        LEN - GRANULE..LEN,
    ];
    let file = store.open(Path::new(IMAGE), Access::Write).unwrap();
    for range in &ranges {
        file.punch(range.start, range.end - range.start).unwrap();
    }
    ranges
}

fn origin(bytes: &[u8]) -> Arc<Origin> {
    Arc::new(Origin {
        again: true,
        ..Origin::of(bytes.to_vec())
    })
}

/// What is found after a crash: every byte reads as the source has it, then it is filled, and is whole
/// and closed. `gone`: the source may be.
fn judge(found: &MemoryStore, bytes: &[u8], gone: bool, what: &dyn std::fmt::Display) {
    let path = Path::new(IMAGE);
    let store = ArrivingStore::new(Arc::new(found.clone()));
    if Missing::is_there(found, path).unwrap() {
        let from = origin(bytes);
        from.fails.store(gone, Ordering::Relaxed);
        store.register(path, from).unwrap();
    }
    let mut all = vec![0; bytes.len()];
    let file = store.open(path, Access::Read).unwrap();
    read_exact(file.as_ref(), &mut all, 0).unwrap();
    assert!(all == bytes, "{what}");
    while store.fill_next(path, 1 << 20).unwrap() == Filled::More {}
    let file = found.open(path, Access::Read).unwrap();
    read_exact(file.as_ref(), &mut all, 0).unwrap();
    assert!(all == bytes, "{what}");
    assert!(!Missing::is_there(found, path).unwrap(), "{what}");
}

/// Goal: the record never says too little. Method: every legal state after each step of filling,
/// reading, saving and completing is opened again with a source, and read.
#[test]
fn the_record_says_too_much_and_never_too_little() {
    let memory = MemoryStore::new();
    let bytes = image(&memory);
    let ranges = holes(&memory);
    begin(&memory, Path::new(IMAGE), &ranges).unwrap();
    let recorded = RecordingStore::on(&memory);
    let store = ArrivingStore::new(recorded.store());
    let path = Path::new(IMAGE);
    store.register(path, origin(&bytes)).unwrap();
    store.fill_next(path, GRANULE).unwrap();
    let file = store.open(path, Access::Read).unwrap();
    file.read_at(&mut [0; 10], CLUSTER + 4 * GRANULE).unwrap();
    store.checkpoint(path).unwrap();
    store.fill_next(path, GRANULE).unwrap();
    store.checkpoint(path).unwrap();
    while store.fill_next(path, GRANULE).unwrap() == Filled::More {}
    recorded.mark(1);
    let mut seen = 0;
    for point in recorded.crash_points() {
        let done = !recorded.marks_before(point).is_empty();
        for state in recorded.states_at(point, &Budget::default()) {
            let found = state.build();
            if done {
                assert!(!Missing::is_there(&found, path).unwrap(), "{state}");
            }
            // Foreign programs take it for closed only when it is whole.
            let there = found.open(path, Access::Read).unwrap();
            let dirty = read_header(there.as_ref()).unwrap().0.dirty();
            let mut all = vec![0; bytes.len()];
            read_exact(there.as_ref(), &mut all, 0).unwrap();
            let whole = all == bytes;
            assert!(dirty || whole, "{state}");
            judge(&found, &bytes, whole && !dirty, &state);
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen}");
}

/// Goal: an image has a record before its holes could be taken for data. Method: every legal state of
/// its beginning: it has a record that says what is missing, or none.
#[test]
fn it_begins_or_does_not() {
    let memory = MemoryStore::new();
    let bytes = image(&memory);
    let ranges = holes(&memory);
    let recorded = RecordingStore::on(&memory);
    let path = Path::new(IMAGE);
    let at = recorded.store();
    begin(at.as_ref(), path, &ranges).unwrap();
    recorded.mark(1);
    // Again, over the one that is there.
    Missing::create(at.as_ref(), path, LEN, &ranges).unwrap();
    for point in recorded.crash_points() {
        let begun = !recorded.marks_before(point).is_empty();
        for state in recorded.states_at(point, &Budget::default()) {
            let found = state.build();
            let there = Missing::is_there(&found, path).unwrap();
            assert!(there || !begun, "{state}");
            if there {
                Missing::refuse(&found, path).unwrap_err();
            }
            let file = found.open(path, Access::Read).unwrap();
            let dirty = read_header(file.as_ref()).unwrap().0.dirty();
            assert!(there || !dirty, "{state}");
            assert!(dirty || !begun, "{state}");
            if there && !begun {
                judge(&found, &bytes, false, &state);
            }
        }
    }
}

/// Goal: a sync that failed loses nothing. Method: each sync fails in turn; it is filled all the same,
/// and after that every legal state is right.
#[test]
fn a_sync_that_failed_is_no_loss() {
    for n in 0..12 {
        let memory = MemoryStore::new();
        let bytes = image(&memory);
        let ranges = holes(&memory);
        begin(&memory, Path::new(IMAGE), &ranges).unwrap();
        let recorded = RecordingStore::on(&memory);
        let store = ArrivingStore::new(recorded.store());
        let path = Path::new(IMAGE);
        store.register(path, origin(&bytes)).unwrap();
        recorded.fail_sync(n, Fault::Eio);
        let mut filled = Ok(Filled::More);
        for _ in 0..20 {
            filled = store.fill_next(path, GRANULE);
            // Each may be the one whose sync fails.
            drop(store.checkpoint(path));
            if matches!(filled, Ok(Filled::Done)) {
                break;
            }
        }
        assert_eq!(filled.unwrap(), Filled::Done);
        for point in recorded.crash_points() {
            for state in recorded.states_at(point, &Budget::default()) {
                judge(&state.build(), &bytes, false, &state);
            }
        }
    }
}

#[test]
fn tables_cannot_be_missing() {
    let memory = MemoryStore::new();
    image(&memory);
    let e = begin(
        &memory,
        Path::new(IMAGE),
        std::slice::from_ref(&(GRANULE..LEN)),
    )
    .unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid);
    assert!(!Missing::is_there(&memory, Path::new(IMAGE)).unwrap());
}

/// An image whose header somebody changed is not closed over that.
#[test]
fn a_header_that_was_changed_is_not_written_over() {
    let memory = MemoryStore::new();
    let bytes = image(&memory);
    let ranges = holes(&memory);
    let path = Path::new(IMAGE);
    begin(&memory, path, &ranges).unwrap();
    let file = memory.open(path, Access::Write).unwrap();
    file.write_at(&[9], 20).unwrap();
    let store = ArrivingStore::new(Arc::new(memory.clone()));
    store.register(path, origin(&bytes)).unwrap();
    let e = loop {
        match store.fill_next(path, 1 << 20) {
            Ok(Filled::More) => {}
            ended => break ended.unwrap_err(),
        }
    };
    assert_eq!(e.kind(), Kind::Corrupt);
    assert!(Missing::is_there(&memory, path).unwrap());
}

/// Goal: what arrives while the record is written is not forgotten. Method: each sync in turn has one
/// granule arrive inside of it, and one of the later syncs fails; every legal state after that is right.
#[test]
fn what_arrives_while_it_is_saved_is_saved_later() {
    for during in 0..4 {
        for fails in during..6 {
            let memory = MemoryStore::new();
            let bytes = image(&memory);
            let ranges = holes(&memory);
            let path = Path::new(IMAGE);
            begin(&memory, path, &ranges).unwrap();
            let recorded = RecordingStore::on(&memory);
            let store = Arc::new(ArrivingStore::new(recorded.store()));
            store.register(path, origin(&bytes)).unwrap();
            let inside = store.clone();
            recorded.during_sync(move |n| {
                if n == during && inside.remaining(path) > 0 {
                    inside.fill_next(path, GRANULE).unwrap();
                }
            });
            recorded.fail_sync(fails, Fault::Eio);
            for _ in 0..20 {
                let filled = store.fill_next(path, GRANULE);
                if matches!(filled, Ok(Filled::Done)) {
                    break;
                }
                drop(store.checkpoint(path));
            }
            assert!(store.registered().is_empty());
            for point in recorded.crash_points() {
                for state in recorded.states_at(point, &Budget::default()) {
                    let found = state.build();
                    let file = found.open(path, Access::Read).unwrap();
                    let dirty = read_header(file.as_ref()).unwrap().0.dirty();
                    // Without the mark there is nothing to fetch.
                    judge(&found, &bytes, !dirty, &state);
                }
            }
        }
    }
}
