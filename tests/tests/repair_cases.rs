//! Repairs whose outcome hangs on more than one file: a journal below others, rights, links, a
//! conversion that one image of a disk had behind it.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsck::repair::{self, How};
use ploop::Kind;
use ploop::descriptor::{Guid, parse};
use ploop::device::Device;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::format::ploop::{Header, Version, create};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, EntryKind, RealStore, Store};
use ploop_fuzz::base::{Base, CLUSTER, disk};
use ploop_fuzz::guest::{LOOK, read};
use ploop_fuzz::trial::{Trial, Verdict};
use ploop_tests::damage::bases;
use ploop_tests::stream;
use ploop_tests::tools::{ploop, run};
use snapshots::place::Place;
use snapshots::snapshot::Live;
use snapshots::tracker;
use tempfile::TempDir;

const XML: &str = "DiskDescriptor.xml";

fn bytes(store: &MemoryStore, path: &Path) -> Vec<u8> {
    let file = store.open(path, Access::Read).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The disk of `base` in a directory of the host.
fn on_host(base: &Base) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let store = &base.store;
    let mut todo = vec![PathBuf::from("/d")];
    while let Some(from) = todo.pop() {
        for name in store.list(&from).unwrap() {
            let path = from.join(name);
            let to = dir.path().join(path.strip_prefix("/d").unwrap());
            match store.kind(&path).unwrap() {
                Some(EntryKind::Dir) => {
                    fs::create_dir(to).unwrap();
                    todo.push(path);
                }
                _ => fs::write(to, bytes(store, &path)).unwrap(),
            }
        }
    }
    dir
}

fn source(dir: &Path) -> Source {
    Source {
        path: dir.join(XML),
        descriptor: true,
        snapshot: None,
    }
}

fn repair(dir: &Path) -> repair::Outcome {
    let opener = Opener::host();
    let plan = repair::plan(&opener, &source(dir), &OpenOptions::default()).unwrap();
    repair::apply(&opener, &plan, How::Yes, None).unwrap()
}

/// A snapshot was made, and the power went before the image below was complete.
#[test]
fn a_journal_below_others_is_left_alone_and_the_command_that_is_named_copies_it() {
    let base = disk("a disk with a journal", true);
    let before = read(&base.store, &base.source, None).unwrap();
    let store = &base.store;
    let mut d = parse(&bytes(store, &base.source.path)).unwrap();
    let snapshot = Guid::from_bytes([0x22; 16]);
    d.push_overlay(snapshot, "root.hds.new").unwrap();
    let header = Header::new(Version::V2, CLUSTER, u64::from(CLUSTER) * 30).unwrap();
    drop(create(store, Path::new("/d/root.hds.new"), &header, 0o600).unwrap());
    let xml = store.open(&base.source.path, Access::Write).unwrap();
    xml.set_len(0).unwrap();
    xml.write_at(&d.to_xml(), 0).unwrap();

    let dir = on_host(&base);
    let command = format!("ploop convert DISK@{snapshot} TARGET --to ploop");
    let opener = Opener::host();
    let options = OpenOptions::default();
    let report = fsck::check(&opener, &source(dir.path()), &options).unwrap();
    let finding = report
        .findings
        .iter()
        .find(|f| f.kind == "journal")
        .unwrap();
    assert!(finding.what.contains(&command), "{}", finding.what);
    let outcome = repair(dir.path());
    assert!(outcome.done.is_empty());
    let left: Vec<&str> = outcome.left.iter().map(|l| l.what.as_str()).collect();
    assert!(left.len() == 1 && left[0].contains(&command), "{left:?}");

    let target = dir.path().join("copy.hds");
    let from = format!("{}@{snapshot}", dir.path().display());
    run(ploop().args(["convert", &from, target.to_str().unwrap(), "--to", "ploop"]));
    let copy = MemoryStore::new();
    copy.create_dir(Path::new("/d")).unwrap();
    let file = copy.create(Path::new("/d/copy.hds"), 0o600).unwrap();
    file.write_at(&fs::read(&target).unwrap(), 0).unwrap();
    let now = read(&copy, &image_at("/d/copy.hds"), None);
    assert_eq!(before.lost_in(now.as_ref(), &[]), None);
}

fn image_at(path: &str) -> Source {
    Source {
        path: path.into(),
        descriptor: false,
        snapshot: None,
    }
}

/// A disk whose descriptor has another size than its top.
fn stale() -> TempDir {
    let dir = on_host(&disk("a disk", false));
    let xml = dir.path().join(XML);
    let text = fs::read_to_string(&xml).unwrap();
    let other = text.replace("<Disk_size>1920<", "<Disk_size>1856<");
    assert_ne!(text, other);
    fs::write(&xml, other).unwrap();
    dir
}

#[test]
fn a_descriptor_that_is_replaced_keeps_mode_and_owner() {
    let dir = stale();
    let xml = dir.path().join(XML);
    fs::set_permissions(&xml, fs::Permissions::from_mode(0o640)).unwrap();
    // Only root can give files away.
    let (user, group) = match fs::metadata(&xml).unwrap().uid() {
        0 => (1234, 2345),
        own => (own, fs::metadata(&xml).unwrap().gid()),
    };
    chown(&xml, Some(user), Some(group)).unwrap();
    let rights = || {
        let meta = fs::metadata(&xml).unwrap();
        (meta.mode() & 0o7777, meta.uid(), meta.gid())
    };
    let stale = fs::read(&xml).unwrap();
    let outcome = repair(dir.path());
    assert_ne!(fs::read(&xml).unwrap(), stale);
    assert_eq!(rights(), (0o640, user, group));
    repair::undo(&Opener::host(), &outcome.undo.unwrap()).unwrap();
    assert_eq!(fs::read(&xml).unwrap(), stale);
    assert_eq!(rights(), (0o640, user, group));
}

#[test]
fn undo_follows_no_link_to_where_it_would_move_files_from() {
    let dir = on_host(&disk("a disk", false));
    fs::write(dir.path().join("root.hds.tmp"), b"left").unwrap();
    let undo = repair(dir.path()).undo.unwrap();
    let lost = dir.path().join(".ploop/lost+found");
    assert!(lost.join("root.hds.tmp").exists());
    fs::remove_dir_all(&lost).unwrap();
    let host = tempfile::tempdir().unwrap();
    let secret = host.path().join("root.hds.tmp");
    fs::write(&secret, b"the host's").unwrap();
    symlink(host.path(), &lost).unwrap();
    let e = repair::undo(&Opener::host(), &undo).unwrap_err();
    assert_eq!(e.kind(), Kind::Permission, "{e}");
    assert!(secret.exists() && !dir.path().join("root.hds.tmp").exists());
}

/// The base was converted and can be read; the image above was cut off. What the base reads rules,
/// whatever its backup says.
#[test]
fn a_base_that_reads_otherwise_than_its_backup_is_not_put_back() {
    let base = bases()
        .into_iter()
        .find(|b| b.name == "310-conversion-of-chain")
        .unwrap();
    let file = base
        .store
        .open(Path::new("/d/root.hds"), Access::Write)
        .unwrap();
    // The marks of the conversion and of use are gone, an entry is another's.
    file.write_at(&[0; 4], 44).unwrap();
    file.write_at(&[0; 4], 52).unwrap();
    let mut entry = [0; 4];
    file.read_at(&mut entry, 148).unwrap();
    file.write_at(&entry, 144).unwrap();
    let trial = Trial {
        store: &base.store,
        source: &base.source,
        look: LOOK,
        about: "a conversion",
    };
    trial.check();
    assert_eq!(trial.repair(), Verdict::Refused);
    let opener = Opener::on(Arc::new(base.store.clone()));
    let plan = repair::plan(&opener, &base.source, &OpenOptions::default()).unwrap();
    let why: Vec<&str> = plan.unrepairable.iter().map(|r| r.what.as_str()).collect();
    assert!(
        why.iter().any(|w| w.contains("its entries are not those")),
        "{why:?}"
    );
    let disk = opener.open(&image_at("/d/root.hds"), &OpenOptions::default());
    assert!(disk.unwrap().size() > 0);
}

/// What a descriptor may name and the host refuses in its own ways is damage of the disk.
#[test]
fn names_that_lead_to_no_file_are_found_and_refused_and_no_failure() {
    let long = "n".repeat(300);
    for (name, kind) in [
        ("root.hds/inside", "missing-file"),
        (long.as_str(), "bad-path"),
        ("circle", "bad-path"),
    ] {
        let dir = on_host(&disk("a disk", false));
        symlink("circle", dir.path().join("circle")).unwrap();
        let xml = dir.path().join(XML);
        let text = fs::read_to_string(&xml).unwrap();
        let text = text.replace("<File>root.hds.top<", &format!("<File>{name}<"));
        fs::write(&xml, text).unwrap();
        let opener = Opener::host();
        let options = OpenOptions::default();
        let report = fsck::check(&opener, &source(dir.path()), &options).unwrap();
        let kinds: Vec<&str> = report.findings.iter().map(|f| f.kind).collect();
        assert!(kinds.contains(&kind), "{name}: {kinds:?}");
        let outcome = repair(dir.path());
        assert!(outcome.done.is_empty() && !outcome.unrepairable.is_empty());
    }
}

/// A private copy takes the space that its bytes take, and shows nothing else.
#[test]
fn holes_of_a_copied_cluster_stay_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.hds");
    let mib = 1u64 << 20;
    let header = Header::new(Version::V2, 2048, 2048 * 64).unwrap();
    let file = create(&RealStore, &path, &header, 0o600).unwrap();
    // Clusters 1 and 3 have owners, 1 has two; the free one between them is full of leftovers.
    for (slot, entry) in [(0, 1u32), (1, 1), (2, 3)] {
        file.write_at(&entry.to_le_bytes(), Header::slot_offset(slot))
            .unwrap();
    }
    file.write_at(&[7; 4096], mib + 8192).unwrap();
    file.write_at(&vec![9; mib as usize], 2 * mib).unwrap();
    file.set_len(4 * mib).unwrap();
    drop(file);
    let (opener, options) = (Opener::host(), OpenOptions::default());
    let source = image_at(path.to_str().unwrap());
    let plan = repair::plan(&opener, &source, &options).unwrap();
    let outcome = repair::apply(&opener, &plan, How::Yes, None).unwrap();
    assert_eq!(outcome.after.class, fsck::Class::Clean);
    let disk = Opener::host().open(&source, &options).unwrap();
    let mut bytes = vec![1; 2 * mib as usize];
    disk.read(0, &mut bytes).unwrap();
    let mut cluster = vec![0; mib as usize];
    cluster[8192..8192 + 4096].fill(7);
    assert!(bytes[..mib as usize] == cluster && bytes[mib as usize..] == cluster);
    let taken = fs::metadata(&path).unwrap().blocks() * 512;
    // The leftovers, and no second cluster full of bytes.
    assert!(taken < mib + mib / 2, "{taken} bytes on disk");
}

/// Goal: an increment by a tracker has what repair changed. Method: an entry that leads behind the file,
/// in the top and in an image below it, of a disk that was closed cleanly with nothing written since
/// the tracker was cleared; an image beside its chain changes nothing of it.
#[test]
fn what_repair_changes_counts_as_written_since() {
    for (node, counts) in [("top", true), ("below", true), ("beside", false)] {
        let (_, root) = stream::host();
        stream::container(&root, "ct", Version::V2, 64, 8 * 32768);
        stream::write(&root, "ct", 0, &[1; 9000]);
        stream::snapshot(&root, "ct", "below");
        stream::write(&root, "ct", 3 * 32768, &[2; 9000]);
        stream::snapshot(&root, "ct", "beside");
        stream::go_back(&root, "ct", "below");
        stream::write(&root, "ct", 5 * 32768, &[3; 9000]);
        let place = Place::container(&root, "ct").unwrap();
        let disk = place.open().unwrap();
        let live = Live {
            place: &place,
            disk: &disk,
        };
        tracker::start(live, "night", 65536).unwrap();
        disk.close().unwrap();
        drop(disk);
        let dirty = || tracker::list(&place, None).unwrap()[0].dirty;
        assert_eq!(dirty(), 0);

        let d = place.descriptor().unwrap();
        let guid = match node {
            "top" => d.top,
            name => place.find(&d, &place.meta().unwrap(), name).unwrap(),
        };
        let path = place.file_of(d.image(guid).unwrap()).unwrap();
        let file = place.store().open(&path, Access::Write).unwrap();
        let mut entries = [0; 32];
        file.read_at(&mut entries, 64).unwrap();
        let slot = entries.chunks(4).position(|e| e != [0; 4]).unwrap();
        file.write_at(&[0xFF, 0xFF, 0, 0], 64 + 4 * slot as u64)
            .unwrap();
        let options = place.open_options(false);
        let plan = repair::plan(place.opener(), &place.source(None), &options).unwrap();
        let done = repair::apply(place.opener(), &plan, How::Yes, None).unwrap();
        assert!(done.unrepairable.is_empty(), "{node}: {done:?}");
        let all = 8 * 32768;
        assert_eq!(dirty(), if counts { all } else { 0 }, "{node}");
        let disk = place.open().unwrap();
        disk.close().unwrap();
    }
}
