//! Rollback: what is shown afterwards, what is kept, and what is refused.

use std::path::Path;

use ploop::Kind;
use ploop::descriptor::{Guid, Temporary};
use ploop::device::Device;
use ploop::format::ploop::Version;
use ploop::locks::{Use, lock_image};
use ploop::store::Access;
use ploop::store::memory::MemoryStore;
use snapshots::switch::{SwitchOptions, Switched, switch};
use snapshots::tree;

use crate::common::{CLUSTER, CLUSTERS, DIR, Host, alone, kind};

pub(crate) fn to(host: &Host, to: impl ToString) -> ploop::Result<Switched> {
    let options = SwitchOptions {
        to: to.to_string(),
        ..SwitchOptions::default()
    };
    switch(&host.place(), &options)
}

pub(crate) fn discard(host: &Host, to: impl ToString) -> ploop::Result<Switched> {
    let options = SwitchOptions {
        to: to.to_string(),
        discard: true,
        keep_as: None,
    };
    switch(&host.place(), &options)
}

/// base: 1 in cluster 0; a: 2 in cluster 1; b: 3 in cluster 0; top: 4 in cluster 2.
fn grown(version: Version) -> (Host, Guid, Guid) {
    let host = Host::on(MemoryStore::shared());
    host.init(version);
    host.write(0, CLUSTER, 1);
    host.write(CLUSTER, CLUSTER, 2);
    let a = host.snap("a");
    host.write(0, 4096, 3);
    let b = host.snap("b");
    host.write(2 * CLUSTER, 512, 4);
    (host, a, b)
}

fn whole(host: &Host) {
    let place = host.place();
    place.sweep().unwrap();
    assert_eq!(host.files(), host.named());
    assert_eq!(host.findings().unwrap(), [""; 0]);
}

#[test]
fn a_rollback_destroys_nothing_and_every_node_can_be_gone_back_to() {
    for version in [Version::V1, Version::V2] {
        let (host, a, b) = grown(version);
        let shown = |n| host.shows(n).unwrap();
        let (at_a, at_b, at_top) = (shown(Some(a)), shown(Some(b)), shown(None));
        assert!(at_a != at_b && at_b != at_top);

        let done = to(&host, "a").unwrap();
        assert_eq!((done.to_name.as_deref(), done.depth), (Some("a"), 2));
        assert_eq!((done.size, done.discarded_bytes), (CLUSTERS * CLUSTER, 0));
        let kept = done.kept.unwrap();
        assert_eq!(kept.name.as_deref(), Some("rollback-1"));
        let kept = Guid::parse(&kept.guid).unwrap();
        assert_eq!(shown(None), at_a);
        assert_eq!(shown(Some(kept)), at_top);
        assert_eq!(shown(Some(b)), at_b);
        whole(&host);

        // Onto what was kept, by name; the disk was not written since, so no branch remains.
        let done = to(&host, "rollback-1").unwrap();
        assert_eq!(done.kept, None);
        assert_eq!(done.notes.len(), 1);
        assert!(done.discarded_bytes > 0);
        assert_eq!(shown(None), at_top);
        whole(&host);

        host.write(5 * CLUSTER, 512, 9);
        let at_top = shown(None);
        let done = to(&host, b).unwrap();
        let second = done.kept.unwrap();
        assert_eq!(second.name.as_deref(), Some("rollback-2"));
        assert_eq!(shown(None), at_b);
        assert_eq!(shown(Some(Guid::parse(&second.guid).unwrap())), at_top);
        let list = tree::list(&host.place()).unwrap();
        let story = &list
            .iter()
            .find(|s| s.guid == second.guid)
            .unwrap()
            .description;
        assert!(
            story.contains("rollback-1") && story.contains("to b at 2"),
            "{story}"
        );
        assert!(
            list.iter()
                .find(|s| s.guid == b.to_string())
                .unwrap()
                .current
        );

        // The new top is written like any other.
        host.write(0, 512, 7);
        assert_eq!(shown(None)[..512], [7; 512]);
        assert_eq!(shown(Some(b)), at_b);
        whole(&host);
    }
}

#[test]
fn discarding_gives_the_space_back_and_says_how_much() {
    let (host, a, _) = grown(Version::V2);
    let tops = host.named().len();
    let done = discard(&host, "a").unwrap();
    // Header and table, and one block of the one cluster.
    assert_eq!((done.discarded_bytes, done.kept), (8192, None));
    assert_eq!(host.files().len(), tops);
    whole(&host);
    assert_eq!(host.shows(None).unwrap(), host.shows(Some(a)).unwrap());
    let options = SwitchOptions {
        to: "b".into(),
        discard: true,
        keep_as: Some("x".into()),
    };
    assert_eq!(kind(switch(&host.place(), &options)), Kind::Invalid);
}

#[test]
fn the_branch_gets_the_name_that_was_asked_for_even_when_it_is_empty() {
    let (host, _, b) = grown(Version::V2);
    to(&host, "b").unwrap();
    let keep = |name: &str| {
        let options = SwitchOptions {
            to: "a".into(),
            discard: false,
            keep_as: Some(name.into()),
        };
        switch(&host.place(), &options)
    };
    assert_eq!(kind(keep("b")), Kind::Exists);
    assert_eq!(kind(keep("no/name")), Kind::Invalid);
    let kept = keep("mine").unwrap().kept.unwrap();
    let kept = Guid::parse(&kept.guid).unwrap();
    assert_eq!(
        host.shows(Some(kept)).unwrap(),
        host.shows(Some(b)).unwrap()
    );
    whole(&host);
}

#[test]
fn what_was_flushed_before_a_kill_is_kept_and_closed() {
    let (host, _, _) = grown(Version::V2);
    host.write_and_die(4 * CLUSTER, CLUSTER, 6);
    assert!(!host.findings().unwrap().is_empty());
    let at_top = host.shows(None).unwrap();
    let kept = to(&host, "a").unwrap().kept.unwrap();
    assert_eq!(
        host.shows(Some(Guid::parse(&kept.guid).unwrap())).unwrap(),
        at_top
    );
    whole(&host);
}

#[test]
fn a_damaged_top_is_put_aside_as_it_is() {
    let (host, _, _) = grown(Version::V2);
    let place = host.place();
    let d = place.descriptor().unwrap();
    let path = place.file_of(d.image(d.top).unwrap()).unwrap();
    let file = host.store().open(&path, Access::Write).unwrap();
    file.write_at(&[0xff; 4], 64).unwrap();
    drop(file);
    let done = to(&host, "b").unwrap();
    assert!(
        done.notes.iter().any(|n| n.contains("damaged")),
        "{:?}",
        done.notes
    );
    let kept = Guid::parse(&done.kept.unwrap().guid).unwrap();
    assert_eq!(
        place
            .file_of(place.descriptor().unwrap().image(kept).unwrap())
            .unwrap(),
        path
    );
    host.write(0, 512, 1);
    // Another one, whose file is gone.
    let d = place.descriptor().unwrap();
    let path = place.file_of(d.image(d.top).unwrap()).unwrap();
    host.store().remove_file(&path).unwrap();
    let done = discard(&host, "a").unwrap();
    assert_eq!(done.discarded_bytes, 0);
    host.shows(None).unwrap();
}

#[test]
fn what_cannot_be_switched_to_is_refused_by_name_and_changes_nothing() {
    let (host, a, _) = grown(Version::V2);
    let place = host.place();
    let before = (place.descriptor().unwrap(), host.files());
    assert_eq!(kind(to(&host, Guid::TOP)), Kind::Invalid);
    assert_eq!(kind(to(&host, "nobody")), Kind::NotFound);
    assert_eq!(kind(to(&host, Guid::new_v4())), Kind::NotFound);
    // Somebody has the top's file open.
    let d = place.descriptor().unwrap();
    let path = place.file_of(d.image(d.top).unwrap()).unwrap();
    let file = host.store().open(&path, Access::Write).unwrap();
    lock_image(file.as_ref(), Use::Read).unwrap();
    assert_eq!(kind(to(&host, "a")), Kind::InUse);
    drop(file);
    // A target that cannot be opened is none.
    let base = place.file_of(d.image(a).unwrap()).unwrap();
    let file = host.store().open(&base, Access::Write).unwrap();
    let mut magic = [0; 16];
    file.read_at(&mut magic, 0).unwrap();
    file.write_at(&[0; 16], 0).unwrap();
    assert_eq!(kind(to(&host, "a")), Kind::Corrupt);
    file.write_at(&magic, 0).unwrap();
    drop(file);
    let mut marked = d.clone();
    marked.shot_mut(a).unwrap().temporary = Temporary::Temporary;
    host.put(&marked);
    assert_eq!(kind(to(&host, "a")), Kind::NotFound);
    assert_eq!(kind(to(&host, a)), Kind::NotFound);
    host.put(&d);
    assert_eq!((place.descriptor().unwrap(), host.files()), before);
    to(&host, "a").unwrap();
}

#[test]
fn an_empty_top_over_a_deleted_snapshot_is_the_last_to_show_it() {
    let (host, _, b) = grown(Version::V2);
    to(&host, "b").unwrap();
    let at_b = host.shows(None).unwrap();
    let mut d = host.place().descriptor().unwrap();
    d.shot_mut(b).unwrap().temporary = Temporary::Temporary;
    host.put(&d);
    let kept = to(&host, "a").unwrap().kept.unwrap();
    assert_eq!(
        host.shows(Some(Guid::parse(&kept.guid).unwrap())).unwrap(),
        at_b
    );
}

#[test]
fn over_a_raw_base_the_new_top_is_v2_and_a_raw_top_is_refused() {
    let host = Host::on(MemoryStore::shared());
    host.init_raw(CLUSTERS * CLUSTER - 512);
    let raw = Path::new(DIR).join("root.hds");
    let file = host.store().open(&raw, Access::Write).unwrap();
    file.write_at(&[5; 512], CLUSTER).unwrap();
    drop(file);
    assert_eq!(kind(to(&host, Guid::TOP)), Kind::Invalid);
    let a = host.snap("a");
    host.write(0, 512, 1);
    let top = host.shows(None).unwrap();
    let done = to(&host, a).unwrap();
    assert_eq!(done.size, CLUSTERS * CLUSTER);
    let shown = host.shows(None).unwrap();
    assert_eq!(shown[CLUSTER as usize..][..512], [5; 512]);
    assert_eq!(shown[..512], [0; 512]);
    let kept = Guid::parse(&done.kept.unwrap().guid).unwrap();
    assert_eq!(host.shows(Some(kept)).unwrap(), top);
    whole(&host);

    // Two bases, and the raw one is the top: nothing that a delta could stand on.
    let mut d = host.place().descriptor().unwrap();
    let new = d.top;
    d.shot_mut(new).unwrap().parent = Guid::NONE;
    host.put(&d);
    assert_eq!(kind(to(&host, "a")), Kind::Unsupported);
}

#[test]
fn the_disk_gets_the_size_of_what_it_shows() {
    let (host, _, _) = grown(Version::V2);
    // A snapshot of a larger disk, as growing leaves it.
    let mut d = host.place().descriptor().unwrap();
    let file = d.image(d.top).unwrap().file.clone();
    let sectors = 2 * CLUSTERS * 64;
    let header = ploop::format::ploop::Header::new(Version::V2, 64, sectors).unwrap();
    let path = Path::new(DIR).join(file);
    host.store().remove_file(&path).unwrap();
    drop(ploop::format::ploop::create(host.store(), &path, &header, 0o600).unwrap());
    d.set_disk_sectors(sectors);
    host.put(&d);
    // Without a cluster, but larger than its parent: it is kept.
    let done = to(&host, "b").unwrap();
    assert_eq!(done.size, CLUSTERS * CLUSTER);
    assert_eq!(
        host.place().descriptor().unwrap().disk_sectors,
        Some(sectors / 2)
    );
    let kept = done.kept.unwrap();
    let done = to(&host, kept.guid).unwrap();
    assert_eq!(done.size, 2 * CLUSTERS * CLUSTER);
    assert_eq!(
        host.place().descriptor().unwrap().disk_sectors,
        Some(sectors)
    );
    assert_eq!(host.place().open().unwrap().size(), 2 * CLUSTERS * CLUSTER);
}

#[test]
fn a_disk_that_is_served_is_left_alone() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().canonicalize().unwrap().join("disk");
    let host = Host::at(ploop::store::RealStore::shared(), at.to_str().unwrap());
    host.init(Version::V2);
    let a = host.snap("a");
    let opener = ploop::disk::open::Opener::host();
    let source = host.place().source(None);
    let place = snapshots::place::Place::disk(&opener, &source, &[], true).unwrap();
    let disk = place.open().unwrap();
    disk.write(0, &[1; 512]).unwrap();
    let options = SwitchOptions {
        to: a.to_string(),
        ..SwitchOptions::default()
    };
    let e = switch(&place, &options).unwrap_err();
    assert_eq!(e.kind(), Kind::InUse);
    assert!(
        e.to_string().contains(&std::process::id().to_string()),
        "{e}"
    );
    disk.close().unwrap();
    drop(disk);
    switch(&place, &options).unwrap();
    assert_eq!(host.shows(None).unwrap()[..512], [0; 512]);
}
