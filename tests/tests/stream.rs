//! `ploop send` and `ploop receive`, on stores in memory: what arrives is what was sent, and what
//! the other side has is not sent.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::path::Path;
use std::sync::Arc;

use ploop::Kind;
use ploop::descriptor::{Descriptor, ImageKind};
use ploop::disk::open::{DESCRIPTOR, OpenOptions, Source};
use ploop::format::ploop::Version;
use ploop::format::ploop::delta::read_header;
use ploop::store::{Access, Store};
use ploop_tests::stream::{
    DIR, container, everything, go_back, grown, host, of_version, received, sent, shows, snapshot,
    state, write,
};
use snapshots::place::Place;
use snapshots::rootfs::BuildOptions;
use snapshots::stream::{SendOptions, have};
use snapshots::template::{ImportOptions, ImportSource};
use snapshots::{CreateOptions, Root, create_container, remove_template, tree};

fn place<'a>(root: &'a Root, name: &str) -> Place<'a> {
    Place::container(root, name).unwrap()
}

fn descriptor(root: &Root, name: &str) -> Descriptor {
    place(root, name).descriptor().unwrap()
}

/// The same snapshots under the same names, with the same content, in images that have the same
/// clusters; the same state, quota and limits.
fn assert_same(from: &Root, to: &Root, of: &str, name: &str) {
    let listed = |root: &Root, name: &str| tree::list(&place(root, name)).unwrap();
    assert_eq!(listed(to, name), listed(from, of));
    assert_eq!(shows(to, name, None), shows(from, of, None));
    for s in listed(from, of) {
        let guid = Some(s.guid.as_str());
        assert_eq!(shows(to, name, guid), shows(from, of, guid), "{s:?}");
    }
    let known = |root: &Root, name: &str| {
        let meta = place(root, name).meta().unwrap();
        (meta.quota, meta.limits)
    };
    assert_eq!(known(to, name), known(from, of));
    let images = |root: &Root, name: &str| {
        let (place, d) = (place(root, name), descriptor(root, name));
        let one = |image: &ploop::descriptor::Image| {
            let store = root.opener().store();
            let path = place.file_of(image).unwrap();
            let file = store.open(&path, Access::Read).unwrap();
            let (header, _) = read_header(file.as_ref()).unwrap();
            let mut table = vec![0; header.entries as usize * 4];
            file.read_at(&mut table, 64).unwrap();
            let present = table.chunks(4).map(|e| e != [0; 4]);
            let present: Vec<bool> = present.collect();
            (image.guid, header.version, header.size(), present)
        };
        let mut all: Vec<_> = d.images.iter().map(one).collect();
        all.sort_by_key(|i| i.0);
        all
    };
    assert_eq!(images(to, name), images(from, of));
}

#[test]
fn a_tree_arrives_as_it_was() {
    for version in [Version::V1, Version::V2] {
        for cluster_sectors in [64, 256, 4096] {
            let ((_, from), (store, to)) = (host(), host());
            grown(&from, "src", version, cluster_sectors);
            let stream = sent(&from, "src", &SendOptions::default()).unwrap();
            let done = received(&to, "dst", &stream, false).unwrap();
            assert_same(&from, &to, "src", "dst");
            assert_eq!(done.images, 5);
            assert_eq!(done.bytes, stream.len() as u64);
            assert!(store.list(Path::new("/store/tmp")).unwrap().is_empty());
            // What arrived is a disk like any other: it goes on, and goes back.
            write(&to, "dst", 0, &[9; 512]);
            snapshot(&to, "dst", "d");
            go_back(&to, "dst", "b");
            assert_eq!(shows(&to, "dst", None), shows(&from, "src", Some("b")));
            let again = sent(&to, "dst", &SendOptions::default()).unwrap();
            received(&from, "back", &again, false).unwrap();
            assert_same(&to, &from, "dst", "back");
        }
    }
}

#[test]
fn neither_holes_nor_zeros_are_sent() {
    let ((_, from), (_, to)) = (host(), host());
    container(&from, "src", Version::V2, 2048, 1 << 30);
    write(&from, "src", 512 << 20, &[1; 4096]);
    write(&from, "src", 600 << 20, &vec![0; 1 << 20]);
    let stream = sent(&from, "src", &SendOptions::default()).unwrap();
    assert!(stream.len() < 4096 + 2048, "{} bytes", stream.len());
    let done = received(&to, "dst", &stream, false).unwrap();
    assert_eq!((done.data, done.size), (4096, 1 << 30));
}

#[test]
fn a_state_arrives_as_one_snapshot_with_nothing_written_on_it() {
    for (name, chain) in [("a", 1), ("b", 2), ("c", 2)] {
        let ((_, from), (_, to)) = (host(), host());
        grown(&from, "src", Version::V2, 64);
        let stream = sent(&from, "src", &state(name)).unwrap();
        received(&to, "dst", &stream, false).unwrap();
        let wanted = shows(&from, "src", Some(name));
        assert_eq!(shows(&to, "dst", None), wanted);
        assert_eq!(shows(&to, "dst", Some(name)), wanted);
        let (d, source) = (descriptor(&to, "dst"), descriptor(&from, "src"));
        assert_eq!(d.chain(d.top).unwrap().len(), 2);
        let node = place(&from, "src");
        let node = node.find(&source, &node.meta().unwrap(), name).unwrap();
        assert_eq!(source.chain(node).unwrap().len(), chain);
        assert!(d.image(node).is_some(), "it keeps its GUID");
    }
}

#[test]
fn what_came_after_a_snapshot_goes_onto_it() {
    let ((_, from), (_, to)) = (host(), host());
    grown(&from, "src", Version::V2, 64);
    received(&to, "dst", &sent(&from, "src", &state("a")).unwrap(), false).unwrap();
    let since = |name: &str| SendOptions {
        from: Some("a".into()),
        ..state(name)
    };
    let whole = sent(&from, "src", &state("b")).unwrap();
    let stream = sent(&from, "src", &since("b")).unwrap();
    assert!(stream.len() < whole.len());
    // The state goes along, because nothing was written.
    let done = received(&to, "dst", &stream, false).unwrap();
    assert!(done.current);
    assert_eq!(shows(&to, "dst", None), shows(&from, "src", Some("b")));
    assert_eq!(shows(&to, "dst", Some("a")), shows(&from, "src", Some("a")));
    // It is there.
    let e = received(&to, "dst", &stream, false).unwrap_err();
    assert_eq!(e.kind(), Kind::Exists, "{e}");
    // A branch: what is written stays.
    write(&to, "dst", 0, &[8; 512]);
    let kept = shows(&to, "dst", None);
    let branch = sent(&from, "src", &since("c")).unwrap();
    let done = received(&to, "dst", &branch, false).unwrap();
    assert!(!done.current);
    assert_eq!(shows(&to, "dst", None), kept);
    assert_eq!(shows(&to, "dst", Some("c")), shows(&from, "src", Some("c")));
    // What lies below a difference may be several snapshots.
    write(&from, "src", 0, &[1; 4096]);
    snapshot(&from, "src", "e");
    received(&to, "dst", &sent(&from, "src", &since("e")).unwrap(), false).unwrap();
    assert_eq!(shows(&to, "dst", Some("e")), shows(&from, "src", Some("e")));
}

#[test]
fn a_difference_is_refused_where_its_snapshot_is_another_one_or_missing() {
    let ((_, from), (store, to)) = (host(), host());
    grown(&from, "src", Version::V2, 64);
    let since = SendOptions {
        from: Some("a".into()),
        ..state("b")
    };
    let stream = sent(&from, "src", &since).unwrap();
    let refused = |to: &Root, kind: Kind, says: &str| {
        let before = everything(&store);
        let e = received(to, "dst", &stream, false).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(says), "{e}");
        assert!(everything(&store) == before, "nothing is left: {e}");
    };
    refused(&to, Kind::NotFound, "no container dst");
    container(&to, "dst", Version::V2, 64, 8 * 64 * 512);
    refused(&to, Kind::NotFound, "send that one to dst first");
    // The same GUID, with other data: as if somebody had written to a sealed image.
    snapshots::remove_container(&to, "dst").unwrap();
    received(&to, "dst", &sent(&from, "src", &state("a")).unwrap(), false).unwrap();
    let d = descriptor(&to, "dst");
    let meta = place(&to, "dst").meta().unwrap();
    let node = place(&to, "dst").find(&d, &meta, "a").unwrap();
    let mut forged = meta.clone();
    let known = forged.snapshots.get_mut(&node.to_string()).unwrap();
    known.content = None;
    place(&to, "dst").set_meta(&forged).unwrap();
    let path = place(&to, "dst").dir().join(&d.image(node).unwrap().file);
    let file = store.open(&path, Access::Write).unwrap();
    let last = file.len().unwrap() - 64 * 512;
    file.write_at(&[0xEE; 512], last).unwrap();
    refused(&to, Kind::Invalid, "other data");
    for (options, says) in [
        (
            SendOptions {
                from: Some("a".into()),
                ..SendOptions::default()
            },
            "name the later one",
        ),
        (
            SendOptions {
                from: Some("b".into()),
                ..state("a")
            },
            "not below",
        ),
        (
            SendOptions {
                from: Some("b".into()),
                ..state("b")
            },
            "not below",
        ),
        (state("nope"), "no snapshot"),
    ] {
        let e = sent(&from, "src", &options).unwrap_err();
        assert!(e.to_string().contains(says), "{e}");
    }
}

/// Imports a template from a raw image that is the same on every host.
fn import(root: &Root, name: &str) {
    let path = Path::new("/source.raw");
    let store: &Arc<dyn Store> = root.opener().store();
    if store.kind(path).unwrap().is_none() {
        let raw = store.create(path, 0o600).unwrap();
        raw.set_len(1 << 20).unwrap();
        for n in 0..20u8 {
            let at = u64::from(n) * 50_000;
            raw.write_at(&[n + 1; 8192], at).unwrap();
        }
    }
    let options = ImportOptions {
        cluster_sectors: 128,
        build: BuildOptions::default(),
        open: OpenOptions::default(),
        source_text: "raw".into(),
    };
    let source = ImportSource::Disk(Source {
        path: path.into(),
        descriptor: false,
        snapshot: None,
    });
    snapshots::import(root, name, &source, &options, &|_| ()).unwrap();
}

#[test]
fn a_template_that_is_there_is_not_sent() {
    let ((_, from), (store, to)) = (host(), host());
    import(&from, "base");
    create_container(&from, "src", "base", &CreateOptions::default(), &|_, _| ()).unwrap();
    write(&from, "src", 100_000, &[0xAA; 5000]);
    snapshot(&from, "src", "a");
    write(&from, "src", 0, &vec![0; 65536]);
    write(&from, "src", 300_000, &[0xBB; 50]);

    let alone = sent(&from, "src", &SendOptions::default()).unwrap();
    import(&to, "other-name");
    let known = have(&to).unwrap();
    assert_eq!(known[0].template, "other-name");
    for by_name in [false, true] {
        let options = |snapshot: Option<&str>| SendOptions {
            snapshot: snapshot.map(str::to_owned),
            have: if by_name { Vec::new() } else { known.clone() },
            reference: by_name.then(|| "base".to_owned()),
            ..SendOptions::default()
        };
        let tree = sent(&from, "src", &options(None)).unwrap();
        assert!(tree.len() + 100_000 < alone.len());
        let before = everything(&store);
        let layers = store.list(Path::new("/store/layers")).unwrap();
        received(&to, "tree", &tree, false).unwrap();
        received(
            &to,
            "state",
            &sent(&from, "src", &options(Some("a"))).unwrap(),
            false,
        )
        .unwrap();
        assert_eq!(shows(&to, "tree", None), shows(&from, "src", None));
        assert_eq!(
            shows(&to, "tree", Some("a")),
            shows(&from, "src", Some("a"))
        );
        assert_eq!(shows(&to, "state", None), shows(&from, "src", Some("a")));
        assert_eq!(store.list(Path::new("/store/layers")).unwrap(), layers);
        let e = remove_template(&to, "other-name").unwrap_err();
        assert_eq!(e.kind(), Kind::InUse, "{e}");
        snapshots::remove_containers(&to, &["tree".into(), "state".into()]).unwrap();
        assert!(everything(&store) == before, "its references are gone");
    }
    // Without it, the disk cannot be made, and nothing is.
    let (bare, without) = host();
    let before = everything(&bare);
    let options = SendOptions {
        have: known,
        ..SendOptions::default()
    };
    let tree = sent(&from, "src", &options).unwrap();
    let e = received(&without, "dst", &tree, false).unwrap_err();
    assert_eq!(e.kind(), Kind::NotFound, "{e}");
    assert!(e.to_string().contains("sha256-blocks:"), "{e}");
    assert!(everything(&bare) == before);
    // All of it, with its template, needs nothing.
    received(&without, "dst", &alone, false).unwrap();
    assert_same(&from, &without, "src", "dst");
    for (name, kind) in [("nope", Kind::NotFound), ("second", Kind::Invalid)] {
        if kind == Kind::Invalid {
            snapshots::template::from_snapshot(&from, "of", "src", "a").unwrap();
            import(&from, name);
        }
        let options = SendOptions {
            reference: Some(name.to_owned()),
            ..SendOptions::default()
        };
        let e = sent(&from, "src", &options).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
    }
}

/// A chain has one version: what stands on images of another one could not be opened.
#[test]
fn images_of_another_version_than_what_they_stand_on_are_refused() {
    let ((_, from), (store, to)) = (host(), host());
    import(&from, "base");
    import(&to, "base");
    create_container(&from, "src", "base", &CreateOptions::default(), &|_, _| ()).unwrap();
    write(&from, "src", 100_000, &[0xAA; 5000]);
    snapshot(&from, "src", "a");
    let on_template = SendOptions {
        reference: Some("base".to_owned()),
        ..state("a")
    };
    let first = sent(&from, "src", &on_template).unwrap();
    let before = everything(&store);
    let e = received(&to, "dst", &of_version(&first, 1), false).unwrap_err();
    assert!(e.to_string().contains("format version 1"), "{e}");
    assert!(everything(&store) == before);
    received(&to, "dst", &first, false).unwrap();

    write(&from, "src", 300_000, &[0xBB; 50]);
    snapshot(&from, "src", "b");
    let on_snapshot = SendOptions {
        from: Some("a".to_owned()),
        ..state("b")
    };
    let second = sent(&from, "src", &on_snapshot).unwrap();
    let before = everything(&store);
    let e = received(&to, "dst", &of_version(&second, 1), false).unwrap_err();
    assert!(e.to_string().contains("version 1"), "{e}");
    assert!(everything(&store) == before);
    received(&to, "dst", &second, false).unwrap();
    assert_eq!(shows(&to, "dst", None), shows(&from, "src", Some("b")));
}

/// A raw base is sent as an image of the version that the others have, also when it goes alone.
#[test]
fn a_raw_base_arrives_below_images_of_either_version() {
    for version in [Version::V1, Version::V2] {
        let ((_, from), (_, to)) = (host(), host());
        container(&from, "src", version, 64, 8 * 32768);
        write(&from, "src", 0, &[1; 9000]);
        let store = from.opener().store();
        let dir = Path::new(DIR).join("containers/src");
        // Its base becomes a raw file that shows the same.
        let (d, shown) = (descriptor(&from, "src"), shows(&from, "src", None));
        snapshot(&from, "src", "base");
        let mut tree = descriptor(&from, "src");
        let base = tree.images.iter_mut().find(|i| i.guid != tree.top).unwrap();
        assert_eq!(base.file, d.images[0].file);
        base.kind = ImageKind::Plain;
        let path = dir.join(&base.file);
        store.remove_file(&path).unwrap();
        let raw = store.create(&path, 0o600).unwrap();
        raw.write_at(&shown, 0).unwrap();
        let xml = store.open(&dir.join(DESCRIPTOR), Access::Write).unwrap();
        xml.set_len(0).unwrap();
        xml.write_at(&tree.to_xml(), 0).unwrap();
        assert!(descriptor(&from, "src").base_is_raw());

        write(&from, "src", 4096, &[2; 100]);
        snapshot(&from, "src", "upper");
        let tree = sent(&from, "src", &SendOptions::default()).unwrap();
        received(&to, "tree", &tree, false).unwrap();
        assert_eq!(shows(&to, "tree", None), shows(&from, "src", None));
        assert_eq!(shows(&to, "tree", Some("base")), shown);
        received(
            &to,
            "alone",
            &sent(&from, "src", &state("base")).unwrap(),
            false,
        )
        .unwrap();
        let rest = SendOptions {
            from: Some("base".to_owned()),
            ..state("upper")
        };
        received(&to, "alone", &sent(&from, "src", &rest).unwrap(), false).unwrap();
        assert_eq!(shows(&to, "alone", None), shows(&from, "src", None));
    }
}

#[test]
fn a_name_that_is_taken_is_refused_before_anything_is_read() {
    let ((_, from), (store, to)) = (host(), host());
    grown(&from, "src", Version::V2, 64);
    let stream = sent(&from, "src", &SendOptions::default()).unwrap();
    received(&to, "dst", &stream, false).unwrap();
    let before = everything(&store);
    for (name, kind) in [
        ("dst", Kind::Exists),
        ("../x", Kind::Invalid),
        ("", Kind::Invalid),
    ] {
        let e = received(&to, name, &stream, false).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
    }
    assert!(everything(&store) == before);
}
