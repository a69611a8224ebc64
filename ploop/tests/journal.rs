//! The journal where it is not alone: writers beside a flush that cannot keep one, damaged and
//! hostile journals, an image that is opened without its disk.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use ploop::chain::Chain;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::error::Kind;
use ploop::format::ploop::journal::{self, Home};
use ploop::format::ploop::parts;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{self as fmt, Header, PloopDelta, Version};
use ploop::store::memory::MemoryStore;
use ploop::store::recording::RecordingStore;
use ploop::store::{Access, RealStore, Store};

const CLUSTER: u64 = 64 * 1024;
const BASE: u8 = 0xBB;

fn over_a_base(clusters: u64) -> Arc<dyn Store> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    make(&store, clusters);
    store
}

/// A base that is all data, and an empty image for what is written over it.
fn make(store: &Arc<dyn Store>, clusters: u64) {
    store.create_dir(Path::new("/d")).unwrap();
    let header = Header::new(Version::V2, 128, clusters * 128).unwrap();
    for name in ["/d/base", "/d/top"] {
        fmt::create(store.as_ref(), Path::new(name), &header, 0o600).unwrap();
    }
    let file = store.open(Path::new("/d/base"), Access::Write).unwrap();
    let base = Disk::writable(None, Top::open(file).unwrap(), None).unwrap();
    for cluster in 0..clusters {
        base.write(cluster * CLUSTER, &vec![BASE; CLUSTER as usize])
            .unwrap();
    }
    base.close().unwrap();
}

fn open(store: &Arc<dyn Store>, home: Option<Home>) -> ploop::Result<Disk> {
    let base = store.open(Path::new("/d/base"), Access::Read)?;
    let below = Chain::new(vec![Arc::new(PloopDelta::open(base)?)])?;
    let file = store.open(Path::new("/d/top"), Access::Write)?;
    Disk::writable(Some(Arc::new(below)), Top::open_at(file, home)?, None)
}

fn home(store: &Arc<dyn Store>) -> Option<Home> {
    Home::of(store, Path::new("/d/top"))
}

fn byte(disk: &Disk, at: u64) -> u8 {
    let mut got = [0];
    disk.read(at, &mut got).unwrap();
    got[0]
}

/// Goal: who writes while a flush completes clusters, because no journal can be kept, is no reason
/// to stop all writers. Method: the write comes in the middle of the completion.
#[test]
fn a_write_beside_a_flush_that_has_no_room_for_a_journal_is_the_next_flushs() {
    let store = over_a_base(16);
    let nowhere = Home::of(&RealStore::shared(), Path::new("/proc/none/top"));
    let disk = open(&store, nowhere).unwrap();
    disk.write(CLUSTER + 4096, &[1; 4096]).unwrap();
    let top = disk.top().unwrap();
    top.flush_or(&|| {
        disk.complete(u64::MAX, usize::MAX)?;
        disk.write(3 * CLUSTER + 4096, &[2; 4096])
    })
    .unwrap();
    assert_eq!(top.parts().older_than(u64::MAX, 9), [3]);
    disk.write(5 * CLUSTER, &[3; 512]).unwrap();
    disk.flush().unwrap();
    assert_eq!(top.parts().count(), 0);
    assert_eq!(
        [CLUSTER + 4096, 3 * CLUSTER + 4096].map(|at| byte(&disk, at)),
        [1, 2]
    );
}

/// Goal: a cluster below that cannot be read fails the flush that needs it, not all that follow.
#[test]
fn a_flush_that_cannot_complete_fails_alone_and_forgets_nothing() {
    let store = over_a_base(16);
    let nowhere = Home::of(&RealStore::shared(), Path::new("/proc/none/top"));
    let disk = open(&store, nowhere).unwrap();
    disk.write(CLUSTER + 4096, &[1; 4096]).unwrap();
    disk.write(2 * CLUSTER, &vec![2; CLUSTER as usize]).unwrap();
    let top = disk.top().unwrap();
    let unreadable = || Err(ploop::Error::new(Kind::Io, "a bad sector below"));
    assert_eq!(top.flush_or(&unreadable).unwrap_err().kind(), Kind::Io);
    disk.write(3 * CLUSTER, &[3; 512]).unwrap();
    disk.flush().unwrap();
    // As a crash leaves it.
    drop((top, disk));
    let disk = open(&store, None).unwrap();
    assert_eq!(
        [CLUSTER + 4096, CLUSTER, 2 * CLUSTER].map(|at| byte(&disk, at)),
        [1, BASE, 2]
    );
}

#[test]
fn an_image_whose_clusters_need_those_below_is_not_opened_alone_for_writing() {
    let store = over_a_base(16);
    let disk = open(&store, home(&store)).unwrap();
    disk.write(CLUSTER + 4096, &[1; 4096]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let opener = Opener::on(store.clone());
    let source = Source::parse(store.as_ref(), "/d/top").unwrap();
    let options = OpenOptions {
        write: true,
        ..OpenOptions::default()
    };
    let refused = opener.open(&source, &options).unwrap_err();
    assert_eq!(refused.kind(), Kind::Invalid, "{refused}");
    let disk = open(&store, home(&store)).unwrap();
    assert_eq!(
        [CLUSTER, CLUSTER + 4096].map(|at| byte(&disk, at)),
        [BASE, 1]
    );
}

/// Goal: a flush is as good as a write in making sure of what a process before left. Method: an
/// entry whose write-back failed in the first process; the second one only flushes; the power goes.
#[test]
fn a_flush_before_any_write_leaves_no_entry_to_a_failed_write_back() {
    for second in [false, true] {
        let record = RecordingStore::new();
        let store = record.store();
        make(&store, 4096);
        let disk = open(&store, home(&store)).unwrap();
        disk.write(CLUSTER + 4096, &[1; 4096]).unwrap();
        disk.write(3000 * CLUSTER, &vec![5; CLUSTER as usize])
            .unwrap();
        disk.flush().unwrap();
        drop(disk);
        let entry = Header::slot_offset(3000);
        let top = store.open(Path::new("/d/top"), Access::Write).unwrap();
        let mut on_disk = [0; 4];
        top.read_at(&mut on_disk, entry).unwrap();
        assert_ne!(on_disk, [0; 4], "the flush wrote it");
        if second {
            let before = record.log().len();
            open(&store, home(&store)).unwrap().flush().unwrap();
            let page = format!("write /d/top {:#x}", Header::slot_offset(2048));
            let log = &record.log()[before..];
            assert!(log.iter().any(|l| l.starts_with(&page)), "{log:?}");
        } else {
            top.write_at(&[0; 4], entry).unwrap();
        }
        let disk = open(&store, home(&store)).unwrap();
        assert_eq!(byte(&disk, 3000 * CLUSTER), 5);
    }
}

/// Goal: `fstrim` after a burst of small writes does not sync once for each of their clusters.
#[test]
fn a_discard_of_many_flushed_parts_flushes_once() {
    let store = over_a_base(200);
    let disk = open(&store, home(&store)).unwrap();
    for cluster in 0..200 {
        disk.write(cluster * CLUSTER + 4096, &[2; 4096]).unwrap();
    }
    disk.flush().unwrap();
    let before = journal::syncs();
    disk.discard(0..200 * CLUSTER).unwrap();
    let syncs = journal::syncs() - before;
    assert!(syncs <= 4, "{syncs}");
    assert_eq!(
        [0, 4096, 199 * CLUSTER + 4096].map(|at| byte(&disk, at)),
        [0; 3]
    );
}

// ------------------------------------------------------------------------------- hostile journals

/// A record of `kind` whose items are `items`.
fn record(number: u64, group: u64, kind: u32, words: u32, items: &[u8]) -> Vec<u8> {
    let len = 64 + items.len();
    let mut r = vec![0; 64];
    r[..8].copy_from_slice(b"ploopjrn");
    r[12..16].copy_from_slice(&(len as u32).to_le_bytes());
    r[16..32].copy_from_slice(&[7; 16]);
    r[32..40].copy_from_slice(&number.to_le_bytes());
    r[40..48].copy_from_slice(&group.to_le_bytes());
    r[48..52].copy_from_slice(&kind.to_le_bytes());
    r[52..56].copy_from_slice(&words.to_le_bytes());
    r.extend_from_slice(items);
    let sum = crc32fast::hash(&r[12..]);
    r[8..12].copy_from_slice(&sum.to_le_bytes());
    r.resize(len.next_multiple_of(512), 0);
    r
}

const PARTS: u32 = 4;

/// A part of one word.
fn part(slot: u32, entry: u32, present: u64) -> Vec<u8> {
    let mut p = slot.to_le_bytes().to_vec();
    p.extend_from_slice(&entry.to_le_bytes());
    p.extend_from_slice(&present.to_le_bytes());
    p
}

/// An image of `entries` clusters of `sectors` each, in use, with a journal whose base, of flush
/// `group`, is right, and `records` behind it.
fn with_journal(sectors: u32, entries: u32, group: u64, records: &[u8]) -> Arc<dyn Store> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    for dir in ["/d", "/d/.ploop"] {
        store.create_dir(Path::new(dir)).unwrap();
    }
    let cluster = u64::from(sectors) * 512;
    let table = (64 + 4 * u64::from(entries)).next_multiple_of(cluster);
    let size = u64::from(entries) * u64::from(sectors);
    let mut head = b"WithouFreSpacExt".to_vec();
    for field in [2, 16, 40, sectors, entries] {
        head.extend_from_slice(&u32::to_le_bytes(field));
    }
    head.extend_from_slice(&size.to_le_bytes());
    for field in [0x746F_6E59, (table / 512) as u32, 1, 0, 0] {
        head.extend_from_slice(&u32::to_le_bytes(field));
    }
    let file = store.create(Path::new("/d/image"), 0o600).unwrap();
    file.set_len(table + size * 512 + 512).unwrap();
    file.write_at(&head, 0).unwrap();
    head.extend_from_slice(&0u64.to_le_bytes());
    let mut all = record(0, group, 1, 0, &head);
    all.extend_from_slice(records);
    let path = Path::new("/d/.ploop/journal.image");
    let file = store.create(path, 0o600).unwrap();
    file.write_at(&all, 0).unwrap();
    store
}

/// What opening says, both ways.
fn opened(store: &Arc<dyn Store>) -> Vec<Kind> {
    let opener = Opener::on(store.clone());
    let source = Source::parse(store.as_ref(), "/d/image").unwrap();
    let open = |write| {
        let options = OpenOptions {
            write,
            ..OpenOptions::default()
        };
        let disk = opener.open(&source, &options)?;
        let mut got = vec![0; disk.size().min(1 << 20) as usize];
        disk.read(0, &mut got)
    };
    [false, true]
        .into_iter()
        .filter_map(|write| open(write).err())
        .map(|e| e.kind())
        .collect()
}

#[test]
fn parts_of_clusters_that_have_no_granules_are_refused() {
    let records = record(1, 0, PARTS, 1, &part(0, 1, 2));
    assert_eq!(
        opened(&with_journal(513, 1, 0, &records)),
        [Kind::Corrupt; 2]
    );
    assert_eq!(opened(&with_journal(128, 1, 0, &records)), [Kind::Invalid]);
}

#[test]
fn the_last_number_of_a_flush_is_no_end() {
    // A damaged record, and one behind it.
    let mut records = vec![0; 512];
    records.extend(record(3, u64::MAX, PARTS, 1, &part(0, 1, 2)));
    // Two records of one flush, the first one torn: what came before counts.
    assert_eq!(opened(&with_journal(128, 1, u64::MAX, &records)), []);
    assert_eq!(
        opened(&with_journal(128, 1, 1, &records)),
        [Kind::Corrupt; 2]
    );
}

#[test]
fn more_parts_than_an_image_may_have_are_refused_before_they_fill_memory() {
    let per_record = (64 * 1024 - 64) / 16;
    let (mut records, mut number) = (Vec::new(), 1);
    let slots = 3 * parts::PARTS_MAX as u32;
    for first in (0..slots).step_by(per_record) {
        let some = first..(first + per_record as u32).min(slots);
        let items: Vec<u8> = some.flat_map(|s| part(s, 1024 + s, 1)).collect();
        records.extend(record(number, 0, PARTS, 1, &items));
        number += 1;
    }
    assert_eq!(
        opened(&with_journal(64, slots, 0, &records)),
        [Kind::Corrupt; 2]
    );
    // One that is longer than any of this image can be.
    let long = vec![0; 8 << 20];
    assert_eq!(opened(&with_journal(64, 16, 0, &long)), [Kind::Corrupt; 2]);
    let past_the_end = record(1, 0, PARTS, 1, &part(16, 3, 1));
    assert_eq!(
        opened(&with_journal(64, 16, 0, &past_the_end)),
        [Kind::Corrupt; 2]
    );
}
