//! A disk directory that stands for itself.

use std::path::Path;
use std::process::Command;

use ploop::Kind;
use ploop::descriptor::{Guid, Temporary};
use ploop::device::Device;
use ploop::disk::open::{Opener, Source};
use ploop::format::ploop::Version;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, Calls, Fault, RecordingStore};
use ploop::store::{Access, RealStore};
use snapshots::export::{Exported, export_disk};
use snapshots::place::Place;
use snapshots::tree;

use crate::common::{CLUSTER, CLUSTERS, Host, alone, kind};

fn export(host: &Host, node: Option<Guid>, target: &str) -> ploop::Result<Exported> {
    export_disk(&host.try_place()?, node, Path::new(target), &|_, _| ())
}

/// a with 1 and 2; b with 3; the top with 4.
fn fill(host: &Host, version: Version) -> (Guid, Guid) {
    host.init(version);
    host.write(0, CLUSTER, 1);
    host.write(2 * CLUSTER, 4096, 2);
    let a = host.snap("a");
    host.write(0, 512, 3);
    let b = host.snap("b");
    super::switch::to(host, "a").unwrap();
    host.write(5 * CLUSTER, 512, 4);
    (a, b)
}

fn copy_of(host: &Host, at: &str) -> Host {
    Host::at(host.opener.store().clone(), at)
}

#[test]
fn the_whole_tree_arrives_with_its_names_and_is_a_disk_like_any() {
    for version in [Version::V1, Version::V2] {
        let host = Host::on(MemoryStore::shared());
        let (a, b) = fill(&host, version);
        let place = host.place();
        let seen = std::cell::RefCell::new(Vec::new());
        let progress = |done, total| seen.borrow_mut().push((done, total));
        let done = export_disk(&place, None, Path::new("/out"), &progress).unwrap();
        assert_eq!((done.images, done.size), (3, CLUSTERS * CLUSTER));
        assert_eq!(seen.borrow().last(), Some(&(done.data, done.data)));
        let out = copy_of(&host, "/out");
        for node in [None, Some(a), Some(b)] {
            assert_eq!(out.shows(node).unwrap(), host.shows(node).unwrap());
        }
        assert_eq!(out.files(), out.named());
        assert!(
            out.files()
                .iter()
                .all(|f| f == "DiskDescriptor.xml" || f.starts_with("root.hds"))
        );
        assert!(out.files().contains(&"root.hds".to_owned()));
        assert_eq!(out.findings().unwrap(), [""; 0]);
        let before = tree::list(&place).unwrap();
        assert_eq!(tree::list(&out.place()).unwrap(), before);
        // It is changed without the first one noticing.
        out.write(0, 512, 9);
        super::switch::to(&out, "b").unwrap();
        assert_ne!(out.shows(None).unwrap(), host.shows(None).unwrap());
        // And neither is written over.
        assert_eq!(kind(export(&host, None, "/out")), Kind::Exists);
    }
}

#[test]
fn a_snapshot_is_exported_as_the_disk_that_it_was() {
    let host = Host::on(MemoryStore::shared());
    let (a, b) = fill(&host, Version::V2);
    for (node, images, at) in [(a, 1, "/at-a"), (b, 2, "/at-b")] {
        assert_eq!(export(&host, Some(node), at).unwrap().images, images);
        let out = copy_of(&host, at);
        assert_eq!(out.shows(None).unwrap(), host.shows(Some(node)).unwrap());
        let d = out.place().descriptor().unwrap();
        assert_eq!((d.top, d.images.len()), (Guid::TOP, images));
        assert_eq!(d.chain(d.top).unwrap().len(), images);
        out.write(0, 4096, 7);
        assert_eq!(out.findings().unwrap(), [""; 0]);
    }
    let names = tree::list(&copy_of(&host, "/at-b").place()).unwrap();
    assert_eq!(names[0].name.as_deref(), Some("a"));
    assert_eq!(
        kind(export(&host, Some(Guid::new_v4()), "/x")),
        Kind::NotFound
    );
}

#[test]
fn what_is_live_can_be_exported_but_for_its_top() {
    let host = Host::on(MemoryStore::shared());
    let (_, b) = fill(&host, Version::V2);
    let disk = host.place().open().unwrap();
    disk.write(0, &[8; 512]).unwrap();
    export(&host, Some(b), "/b").unwrap();
    assert_eq!(kind(export(&host, None, "/all")), Kind::InUse);
    let top = host.place().descriptor().unwrap().top;
    assert_eq!(kind(export(&host, Some(top), "/top")), Kind::InUse);
    disk.flush().unwrap();
    let shown = host.shows(None);
    drop(disk);
    assert!(shown.is_err(), "it was open for writing");
    // Killed with a journal, which says what the image alone does not: the original is closed first.
    assert!(!host.findings().unwrap().is_empty());
    export(&host, None, "/all").unwrap();
    let out = copy_of(&host, "/all");
    assert_eq!(out.findings().unwrap(), [""; 0]);
    assert_eq!(host.findings().unwrap(), [""; 0]);
    assert_eq!(out.shows(None).unwrap(), host.shows(None).unwrap());
}

#[test]
fn an_unfinished_merge_and_a_damaged_image_are_refused_and_leave_nothing() {
    let host = Host::on(MemoryStore::shared());
    let (a, b) = fill(&host, Version::V2);
    let place = host.place();
    let d = place.descriptor().unwrap();
    let mut marked = d.clone();
    marked.shot_mut(b).unwrap().temporary = Temporary::Temporary;
    host.put(&marked);
    assert_eq!(kind(export(&host, None, "/x")), Kind::InUse);
    assert_eq!(kind(export(&host, Some(b), "/x")), Kind::InUse);
    export(&host, Some(a), "/a").unwrap();
    host.put(&d);
    let path = place.file_of(d.image(b).unwrap()).unwrap();
    let file = host.store().open(&path, Access::Write).unwrap();
    file.write_at(&[0; 16], 0).unwrap();
    drop(file);
    assert_eq!(kind(export(&host, None, "/x")), Kind::Corrupt);
    let left = host.store().list(Path::new("/")).unwrap();
    assert_eq!(left, [Path::new("a"), Path::new("d")]);
}

#[test]
fn a_raw_base_stays_one() {
    let host = Host::on(MemoryStore::shared());
    host.init_raw(CLUSTERS * CLUSTER);
    let a = host.snap("a");
    host.write(0, 512, 1);
    export(&host, None, "/all").unwrap();
    export(&host, Some(a), "/raw").unwrap();
    let out = copy_of(&host, "/all");
    assert!(out.place().descriptor().unwrap().base_is_raw());
    assert_eq!(out.shows(None).unwrap(), host.shows(None).unwrap());
    let raw = copy_of(&host, "/raw");
    assert_eq!(raw.shows(None).unwrap(), host.shows(Some(a)).unwrap());
    assert_eq!(raw.files(), ["DiskDescriptor.xml", "root.hds"]);
}

#[test]
fn a_power_cut_leaves_the_whole_directory_or_none() {
    let start = MemoryStore::new();
    let host = Host::after(&start);
    let (_, b) = fill(&host, Version::V2);
    let expected = [host.shows(None).unwrap(), host.shows(Some(b)).unwrap()];
    let whole = |state: &MemoryStore| {
        let out = Host::at(std::sync::Arc::new(state.clone()), "/out");
        if out.store().kind(Path::new("/out")).unwrap().is_none() {
            return false;
        }
        assert_eq!(out.shows(None).unwrap(), expected[0]);
        assert_eq!(out.shows(Some(b)).unwrap(), expected[1]);
        assert_eq!(out.findings().unwrap(), [""; 0]);
        assert_eq!(tree::list(&out.place()).unwrap().len(), 2);
        true
    };
    let budget = Budget {
        exhaustive_units: 8,
        seeded: 40,
        seed: 3,
    };
    let store = RecordingStore::on(&start);
    export(&Host::on(store.store()), None, "/out").unwrap();
    store.mark(1);
    for point in 0..=store.log().len() {
        let done = store.marks_before(point).contains(&1);
        for state in store.states_at(point, &budget) {
            let there = whole(&state.build());
            assert!(there || !done, "{state}");
        }
    }
    for (fault, calls) in [(Fault::Eio, Calls::All), (Fault::Enospc, Calls::Changes)] {
        for n in 0.. {
            let store = RecordingStore::on(&start);
            store.count(calls);
            store.fail_at(n, fault);
            let done = export(&Host::on(store.store()), None, "/out");
            let met = store.calls() > n;
            assert_eq!(whole(&store.snapshot()), done.is_ok(), "call {n}");
            if done.is_err() {
                let host = Host::after(&store.snapshot());
                export(&host, None, "/out").unwrap();
            }
            if !met {
                assert!(n > 20, "{n} calls only");
                break;
            }
        }
    }
}

#[test]
fn what_is_exported_to_files_is_clean_sparse_and_private() {
    let _alone = alone();
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().canonicalize().unwrap().join(name);
    let host = Host::at(RealStore::shared(), at("disk").to_str().unwrap());
    let (a, b) = fill(&host, Version::V2);
    export(&host, None, at("all").to_str().unwrap()).unwrap();
    export(&host, Some(b), at("b").to_str().unwrap()).unwrap();
    for out in ["all", "b"] {
        let out = Host::at(RealStore::shared(), at(out).to_str().unwrap());
        let place = out.place();
        let d = place.descriptor().unwrap();
        for image in &d.images {
            let path = place.dir().join(&image.file);
            let meta = path.metadata().unwrap();
            assert_eq!(meta.mode() & 0o777, 0o600);
            assert!(meta.blocks() * 512 < meta.len(), "{image:?} has no hole");
            let check = Command::new("qemu-img")
                .args(["check", "-q", "-f", "parallels"])
                .arg(&path)
                .output()
                .expect("qemu-img is required: apt-get install qemu-utils");
            assert!(check.status.success(), "{check:?}");
        }
        assert_eq!(out.findings().unwrap(), [""; 0]);
    }
    // It opens wherever it is moved to.
    std::fs::rename(at("all"), at("moved")).unwrap();
    std::fs::remove_dir_all(at("disk")).unwrap();
    let opener = Opener::host();
    let source = Source {
        path: at("moved/DiskDescriptor.xml"),
        descriptor: true,
        snapshot: None,
    };
    let place = Place::disk(&opener, &source, &[], true).unwrap();
    for node in [a, b] {
        opener
            .open(&place.source(Some(node)), &place.open_options(false))
            .unwrap();
    }
    place.open().unwrap().close().unwrap();
}
