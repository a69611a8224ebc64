//! The real thing: a Debian root filesystem through import, clone, server, mount and chroot, and a
//! hundred clones of one template.
//!
//! The mounts go through nbdfuse and a loop device, so the kernel's ext4 is the judge of what we
//! serve, and e2fsck of what it left.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use ploop_tests::mount::{MountedExport, NbdFile, e2fsck};
use ploop_tests::store::{Rig, on_export};
use ploop_tests::tools::{run, tool};
use ploop_tests::treehash::{Tree, assert_same, tree};
use ploop_tests::{minbase, treehash};

/// First byte of the partition.
const PARTITION: u64 = 1 << 20;

/// Clones `template`, serves the clone, mounts it: it must be the tree that was imported. Then
/// Debian's own programs run in it.
fn boots(rig: &Rig, template: &str, want: &Tree) {
    let before = rig.template_content(template);
    rig.run(["create", "ct", "--template", template]);
    let server = rig.serve(["ct"]);
    let mounted = MountedExport::new(&server.uri("ct"));
    assert_same(&tree(mounted.path()), want, template);
    let said = mounted.chroot("dpkg -l && apt-get --version && echo changed > /etc/hostname");
    assert!(
        said.contains("ii  base-files ") && said.contains("ii  dpkg "),
        "{said}"
    );
    assert!(said.lines().any(|l| l.starts_with("apt ")), "{said}");
    let file = mounted.unmount();
    file.e2fsck(PARTITION);
    drop(file);
    server.stop();

    // The same bytes, past the server: sound as a disk and as a file system.
    rig.run(["convert", "ct", "ct.raw", "--to", "raw"]);
    e2fsck(&rig.path("ct.raw"), PARTITION);
    sgdisk_is_content(&rig.path("ct.raw"));
    fs::remove_file(rig.path("ct.raw")).unwrap();
    assert!(rig.run(["check", "ct"]).contains("clean"));
    assert_eq!(
        rig.template_content(template),
        before,
        "the template changed"
    );
    rig.run(["rm", "ct"]);
}

fn sgdisk_is_content(disk: &Path) {
    let said = String::from_utf8(run(tool("sgdisk").arg("-v").arg(disk)).stdout).unwrap();
    assert!(said.contains("No problems found"), "{said}");
}

/// Goal: what is mounted is what was imported, whoever imports it and from what; and it is a system
/// that runs. Method: Debian's minbase as a tar archive (by root and by nobody) and as a directory.
#[test]
fn a_debian_is_the_same_from_a_tar_from_a_directory_and_from_nobodys_hand() {
    let tar = minbase::tar();
    let rig = Rig::new();
    let source = rig.path("source");
    fs::create_dir(&source).unwrap();
    minbase::unpack(&tar, &source);
    let want = tree(&source);
    assert!(want.len() > 5000, "{} entries are no Debian", want.len());

    rig.run(["template", "import", "tar", tar.to_str().unwrap()]);
    boots(&rig, "tar", &want);
    grows(&rig, "tar", &want);

    rig.run(["template", "import", "directory", source.to_str().unwrap()]);
    assert_same(&tree(&source), &want, "the source was changed");
    boots(&rig, "directory", &want);

    let nobody = Rig::of_nobody();
    fs::copy(&tar, nobody.path("minbase.tar")).unwrap();
    nobody.run(["template", "import", "tar", "minbase.tar"]);
    boots(&nobody, "tar", &want);
}

/// A clone that is larger than its template: partition and filesystem have grown with the disk.
fn grows(rig: &Rig, template: &str, want: &Tree) {
    const SIZE: u64 = 2 << 30;
    let before = rig.template_content(template);
    for (name, cached) in [("large", false), ("second", true)] {
        let made = rig.json([
            "create",
            name,
            "--template",
            template,
            "--size",
            "2G",
            "--json",
        ]);
        assert_eq!(made[0]["size"], SIZE, "{made}");
        assert_eq!(made[0]["grown"]["cached"], cached, "{made}");
        let server = rig.serve([name]);
        let file = NbdFile::attach(&server.uri(name));
        assert_eq!(fs::metadata(file.path()).unwrap().len(), SIZE);
        sgdisk_is_content(file.path());
        file.e2fsck(PARTITION);
        let device = format!("{}?offset={PARTITION}", file.path().display());
        let said = run(tool("dumpe2fs").args(["-h", &device])).stdout;
        let said = String::from_utf8(said).unwrap();
        let number = |key: &str| -> u64 {
            let line = said.lines().find_map(|l| l.strip_prefix(key));
            line.unwrap().trim().parse().unwrap()
        };
        let bytes = number("Block count:") * number("Block size:");
        assert!(
            bytes > SIZE - (4 << 20),
            "the file system has {bytes} bytes"
        );
        drop(file);
        let mounted = MountedExport::new(&server.uri(name));
        assert_same(&tree(mounted.path()), want, name);
        let free = rustix::fs::statvfs(mounted.path()).unwrap();
        assert!(
            free.f_bavail * free.f_frsize > SIZE / 10 * 7,
            "{} blocks free",
            free.f_bavail
        );
        fs::write(mounted.path().join("root/filled"), vec![7; 400 << 20]).unwrap();
        mounted.unmount().e2fsck(PARTITION);
        server.stop();
    }
    assert_eq!(
        rig.template_content(template),
        before,
        "the template changed"
    );
    rig.run(["rm", "large", "second"]);
}

/// Goal: what is written to one clone is in no other, and not in the template. Method: 120 clones
/// of one template, each written its own pattern, several at a time, through one server; all are
/// read again when all have been written.
#[test]
fn a_hundred_and_twenty_clones_know_nothing_of_each_other() {
    const CLONES: u64 = 120;
    const THREADS: u64 = 4;
    let rig = Rig::new();
    let names: Vec<String> = (1..=CLONES).map(|i| format!("ct{i:03}")).collect();
    rig.small_template(
        "mini",
        &names.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    rig.run(["create", "untouched", "--template", "mini"]);
    let before = rig.template_content("mini");
    let layer = treehash::file_digest(&rig.layer());

    let server = rig.serve(["--store"]);
    // One cluster of its own, one that all share, and one at its end that starts in a cluster's
    // middle; `i` is the pattern.
    let places = |i: u64| [(20 << 20) + i * 65_536, 8 << 20, (50 << 20) + i * 4096];
    let all = |one: &(dyn Fn(u64) + Sync)| {
        std::thread::scope(|scope| {
            for t in 0..THREADS {
                scope.spawn(move || (1..=CLONES).filter(|i| i % THREADS == t).for_each(one));
            }
        });
    };
    let uri = |i: u64| server.uri(&names[i as usize - 1]);
    all(&|i| {
        let writes = places(i).map(|at| format!("write -P {i} {at} 4096"));
        on_export(&uri(i), &[&writes[0], &writes[1], &writes[2], "flush"]);
    });
    all(&|i| {
        let [own, shared, end] = places(i).map(|at| format!("read -P {i} {at} 4096"));
        // Where its neighbour wrote, it has nothing.
        let other = places(i % CLONES + 1);
        let [other, _, last] = other.map(|at| format!("read -P 0 {at} 4096"));
        on_export(&uri(i), &[&own, &shared, &end, &other, &last]);
    });

    // The same, as users see it.
    let a = MountedExport::new(&uri(1));
    let b = MountedExport::new(&uri(2));
    let was = tree(b.path());
    fs::write(a.path().join("etc/hostname"), "first\n").unwrap();
    fs::write(a.path().join("home/user/new"), vec![1; 1 << 20]).unwrap();
    rustix::fs::syncfs(fs::File::open(a.path()).unwrap()).unwrap();
    assert_same(
        &tree(b.path()),
        &was,
        "the second clone saw what the first one wrote",
    );
    a.unmount().e2fsck(PARTITION);
    b.unmount().e2fsck(PARTITION);
    server.stop();

    assert_eq!(rig.template_content("mini"), before);
    assert_eq!(rig.content("untouched"), before);
    assert_eq!(
        treehash::file_digest(&rig.layer()),
        layer,
        "a sealed layer was written"
    );
    assert_ne!(rig.content(&names[0]), before);
    // Removing them all leaves the template, and nothing of theirs.
    let rm = ["rm", "untouched"]
        .into_iter()
        .chain(names.iter().map(String::as_str));
    rig.run(rm);
    let listing = rig.listing();
    assert!(
        !listing
            .keys()
            .any(|p| p.starts_with("containers/") && p.components().count() > 1)
    );
    assert_eq!(rig.template_content("mini"), before);
}
