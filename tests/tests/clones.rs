//! Disks that share layers: many clones at once, clones and templates of another container's
//! snapshot, content hashes, and who may be removed when.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ploop::Kind;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store};
use ploop_tests::corpus;
use ploop_tests::crash::tree::{self, Operation};
use ploop_tests::tools::{run, tool};
use snapshots::clone::{CloneSource, CreateOptions, create_containers, numbered};
use snapshots::place::Place;
use snapshots::rootfs::BuildOptions;
use snapshots::snapshot::{NewSnapshot, take_offline};
use snapshots::template::{self, ImportOptions, ImportSource};
use snapshots::{Root, hash, list, remove, share};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|n| (*n).to_owned()).collect()
}

fn of_template(name: &str) -> CloneSource {
    CloneSource::Template(name.into())
}

fn of_snapshot(container: &str) -> CloneSource {
    CloneSource::Snapshot {
        container: container.into(),
        snapshot: "s".into(),
    }
}

fn create(root: &Root, list: &[String], from: &CloneSource) -> ploop::Result<Vec<String>> {
    let made = create_containers(root, list, from, &CreateOptions::default(), &|_, _| ())?;
    let text = |dir: &Path| dir.file_name().unwrap().to_str().unwrap().to_owned();
    Ok(made.iter().map(|c| text(&c.dir)).collect())
}

fn import(root: &Root, name: &str, raw: &Path) {
    let source = Source {
        path: raw.to_path_buf(),
        descriptor: false,
        snapshot: None,
    };
    let options = ImportOptions {
        cluster_sectors: template::DEFAULT_CLUSTER_SECTORS,
        build: BuildOptions::default(),
        open: OpenOptions::default(),
        source_text: "raw".into(),
    };
    template::import(root, name, &ImportSource::Disk(source), &options, &|_| ()).unwrap();
}

fn snapshot(root: &Root, container: &str) {
    let new = NewSnapshot {
        name: Some("s".into()),
        ..NewSnapshot::default()
    };
    take_offline(&Place::container(root, container).unwrap(), &new).unwrap();
}

fn open(root: &Root, container: &str) -> Disk {
    Place::container(root, container).unwrap().open().unwrap()
}

fn write(root: &Root, container: &str, offset: u64, bytes: &[u8]) {
    let disk = open(root, container);
    disk.write(offset, bytes).unwrap();
    disk.close().unwrap();
}

fn content(root: &Root, container: &str) -> String {
    let place = Place::container(root, container).unwrap();
    let source = place.source(None);
    let disk = root.opener().open(&source, &root.open_options(false));
    hash::content(&disk.unwrap(), &|_, _| ()).unwrap()
}

fn template_content(root: &Root, name: &str) -> String {
    template::verify(root, name, &|_, _| ()).unwrap().content
}

/// What each container reads as.
fn contents(root: &Root) -> BTreeMap<String, String> {
    let names = list::names(root).unwrap().containers;
    names
        .into_iter()
        .map(|n| (n.clone(), content(root, &n)))
        .collect()
}

/// A store of the host with template `t`: 1 GiB, a few pieces of data.
fn rig(dir: &TempDir) -> Root {
    let raw = dir.path().join("t.raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len(1 << 30).unwrap();
    for n in 0..8 {
        let at = n * 100 * MIB;
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![n as u8 + 1; 20_000], at).unwrap();
    }
    let root = Root::open(&dir.path().join("store"), true).unwrap();
    import(&root, "t", &raw);
    root
}

fn room(on: &Path) -> TempDir {
    tempfile::Builder::new()
        .prefix("ploop-clones-")
        .tempdir_in(on)
        .unwrap()
}

/// Bytes that everything below `dir` takes, as `du` counts.
fn taken(dir: &Path) -> u64 {
    let meta = fs::symlink_metadata(dir).unwrap();
    let below = match meta.is_dir() {
        true => fs::read_dir(dir)
            .unwrap()
            .map(|e| taken(&e.unwrap().path()))
            .sum(),
        false => 0,
    };
    meta.blocks() * 512 + below
}

/// How long `qemu-img create` takes for as many overlays; measured on some of them.
fn qemu_overlays(dir: &Path, raw: &Path, count: u32) -> Duration {
    const SOME: u32 = 40;
    let began = Instant::now();
    for n in 0..SOME {
        let mut create = tool("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
        create
            .arg(raw)
            .arg(dir.join(format!("{n}.qcow2")))
            .stdout(Stdio::null());
        run(&mut create);
    }
    began.elapsed() * count / SOME
}

/// Goal: a thousand clones of a 1 GiB template in one call, each small and each its own. Method: on
/// a tmpfs and on the disk; some are written to, and all the others still read as the template.
#[test]
fn a_thousand_clones_made_at_once_are_small_and_independent() {
    for place in [Path::new("/dev/shm"), &std::env::temp_dir()] {
        let dir = room(place);
        let root = rig(&dir);
        let want = template_content(&root, "t");
        let all = numbered("ct", 1000).unwrap();
        let began = Instant::now();
        assert_eq!(create(&root, &all, &of_template("t")).unwrap(), all);
        let took = began.elapsed();
        let largest = all.iter().map(|n| taken(&root.container(n))).max().unwrap();
        assert!(largest <= 32 << 10, "{largest} bytes for a clone");
        let qemu = qemu_overlays(dir.path(), &dir.path().join("t.raw"), 1000);
        println!(
            "{}: 1000 clones in {took:?}, {largest} bytes each at most; qemu-img create: {qemu:?}",
            place.display()
        );
        assert_eq!((all[0].as_str(), all[999].as_str()), ("ct-0001", "ct-1000"));
        let written = ["ct-0001", "ct-0500", "ct-1000"];
        for (n, name) in written.iter().enumerate() {
            write(&root, name, 100 * MIB + 1000, &vec![n as u8 + 100; 3000]);
        }
        let now = contents(&root);
        assert_eq!(now.len(), 1000);
        let changed: Vec<&String> = now
            .iter()
            .filter(|(_, c)| **c != want)
            .map(|(n, _)| n)
            .collect();
        assert_eq!(changed, written);
        let distinct: std::collections::BTreeSet<_> = written.iter().map(|n| &now[*n]).collect();
        assert_eq!(distinct.len(), 3);
        assert_eq!(template_content(&root, "t"), want);
        assert_eq!(list::template(&root, "t").unwrap().clones, 1000);
        remove::remove_containers(&root, &all).unwrap();
        remove::remove_template(&root, "t").unwrap();
        assert_empty(&root);
    }
}

fn assert_empty(root: &Root) {
    for room in ["layers", "tmp", "templates", "containers"] {
        let left = root.opener().store().list(&root.dir().join(room)).unwrap();
        assert!(left.is_empty(), "{room}: {left:?}");
    }
}

/// Goal: a call for many containers makes all of them or none.
#[test]
fn a_name_that_is_taken_or_wrong_or_given_twice_refuses_the_whole_call() {
    let store = tree::start();
    let root = tree::open(Arc::new(store)).unwrap();
    tree::perform(&root, Operation::Import).unwrap();
    let from = of_template(tree::TEMPLATE);
    create(&root, &names(&["b"]), &from).unwrap();
    for (list, kind) in [
        (names(&["a", "b", "c"]), Kind::Exists),
        (names(&["a", "c", "a"]), Kind::Invalid),
        (names(&["a", "x/y"]), Kind::Invalid),
    ] {
        assert_eq!(create(&root, &list, &from).unwrap_err().kind(), kind);
        assert_eq!(list::names(&root).unwrap().containers, ["b"]);
    }
    assert!(create(&root, &[], &from).unwrap().is_empty());
    assert_eq!(numbered("x", 3).unwrap(), ["x-0001", "x-0002", "x-0003"]);
    assert_eq!(numbered("x", 12_345).unwrap()[0], "x-00001");
    assert_eq!(numbered("x", 0).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(numbered("x", u32::MAX).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(numbered("x/y", 2).unwrap_err().kind(), Kind::Invalid);
}

/// A store in memory: template `t`, its clone `a` with a snapshot and writes after it, a clone `b`
/// of that, a template `u` of it, and a clone `c` of that.
fn family() -> (MemoryStore, Root) {
    let store = tree::start();
    let root = tree::open(Arc::new(store.clone())).unwrap();
    tree::perform(&root, Operation::Import).unwrap();
    create(&root, &names(&["a"]), &of_template(tree::TEMPLATE)).unwrap();
    write(&root, "a", 0, &[1; 5000]);
    snapshot(&root, "a");
    write(&root, "a", 512, &[2; 5000]);
    create(&root, &names(&["b"]), &of_snapshot("a")).unwrap();
    write(&root, "b", 1024, &[3; 5000]);
    template::from_snapshot(&root, "u", "a", "s").unwrap();
    create(&root, &names(&["c"]), &of_template("u")).unwrap();
    write(&root, "c", 1536, &[4; 5000]);
    (store, root)
}

/// Goal: removing one disk never harms another that stands on the same layers; a template is never
/// removed while it is used; what nobody uses goes. Method: every order of removal.
#[test]
fn source_clones_and_templates_can_go_in_any_order_and_harm_nobody() {
    let (store, _) = family();
    let mut orders = vec![vec![]];
    for _ in 0..5 {
        let longer = |o: &Vec<&'static str>| {
            let rest = ["a", "b", "c", "t", "u"]
                .into_iter()
                .filter(|n| !o.contains(n));
            rest.map(|n| [o.clone(), vec![n]].concat())
                .collect::<Vec<_>>()
        };
        orders = orders.iter().flat_map(longer).collect();
    }
    assert_eq!(orders.len(), 120);
    for order in orders {
        let root = tree::open(Arc::new(store.snapshot())).unwrap();
        let before = contents(&root);
        assert_eq!(before.len(), 3);
        let mut left = order.clone();
        while !left.is_empty() {
            let gone = left.iter().position(|name| remove_one(&root, name, &left));
            left.remove(gone.unwrap_or_else(|| panic!("{order:?}: none of {left:?} can go")));
            for (name, content) in contents(&root) {
                assert_eq!(
                    before[&name], content,
                    "{order:?}: {name} after {left:?} are left"
                );
            }
            for name in left.iter().filter(|n| ["t", "u"].contains(n)) {
                template::verify(&root, name, &|_, _| ()).unwrap();
            }
        }
        assert_empty(&root);
    }
}

/// Tries to remove it; a refusal must be right.
fn remove_one(root: &Root, name: &str, left: &[&str]) -> bool {
    let users: &[&str] = match name {
        "t" => &["a", "b", "c"],
        "u" => &["b", "c"],
        _ => return remove::remove_container(root, name).is_ok(),
    };
    let used = users.iter().any(|u| left.contains(u));
    match remove::remove_template(root, name) {
        Ok(()) => assert!(!used, "{name} was removed while {left:?} stand on it"),
        Err(e) => assert!(used && e.kind() == Kind::InUse, "{name}, {left:?}: {e}"),
    }
    !used
}

/// Goal: who stands on what is shown, and only a layer of its own may a disk rewrite.
#[test]
fn a_shared_layer_is_nobodys_to_rewrite_until_the_others_are_gone() {
    let (_, root) = family();
    let place = Place::container(&root, "a").unwrap();
    let by = share::id(&place).unwrap();
    let d = place.descriptor().unwrap();
    let files: Vec<_> = d.images.iter().map(|i| place.file_of(i).unwrap()).collect();
    let exclusive = |n: usize| {
        let _alone = root.lock(true).unwrap();
        share::exclusive(&root, &files[n], by).unwrap()
    };
    // The template's, the snapshot's, and the top.
    assert_eq!([0, 1, 2].map(exclusive), [false, false, true]);
    let u = list::template(&root, "u").unwrap();
    assert_eq!(u.clones, 2, "b and c; not a, whose snapshot it is");
    assert_eq!(u.layers.iter().map(|l| l.disks).collect::<Vec<_>>(), [5, 4]);
    let templates: Vec<_> = list::containers(&root)
        .unwrap()
        .into_iter()
        .map(|c| c.template)
        .collect();
    assert_eq!(
        templates,
        [Some("t".into()), Some("u".into()), Some("u".into())]
    );
    remove::remove_containers(&root, &names(&["b", "c"])).unwrap();
    remove::remove_template(&root, "u").unwrap();
    assert_eq!([0, 1, 2].map(exclusive), [false, true, true]);
    // What its descriptor still names is not given up.
    assert_eq!(share::release(&root, &files, by).unwrap(), [false; 3]);
    assert_eq!(contents(&root).len(), 1);
}

/// Goal: a template of several layers becomes one of a single layer, for new clones only; cancelled
/// it is as it was.
#[test]
fn flattening_changes_no_byte_and_nobodys_layers() {
    let (store, root) = family();
    let before = (contents(&root), template_content(&root, "u"));
    assert_eq!(
        template::flatten(&root, "u", &|_, _| (), &|| true).unwrap(),
        None
    );
    assert_eq!(list::template(&root, "u").unwrap().layers.len(), 2);
    let done = template::flatten(&root, "u", &|_, _| (), &|| false)
        .unwrap()
        .unwrap();
    assert_eq!(done.layers, 2);
    let u = list::template(&root, "u").unwrap();
    assert_eq!((u.layers.len(), u.clones), (1, 0));
    assert_eq!((contents(&root), template_content(&root, "u")), before);
    let verified = template::verify(&root, "u", &|_, _| ()).unwrap();
    assert_eq!((verified.expected, verified.ok), (u.content, true));
    create(&root, &names(&["d"]), &of_template("u")).unwrap();
    assert_eq!(content(&root, "d"), before.1);
    assert_eq!(
        template::flatten(&root, "u", &|_, _| (), &|| false)
            .unwrap()
            .unwrap()
            .copied,
        0
    );
    drop(store);
    remove::remove_containers(&root, &names(&["a", "b", "c", "d"])).unwrap();
    remove::remove_template(&root, "u").unwrap();
    remove::remove_template(&root, "t").unwrap();
    assert_empty(&root);
}

/// Goal: what a template reads is compared with what was imported: one flipped bit is found.
#[test]
fn a_flipped_bit_in_a_layer_is_found() {
    let store = tree::start();
    let root = tree::open(Arc::new(store.clone())).unwrap();
    tree::perform(&root, Operation::Import).unwrap();
    let good = template::verify(&root, tree::TEMPLATE, &|_, _| ()).unwrap();
    assert!(
        good.ok && good.expected.as_ref() == Some(&good.content),
        "{good:?}"
    );
    let layers = store.list(&root.dir().join("layers")).unwrap();
    let image = root.dir().join("layers").join(&layers[0]).join("image.hds");
    let file = store.open(&image, Access::Write).unwrap();
    let data = file
        .next_data(32 << 10, file.len().unwrap())
        .unwrap()
        .unwrap();
    let at = data.start + 8 * 512 + 77;
    let mut byte = [0];
    file.read_at(&mut byte, at).unwrap();
    file.write_at(&[byte[0] ^ 4], at).unwrap();
    let root = tree::open(Arc::new(store)).unwrap();
    let bad = template::verify(&root, tree::TEMPLATE, &|_, _| ()).unwrap();
    assert!(!bad.ok && bad.expected == good.expected, "{bad:?}");
    assert_eq!(
        template::flatten(&root, tree::TEMPLATE, &|_, _| (), &|| false)
            .unwrap()
            .unwrap()
            .copied,
        0
    );
}

/// Goal: a snapshot of a disk that is open and written to can be cloned, once the process that has
/// it open has shared it. Method: real files and locks.
#[test]
fn a_snapshot_of_an_open_disk_is_shared_by_who_has_it_open() {
    let dir = room(&std::env::temp_dir());
    let root = rig(&dir);
    create(&root, &names(&["a"]), &of_template("t")).unwrap();
    write(&root, "a", 5 * MIB, &[1; 5000]);
    let want = content(&root, "a");
    snapshot(&root, "a");
    let place = Place::container(&root, "a").unwrap();
    let disk = place.open().unwrap();
    let refused = create(&root, &names(&["b"]), &of_snapshot("a")).unwrap_err();
    assert_eq!(refused.kind(), Kind::InUse, "{refused}");
    let d = place.descriptor().unwrap();
    let node = place.find(&d, &place.meta().unwrap(), "s").unwrap();
    assert_eq!(
        share::share(&place, d.top).unwrap_err().kind(),
        Kind::Invalid
    );
    share::share(&place, node).unwrap();
    disk.write(5 * MIB, &[2; 5000]).unwrap();
    create(&root, &names(&["b", "c"]), &of_snapshot("a")).unwrap();
    template::from_snapshot(&root, "u", "a", "s").unwrap();
    disk.write(6 * MIB, &[2; 5000]).unwrap();
    disk.close().unwrap();
    drop(disk);
    let now = contents(&root);
    assert_eq!((&now["b"], &now["c"]), (&want, &want));
    assert_ne!(now["a"], want);
    let layers = fs::read_dir(root.dir().join("layers")).unwrap();
    for layer in layers {
        let image = layer.unwrap().path().join("image.hds");
        let meta = fs::metadata(&image).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.nlink()), (0o400, 1), "{image:?}");
    }
    // A larger clone: there is no filesystem to grow, but the disk is larger.
    let larger = CreateOptions {
        size: Some(2 << 30),
    };
    create_containers(
        &root,
        &names(&["d"]),
        &of_snapshot("a"),
        &larger,
        &|_, _| (),
    )
    .unwrap();
    assert_eq!(open(&root, "d").size(), 2 << 30);
    assert_eq!(content(&root, "d"), want);
}

/// Goal: the hash is the one that the corpus was made with.
#[test]
fn the_hash_of_every_clean_case_is_the_corpuss() {
    let opener = Opener::host();
    let mut compared = 0;
    for case in corpus::cases() {
        if case.read_rule() != "exact" {
            continue;
        }
        let Some((_, Some(want))) = case.hashes().remove("top") else {
            continue;
        };
        let dir = case.unpack();
        let real = fs::canonicalize(dir.path()).unwrap();
        let entry = real.join(case.text("entry"));
        let source = Source::parse(opener.store().as_ref(), entry.to_str().unwrap()).unwrap();
        let options = OpenOptions {
            allow: vec![real],
            ..OpenOptions::default()
        };
        let disk = opener.open(&source, &options).unwrap();
        let got = hash::content(&disk, &|_, _| ()).unwrap();
        assert_eq!(got, format!("sha256-blocks:{want}"), "{}", case.name);
        compared += 1;
    }
    assert!(compared > 50, "{compared} cases");
}
