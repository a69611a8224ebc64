//! Full disks: small filesystems that a store is on.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;

use ploop_tests::mount::Mounted;
use ploop_tests::store::{Rig, on_export, qemu_io};
use ploop_tests::tools::{run, tool};

use crate::refused;

/// A filesystem of 64 MiB with a store in it.
struct Small {
    // In this order: the store's rig goes before what it stands on.
    rig: Rig,
    disk: Mounted,
}

impl Small {
    fn new() -> Small {
        let disk = Mounted::tmpfs(64 << 20);
        let rig = Rig::new().with_root(&disk.path().join("store"));
        Small { rig, disk }
    }

    /// Takes all the room there is, to the last byte.
    fn fill(&self) {
        // Room is handed out in batches, so the last of it takes more than one attempt.
        for i in 0..4 {
            let mut file = File::create(self.disk.path().join(format!("filler{i}"))).unwrap();
            for piece in [1 << 20, 4096, 1] {
                while file.write_all(&vec![0xFF; piece]).is_ok() {}
            }
        }
    }

    fn make_room(&self) {
        for i in 0..4 {
            fs::remove_file(self.disk.path().join(format!("filler{i}"))).unwrap();
        }
    }
}

#[test]
fn a_disk_that_fills_up_during_an_import() {
    let small = Small::new();
    let rig = &small.rig;
    rig.small_template("mini", &["a"]);
    let big: Vec<u8> = (0..100u32 << 20).map(|i| (i / 512) as u8 | 1).collect();
    fs::create_dir(rig.path("big")).unwrap();
    fs::write(rig.path("big/file"), &big).unwrap();
    fs::write(rig.path("big.raw"), &big).unwrap();
    run(tool("tar")
        .arg("-cf")
        .arg(rig.path("big.tar"))
        .arg("-C")
        .arg(rig.path("big"))
        .arg("."));
    let root = rig.root().to_str().unwrap();
    for source in ["big", "big.raw", "big.tar"] {
        let says = [root, "No space left on device", "Make room"];
        refused(rig, 8, &["template", "import", "new", source], &says);
    }
    rig.run(["template", "import", "new", "rootfs", "--size", "64M"]);
    let layers = fs::read_dir(rig.root().join("layers")).unwrap().count();
    assert_eq!(layers, 2);
}

#[test]
fn a_full_disk_refuses_new_containers_and_still_removes_old_ones() {
    let small = Small::new();
    let rig = &small.rig;
    rig.small_template("mini", &["a", "b", "c"]);
    let content = rig.template_content("mini");
    small.fill();
    let root = rig.root().to_str().unwrap();
    let says = [root, "No space left on device", "Make room"];
    refused(rig, 8, &["create", "new", "--template", "mini"], &says);
    refused(
        rig,
        8,
        &["create", "new", "--template", "mini", "--size", "200M"],
        &says,
    );
    refused(rig, 8, &["template", "import", "new", "rootfs"], &says);
    // Reading takes no room, nor does serving, nor does getting rid of something.
    rig.run(["list"]);
    assert!(rig.run(["check", "a"]).contains("clean"));
    assert_eq!(rig.content("a"), content);
    let server = rig.serve(["a"]);
    on_export(&server.uri("a"), &["read -P 0 40M 1M"]);
    server.stop();
    rig.run(["rm", "a", "b"]);
    small.make_room();
    rig.run(["create", "new", "--template", "mini", "--size", "200M"]);
    rig.run(["rm", "c", "new"]);
    rig.run(["template", "rm", "mini"]);
    assert_eq!(fs::read_dir(rig.root().join("layers")).unwrap().count(), 0);
}

/// The same on the filesystem that most stores are on, where a directory takes room, too.
#[test]
fn a_full_ext4_still_removes_containers() {
    let rig = Rig::new();
    let image = rig.path("ext4");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    run(tool("mke2fs").args(["-q", "-t", "ext4"]).arg(&image));
    let disk = Mounted::new(&image, "loop");
    let rig = rig.with_root(&disk.path().join("store"));
    rig.small_template("mini", &["a", "b"]);
    let small = Small { rig, disk };
    small.fill();
    let says = ["No space left on device", "Make room"];
    let before = small.rig.listing();
    small
        .rig
        .refused(8, ["create", "new", "--template", "mini"], &says);
    assert_eq!(small.rig.listing(), before);
    small.rig.run(["rm", "a"]);
    small.rig.run(["rm", "b"]);
    small.rig.run(["template", "rm", "mini"]);
    assert_eq!(
        fs::read_dir(small.rig.root().join("layers"))
            .unwrap()
            .count(),
        0
    );
    let Small { rig, disk } = small;
    drop(disk);
    drop(rig);
}

#[test]
fn a_disk_that_fills_up_under_a_server_costs_the_writer_an_error_and_nobody_anything_else() {
    let small = Small::new();
    let rig = &small.rig;
    rig.small_template("mini", &["a", "b", "c"]);
    let template = rig.template_content("mini");
    let server = rig.serve(["--store"]);
    let a = server.uri("a");
    on_export(&a, &["write -P 7 20M 1M", "flush"]);
    small.fill();
    let wants_room = |uri: &str| {
        let commands = ["write -P 8 30M 8M", "flush"];
        let (ok, said) = qemu_io("raw", false, OsStr::new(uri), &commands);
        assert!(!ok && said.contains("No space left on device"), "{said}");
    };
    wants_room(&a);
    wants_room(&server.uri("b"));
    // What has its room goes on, and what was promised is there.
    on_export(
        &a,
        &[
            "read -P 7 20M 1M",
            "write -P 9 20M 64k",
            "flush",
            "read -P 9 20M 64k",
        ],
    );
    assert!(rig.root().join("containers/c").exists());
    rig.run(["rm", "c"]);
    small.make_room();
    // Without a restart, as soon as there is room.
    on_export(
        &a,
        &[
            "write -P 8 30M 8M",
            "flush",
            "read -P 8 30M 8M",
            "read -P 7 21430272 4k",
        ],
    );
    server.stop();
    for name in ["a", "b"] {
        assert!(rig.run(["check", name]).contains("clean"));
    }
    assert_eq!(rig.template_content("mini"), template);
    let server = rig.serve(["a"]);
    on_export(
        &server.uri("a"),
        &["read -P 9 20M 64k", "read -P 8 30M 8M", "read -P 0 50M 1M"],
    );
    server.stop();
    rig.run(["rm", "a", "b"]);
}
