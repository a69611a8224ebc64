//! Which changes are units, and what makes them durable.

use super::*;
use crate::error::Result;

#[test]
fn an_unsynced_write_tears_by_sector() {
    let (rec, file) = with_file(2 * S);
    file.write_at(&[b'b'; 2 * S], 0).unwrap();
    assert_eq!(of_f(&rec), ["a1 b1", "a2", "b1 a1", "b2"]);
    assert_eq!(
        text(&rec.snapshot(), "/f"),
        "b2",
        "without a power cut nothing is lost"
    );
}

#[test]
fn a_sector_is_whole_and_a_part_of_it_too() {
    let (rec, file) = with_file(2 * S);
    file.write_at(&[b'b'; 24], 500).unwrap();
    let torn = ["a+500 b+12 a1", "a+500 b+24 a+500", "a1 b+12 a+500", "a2"];
    assert_eq!(of_f(&rec), torn);
}

#[test]
fn later_writes_of_one_sector_win_if_they_survive() {
    let (rec, file) = with_file(S);
    file.write_at(&[b'b'; S], 0).unwrap();
    file.write_at(&[b'c'; S], 0).unwrap();
    assert_eq!(of_f(&rec), ["a1", "b1", "c1"]);
}

#[test]
fn what_is_synced_stays_and_only_what_follows_is_at_risk() {
    let (rec, file) = with_file(3 * S);
    file.write_at(&[b'b'; 2 * S], 0).unwrap();
    file.sync().unwrap();
    assert_eq!(of_f(&rec), ["b2 a1"]);
    file.write_at(&[b'c'; S], SECTOR).unwrap();
    assert_eq!(of_f(&rec), ["b1 c1 a1", "b2 a1"]);
}

#[test]
fn the_sync_of_another_file_or_of_the_directory_does_not_help() {
    let (rec, file) = with_file(S);
    let other = rec.create(p("/g"), 0o600).unwrap();
    rec.sync_dir(p("/")).unwrap();
    file.write_at(&[b'b'; S], 0).unwrap();
    other.sync().unwrap();
    rec.sync_dir(p("/")).unwrap();
    assert_eq!(of_f(&rec), ["a1", "b1"]);
}

#[test]
fn an_extending_write_loses_data_and_length_apart() {
    let (rec, file) = with_file(S);
    file.write_at(&[b'b'; S], SECTOR).unwrap();
    assert_eq!(of_f(&rec), ["a1", "a1 01", "a1 b1"]);
}

#[test]
fn data_past_the_end_shows_when_a_later_length_survives() {
    let (rec, file) = with_file(0);
    file.write_at(&[b'b'; S], 0).unwrap();
    file.write_at(&[b'c'; S], SECTOR).unwrap();
    let all = ["", "01", "01 c1", "02", "b1", "b1 01", "b1 c1"];
    assert_eq!(of_f(&rec), all);
}

#[test]
fn lengths_are_lost_whole() {
    let (rec, file) = with_file(2 * S);
    file.set_len(4 * SECTOR).unwrap();
    assert_eq!(of_f(&rec), ["a2", "a2 02"]);
    file.sync().unwrap();
    file.set_len(SECTOR).unwrap();
    assert_eq!(of_f(&rec), ["a1", "a2 02"]);
    file.set_len(2 * SECTOR).unwrap();
    assert_eq!(of_f(&rec), ["a1", "a1 01", "a2", "a2 02"]);
}

#[test]
fn punches_and_zeros_are_lost_in_pieces() {
    type Clear = fn(&dyn StoreFile, u64, u64) -> Result<()>;
    for clear in [(|f, at, n| f.punch(at, n)) as Clear, |f, at, n| {
        f.zero(at, n)
    }] {
        let (rec, file) = with_file(3 * S);
        clear(&*file, SECTOR, 9 * SECTOR).unwrap();
        assert_eq!(of_f(&rec), ["a1 01 a1", "a1 02", "a2 01", "a3"]);
        file.sync().unwrap();
        assert_eq!(of_f(&rec), ["a1 02"]);

        let (rec, file) = with_file(32 * S);
        clear(&*file, 0, 24 * SECTOR).unwrap();
        assert_eq!(of_f(&rec).len(), 8, "three runs of 4 KiB");

        let (rec, file) = with_file(1 << 20);
        clear(&*file, 0, 1 << 20).unwrap();
        assert_eq!(rec.states_at(usize::MAX, &Budget::default()).units(), 16);
    }
}

#[test]
fn a_name_needs_its_directory_synced() {
    let rec = RecordingStore::new();
    let file = rec.create(p("/f"), 0o600).unwrap();
    file.write_at(&[b'b'; S], 0).unwrap();
    assert_eq!(of_f(&rec), ["", "-", "01", "b1"]);
    file.sync().unwrap();
    assert_eq!(of_f(&rec), ["-", "b1"]);
    rec.sync_dir(p("/")).unwrap();
    assert_eq!(of_f(&rec), ["b1"]);
    rec.remove_file(p("/f")).unwrap();
    assert_eq!(of_f(&rec), ["-", "b1"]);
    rec.sync_dir(p("/")).unwrap();
    assert_eq!(of_f(&rec), ["-"]);
}

#[test]
fn a_rename_leaves_the_old_or_the_new_name() {
    let (rec, _) = with_file(S);
    let new = rec.create(p("/new"), 0o600).unwrap();
    new.write_at(&[b'b'; S], 0).unwrap();
    new.sync().unwrap();
    rec.sync_dir(p("/")).unwrap();
    rec.rename(p("/new"), p("/f")).unwrap();
    let both = |store: &MemoryStore| format!("{} {}", text(store, "/f"), text(store, "/new"));
    assert_eq!(outcomes(&rec, both), ["a1 b1", "b1 -"]);
    rec.sync_dir(p("/")).unwrap();
    assert_eq!(outcomes(&rec, both), ["b1 -"]);
}

#[test]
fn a_rename_across_directories_needs_both_synced() {
    for (order, synced) in [
        (["/", "/"], 2),
        (["/d", "/d"], 2),
        (["/", "/d"], 1),
        (["/d", "/"], 1),
    ] {
        let (rec, _) = with_file(S);
        rec.create_dir(p("/d")).unwrap();
        rec.sync_dir(p("/")).unwrap();
        rec.rename_new(p("/f"), p("/d/f")).unwrap();
        let both = |store: &MemoryStore| format!("{} {}", text(store, "/f"), text(store, "/d/f"));
        assert_eq!(outcomes(&rec, both), ["- a1", "a1 -"]);
        order.iter().for_each(|dir| rec.sync_dir(p(dir)).unwrap());
        assert_eq!(outcomes(&rec, both).len(), synced, "{order:?}");
    }
}

#[test]
fn the_second_of_two_renames_may_survive_alone() {
    let (rec, file) = with_file(S);
    rec.create(p("/new"), 0o600).unwrap();
    rec.sync_dir(p("/")).unwrap();
    rec.rename(p("/f"), p("/old")).unwrap();
    rec.rename(p("/new"), p("/f")).unwrap();
    let names = |store: &MemoryStore| format!("{:?}", store.list(p("/")).unwrap());
    let lost = r#"["f"]"#.to_string();
    assert!(
        outcomes(&rec, names).contains(&lost),
        "the old file was under neither name"
    );
    // What the removed file still gets is nobody's.
    let units = || rec.states_at(usize::MAX, &Budget::default()).units();
    assert_eq!(units(), 2);
    rec.remove_file(p("/old")).unwrap();
    rec.sync_dir(p("/")).unwrap();
    file.write_at(&[b'z'; S], 0).unwrap();
    assert_eq!(units(), 0);
}

#[test]
fn a_lost_directory_takes_everything_in_it() {
    let rec = RecordingStore::new();
    rec.create_dir(p("/d")).unwrap();
    let file = rec.create(p("/d/f"), 0o600).unwrap();
    rec.sync_dir(p("/d")).unwrap();
    file.write_at(&[b'b'; S], 0).unwrap();
    let inside = |store: &MemoryStore| text(store, "/d/f");
    assert_eq!(outcomes(&rec, inside), ["", "-", "01", "b1"]);
    file.sync().unwrap();
    assert_eq!(outcomes(&rec, inside), ["-", "b1"]);
    rec.sync_dir(p("/")).unwrap();
    assert_eq!(outcomes(&rec, inside), ["b1"]);
    rec.remove_file(p("/d/f")).unwrap();
    rec.remove_dir(p("/d")).unwrap();
    let tree = |store: &MemoryStore| format!("{:?} {}", store.list(p("/")), inside(store));
    assert_eq!(
        outcomes(&rec, tree).len(),
        3,
        "all of it, the empty directory, nothing"
    );
}

#[test]
fn beyond_twelve_units_the_families_are_tried() {
    let (rec, file) = with_file(13 * S);
    for n in 0..13u8 {
        file.write_at(&[b'b' + n; S], u64::from(n) * SECTOR)
            .unwrap();
    }
    let seeded = |seeded, seed| {
        let budget = Budget {
            seeded,
            seed,
            ..Budget::default()
        };
        rec.states_at(usize::MAX, &budget)
            .map(|s| s.kept())
            .collect::<Vec<_>>()
    };
    // 14 prefixes, 13 losses and 13 survivors; the last loss and the first survivor are prefixes.
    assert_eq!(seeded(0, 1).len(), 14 + 12 + 12);
    assert!(seeded(1000, 1).len() > 700);
    assert_eq!(seeded(1000, 1), seeded(1000, 1));
    assert_ne!(seeded(1000, 1), seeded(1000, 2));
    let all = Budget {
        exhaustive_units: 13,
        ..Budget::default()
    };
    assert_eq!(rec.states_at(usize::MAX, &all).count(), 1 << 13);
}

#[test]
fn a_state_can_be_built_again_from_its_text() {
    let (rec, file) = with_file(20 * S);
    file.write_at(&[b'b'; 20 * S], 0).unwrap();
    for state in rec.states_at(usize::MAX, &Budget::default()) {
        let again = rec.state(state.point(), &state.kept());
        assert_eq!(text(&again.build(), "/f"), text(&state.build(), "/f"));
    }
    let shown = rec.state(1, &[0, 1, 2, 19]).to_string();
    let head = "power cut at point 1 of 1 (after write /f 0x0+0x2800): asked for, \
                kept [0-2, 19] of 20 units\n  kept data /f 0x0+0x200\n";
    assert!(shown.starts_with(head), "{shown}");
    assert!(shown.contains("\n  lost data /f 0x600+0x200\n"), "{shown}");
    assert!(shown.ends_with("\n  and 4 more"), "{shown}");
}

#[test]
fn marks_belong_to_the_point_after_them() {
    let (rec, file) = with_file(S);
    rec.mark(1);
    file.write_at(b"x", 0).unwrap();
    rec.mark(2);
    file.sync().unwrap();
    rec.mark(3);
    rec.mark(4);
    assert_eq!(rec.crash_points().collect::<Vec<_>>(), [1, 3, 6]);
    assert_eq!(rec.marks_before(3), [1, 2]);
    assert_eq!(rec.marks_before(6), [1, 2, 3, 4]);
    let log = [
        "mark 1",
        "write /f 0x0+0x1",
        "mark 2",
        "sync /f",
        "mark 3",
        "mark 4",
    ];
    assert_eq!(rec.log(), log);
    // Points can be asked for in any order.
    let count = |point| rec.states_at(point, &Budget::default()).count();
    assert_eq!([6, 3, 1, 3, 6].map(count), [1, 2, 1, 2, 1]);
}

#[test]
fn a_sync_of_the_file_system_covers_all_that_came_before_it() {
    let (rec, file) = with_file(S);
    let whole = rec.file_system(p("/")).unwrap().unwrap();
    file.write_at(&[b'b'; S], 0).unwrap();
    rec.create_dir(p("/d")).unwrap();
    let other = rec.create(p("/d/g"), 0o600).unwrap();
    other.write_at(b"ggg", 0).unwrap();
    whole.sync().unwrap();
    file.write_at(&[b'c'; S], 0).unwrap();
    let end = rec.log().len();
    for state in rec.states_at(end, &Budget::default()) {
        assert_eq!(text(&state.build(), "/d/g"), "g+3");
    }
    assert_eq!(of_f(&rec), ["b1", "c1"]);
}

#[test]
fn what_a_failed_sync_of_the_file_system_covered_is_lost_for_ever() {
    let (rec, file) = with_file(S);
    let whole = rec.file_system(p("/")).unwrap().unwrap();
    file.write_at(&[b'b'; S], 0).unwrap();
    rec.fail_sync(rec.syncs(), crate::store::recording::Fault::Eio);
    assert!(whole.sync().is_err());
    file.sync().unwrap();
    whole.sync().unwrap();
    assert_eq!(of_f(&rec), ["a1", "b1"]);
}
