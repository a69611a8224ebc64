use super::*;
use crate::store::memory::MemoryStore;
use crate::store::recording::{Budget, RecordingStore};

const DISK: &str = "/disk";

fn store() -> MemoryStore {
    let store = MemoryStore::new();
    store.create_dir(Path::new(DISK)).unwrap();
    store
}

fn record(state: State) -> Record {
    Record {
        state,
        id: Guid::from_bytes([7; 16]),
        epoch: 3,
        peer: "unix:/run/other.sock".into(),
    }
}

#[test]
fn a_record_is_read_as_it_was_written() {
    let (store, dir) = (store(), Path::new(DISK));
    assert_eq!(read(&store, dir).unwrap(), None);
    for state in State::ALL {
        Owner::write(&store, dir, record(state)).unwrap();
        assert_eq!(read(&store, dir).unwrap(), Some(record(state)));
    }
    remove(&store, dir).unwrap();
    remove(&store, dir).unwrap();
    assert_eq!(read(&store, dir).unwrap(), None);
}

/// A record of another move.
fn other(state: State) -> Record {
    Record {
        id: Guid::from_bytes([8; 16]),
        ..record(state)
    }
}

#[test]
fn what_was_taken_is_taken_again_where_the_next_move_fails() {
    let (store, dir) = (store(), Path::new(DISK));
    let (first, next) = (record(State::Taken), other(State::Offered));
    Owner::write(&store, dir, first.clone()).unwrap();
    for _ in 0..2 {
        past::set_aside(&store, dir).unwrap();
        Owner::write(&store, dir, next.clone()).unwrap();
        assert_eq!(past::aside(&store, dir).unwrap(), Some(first.clone()));
        assert!(!remove_of(&store, dir, first.id).unwrap());
        assert_eq!(read(&store, dir).unwrap(), Some(next.clone()));
        assert!(remove_of(&store, dir, next.id).unwrap());
        assert_eq!(read(&store, dir).unwrap(), Some(first.clone()));
        assert_eq!(past::aside(&store, dir).unwrap(), None);
    }
    // The source knows by then.
    past::set_aside(&store, dir).unwrap();
    Owner::write(&store, dir, next.clone()).unwrap();
    past::confirm(&store, dir, next.id).unwrap();
    assert_eq!(past::aside(&store, dir).unwrap(), Some(first.clone()));
    past::confirm(&store, dir, first.id).unwrap();
    assert_eq!(read(&store, dir).unwrap(), Some(next.clone()));
    assert!(remove_of(&store, dir, next.id).unwrap());
    assert_eq!(read(&store, dir).unwrap(), None);
    // Nothing is left of it for a move that has nothing to do with it.
    Owner::write(&store, dir, first.clone()).unwrap();
    past::set_aside(&store, dir).unwrap();
    assert!(remove_of(&store, dir, first.id).unwrap());
    assert_eq!(read(&store, dir).unwrap(), None);
    assert_eq!(past::aside(&store, dir).unwrap(), None);
}

#[test]
fn what_was_taken_and_has_left_is_kept_until_the_source_knows() {
    let (store, dir) = (store(), Path::new(DISK));
    let root = Path::new("/");
    let first = record(State::Taken);
    past::leave(&store, dir, root).unwrap();
    past::forget(&store, root, first.id).unwrap();
    assert_eq!(past::read(&store, root, first.id).unwrap(), None);
    Owner::write(&store, dir, first.clone()).unwrap();
    past::set_aside(&store, dir).unwrap();
    Owner::write(&store, dir, other(State::Given)).unwrap();
    past::leave(&store, dir, root).unwrap();
    assert_eq!(past::aside(&store, dir).unwrap(), None);
    let kept = || past::read(&store, root, first.id).unwrap();
    assert_eq!(kept(), Some(first.clone()));
    assert_eq!(
        past::read(&store, root, other(State::Given).id).unwrap(),
        None
    );
    past::forget(&store, root, first.id).unwrap();
    assert_eq!(kept(), None);
}

/// At every power cut of a move on that fails the first record is there, in one place or the other.
#[test]
fn what_was_taken_is_never_lost_on_the_way() {
    let start = store();
    let dir = Path::new(DISK);
    let (first, next) = (record(State::Taken), other(State::Offered));
    Owner::write(&start, dir, first.clone()).unwrap();
    let recorded = RecordingStore::on(&start);
    let disk = recorded.store();
    past::set_aside(disk.as_ref(), dir).unwrap();
    Owner::write(disk.as_ref(), dir, next.clone()).unwrap();
    remove_of(disk.as_ref(), dir, next.id).unwrap();
    let mut states = 0;
    for point in recorded.crash_points() {
        for state in recorded.states_at(point, &Budget::default()) {
            let left = state.build();
            let (now, aside) = (read(&left, dir).unwrap(), past::aside(&left, dir).unwrap());
            assert!(
                now == Some(first.clone()) || now == Some(next.clone()),
                "{now:?}"
            );
            assert!(now == Some(first.clone()) || aside == Some(first.clone()));
            states += 1;
        }
    }
    assert!(states > 5, "{states}");
}

#[test]
fn a_record_goes_with_its_own_move_only() {
    let (store, dir) = (store(), Path::new(DISK));
    let id = record(State::Taken).id;
    assert!(!remove_of(&store, dir, id).unwrap());
    Owner::write(&store, dir, record(State::Taken)).unwrap();
    assert!(!remove_of(&store, dir, Guid::from_bytes([8; 16])).unwrap());
    assert_eq!(read(&store, dir).unwrap(), Some(record(State::Taken)));
    assert!(remove_of(&store, dir, id).unwrap());
    assert_eq!(read(&store, dir).unwrap(), None);
}

#[test]
fn a_peer_of_any_length_that_fits_is_kept() {
    let (store, dir) = (store(), Path::new(DISK));
    let long = Record {
        peer: "x".repeat(PEER_MAX),
        ..record(State::Given)
    };
    Owner::write(&store, dir, long.clone()).unwrap();
    assert_eq!(read(&store, dir).unwrap(), Some(long.clone()));
    let longer = Record {
        peer: "x".repeat(PEER_MAX + 1),
        ..long
    };
    assert_eq!(longer.encode().unwrap_err().kind(), Kind::Invalid);
}

#[test]
fn only_who_owns_a_disk_may_open_it() {
    let (store, dir) = (store(), Path::new(DISK));
    check(&store, dir).unwrap();
    for state in State::ALL {
        Owner::write(&store, dir, record(state)).unwrap();
        match check(&store, dir) {
            Ok(()) => assert!(state.owns(), "{state}"),
            Err(e) => {
                assert!(!state.owns(), "{state}");
                assert_eq!((e.kind(), e.path()), (Kind::InUse, Some(dir)));
                assert!(e.to_string().contains("unix:/run/other.sock"), "{e}");
            }
        }
    }
}

#[test]
fn a_record_with_any_bit_turned_is_refused() {
    let bytes = record(State::Given).encode().unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Record::decode(&damaged).is_err(), "bit {bit}");
    }
    let (store, dir) = (store(), Path::new(DISK));
    Owner::write(&store, dir, record(State::Given)).unwrap();
    let file = store.open(&path(dir), Access::Write).unwrap();
    for len in [0, 100, 511, 513, 1 << 40] {
        file.set_len(len).unwrap();
        let e = check(&store, dir).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt, "{len}");
    }
}

/// Cut anywhere: the state before or the one after, and the one after when it was returned.
#[test]
fn a_change_of_state_happened_or_did_not() {
    let dir = Path::new(DISK);
    type Step = fn(&dyn Store, &Path);
    let steps: [(Step, Option<State>); 4] = [
        (
            |s, d| drop(Owner::write(s, d, record(State::Offered)).unwrap()),
            Some(State::Offered),
        ),
        (
            |s, d| {
                let mut owner = Owner::open(s, d).unwrap().unwrap();
                owner.set(State::Given, 4).unwrap();
            },
            Some(State::Given),
        ),
        (
            |s, d| {
                let mut owner = Owner::open(s, d).unwrap().unwrap();
                owner.set(State::Ready, 4).unwrap();
            },
            Some(State::Ready),
        ),
        (|s, d| remove(s, d).unwrap(), None),
    ];
    let recorded = RecordingStore::on(&store());
    let at = recorded.store();
    for (n, (step, _)) in steps.iter().enumerate() {
        step(at.as_ref(), dir);
        recorded.mark(n as u64);
    }
    let expected = |n: usize| n.checked_sub(1).and_then(|n| steps[n].1);
    let mut seen = 0;
    for point in recorded.crash_points() {
        let done = recorded.marks_before(point).len();
        for state in recorded.states_at(point, &Budget::default()) {
            let found = read(&state.build(), dir).unwrap().map(|r| r.state);
            let next = (done < steps.len()).then(|| expected(done + 1));
            assert!(
                found == expected(done) || Some(found) == next,
                "{done} done: {found:?}"
            );
            seen += 1;
        }
    }
    assert!(seen > 10, "{seen}");
}
