//! Walking and changing the tree.

use super::super::*;
use crate::error::Kind;

fn node(n: u8) -> Guid {
    Guid::from_bytes([n; 16])
}

/// base ← 1 ← 2 ← top, with a branch 3 on 1.
fn branched() -> Descriptor {
    let mut d = Descriptor::new_single(20480, 2048, false, Guid::TOP, "base").unwrap();
    d.push_overlay(node(9), "one").unwrap();
    d.push_overlay(node(1), "branch").unwrap();
    d.push_overlay(node(3), "discarded").unwrap();
    d.replace_top(node(1), "two").unwrap();
    d.push_overlay(node(2), "top").unwrap();
    saved(&d);
    d
}

/// A disk that this library leaves behind can be written and opened again.
fn saved(d: &Descriptor) {
    d.check().unwrap();
    assert_eq!(&parse(&d.to_xml()).unwrap(), d);
}

fn files(d: &Descriptor, guid: Guid) -> Vec<&str> {
    d.chain(guid)
        .unwrap()
        .iter()
        .map(|image| image.file.as_str())
        .collect()
}

#[test]
fn a_new_disk_is_its_own_top() {
    let d = Descriptor::new_single(20480, 2048, true, Guid::TOP, "root.hds").unwrap();
    saved(&d);
    assert!(d.base_is_raw());
    assert_eq!(files(&d, Guid::TOP), ["root.hds"]);
    assert_eq!(d.end, Some(20480));
    for bad in [
        Descriptor::new_single(20480, 2047, false, Guid::TOP, "x"),
        Descriptor::new_single(20480, 32, false, Guid::TOP, "x"),
        Descriptor::new_single(u64::MAX, 2048, false, Guid::TOP, "x"),
        Descriptor::new_single(20480, 2048, false, Guid::NONE, "x"),
        Descriptor::new_single(20480, 2048, false, Guid::TOP, ""),
        Descriptor::new_single(20480, 2048, false, Guid::TOP, "a\nb"),
    ] {
        assert_eq!(bad.unwrap_err().kind(), Kind::Invalid);
    }
}

#[test]
fn a_snapshot_keeps_what_the_top_showed_and_the_top_keeps_its_guid() {
    let mut d = Descriptor::new_single(20480, 2048, true, Guid::TOP, "base").unwrap();
    d.push_overlay(node(1), "over").unwrap();
    saved(&d);
    assert_eq!(d.top, Guid::TOP);
    assert_eq!(files(&d, node(1)), ["base"]);
    assert_eq!(files(&d, Guid::TOP), ["base", "over"]);
    // The overlay is no raw file, and the disk still has a raw base.
    assert_eq!(d.images[1].kind, ImageKind::Compressed);
    assert!(d.base_is_raw());

    let before = d.clone();
    for (guid, file, kind) in [
        (node(1), "x", Kind::Exists),
        (Guid::TOP, "x", Kind::Invalid),
        (Guid::NONE, "x", Kind::Invalid),
        (node(2), "over", Kind::Exists),
        (node(2), "", Kind::Invalid),
        (node(2), "a\0b", Kind::Invalid),
    ] {
        assert_eq!(
            d.push_overlay(guid, file).unwrap_err().kind(),
            kind,
            "{guid} {file}"
        );
        assert_eq!(d, before, "a refused change changes nothing");
    }
}

#[test]
fn branches_are_walked_and_rolled_back() {
    let mut d = branched();
    assert_eq!(files(&d, Guid::TOP), ["base", "one", "two", "top"]);
    assert_eq!(files(&d, node(3)), ["base", "one", "branch"]);
    assert_eq!(d.children(node(1)), [node(3), node(2)]);
    assert_eq!(d.children(Guid::NONE), [node(9)]);
    assert_eq!(d.chain(node(77)).unwrap_err().kind(), Kind::NotFound);

    d.shot_mut(node(2)).unwrap().temporary = Temporary::Temporary;
    for onto in [node(2), Guid::TOP] {
        assert_eq!(d.replace_top(onto, "x").unwrap_err().kind(), Kind::Invalid);
    }
    assert_eq!(
        d.replace_top(node(77), "x").unwrap_err().kind(),
        Kind::NotFound
    );
    assert_eq!(
        d.replace_top(node(3), "two").unwrap_err().kind(),
        Kind::Exists
    );
    assert_eq!(d.replace_top(node(3), "new").unwrap().file, "top");
    assert_eq!(files(&d, Guid::TOP), ["base", "one", "branch", "new"]);
    saved(&d);
}

#[test]
fn branching_off_keeps_the_old_top_and_refuses_what_a_rollback_refuses() {
    let mut d = branched();
    let before = d.clone();
    d.shot_mut(node(2)).unwrap().temporary = Temporary::Temporary;
    let marked = d.clone();
    for (becomes, onto, file, kind) in [
        (node(5), node(2), "x", Kind::Invalid),
        (node(5), Guid::TOP, "x", Kind::Invalid),
        (node(5), node(77), "x", Kind::NotFound),
        (node(5), node(3), "two", Kind::Exists),
        (node(3), node(9), "x", Kind::Exists),
        (Guid::TOP, node(9), "x", Kind::Invalid),
        (Guid::NONE, node(9), "x", Kind::Invalid),
    ] {
        let e = d.branch_off(becomes, onto, file).unwrap_err();
        assert_eq!(e.kind(), kind, "{becomes} {onto} {file}");
        assert_eq!(d, marked);
    }
    d = before;
    // What hangs on the old top stays there, under its new name.
    d.branch_off(node(5), node(3), "six").unwrap();
    saved(&d);
    assert_eq!(files(&d, Guid::TOP), ["base", "one", "branch", "six"]);
    assert_eq!(files(&d, node(5)), ["base", "one", "two", "top"]);
    // Back again, and nothing is lost.
    d.branch_off(node(6), node(5), "seven").unwrap();
    saved(&d);
    assert_eq!(files(&d, Guid::TOP), ["base", "one", "two", "top", "seven"]);
    assert_eq!(files(&d, node(6)), ["base", "one", "branch", "six"]);
    // Onto its own parent: the two become siblings.
    d.branch_off(node(7), node(5), "eight").unwrap();
    saved(&d);
    assert_eq!(d.children(node(5)), [node(7), Guid::TOP]);
}

#[test]
fn removing_a_node_hands_its_children_down() {
    let mut d = branched();
    assert_eq!(d.remove(node(1)).unwrap().file, "one");
    saved(&d);
    assert_eq!(files(&d, Guid::TOP), ["base", "two", "top"]);
    assert_eq!(files(&d, node(3)), ["base", "branch"]);
    d.remove(node(3)).unwrap();
    d.remove(node(9)).unwrap();
    saved(&d);
    assert_eq!(files(&d, Guid::TOP), ["two", "top"]);
    assert_eq!(d.remove(Guid::TOP).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(d.remove(node(3)).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn an_edit_that_breaks_the_tree_is_noticed() {
    type Break = fn(&mut Descriptor);
    let breaks: [(Break, &str); 6] = [
        (|d| d.shot_mut(node(9)).unwrap().parent = Guid::TOP, "cycle"),
        (
            |d| d.shot_mut(node(2)).unwrap().parent = node(77),
            "{4d4d4d4d-",
        ),
        (|d| d.images.retain(|i| i.guid != node(1)), "no <Image>"),
        (|d| d.shots.retain(|s| s.guid != node(3)), "no <Shot>"),
        (
            |d| d.shot_mut(Guid::TOP).unwrap().temporary = Temporary::Zero,
            "marked",
        ),
        (|d| d.images.clear(), "0 images"),
    ];
    for (edit, words) in breaks {
        let mut d = branched();
        edit(&mut d);
        let e = d.check().unwrap_err();
        assert!(
            e.kind() == Kind::Invalid && e.what().contains(words),
            "{words}: {e}"
        );
        if let Err(e) = d.chain(Guid::TOP) {
            assert_eq!(e.kind(), Kind::Corrupt, "{e}");
        }
    }
}

#[test]
fn geometry_is_what_openvz_writes() {
    for (size, cylinders, heads, sectors) in [
        (20480, 40, 16, 32),
        (1920, 15, 4, 32),
        (64, 1, 2, 32),
        (2_097_152, 2080, 16, 63),
        (109_521_666_048, 213_909_504, 16, 32),
        (17, 17, 1, 1),
        (0, 0, 16, 63),
    ] {
        let want = Chs {
            cylinders: Some(cylinders),
            heads: Some(heads),
            sectors: Some(sectors),
        };
        assert_eq!(Chs::of(size), want, "{size}");
    }
}

#[test]
fn a_new_delta_is_named_after_the_first_image() {
    let g = Guid::new_v4();
    let old = Guid::new_v4();
    for (first, stem) in [
        ("root.hds".to_owned(), "root.hds"),
        (format!("root.hds.{old}"), "root.hds"),
        (format!("root.hds.{old}.{g}"), "root.hds"),
        (format!("images/root.hds.{old}"), "images/root.hds"),
        ("root.{x}".to_owned(), "root.{x}"),
        ("noext".to_owned(), "noext"),
    ] {
        assert_eq!(
            new_delta_file_name(&first, g),
            format!("{stem}.{g}"),
            "{first}"
        );
    }
    // Nothing but an ending is a name of its own.
    for first in [format!(".{old}"), format!("d/.{old}"), format!("{old}.hds")] {
        assert_eq!(new_delta_file_name(&first, g), format!("{first}.{g}"));
    }
}
