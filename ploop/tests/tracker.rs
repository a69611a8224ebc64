//! Trackers of an open disk: exact as long as it is closed cleanly, and in the file where OpenVZ's
//! tool and QEMU look.
//!
//! What a user would lose: the change that an increment leaves out because its granule's bit was
//! lost, or clear too early.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ploop::Kind;
use ploop::descriptor::{Descriptor, Guid};
use ploop::device::{Device, ZeroMode};
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::format::ploop::{self as fmt, Header, Version};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store};
use ploop::tracker::Id;
use ploop::tracker::bitmap::Bitmap;
use ploop::verify::{Class, check_image, class_of};

const CLUSTER: u64 = 32 * 1024;
const TOP: &str = "/disk/root.hds";
const FINE: Id = Id([1; 16]);
const COARSE: Id = Id([2; 16]);

fn put(store: &dyn Store, path: &str, bytes: &[u8]) {
    drop(store.remove_file(Path::new(path)));
    let file = store.create(Path::new(path), 0o600).unwrap();
    file.write_at(bytes, 0).unwrap();
}

fn know(store: &dyn Store, known: &[(Id, u64)]) {
    let known = known.iter();
    let known: Vec<String> = known
        .map(|(id, g)| format!("\"{id}\": {{\"name\": \"t\", \"granularity\": {g}}}"))
        .collect();
    let text = format!("{{\"trackers\": {{{}}}}}", known.join(", "));
    put(store, "/disk/.ploop/meta.json", text.as_bytes());
}

fn disk_of(version: Version, clusters: u64) -> Arc<dyn Store> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    store.create_dir(Path::new("/disk")).unwrap();
    store.create_dir(Path::new("/disk/.ploop")).unwrap();
    let header = Header::new(version, 64, clusters * 64).unwrap();
    fmt::create(store.as_ref(), Path::new(TOP), &header, 0o600).unwrap();
    let guid = Guid::parse("{5fbaabe3-6958-40ff-92a7-860e329aab41}").unwrap();
    let d = Descriptor::new_single(clusters * 64, 64, false, guid, "root.hds").unwrap();
    put(store.as_ref(), "/disk/DiskDescriptor.xml", &d.to_xml());
    store
}

fn open(store: &Arc<dyn Store>) -> Disk {
    let options = OpenOptions {
        write: true,
        ..OpenOptions::default()
    };
    let source = Source {
        path: "/disk/DiskDescriptor.xml".into(),
        descriptor: true,
        snapshot: None,
    };
    Opener::on(store.clone()).open(&source, &options).unwrap()
}

/// Closes the disk; the next process may have it.
fn shut(disk: Disk) {
    disk.close().unwrap();
}

fn bits(disk: &Disk, id: Id) -> Vec<u64> {
    set(&disk.tracker(id).unwrap().bits)
}

/// The numbers of the granules that are set.
fn set(bits: &Bitmap) -> Vec<u64> {
    let g = bits.granularity();
    let runs = bits.runs(0..bits.size()).filter(|run| run.1);
    runs.flat_map(|(r, _)| r.start / g..r.end.div_ceil(g))
        .collect()
}

fn header(store: &Arc<dyn Store>) -> Header {
    let file = store.open(Path::new(TOP), Access::Read).unwrap();
    assert_eq!(
        class_of(&check_image(file.as_ref()).unwrap().findings),
        Class::Clean
    );
    fmt::delta::read_header(file.as_ref()).unwrap().0
}

#[test]
fn bits_are_exact_over_clean_closes_and_full_after_a_kill() {
    for version in [Version::V1, Version::V2] {
        let store = disk_of(version, 3000);
        know(store.as_ref(), &[(FINE, 4096), (COARSE, 65536)]);
        let disk = open(&store);
        disk.write(0, &[7; 512]).unwrap();
        // Nobody knows anything of them yet.
        assert_eq!(bits(&disk, COARSE).len(), 1500);
        disk.clear_tracker(FINE).unwrap();
        disk.clear_tracker(COARSE).unwrap();
        disk.write(70_000, &[1; 1]).unwrap();
        disk.zero(1_000_000..1_004_096, ZeroMode::default())
            .unwrap();
        disk.discard(CLUSTER * 100..CLUSTER * 101).unwrap();
        // Another region.
        disk.write((16 << 20) - 1, &[2; 2]).unwrap();
        let fine = [vec![17, 244, 245], (800..808).collect(), vec![4095, 4096]].concat();
        let coarse = vec![1, 15, 50, 255, 256];
        assert_eq!(bits(&disk, FINE), fine);
        assert_eq!(bits(&disk, COARSE), coarse);
        shut(disk);
        for _ in 0..3 {
            assert!(header(&store).extension_sector > 0, "{version:?}");
            assert_eq!(
                store.kind(Path::new("/disk/.ploop/trackers")).unwrap(),
                None
            );
            let disk = open(&store);
            assert_eq!(bits(&disk, FINE), fine, "{version:?}");
            assert_eq!(bits(&disk, COARSE), coarse);
            // Opened and closed without a change nothing is written.
            shut(disk);
            let disk = open(&store);
            assert_eq!(bits(&disk, COARSE), coarse);
            disk.write(70_000, &[9; 100]).unwrap();
            shut(disk);
        }
        let disk = open(&store);
        disk.write(40 << 20, &[1; 1]).unwrap();
        drop(disk);
        // Killed: its region counts, and no other.
        let disk = open(&store);
        let mut killed = coarse.clone();
        killed.extend(512..768);
        assert_eq!(bits(&disk, COARSE), killed, "{version:?}");
        shut(disk);
        assert_eq!(bits(&open(&store), COARSE), killed);
    }
}

#[test]
fn a_write_that_failed_and_one_that_was_given_up() {
    let store = disk_of(Version::V2, 100);
    know(store.as_ref(), &[(COARSE, 65536)]);
    let disk = open(&store);
    disk.clear_tracker(COARSE).unwrap();
    disk.account().unwrap().set_limit(Some(0));
    let full = disk.write(0, &[1; 4096]).unwrap_err();
    assert_eq!(full.kind(), Kind::NoSpace);
    assert!(bits(&disk, COARSE).is_empty(), "nothing was changed");
    disk.account().unwrap().set_limit(None);
    let mut segments = Vec::new();
    let lease = disk.prepare(65536..65537, &mut segments).unwrap();
    drop(lease);
    assert_eq!(bits(&disk, COARSE), [1], "some of it may be there");
}

#[test]
fn another_program_wrote_to_the_image() {
    let store = disk_of(Version::V2, 100);
    know(store.as_ref(), &[(COARSE, 65536)]);
    let disk = open(&store);
    disk.clear_tracker(COARSE).unwrap();
    disk.write(0, &[1; 1]).unwrap();
    shut(disk);
    // QEMU ignores the extension, leaves its place, and says on close that the image is closed.
    let file = store.open(Path::new(TOP), Access::Write).unwrap();
    let mut h = header(&store).bytes().to_vec();
    h[44..48].fill(0);
    file.write_at(&h, 0).unwrap();
    let disk = open(&store);
    assert_eq!(bits(&disk, COARSE).len(), 50, "every granule counts");
    disk.write(0, &[2; 1]).unwrap();
    shut(disk);
    // A damaged bitmap says nothing either.
    let at = header(&store).extension_sector * 512;
    file.write_at(&[0xff], at + 100).unwrap();
    assert_eq!(bits(&open(&store), COARSE).len(), 50);
}

#[test]
fn trackers_begin_end_and_merge_under_writers() {
    let store = disk_of(Version::V2, 4096);
    let disk = open(&store);
    let (done, third) = (AtomicBool::new(false), Id([3; 16]));
    std::thread::scope(|s| {
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        for w in 0..3u64 {
            let (disk, done) = (&disk, &done);
            s.spawn(move || {
                let mut i = w;
                while !done.load(Ordering::Relaxed) {
                    i = i
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    let at = (i >> 33) % (128 << 20) / 512 * 512;
                    let len = 512.min((128 << 20) - at);
                    disk.write(at, &vec![w as u8 + 1; len as usize]).unwrap();
                }
            });
        }
        let _done = Done(&done);
        for round in 0..20 {
            disk.start_tracker(FINE, 4096, round % 2 == 0).unwrap();
            let again = disk.start_tracker(FINE, 4096, false).unwrap_err();
            assert_eq!(again.kind(), Kind::Exists);
            disk.write(round * 65536 + 512, &[4; 512]).unwrap();
            // It does not know of that write but by merging.
            disk.start_tracker(third, 65536, false).unwrap();
            disk.merge_trackers(FINE, third).unwrap();
            // What is read after the bits are taken is what every write left whose bit was taken.
            let taken = disk.clear_tracker(FINE).unwrap();
            let before = set(&taken);
            std::thread::yield_now();
            assert_eq!(set(&taken), before, "nobody sets a bit that was taken");
            disk.stop_tracker(FINE).unwrap();
            let coarse = disk.stop_tracker(third).unwrap();
            assert!(set(&coarse.bits).contains(&round));
            assert!(disk.trackers().is_empty());
        }
    });
    shut(disk);
    assert_eq!(header(&store).extension_sector, 0);
    let disk = open(&store);
    for bad in [0, 100, 65537, 1 << 50] {
        let e = disk.start_tracker(FINE, bad, false).unwrap_err();
        assert!(matches!(e.kind(), Kind::Invalid | Kind::Unsupported), "{e}");
    }
    assert_eq!(disk.stop_tracker(FINE).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_disk_that_grows_keeps_its_bits() {
    let store = disk_of(Version::V2, 64);
    know(store.as_ref(), &[(COARSE, 65536)]);
    let disk = open(&store);
    disk.clear_tracker(COARSE).unwrap();
    disk.write(CLUSTER * 9, &[1; 1]).unwrap();
    {
        let _arranging = disk.arrange();
        disk.grow(CLUSTER * 10_000).unwrap();
    }
    shut(disk);
    let disk = open(&store);
    // What is new counts, too.
    let grown: Vec<u64> = [4].into_iter().chain(32..5000).collect();
    assert_eq!(bits(&disk, COARSE), grown);
    disk.clear_tracker(COARSE).unwrap();
    disk.write(CLUSTER * 9_999, &[1; 1]).unwrap();
    shut(disk);
    assert_eq!(bits(&open(&store), COARSE), [4999]);
}

#[test]
fn what_changes_no_byte_of_the_image_is_kept_too() {
    let store = disk_of(Version::V2, 64);
    know(store.as_ref(), &[(COARSE, 65536)]);
    let disk = open(&store);
    disk.clear_tracker(COARSE).unwrap();
    for grown in [false, true] {
        if grown {
            let _arranging = disk.arrange();
            disk.grow(CLUSTER * 70).unwrap();
        }
        // Nothing is there: the table stays as it is.
        disk.discard(CLUSTER * 40..CLUSTER * 41).unwrap();
    }
    shut(disk);
    let disk = open(&store);
    assert_eq!(bits(&disk, COARSE), [20, 32, 33, 34]);
    disk.discard(CLUSTER * 8..CLUSTER * 9).unwrap();
    shut(disk);
    assert_eq!(bits(&open(&store), COARSE), [4, 20, 32, 33, 34]);
}

#[test]
fn more_than_the_extension_holds_is_refused() {
    let store = disk_of(Version::V2, 64);
    let disk = open(&store);
    let mut begun = 0u16;
    let refused = loop {
        let mut id = [9; 16];
        id[..2].copy_from_slice(&begun.to_le_bytes());
        match disk.start_tracker(Id(id), 65536, false) {
            Ok(_) => begun += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(refused.kind(), Kind::Unsupported);
    assert!(begun > 400, "{begun}");
    shut(disk);
    assert_eq!(open(&store).trackers().len(), usize::from(begun));
}
