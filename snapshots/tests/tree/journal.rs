//! Disks that crashed with a journal, and what is done to their trees then.

use std::path::{Path, PathBuf};

use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::format::ploop::Version;
use ploop::store::Access;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, RecordingStore};
use snapshots::export::export_disk;
use snapshots::merge::{Merge, Step};
use snapshots::snapshot::{Live, NewSnapshot, take};

use crate::common::{CLUSTER, CLUSTERS, DIR, Host};

/// What the disk holds where nothing else was written.
const BELOW: u8 = 1;

/// A disk that is all data, with snapshot `a`.
fn with_data(host: Host) -> (Host, Guid) {
    host.init(Version::V2);
    host.write(0, CLUSTER * CLUSTERS, BELOW);
    let a = host.snap("a");
    (host, a)
}

fn in_memory() -> Host {
    with_data(Host::on(MemoryStore::shared())).0
}

fn top(host: &Host) -> PathBuf {
    let d = host.place().descriptor().unwrap();
    Path::new(DIR).join(&d.image(d.top).unwrap().file)
}

fn journal(host: &Host) -> PathBuf {
    let name = top(host).file_name().unwrap().to_str().unwrap().to_owned();
    Path::new(DIR).join(format!(".ploop/journal.{name}"))
}

/// The entry of cluster 1 of the first image then names nothing.
fn damage_base(host: &Host) {
    let base = Path::new(DIR).join("root.hds");
    let file = host.store().open(&base, Access::Write).unwrap();
    file.write_at(&0x00FF_0000u32.to_le_bytes(), 64 + 4)
        .unwrap();
}

/// Goal: what was flushed is shown or refused, also on a branch that is kept aside. Method: another
/// tool clears the mark after a crash; back to a snapshot; then another operation.
#[test]
fn a_branch_that_is_kept_keeps_its_journal() {
    let host = in_memory();
    host.write_and_die(4096, 4096, 7);
    let journal = journal(&host);
    let file = host.store().open(&top(&host), Access::Write).unwrap();
    file.write_at(&[0; 4], 44).unwrap();
    drop(file);
    assert!(host.shows(None).is_err());
    let kept = crate::switch::to(&host, "a").unwrap().kept.unwrap();
    let kept = Guid::parse(&kept.guid).unwrap();
    assert!(host.shows(Some(kept)).is_err());
    host.snap("b");
    host.snap("c");
    assert!(host.store().kind(&journal).unwrap().is_some());
    assert!(host.shows(Some(kept)).is_err(), "old bytes, in silence");
}

/// Goal: a disk that was closed is a closed one, whether or not its journal's name comes back with
/// the power. Method: the name is put back after the close, before or without another write.
#[test]
fn a_journal_that_ended_stops_nothing() {
    for write in [false, true] {
        let host = in_memory();
        let disk = host.place().open().unwrap();
        disk.write(4096, &[7; 4096]).unwrap();
        disk.flush().unwrap();
        let (journal, keep) = (journal(&host), Path::new(DIR).join("keep"));
        host.store().hard_link(&journal, &keep).unwrap();
        disk.close().unwrap();
        drop(disk);
        host.store().rename(&keep, &journal).unwrap();
        if write {
            host.write(8192, 4096, 8);
        }
        assert_eq!(host.shows(None).unwrap()[4096], 7);
        export_disk(&host.place(), None, Path::new("/out"), &|_, _| ()).unwrap();
        host.snap("b");
        assert!(host.store().kind(&journal).unwrap().is_none(), "swept");
    }
}

#[test]
fn going_back_from_clusters_that_cannot_be_completed_keeps_them_as_they_are() {
    let host = in_memory();
    host.write(0, CLUSTER, 2);
    host.snap("b");
    host.write_and_die(CLUSTER + 4096, 4096, 7);
    damage_base(&host);
    let journal = journal(&host);
    let done = crate::switch::to(&host, "b").unwrap();
    assert!(done.kept.is_some());
    assert!(
        done.notes
            .iter()
            .any(|n| n.contains("could not be completed")),
        "{:?}",
        done.notes
    );
    assert!(host.store().kind(&journal).unwrap().is_some());
}

/// Goal: a snapshot that cannot be made is no reason to stop the writers.
#[test]
fn a_snapshot_over_a_cluster_that_cannot_be_read_fails_before_its_barrier() {
    let host = in_memory();
    damage_base(&host);
    let place = host.place();
    let disk = place.open().unwrap();
    disk.write(CLUSTER + 4096, &[7; 4096]).unwrap();
    disk.flush().unwrap();
    let live = Live {
        place: &place,
        disk: &disk,
    };
    assert!(take(live, &NewSnapshot::default()).is_err());
    disk.write(3 * CLUSTER, &[7; 4096]).unwrap();
    disk.flush().unwrap();
}

/// Goal: after a merge into the live top and a crash, no program finds zeros where there was data,
/// not even one that looks at no journal. Method: every crash state of the merge, once as it is and
/// once without its journals.
#[test]
fn a_merge_gives_nothing_up_that_only_a_journal_names() {
    let record = RecordingStore::new();
    let (host, a) = with_data(Host::on(record.store()));
    let place = host.place();
    let disk = place.open().unwrap();
    disk.write(5 * CLUSTER + 4096, &[7; 4096]).unwrap();
    disk.flush().unwrap();
    let start = record.log().len();
    let mut merge = Merge::begin(&place, &disk, a).unwrap();
    while merge.step(CLUSTER).unwrap() == Step::More {}
    drop(merge);
    drop(disk);
    let budget = Budget {
        exhaustive_units: 4,
        seeded: 10,
        seed: 1,
    };
    let mut looked = 0;
    for point in start..=record.log().len() {
        for state in record.states_at(point, &budget) {
            looked += 1;
            for with_journal in [true, false] {
                let memory = state.build();
                let after = Host::after(&memory);
                if !with_journal {
                    forget_journals(&after);
                }
                let Ok(disk) = after.place().open() else {
                    assert!(!with_journal, "point {point}: refused\n{state}");
                    continue;
                };
                let mut got = vec![0; (CLUSTER * CLUSTERS) as usize];
                let read = disk.read(0, &mut got);
                assert!(
                    read.is_err() && !with_journal || !got.contains(&0),
                    "point {point}, with its journal {with_journal}\n{state}"
                );
            }
        }
    }
    assert!(looked > 1000, "{looked}");
}

fn forget_journals(host: &Host) {
    let side = Path::new(DIR).join(".ploop");
    for name in host.store().list(&side).unwrap_or_default() {
        if name.to_str().unwrap().starts_with("journal.") {
            host.store().remove_file(&side.join(name)).unwrap();
        }
    }
}
