//! Backups of a disk in memory: cut by the user, and by power cuts at every instant.

use std::cell::Cell;
use std::path::Path;

use ploop::Kind;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Source};
use ploop::format::ploop::Version;
use ploop::format::qcow2::Qcow2Delta;
use ploop::store::Access;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, RecordingStore};
use snapshots::backup::{self, Format, Record, Request};
use snapshots::delete::{self, Watch};
use snapshots::merge::Progress;
use snapshots::place::Place;
use snapshots::snapshot::Live;
use snapshots::tracker;

use crate::common::{CLUSTER, Host};

/// Stops after so many looks.
pub(crate) struct Looks(pub(crate) Cell<u64>);

impl Watch for Looks {
    fn go_on(&self, _: u64) -> bool {
        self.0.set(self.0.get().saturating_sub(1));
        self.0.get() > 0
    }
    fn progress(&self, _: Progress) {}
}

pub(crate) fn never() -> Looks {
    Looks(Cell::new(u64::MAX))
}

pub(crate) fn request(target: &str, since: bool) -> Request {
    Request {
        target: target.into(),
        since: since.then(|| "t".to_owned()),
        tracker: (!since).then(|| "t".to_owned()),
        granularity: (!since).then_some(4096),
        ..Request::default()
    }
}

/// To its end; what the snapshot showed.
pub(crate) fn run(live: Live<'_>, request: &Request) -> ploop::Result<Record> {
    let id = backup::begin(live, request)?.pending.id;
    let record = backup::copy(live.place, &id, &never())?.unwrap();
    end(live, &id)?;
    Ok(record)
}

pub(crate) fn end(live: Live<'_>, id: &str) -> ploop::Result<()> {
    backup::finish(live, id)?;
    backup::remove(live, id)?;
    delete::run(live, &never()).map(drop)
}

pub(crate) fn all(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

/// What the chain of a file shows.
pub(crate) fn shows(host: &Host, file: &str, format: Option<ploop::disk::open::Format>) -> Vec<u8> {
    let source = Source {
        path: file.into(),
        descriptor: false,
        snapshot: None,
    };
    let options = OpenOptions {
        format,
        ..OpenOptions::default()
    };
    all(&host.opener.open(&source, &options).unwrap())
}

/// Goal: a copy that is stopped goes on where it was, and is the same in the end. Method: stopped at
/// every look, in both formats that can go on, full and as an increment, while the disk is written to.
#[test]
fn a_copy_that_is_stopped_goes_on_where_it_was() {
    for (format, since) in [
        (Format::Qcow2, false),
        (Format::Raw, false),
        (Format::Ploop, false),
        (Format::Qcow2, true),
    ] {
        let host = Host::on(MemoryStore::shared());
        host.init_of(Version::V2, 300);
        host.store().create_dir(Path::new("/b")).unwrap();
        let place = host.place();
        let disk = place.open().unwrap();
        let live = Live {
            place: &place,
            disk: &disk,
        };
        if since {
            disk.write(10 * CLUSTER, &vec![9; 40 * CLUSTER as usize])
                .unwrap();
            run(live, &request("/b/base", false)).unwrap();
            disk.write(20 * CLUSTER, &vec![0; 10 * CLUSTER as usize])
                .unwrap();
        }
        for cluster in 0..200u64 {
            let byte = 1 + (cluster % 250) as u8;
            disk.write(
                cluster * CLUSTER + 4096,
                &vec![byte; CLUSTER as usize - 5000],
            )
            .unwrap();
        }
        let asked = Request {
            format,
            ..request("/b/f", since)
        };
        let id = backup::begin(live, &asked).unwrap().pending.id;
        let then = all(&disk);
        disk.write(0, &vec![77; 100 * CLUSTER as usize]).unwrap();
        let mut stops = 0;
        let record = loop {
            let looks = if format == Format::Ploop {
                stops + 3
            } else {
                1
            };
            if let Some(record) = backup::copy(&place, &id, &Looks(Cell::new(looks))).unwrap() {
                break record;
            }
            stops += 1;
            assert!(backup::begin(live, &asked).unwrap().resumed);
            assert!(stops < 100, "{format:?} gets no further");
        };
        assert!(stops > 2, "{format:?}: {stops}");
        end(live, &id).unwrap();
        let open = match format {
            Format::Raw => Some(ploop::disk::open::Format::Raw),
            _ => None,
        };
        let shown = shows(&host, "/b/f", open);
        assert!(shown[..then.len()] == then[..], "{format:?}");
        assert!(shown[then.len()..].iter().all(|b| *b == 0));
        if format == Format::Qcow2 {
            let file = host.store().open(Path::new("/b/f"), Access::Read).unwrap();
            let mut found = Vec::new();
            let audit = Qcow2Delta::open(file)
                .unwrap()
                .audit(&mut |f| found.push(f));
            audit.unwrap();
            assert!(found.is_empty(), "{found:?}");
        }
        assert_eq!(record.content.is_some(), !since);
        let sound = backup::verify(&host.opener, Path::new("/b/f"), &|_, _| ()).unwrap();
        assert!(sound.ok, "{sound:?}");
        let names = host.store().list(Path::new("/b")).unwrap();
        assert!(
            names.iter().all(|n| !n.to_str().unwrap().contains(".part")),
            "{names:?}"
        );
        assert!(place.meta().unwrap().backups.is_empty());
    }
}

/// Goal: an increment lacks nothing, whenever the power went. Method: a story on a recorded store; in
/// every legal state what a user does next: the same command again, or `--abandon`, and one more
/// increment; what its chain shows is what the disk shows.
#[test]
fn a_power_cut_at_any_instant_loses_no_written_granule() {
    for abandons in [false, true] {
        let memory = MemoryStore::new();
        let start = Host::after(&memory);
        start.init(Version::V2);
        start.store().create_dir(Path::new("/b")).unwrap();
        {
            let place = start.place();
            let disk = place.open().unwrap();
            let live = Live {
                place: &place,
                disk: &disk,
            };
            disk.write(0, &[1; 9000]).unwrap();
            run(live, &request("/b/0", false)).unwrap();
            disk.close().unwrap();
        }
        start.store().sync_dir(Path::new("/b")).unwrap();
        start.store().sync_dir(Path::new("/")).unwrap();
        let store = RecordingStore::on(&memory);
        {
            let host = Host::on(store.store());
            let place = host.place();
            let disk = place.open().unwrap();
            let live = Live {
                place: &place,
                disk: &disk,
            };
            disk.write(2 * CLUSTER, &[2; 5000]).unwrap();
            disk.write(100, &[0; 4096]).unwrap();
            disk.flush().unwrap();
            let id = backup::begin(live, &request("/b/1", true))
                .unwrap()
                .pending
                .id;
            disk.write(4 * CLUSTER, &[3; 512]).unwrap();
            disk.flush().unwrap();
            if abandons {
                backup::abandon(live, &id).unwrap();
                delete::run(live, &never()).unwrap();
            } else {
                backup::copy(&place, &id, &never()).unwrap().unwrap();
                end(live, &id).unwrap();
            }
            disk.write(5 * CLUSTER, &[4; 512]).unwrap();
            disk.close().unwrap();
        }
        let budget = Budget {
            exhaustive_units: 3,
            seeded: 4,
            seed: 1,
        };
        let mut states = 0;
        for point in store.crash_points() {
            for state in store.states_at(point, &budget) {
                let state = state.build();
                let host = Host::after(&state);
                goes_on(
                    &host,
                    abandons,
                    &format!("abandons {abandons}, point {point}"),
                );
                states += 1;
            }
        }
        assert!(states > 100, "{states}");
    }
}

/// What a user does after a power cut.
fn goes_on(host: &Host, abandons: bool, what: &str) {
    let place = host.place();
    let disk = place.open().unwrap();
    let live = Live {
        place: &place,
        disk: &disk,
    };
    for pending in backup::pending(&place).unwrap() {
        if pending.done {
            backup::remove(live, &pending.id).unwrap();
        } else if abandons {
            backup::abandon(live, &pending.id).unwrap();
        }
    }
    match run(live, &request("/b/1", true)) {
        Err(e) if e.kind() == Kind::Exists => {}
        ran => drop(ran.unwrap_or_else(|e| panic!("{what}: {e}"))),
    }
    run(live, &request("/b/2", true)).unwrap_or_else(|e| panic!("{what}: {e}"));
    let now = all(&disk);
    let shown = shows(host, "/b/2", None);
    assert!(shown == now, "{what}");
    assert_eq!(
        tracker::list(&place, Some(&disk)).unwrap()[0].dirty,
        0,
        "{what}"
    );
    for file in ["/b/0", "/b/1", "/b/2"] {
        let sound = backup::verify(&host.opener, Path::new(file), &|_, _| ()).unwrap();
        assert!(sound.ok, "{what}: {sound:?}");
    }
    let meta = place.meta().unwrap();
    assert!(meta.backups.is_empty(), "{what}");
    delete::run(live, &never()).unwrap();
    let left: Vec<_> = place.descriptor().unwrap().shots;
    assert_eq!(left.len(), 1, "{what}: {left:?}");
    let side = host.store().list(&Path::new("/d").join(".ploop")).unwrap();
    assert!(
        !side.iter().any(|n| n.to_str().unwrap().contains("backup")),
        "{what}: {side:?}"
    );
}

/// Goal: the whole disk does not have to be read. Method: what an increment of nothing is.
#[test]
fn an_increment_of_nothing_is_small() {
    let host = Host::on(MemoryStore::shared());
    host.init_of(Version::V2, 300);
    host.store().create_dir(Path::new("/b")).unwrap();
    let place: Place<'_> = host.place();
    let disk = place.open().unwrap();
    let live = Live {
        place: &place,
        disk: &disk,
    };
    disk.write(0, &vec![5; 100 * CLUSTER as usize]).unwrap();
    run(live, &request("/b/0", false)).unwrap();
    let none = run(live, &request("/b/1", true)).unwrap();
    assert_eq!((none.data, none.content), (0, None));
    assert!(none.length < 65536, "{}", none.length);
    assert_eq!(shows(&host, "/b/1", None), all(&disk));
}
