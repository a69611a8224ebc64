//! What repair and undo refuse: a file that changed meanwhile, an undo file that is damaged or lies;
//! and what becomes of a journal.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsck::repair::{self, How, Plan};
use ploop::Kind;
use ploop::disk::open::{OpenOptions, Opener};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store};
use ploop_fuzz::base::Base;
use ploop_fuzz::files::files;
use ploop_tests::damage::bases;

const IMAGE: &str = "/d/image.hds";
const UNDO: &str = "/undo";

struct Bench {
    base: Base,
    opener: Opener,
}

fn bench(name: &str) -> Bench {
    let base = bases().into_iter().find(|b| b.name == name).unwrap();
    let opener = Opener::on(Arc::new(base.store.clone()));
    Bench { base, opener }
}

impl Bench {
    fn plan(&self) -> Plan {
        repair::plan(&self.opener, &self.base.source, &OpenOptions::default()).unwrap()
    }

    fn apply(&self, plan: &Plan, how: How) -> ploop::Result<repair::Outcome> {
        repair::apply(&self.opener, plan, how, Some(Path::new(UNDO)))
    }

    fn undo(&self) -> ploop::Result<repair::Undone> {
        repair::undo(&self.opener, Path::new(UNDO))
    }

    fn write(&self, path: &str, at: u64, bytes: &[u8]) {
        let file = self
            .base
            .store
            .open(Path::new(path), Access::Write)
            .unwrap();
        file.write_at(bytes, at).unwrap();
    }

    fn read(&self, path: &str) -> Vec<u8> {
        let file = self.base.store.open(Path::new(path), Access::Read).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        bytes
    }
}

#[test]
fn a_plan_that_is_out_of_date_changes_nothing() {
    let b = bench("v2");
    b.write(IMAGE, 64 + 4 * 9, &[0xFF; 4]);
    let plan = b.plan();
    assert!(!plan.is_empty());
    b.write(IMAGE, 64 + 4 * 10, &[0xFF; 4]);
    let before = files(&b.base.store);
    assert_eq!(b.apply(&plan, How::Yes).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(files(&b.base.store), before);
    assert_eq!(b.base.store.kind(Path::new(UNDO)).unwrap(), None);
}

#[test]
fn preening_leaves_a_file_with_losses_as_it_is_and_says_so() {
    let b = bench("v2");
    b.write(IMAGE, 64 + 4 * 9, &[0xFF; 4]);
    b.write(IMAGE, 44, &0x746F_6E59u32.to_le_bytes());
    let before = files(&b.base.store);
    let done = b.apply(&b.plan(), How::Preen).unwrap();
    assert!(done.done.is_empty() && done.undo.is_none());
    assert_eq!(done.remaining.len(), 2);
    let cluster = 128 * 512;
    let [lost] = &done.remaining[0].lost[..] else {
        panic!("{:?}", done.remaining);
    };
    assert_eq!(*lost, 9 * cluster..10 * cluster);
    assert_eq!(files(&b.base.store), before);
}

#[test]
fn undo_refuses_a_file_that_was_changed_since() {
    for (what, at, bytes) in [
        ("an entry that repair emptied", 64 + 4 * 9, [3, 0, 0, 0]),
        ("an entry that it left alone", 64 + 4 * 200, [3, 0, 0, 0]),
        ("the mark", 44, [0x59, 0x6e, 0x6f, 0x74]),
    ] {
        let b = bench("v2");
        b.write(IMAGE, 64 + 4 * 9, &[0xFF; 4]);
        b.apply(&b.plan(), How::Yes).unwrap();
        b.write(IMAGE, at, &bytes);
        let before = files(&b.base.store);
        let e = b.undo().unwrap_err();
        assert_eq!(e.kind(), Kind::Invalid, "{what}: {e}");
        assert_eq!(files(&b.base.store), before, "{what}");
    }
}

/// Goal: an undo takes a repair back, and no write of a guest's since. Method: the cluster that one
/// of two owners got for himself is written to.
#[test]
fn undo_refuses_when_a_copy_that_repair_made_was_written_since() {
    let b = bench("v2");
    let entry = |slot: usize| -> [u8; 4] {
        let at = 64 + 4 * slot;
        b.read(IMAGE)[at..at + 4].try_into().unwrap()
    };
    let mut used = (0..200).filter(|&slot| entry(slot) != [0; 4]);
    let (one, two) = (used.next().unwrap(), used.next().unwrap());
    b.write(IMAGE, 64 + 4 * two as u64, &entry(one));
    b.apply(&b.plan(), How::Yes).unwrap();
    assert_ne!(entry(one), entry(two));
    let copy = u64::from(u32::from_le_bytes(entry(two))) * 128 * 512;
    b.write(IMAGE, copy + 512, &[0xA5; 4]);
    let before = files(&b.base.store);
    let e = b.undo().unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid, "{e}");
    assert_eq!(files(&b.base.store), before);
}

#[test]
fn a_second_repair_does_not_overwrite_the_first_ones_undo_file() {
    let b = bench("v2");
    b.write(IMAGE, 64 + 4 * 9, &[0xFF; 4]);
    b.apply(&b.plan(), How::Yes).unwrap();
    b.write(IMAGE, 64 + 4 * 9, &[0xFF; 4]);
    let (before, undo) = (files(&b.base.store), b.read(UNDO));
    let e = b.apply(&b.plan(), How::Yes).unwrap_err();
    assert_eq!(e.kind(), Kind::Exists);
    assert_eq!((files(&b.base.store), b.read(UNDO)), (before, undo));
}

#[test]
fn without_a_name_the_undo_file_lies_beside_and_a_free_name_is_found() {
    let b = bench("v2");
    for name in ["/d/image.hds.undo", "/d/image.hds.undo.1"] {
        b.write(IMAGE, 64 + 4 * 9, &[0xFF; 4]);
        let done = repair::apply(&b.opener, &b.plan(), How::Yes, None).unwrap();
        assert_eq!(done.undo, Some(PathBuf::from(name)));
    }
    repair::undo(&b.opener, Path::new("/d/image.hds.undo.1")).unwrap();
}

/// Each byte of an undo file in turn, and each length: never a panic, and never a change but a
/// whole undo.
#[test]
fn a_damaged_undo_file_changes_nothing() {
    let b = bench("v2");
    b.write(IMAGE, 64 + 4 * 9, &[0xFF; 4]);
    b.apply(&b.plan(), How::Yes).unwrap();
    let (after, good) = (files(&b.base.store), b.read(UNDO));
    for at in 0..good.len() as u64 {
        b.write(UNDO, at, &[good[at as usize] ^ 0x21]);
        let e = b.undo().unwrap_err();
        let expected = matches!(e.kind(), Kind::Corrupt | Kind::Unsupported);
        assert!(expected, "byte {at}: {e}");
        b.write(UNDO, at, &good[at as usize..][..1]);
    }
    let file = b.base.store.open(Path::new(UNDO), Access::Write).unwrap();
    for len in 0..good.len() as u64 {
        file.set_len(len).unwrap();
        assert_eq!(b.undo().unwrap_err().kind(), Kind::Corrupt, "{len} bytes");
        file.write_at(&good[len as usize..], len).unwrap();
    }
    assert_eq!(files(&b.base.store), after);
    b.undo().unwrap();
}

#[test]
fn a_journal_that_can_be_replayed_is_left_to_opening() {
    let b = bench("disk with a journal");
    let plan = b.plan();
    assert!(plan.is_empty(), "{:?}", plan.steps);
    assert_eq!(plan.left.len(), 1);
    assert!(plan.left[0].what.contains("journal"));
}

#[test]
fn a_journal_that_explains_nothing_is_put_away_and_what_it_held_is_named() {
    let b = bench("disk with a journal");
    // As another program leaves it.
    b.write("/d/root.hds.top", 44, &[0; 4]);
    let before = files(&b.base.store);
    let plan = b.plan();
    let step = plan.steps.iter().find(|s| s.what.contains("journal"));
    assert!(!step.unwrap().lost.is_empty() && !plan.is_automatic());
    let done = b.apply(&plan, How::Yes).unwrap();
    assert_eq!(done.after.class, fsck::Class::Clean, "{:?}", done.after);
    let kept = Path::new("/d/.ploop/lost+found/journal.root.hds.top");
    assert!(b.base.store.kind(kept).unwrap().is_some());
    b.undo().unwrap();
    assert_eq!(files(&b.base.store), before);
}

#[test]
fn what_another_program_holds_is_not_repaired() {
    let b = bench("v2");
    b.write(IMAGE, 64 + 4 * 9, &[0xFF; 4]);
    let plan = b.plan();
    let file = b.base.store.open(Path::new(IMAGE), Access::Read).unwrap();
    ploop::locks::lock_image(file.as_ref(), ploop::locks::Use::Read).unwrap();
    let e = b.apply(&plan, How::Yes).unwrap_err();
    assert_eq!(e.kind(), Kind::InUse);
}

/// A store that names what it should not.
#[test]
fn an_undo_file_reaches_no_file_but_images_of_its_directory() {
    let b = bench("v2");
    b.write(IMAGE, 64 + 4 * 9, &[0xFF; 4]);
    b.apply(&b.plan(), How::Yes).unwrap();
    let store: &MemoryStore = &b.base.store;
    // Something else under the image's name.
    let bytes = b.read(IMAGE);
    store.remove_file(Path::new(IMAGE)).unwrap();
    let other = store.create(Path::new(IMAGE), 0o600).unwrap();
    other.write_at(&vec![b'#'; bytes.len()], 0).unwrap();
    let before = files(store);
    assert_eq!(b.undo().unwrap_err().kind(), Kind::Invalid);
    assert_eq!(files(store), before);
}
