//! Backups that others stand in the way of: files that are not theirs, records that lie, two at once.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use ploop::Kind;
use ploop::device::Device;
use ploop::disk::open::Opener;
use ploop::format::ploop::Version;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, RecordingStore};
use ploop::store::{Access, Store};
use serde_json::json;
use snapshots::Root;
use snapshots::backup::{self, Request};
use snapshots::delete::Watch;
use snapshots::merge::Progress;
use snapshots::snapshot::Live;

use crate::backup::{all, end, never, request, run, shows};
use crate::common::{CLUSTER, Host, kind};

/// Does something at each look.
struct Meanwhile<F: Fn()>(F);

impl<F: Fn()> Watch for Meanwhile<F> {
    fn go_on(&self, _: u64) -> bool {
        (self.0)();
        true
    }
    fn progress(&self, _: Progress) {}
}

fn put(store: &dyn Store, path: &str, bytes: &[u8]) {
    drop(store.remove_file(Path::new(path)));
    let file = store.create(Path::new(path), 0o600).unwrap();
    file.write_at(bytes, 0).unwrap();
    file.sync().unwrap();
}

fn get(store: &dyn Store, path: &str) -> Vec<u8> {
    let file = store.open(Path::new(path), Access::Read).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Goal: somebody else's file is never taken for the backup, whose bits would be gone with it. Method:
/// one appears under the target's name while the copy runs.
#[test]
fn a_file_that_came_between_is_not_the_backup() {
    let host = one_disk();
    let place = host.place();
    let disk = place.open().unwrap();
    let live = Live {
        place: &place,
        disk: &disk,
    };
    disk.write(0, &vec![5; 100 * CLUSTER as usize]).unwrap();
    let id = backup::begin(live, &request("/b/0", false)).unwrap();
    let id = id.pending.id;
    let watch = Meanwhile(|| put(host.store(), "/b/0", b"a letter"));
    assert_eq!(kind(backup::copy(&place, &id, &watch)), Kind::Exists);
    for _ in 0..2 {
        assert_eq!(kind(backup::copy(&place, &id, &never())), Kind::Exists);
    }
    assert_eq!(get(host.store(), "/b/0"), b"a letter");
    host.store().remove_file(Path::new("/b/0")).unwrap();
    backup::copy(&place, &id, &never()).unwrap().unwrap();
    end(live, &id).unwrap();
    assert!(shows(&host, "/b/0", None) == all(&disk));
}

/// Goal: a backup is done only when its name is durable. Method: the copy was killed right behind its
/// rename; what the next one calls done is there after a power cut, whichever.
#[test]
fn a_backup_that_was_killed_behind_its_rename_is_durable_when_it_is_done() {
    let memory = MemoryStore::new();
    let id = {
        let host = Host::after(&memory);
        host.init(Version::V2);
        host.store().create_dir(Path::new("/b")).unwrap();
        host.store().sync_dir(Path::new("/")).unwrap();
        let place = host.place();
        let disk = place.open().unwrap();
        let live = Live {
            place: &place,
            disk: &disk,
        };
        disk.write(0, &[1; 9000]).unwrap();
        let id = backup::begin(live, &request("/b/0", false)).unwrap();
        let id = id.pending.id;
        backup::copy(&place, &id, &never()).unwrap().unwrap();
        let (target, part) = (Path::new("/b/0"), Path::new("/b/0.part"));
        host.store().rename(target, part).unwrap();
        host.store().sync_dir(Path::new("/b")).unwrap();
        disk.close().unwrap();
        id
    };
    let store = RecordingStore::on(&memory);
    {
        let host = Host::on(store.store());
        let place = host.place();
        let disk = place.open().unwrap();
        let live = Live {
            place: &place,
            disk: &disk,
        };
        let (target, part) = (Path::new("/b/0"), Path::new("/b/0.part"));
        host.store().rename_new(part, target).unwrap();
        backup::copy(&place, &id, &never()).unwrap().unwrap();
        backup::finish(live, &id).unwrap();
        disk.close().unwrap();
    }
    let budget = Budget {
        exhaustive_units: 3,
        seeded: 8,
        seed: 1,
    };
    for point in store.crash_points() {
        for state in store.states_at(point, &budget) {
            let host = Host::after(&state.build());
            let done = backup::pending(&host.place()).unwrap()[0].done;
            let named = host.store().kind(Path::new("/b/0")).unwrap().is_some();
            assert!(named || !done, "point {point}");
        }
    }
}

/// Two disks of one host, and a directory for what both back up.
fn two_disks() -> [Host; 2] {
    let store = MemoryStore::shared();
    let hosts = ["/one", "/two"].map(|dir| Host::at(store.clone(), dir));
    for host in &hosts {
        host.init_of(Version::V2, 300);
    }
    store.create_dir(Path::new("/b")).unwrap();
    hosts
}

/// A disk of 300 clusters on a host that has a directory for backups.
fn one_disk() -> Host {
    let host = Host::on(MemoryStore::shared());
    host.init_of(Version::V2, 300);
    host.store().create_dir(Path::new("/b")).unwrap();
    host
}

/// Goal: two disks never write one file. Method: both begin a backup to it before either copies; the
/// first one runs on while the second tries.
#[test]
fn of_two_backups_to_one_file_one_is_refused() {
    let hosts = two_disks();
    let places = [hosts[0].place(), hosts[1].place()];
    let disks = [places[0].open().unwrap(), places[1].open().unwrap()];
    let live = |n: usize| Live {
        place: &places[n],
        disk: &disks[n],
    };
    let mut ids = Vec::new();
    for (n, disk) in disks.iter().enumerate() {
        disk.write(0, &vec![5 + n as u8; 100 * CLUSTER as usize])
            .unwrap();
        let begun = backup::begin(live(n), &request("/b/0", false)).unwrap();
        ids.push(begun.pending.id);
    }
    let watch = Meanwhile(|| {
        assert_eq!(
            kind(backup::copy(&places[1], &ids[1], &never())),
            Kind::Exists
        );
    });
    backup::copy(&places[0], &ids[0], &watch).unwrap().unwrap();
    end(live(0), &ids[0]).unwrap();
    assert!(shows(&hosts[0], "/b/0", None) == all(&disks[0]));
    assert_eq!(
        kind(backup::copy(&places[1], &ids[1], &never())),
        Kind::Exists
    );
    backup::abandon(live(1), &ids[1]).unwrap();
    let sound = backup::verify(&hosts[0].opener, Path::new("/b/0"), &|_, _| ()).unwrap();
    assert!(sound.ok, "{sound:?}");
}

/// Goal: dropping a backup leaves the files of another one alone. Method: one that never came to its
/// copy, beside one that is being copied to the same file.
#[test]
fn dropping_one_leaves_the_files_of_another() {
    let hosts = two_disks();
    let places = [hosts[0].place(), hosts[1].place()];
    let disks = [places[0].open().unwrap(), places[1].open().unwrap()];
    let live = |n: usize| Live {
        place: &places[n],
        disk: &disks[n],
    };
    let idle = backup::begin(live(1), &request("/b/0", false)).unwrap();
    disks[0].write(0, &vec![5; 100 * CLUSTER as usize]).unwrap();
    let id = backup::begin(live(0), &request("/b/0", false)).unwrap();
    let id = id.pending.id;
    let watch = Meanwhile(|| drop(backup::abandon(live(1), &idle.pending.id)));
    backup::copy(&places[0], &id, &watch).unwrap().unwrap();
    end(live(0), &id).unwrap();
    assert!(shows(&hosts[0], "/b/0", None) == all(&disks[0]));
}

/// Goal: of two backups that begin at the same time each is there when its command says so. Method:
/// the second one begins within each of the first one's syncs.
#[test]
fn backups_that_begin_together_leave_each_other_alone() {
    for sync in 1..12 {
        let store = RecordingStore::new();
        let host = Host::on(store.store());
        host.init(Version::V2);
        host.store().create_dir(Path::new("/b")).unwrap();
        let place = host.place();
        let disk = place.open().unwrap();
        let live = Live {
            place: &place,
            disk: &disk,
        };
        let begin = |name: &str| {
            let asked = Request {
                target: format!("/b/{name}").into(),
                tracker: Some(name.to_owned()),
                ..Request::default()
            };
            backup::begin(live, &asked).unwrap().pending.id
        };
        let (within, other) = mpsc::channel();
        let behind = within.clone();
        let before = store.syncs();
        store.during_sync(move |n| {
            if n == before + sync {
                within.send(()).unwrap_or_default();
                // It may get as far as it can.
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let begin = &begin;
        std::thread::scope(|s| {
            let second = s.spawn(move || {
                other.recv().unwrap();
                begin("y")
            });
            let first = begin("x");
            // Where it has no such sync.
            behind.send(()).unwrap_or_default();
            for id in [first, second.join().unwrap()] {
                let copied = backup::copy(&place, &id, &never());
                copied.unwrap_or_else(|e| panic!("sync {sync}: {e}"));
            }
        });
    }
}

/// Goal: a record that lies is an answer, not a crash. Method: lengths that no file has, and whose sum
/// no number holds.
#[test]
fn records_with_absurd_numbers_are_found_wrong() {
    let host = Host::on(MemoryStore::shared());
    host.init(Version::V2);
    host.store().create_dir(Path::new("/b")).unwrap();
    let place = host.place();
    let disk = place.open().unwrap();
    let live = Live {
        place: &place,
        disk: &disk,
    };
    run(live, &request("/b/0", false)).unwrap();
    run(live, &request("/b/1", true)).unwrap();
    for file in ["/b/0.json", "/b/1.json"] {
        let mut record: serde_json::Value =
            serde_json::from_slice(&get(host.store(), file)).unwrap();
        record["length"] = u64::MAX.into();
        record["size"] = u64::MAX.into();
        put(host.store(), file, record.to_string().as_bytes());
    }
    let found = backup::verify(&host.opener, Path::new("/b/1"), &|_, _| ()).unwrap();
    assert!(found.files.iter().all(|f| f.wrong.is_some()), "{found:?}");
}

/// Goal: how far a part is, is not believed against the file and the disk. Method: the mark of a backup
/// that was stopped, with numbers that no such file has.
#[test]
fn a_mark_with_absurd_numbers_is_not_believed() {
    struct Stop;
    impl Watch for Stop {
        fn go_on(&self, _: u64) -> bool {
            false
        }
        fn progress(&self, _: Progress) {}
    }
    let far = u64::MAX;
    for (n, (field, value)) in [
        ("at", json!(far)),
        ("at", json!(1)),
        ("next", json!(0)),
        ("next", json!(far)),
        ("l1", json!([[far, 1]])),
        ("l1", json!([[0, 0]])),
        ("l1", json!([[0, 2], [1, 1]])),
    ]
    .into_iter()
    .enumerate()
    {
        let host = one_disk();
        let place = host.place();
        let disk = place.open().unwrap();
        let live = Live {
            place: &place,
            disk: &disk,
        };
        disk.write(0, &vec![5; 200 * CLUSTER as usize]).unwrap();
        let id = backup::begin(live, &request("/b/0", false)).unwrap();
        let id = id.pending.id;
        assert!(backup::copy(&place, &id, &Stop).unwrap().is_none());
        let mut state: serde_json::Value =
            serde_json::from_slice(&get(host.store(), "/b/0.part.json")).unwrap();
        assert!(state["at"].as_u64().is_some_and(|at| at > 0), "{state}");
        match field {
            "at" => state["at"] = value,
            field => state["mark"][field] = value,
        }
        put(host.store(), "/b/0.part.json", state.to_string().as_bytes());
        backup::copy(&place, &id, &never()).unwrap().unwrap();
        end(live, &id).unwrap();
        assert!(shows(&host, "/b/0", None) == all(&disk), "{n}");
    }
}

/// Goal: where there are records, a restore holds to them. Method: a damaged file that has one, on a
/// file whose record is gone, or damaged.
#[test]
fn a_restore_holds_to_the_records_that_there_are() {
    let store = MemoryStore::shared();
    let host = Host::on(store.clone());
    host.init(Version::V2);
    for dir in ["/b", "/store"] {
        store.create_dir(Path::new(dir)).unwrap();
    }
    let place = host.place();
    let disk = place.open().unwrap();
    let live = Live {
        place: &place,
        disk: &disk,
    };
    disk.write(0, &[3; 8192]).unwrap();
    run(live, &request("/b/0", false)).unwrap();
    disk.write(CLUSTER, &[7; 4096]).unwrap();
    run(live, &request("/b/1", true)).unwrap();
    let root = Root::on(Opener::on(store.clone()), Path::new("/store"), true, false).unwrap();
    let restore = |name: &str| backup::restore(&root, name, &["/b/1".into()], &|_, _| ());
    let record = get(&*store, "/b/0.json");
    let sound = get(&*store, "/b/1");
    let mut bad = sound.clone();
    let at = bad.windows(8).position(|w| w == [7; 8]).unwrap();
    bad[at] = 8;
    store.remove_file(Path::new("/b/0.json")).unwrap();
    assert!(!restore("sound").unwrap().verified);
    put(&*store, "/b/1", &bad);
    assert_eq!(kind(restore("a")), Kind::Corrupt);
    put(&*store, "/b/1", &sound);
    put(&*store, "/b/0.json", &record[..record.len() / 2]);
    assert_eq!(kind(restore("b")), Kind::Corrupt);
    put(&*store, "/b/0.json", &record);
    assert!(restore("c").unwrap().verified);
}
