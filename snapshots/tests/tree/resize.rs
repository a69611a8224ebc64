//! The size limit of a disk that was shrunk: with nodes, with writes, and raised under its clients.

use ploop::Kind;
use ploop::device::Device;
use ploop::format::ploop::Version;
use ploop::store::memory::MemoryStore;
use snapshots::delete::Watch;
use snapshots::enlarge::enlarge;
use snapshots::merge::Progress;
use snapshots::resize::{ResizeOptions, Resized, offline};
use snapshots::snapshot::{Live, NewSnapshot, take_offline};
use snapshots::switch::{SwitchOptions, switch};
use std::sync::Arc;

use crate::common::{CLUSTER, CLUSTERS, Host};

struct Until(Option<u64>);

impl Watch for Until {
    fn go_on(&self, _: u64) -> bool {
        self.0 != Some(0)
    }

    fn progress(&self, _: Progress) {}
}

fn options(clusters: u64, shrink: bool) -> ResizeOptions {
    ResizeOptions {
        size: clusters * CLUSTER,
        shrink,
        flatten: false,
        filesystem: false,
    }
}

fn resize(host: &Host, clusters: u64, shrink: bool) -> ploop::Result<Resized> {
    let done = offline(&host.place(), &options(clusters, shrink), &Until(None));
    done.map(|r| r.unwrap())
}

fn clusters(host: &Host) -> u64 {
    let place = host.place();
    let disk = place
        .opener()
        .open(&place.source(None), &place.open_options(false));
    disk.unwrap().size() / CLUSTER
}

fn named(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: Some(name.to_owned()),
        ..NewSnapshot::default()
    }
}

#[test]
fn each_node_has_the_size_that_it_was_made_with() {
    for version in [Version::V1, Version::V2] {
        let host = Host::on(Arc::new(MemoryStore::new()));
        host.init(version);
        take_offline(&host.place(), &named("first")).unwrap();
        resize(&host, 2, true).unwrap();
        take_offline(&host.place(), &named("cut")).unwrap();
        resize(&host, 9, false).unwrap();
        for (name, size) in [("cut", 2), ("first", CLUSTERS), ("cut", 2)] {
            let to = SwitchOptions {
                to: name.to_owned(),
                ..SwitchOptions::default()
            };
            let switched = switch(&host.place(), &to).unwrap();
            assert_eq!((switched.size, clusters(&host)), (size * CLUSTER, size));
        }
        // What was the top is a branch of its size.
        let place = host.place();
        let (d, meta) = (place.descriptor().unwrap(), place.meta().unwrap());
        let kept = place.find(&d, &meta, "rollback-1").unwrap();
        let source = place.source(Some(kept));
        let disk = place.opener().open(&source, &place.open_options(false));
        assert_eq!(disk.unwrap().size(), 9 * CLUSTER);
    }
}

#[test]
fn nothing_is_behind_the_limit_and_data_is_never_cut() {
    let host = Host::on(Arc::new(MemoryStore::new()));
    host.init(Version::V2);
    let place = host.place();
    let disk = place.open().unwrap();
    disk.write(4 * CLUSTER + 512, &[7; 512]).unwrap();
    disk.close().unwrap();
    drop(disk);
    for size in [0, 1, 4] {
        let e = resize(&host, size, true).unwrap_err();
        let kind = if size == 0 {
            Kind::Invalid
        } else {
            Kind::Unsupported
        };
        assert_eq!(e.kind(), kind, "{e}");
    }
    assert_eq!(resize(&host, 6, true).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(resize(&host, 5, false).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(clusters(&host), CLUSTERS);
    resize(&host, 5, true).unwrap();
    let disk = place.open().unwrap();
    assert_eq!(disk.size(), 5 * CLUSTER);
    let end = 5 * CLUSTER;
    for e in [
        disk.write(end, &[1; 512]).unwrap_err(),
        disk.read(end - 512, &mut [0; 1024]).unwrap_err(),
        disk.zero(end..end + 512, Default::default()).unwrap_err(),
        disk.discard(0..end + 512).unwrap_err(),
    ] {
        assert_eq!(e.kind(), Kind::Invalid, "{e}");
    }
    disk.close().unwrap();
}

#[test]
fn a_limit_is_raised_under_clients_and_stays_raised() {
    for (to, shown) in [(4, 4), (CLUSTERS, CLUSTERS), (9, 9)] {
        let host = Host::on(Arc::new(MemoryStore::new()));
        host.init(Version::V2);
        resize(&host, 2, true).unwrap();
        let place = host.place();
        let disk = place.open().unwrap();
        let live = Live {
            place: &place,
            disk: &disk,
        };
        let grown = enlarge(live, to * CLUSTER).unwrap();
        assert_eq!(grown.to, shown * CLUSTER);
        assert_eq!(disk.size(), shown * CLUSTER);
        disk.write(shown * CLUSTER - 512, &[5; 512]).unwrap();
        disk.close().unwrap();
        drop(disk);
        assert_eq!(clusters(&host), shown);
        let disk = place.open().unwrap();
        let mut last = [0; 512];
        disk.read(shown * CLUSTER - 512, &mut last).unwrap();
        assert_eq!(last, [5; 512]);
    }
}

/// Goal: a disk that was shrunk and cannot grow is as small as it was, and who asks twice is not
/// refused the second time.
#[test]
fn a_limit_stays_where_the_images_cannot_grow_and_asking_again_changes_nothing() {
    let host = Host::on(Arc::new(MemoryStore::new()));
    host.init(Version::V2);
    resize(&host, 2, true).unwrap();
    let place = host.place();
    let disk = place.open().unwrap();
    let live = || Live {
        place: &place,
        disk: &disk,
    };
    for size in [1 << 60, u64::MAX] {
        let e = enlarge(live(), size).unwrap_err();
        assert_eq!(e.kind(), Kind::Invalid, "{e}");
        assert_eq!(disk.size(), 2 * CLUSTER);
        let (d, meta) = (place.descriptor().unwrap(), place.meta().unwrap());
        assert_eq!(meta.size_of(&d, d.top), Some(2 * CLUSTER));
    }
    for (size, from) in [(4, 2), (4, 4), (9, 4), (9, 9)] {
        let grown = enlarge(live(), size * CLUSTER - 1).unwrap();
        assert_eq!(
            (grown.from / CLUSTER, grown.to / CLUSTER),
            (from, size),
            "{size}"
        );
    }
    disk.close().unwrap();
    drop(disk);
    assert_eq!(clusters(&host), 9);
}

/// Goal: nobody waits for the copy of a disk to learn that no disk can be so large.
#[test]
fn a_size_that_no_image_can_have_is_refused_before_anything_is_copied() {
    struct Never;
    impl Watch for Never {
        fn go_on(&self, _: u64) -> bool {
            panic!("something is copied");
        }
        fn progress(&self, _: Progress) {}
    }
    for (version, size) in [(Version::V1, 4 << 40), (Version::V2, 1 << 60)] {
        let host = Host::on(Arc::new(MemoryStore::new()));
        host.init(version);
        host.write(0, 512, 7);
        for flatten in [false, true] {
            let options = ResizeOptions {
                size,
                shrink: false,
                flatten,
                filesystem: true,
            };
            let e = offline(&host.place(), &options, &Never).unwrap_err();
            assert_eq!(e.kind(), Kind::Invalid, "{e}");
        }
        assert_eq!(clusters(&host), CLUSTERS);
    }
}

#[test]
fn what_is_stopped_after_its_commit_is_done_and_the_next_one_ends_it() {
    let host = Host::on(Arc::new(MemoryStore::new()));
    host.init(Version::V2);
    let place = host.place();
    let disk = place.open().unwrap();
    disk.write(0, &[7; 512]).unwrap();
    disk.close().unwrap();
    drop(disk);
    let stopped = offline(&place, &options(9, false), &Until(Some(0)));
    let stopped = stopped.unwrap().unwrap();
    assert!(stopped.note.unwrap().contains("--continue"));
    assert_eq!(
        (clusters(&host), place.descriptor().unwrap().images.len()),
        (9, 2)
    );
    let done = resize(&host, 10, false).unwrap();
    assert_eq!(
        (done.note, place.descriptor().unwrap().images.len()),
        (None, 1)
    );
    let mut first = [0; 512];
    let disk = place.open().unwrap();
    disk.read(0, &mut first).unwrap();
    assert_eq!((first, disk.size()), ([7; 512], 10 * CLUSTER));
}
