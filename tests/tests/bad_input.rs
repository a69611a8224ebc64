//! What is wrong is refused by name, with what to do about it, and leaves no trace.
//!
//! After every refusal the store and the test's own files are compared with what they were. The
//! full disks are small filesystems in memory.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

use ploop_tests::mount::{Mounted, MountedExport};
use ploop_tests::store::{Rig, assert_unchanged, on_export, qemu_io};
use ploop_tests::tools::{run, tool};

/// Runs `ploop`, which must fail with `code`, say all of `says`, and change nothing.
fn refused(rig: &Rig, code: i32, args: &[&str], says: &[&str]) {
    let before = rig.everything();
    rig.refused(code, args, says);
    assert_unchanged(&before, &rig.everything(), &format!("{args:?}"));
}

/// The same for all commands that would make something of `source`.
fn no_use(rig: &Rig, code: i32, source: &str, says: &[&str]) {
    no_copy(rig, code, source, says);
    let serve = ["serve", source, "--socket", "sock", "--read-only"];
    refused(rig, code, &serve, says);
}

/// The same for those that read all of it.
fn no_copy(rig: &Rig, code: i32, source: &str, says: &[&str]) {
    for to in ["raw", "qcow2"] {
        refused(rig, code, &["convert", source, "out", "--to", to], says);
    }
    refused(rig, code, &["template", "import", "new", source], says);
}

#[test]
fn names_that_are_wrong_taken_or_missing() {
    let rig = Rig::new();
    rig.small_template("mini", &["a"]);
    let long = "x".repeat(129);
    for name in [
        "", ".", "..", "../x", "a/b", "/etc", ".x", "a@b", "a b", "a\nb", "ä", &long,
    ] {
        let quoted = format!("the name {name:?} ");
        let says = [quoted.as_str()];
        refused(&rig, 2, &["create", name, "--template", "mini"], &says);
        refused(&rig, 2, &["create", "b", "--template", name], &says);
        refused(&rig, 2, &["template", "import", name, "rootfs"], &says);
        refused(&rig, 2, &["template", "info", name], &says);
        refused(&rig, 2, &["template", "rm", name], &says);
        refused(&rig, 2, &["rm", name], &says);
    }
    let missing = ["templates/nope", "no template nope", "ploop template list"];
    refused(&rig, 3, &["create", "b", "--template", "nope"], &missing);
    refused(&rig, 3, &["template", "rm", "nope"], &missing);
    refused(&rig, 3, &["template", "info", "nope"], &missing);
    refused(
        &rig,
        3,
        &["rm", "nope"],
        &["containers/nope", "no container nope", "ploop list"],
    );
    refused(
        &rig,
        3,
        &["info", "nope"],
        &["nope", "no such image", "ploop list"],
    );
    refused(
        &rig,
        3,
        &["info", "rootfs"],
        &["rootfs", "no DiskDescriptor.xml"],
    );
    refused(
        &rig,
        3,
        &["template", "import", "b", "nope.tar"],
        &["nope.tar", "No such file"],
    );
    refused(
        &rig,
        3,
        &["template", "import", "b", "nope"],
        &["nope: no such image"],
    );
    let there = [
        "containers/a",
        "there is a container a already",
        "ploop rm a",
    ];
    refused(&rig, 4, &["create", "a", "--template", "mini"], &there);
    let there = [
        "templates/mini",
        "there is a template mini already",
        "ploop template rm mini",
    ];
    refused(&rig, 4, &["template", "import", "mini", "rootfs"], &there);
    // Of several, what was there before the wrong one is done, and nothing after it.
    rig.refused(
        4,
        ["create", "b", "a", "c", "--template", "mini"],
        &["containers/a"],
    );
    let names: Vec<_> = rig.listing().into_keys().collect();
    assert!(names.contains(&"containers/b".into()) && !names.contains(&"containers/c".into()));
}

#[test]
fn no_store_and_no_permission_for_it() {
    let none = Rig::new();
    let says = ["there is no store here", "ploop template import", "--root"];
    for args in [
        &["list"][..],
        &["rm", "a"],
        &["create", "a", "--template", "b"],
    ] {
        none.refused(3, args, &says);
    }
    assert!(!none.root().exists());
    fs::create_dir(none.root()).unwrap();
    refused(
        &none,
        3,
        &["list"],
        &["this is no store", "ploop template import", "--root"],
    );

    let owner = Rig::new();
    owner.small_template("mini", &["a"]);
    fs::set_permissions(owner.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    for mode in [0o700, 0o755] {
        fs::set_permissions(owner.root(), fs::Permissions::from_mode(mode)).unwrap();
        let nobody = Rig::of_nobody().with_root(owner.root());
        nobody.small_rootfs();
        let root = owner.root().to_str().unwrap();
        let says = [root, "Permission denied", "Run it as"];
        refused(&nobody, 9, &["list"], &says);
        refused(&nobody, 9, &["template", "list"], &says);
        refused(&nobody, 9, &["create", "b", "--template", "mini"], &says);
        refused(&nobody, 9, &["template", "import", "b", "rootfs"], &says);
        refused(&nobody, 9, &["rm", "a"], &says);
        refused(&nobody, 9, &["template", "rm", "mini"], &says);
        refused(&nobody, 9, &["info", "a"], &says);
        refused(&nobody, 9, &["serve", "a", "--socket", "sock"], &says);
        refused(&nobody, 9, &["serve", "--store", "--socket", "sock"], &says);
    }
}

#[test]
fn sources_that_cannot_be_read_and_targets_that_cannot_be_written() {
    let rig = Rig::of_nobody();
    rig.run(["init", "-s", "1M", "good.hds"]);
    for name in ["closed.img", "closed.tar", "closed.hds"] {
        fs::copy(rig.path("good.hds"), rig.path(name)).unwrap();
        fs::set_permissions(rig.path(name), fs::Permissions::from_mode(0)).unwrap();
        chown(rig.path(name), Some(0), Some(0)).unwrap();
    }
    fs::create_dir(rig.path("shut")).unwrap();
    fs::write(rig.path("shut/in.img"), "x").unwrap();
    fs::create_dir(rig.path("shut/dir")).unwrap();
    fs::set_permissions(rig.path("shut"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::create_dir_all(rig.path("rootfs/etc")).unwrap();
    fs::write(rig.path("rootfs/etc/shadow"), "x").unwrap();
    fs::set_permissions(rig.path("rootfs/etc/shadow"), fs::Permissions::from_mode(0)).unwrap();
    fs::create_dir(rig.path("empty")).unwrap();
    rig.run(["template", "import", "there", "empty", "--size", "16M"]);
    let says = ["Permission denied", "Run "];
    for source in ["closed.img", "closed.hds", "shut/in.img"] {
        no_use(&rig, 9, source, &[source, says[0], says[1]]);
        refused(&rig, 9, &["info", source], &[source, says[0], says[1]]);
        refused(&rig, 9, &["check", source], &[source, says[0], says[1]]);
    }
    for source in ["closed.tar", "shut", "shut/dir", "rootfs"] {
        let name = if source == "rootfs" { "shadow" } else { source };
        refused(
            &rig,
            9,
            &["template", "import", "new", source],
            &[name, says[0], says[1]],
        );
    }
    for target in ["shut/new", "/new"] {
        let says = [target, says[0], says[1]];
        refused(
            &rig,
            9,
            &["convert", "good.hds", target, "--to", "qcow2"],
            &says,
        );
        refused(&rig, 9, &["init", "-s", "1M", target], &says);
    }
}

#[test]
fn targets_that_are_there() {
    let rig = Rig::new();
    rig.small_template("mini", &["a"]);
    fs::write(rig.path("file"), "precious").unwrap();
    symlink("nowhere", rig.path("link")).unwrap();
    for to in ["raw", "ploop", "ploop-v1", "qcow2"] {
        for target in ["rootfs", "file", "link"] {
            let says = [target, "already", "Choose another name"];
            refused(&rig, 4, &["convert", "a", target, "--to", to], &says);
        }
        refused(
            &rig,
            3,
            &["convert", "a", "nodir/new", "--to", to],
            &["nodir", "No such file"],
        );
    }
    rig.run(["init", "-s", "1M", "disk.hds"]);
    refused(
        &rig,
        4,
        &["init", "-s", "1M", "other.hds"],
        &["DiskDescriptor.xml", "already"],
    );
    refused(
        &rig,
        4,
        &["serve", "a", "--socket", "file"],
        &["file", "not a socket", "Remove it"],
    );
}

#[test]
fn places_to_listen_that_are_taken_or_unwise() {
    let rig = Rig::new();
    rig.small_template("mini", &["a", "b"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    refused(
        &rig,
        5,
        &["serve", "a", "--listen", &address],
        &[&address, "in use"],
    );
    let server = rig.serve(["b"]);
    let socket = server.socket().to_str().unwrap().to_owned();
    let says = [socket.as_str(), "live server", "use another path"];
    refused(&rig, 5, &["serve", "a", "--socket", &socket], &says);
    on_export(&server.uri("b"), &["write -P 1 30M 4k", "flush"]);
    server.stop();
    let unwise = ["0.0.0.0:0", "no encryption", "--insecure-listen"];
    refused(&rig, 9, &["serve", "a", "--listen", "0.0.0.0:0"], &unwise);
    refused(
        &rig,
        2,
        &["serve", "a", "--listen", "nonsense"],
        &["nonsense", "HOST:PORT"],
    );
    let long = "x".repeat(200);
    refused(
        &rig,
        2,
        &["serve", "a", "--socket", &long],
        &["107", "shorter path"],
    );
    refused(
        &rig,
        3,
        &["serve", "a", "--socket", "nodir/sock"],
        &["nodir", "No such file"],
    );
    refused(&rig, 2, &["serve", "a"], &["--socket"]);
    refused(&rig, 2, &["serve", "a", "--activation"], &["systemd"]);
}

/// `check` says what is wrong on standard output: that is what it was asked for.
fn finds_damage(rig: &Rig, source: &str) {
    let before = rig.everything();
    let out = rig.ploop().args(["check", source]).output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(6), "{said}");
    assert!(said.contains(&format!("{source}: offset 0x")), "{said}");
    assert!(said.ends_with(&format!("{source}: corrupt\n")), "{said}");
    assert_unchanged(&before, &rig.everything(), "check");
}

#[test]
fn images_that_are_none() {
    let rig = Rig::new();
    rig.small_template("mini", &["a"]);
    let noise: Vec<u8> = (0..1u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    fs::write(rig.path("garbage"), &noise).unwrap();
    fs::write(rig.path("empty"), "").unwrap();
    let says = ["neither the signature", "--from raw"];
    for source in ["garbage", "empty"] {
        no_use(&rig, 6, source, &[source, says[0], says[1]]);
        finds_damage(&rig, source);
    }
    for format in ["ploop", "qcow2"] {
        let args = [
            "convert", "garbage", "out.raw", "--to", "raw", "--from", format,
        ];
        refused(&rig, 6, &args, &["garbage", "offset 0x0"]);
    }
    // Images that end too early, at every border of their parts.
    rig.run([
        "convert", "garbage", "good.hds", "--from", "raw", "--to", "ploop",
    ]);
    rig.run([
        "convert",
        "garbage",
        "good.qcow2",
        "--from",
        "raw",
        "--to",
        "qcow2",
    ]);
    for (source, in_header, in_data) in [
        ("good.hds", [16, 63, 64 + 16], [70_000, 600_000]),
        ("good.qcow2", [16, 71, 600], [280_000, 600_000]),
    ] {
        let cut = |len| {
            fs::copy(rig.path(source), rig.path("cut")).unwrap();
            let file = File::options().write(true).open(rig.path("cut")).unwrap();
            file.set_len(len).unwrap();
        };
        for len in in_header {
            cut(len);
            no_use(&rig, 6, "cut", &["cut: offset 0x"]);
        }
        for len in in_data {
            cut(len);
            no_copy(&rig, 6, "cut", &["cut: offset 0x"]);
            if source == "good.hds" {
                let serve = ["serve", "cut", "--socket", "sock"];
                refused(&rig, 6, &serve, &["cut: offset 0x", "ploop check"]);
            }
        }
    }
    finds_damage(&rig, "cut");
    // An image that would pull in whatever its author liked.
    let back = rig.arg("back.qcow2");
    let backing = rig.root().join("lock");
    let mut command = tool("qemu-img");
    command
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(backing);
    run(command.args([&back, "1M"]));
    let says = ["back.qcow2", "backing file", "ploop convert"];
    refused(&rig, 9, &["template", "import", "new", "back.qcow2"], &says);
    refused(
        &rig,
        9,
        &["convert", "back.qcow2", "o", "--to", "raw"],
        &["lock", "--allow-dir"],
    );
}

#[test]
fn descriptors_that_are_hostile() {
    let rig = Rig::new();
    rig.run(["init", "-s", "1M", "disk.hds"]);
    let good = fs::read_to_string(rig.path("DiskDescriptor.xml")).unwrap();
    assert_eq!(good.matches("disk.hds").count(), 1, "{good}");
    rig.small_template("mini", &[]);
    let xml = rig.path("bad/DiskDescriptor.xml");
    fs::create_dir(rig.path("bad")).unwrap();
    let case = |text: &[u8], code, says: &[&str]| {
        fs::write(&xml, text).unwrap();
        no_use(&rig, code, "bad", says);
        refused(&rig, code, &["info", "bad"], says);
        refused(
            &rig,
            code,
            &["snapshot-list", "bad"],
            &["DiskDescriptor.xml"],
        );
    };
    let body = &good[good.find("<Virtuozzo").unwrap()..];
    let laughs: String = (1..20)
        .map(|i| format!("<!ENTITY l{i} \"&l{};&l{};\">", i - 1, i - 1))
        .collect();
    for entity in ["<!ENTITY x SYSTEM \"file:///etc/passwd\">", &laughs, ""] {
        let text = format!("<?xml version=\"1.0\"?>\n<!DOCTYPE a [{entity}]>\n{body}");
        case(
            text.as_bytes(),
            6,
            &["bad/DiskDescriptor.xml", "DOCTYPE", "Remove the DOCTYPE"],
        );
    }
    case(b"", 6, &["bad/DiskDescriptor.xml"]);
    case(b"\0\xFFgarbage<<<", 6, &["bad/DiskDescriptor.xml"]);
    case(
        &good.as_bytes()[..good.len() / 2],
        6,
        &["bad/DiskDescriptor.xml"],
    );
    let deep = "<a>".repeat(200_000);
    case(deep.as_bytes(), 6, &["bad/DiskDescriptor.xml"]);
    // Larger than any descriptor, and nothing in it.
    fs::write(&xml, "").unwrap();
    File::options()
        .write(true)
        .open(&xml)
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    rig.refused(
        6,
        ["info", "bad"],
        &["bad/DiskDescriptor.xml", "is the limit"],
    );
    // Files that are not the disk's.
    for file in [
        "/etc/passwd",
        "../disk.hds",
        "../../../../../etc/passwd",
        "link",
    ] {
        fs::write(&xml, good.replace("disk.hds", file)).unwrap();
        if file == "link" {
            symlink("/etc/passwd", rig.path("bad/link")).unwrap();
        }
        no_use(
            &rig,
            9,
            "bad",
            &["outside of the disk's directory", "--allow-dir"],
        );
    }
}

#[test]
fn archives_that_are_hostile() {
    let rig = Rig::new();
    rig.small_template("mini", &[]);
    fs::create_dir(rig.path("in")).unwrap();
    fs::write(rig.path("in/evil"), "x").unwrap();
    fs::create_dir(rig.path("out")).unwrap();
    let tar = |args: &[&str]| run(tool("tar").args(args).current_dir(rig.path("in")));
    let archive = rig.arg("evil.tar");
    for (transform, member) in [
        (format!("s,^,{}/,", rig.arg("out")), "evil"),
        ("s,^,../out/,".into(), "../out/evil"),
        ("s,^,a/../../out/,".into(), "a/../../out/evil"),
    ] {
        tar(&["-P", "-cf", &archive, "--transform", &transform, "evil"]);
        refused(
            &rig,
            2,
            &["template", "import", "new", "evil.tar"],
            &["evil.tar", member],
        );
    }
    symlink(rig.path("out"), rig.path("in/link")).unwrap();
    tar(&["-P", "-cf", &archive, "link"]);
    tar(&["-P", "-rf", &archive, "--transform", "s,^,link/,", "evil"]);
    refused(
        &rig,
        2,
        &["template", "import", "new", "evil.tar"],
        &["evil.tar", "link/evil"],
    );
    // Ends too early, or is nothing of the kind.
    let whole = fs::read(&archive).unwrap();
    fs::write(&archive, &whole[..700]).unwrap();
    refused(
        &rig,
        6,
        &["template", "import", "new", "evil.tar"],
        &["evil.tar"],
    );
    fs::write(&archive, vec![0x41; 5000]).unwrap();
    refused(
        &rig,
        6,
        &["template", "import", "new", "evil.tar"],
        &["evil.tar"],
    );
    fs::write(
        rig.path("cut.tar.gz"),
        [0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 3, 1],
    )
    .unwrap();
    refused(
        &rig,
        6,
        &["template", "import", "new", "cut.tar.gz"],
        &["cut.tar.gz"],
    );
    fs::write(rig.path("later.tar.xz"), b"\xFD7zXZ\0").unwrap();
    let says = ["later.tar.xz", "xz"];
    refused(
        &rig,
        7,
        &["template", "import", "new", "later.tar.xz"],
        &says,
    );

    // Device nodes are a root filesystem's right: they get into the image, whoever imports them,
    // and onto nobody's own tree.
    let nobody = Rig::of_nobody();
    run(Command::new("mknod")
        .arg(rig.path("in/null"))
        .args(["c", "1", "3"]));
    run(Command::new("mknod")
        .arg(rig.path("in/disk"))
        .args(["b", "8", "0"]));
    let nodes = nobody.arg("nodes.tar");
    tar(&["-cf", &nodes, "null", "disk"]);
    nobody.run(["template", "import", "nodes", &nodes]);
    nobody.run(["create", "a", "--template", "nodes"]);
    let is_node = |text: &String| text.starts_with("02") || text.starts_with("06");
    assert!(!nobody.everything().0.values().any(is_node));
    let server = nobody.serve(["a"]);
    let mounted = MountedExport::new(&server.uri("a"));
    let said = mounted.path().to_str().unwrap().to_owned();
    let said = run(tool("stat")
        .args(["-c", "%F %t:%T"])
        .args(["null", "disk"])
        .current_dir(said));
    let said = String::from_utf8(said.stdout).unwrap();
    assert_eq!(said, "character special file 1:3\nblock special file 8:0\n");
    drop(mounted);
    server.stop();
}

#[test]
fn sizes_that_make_no_sense() {
    let rig = Rig::new();
    rig.small_template("mini", &["a"]);
    for size in [
        "",
        "G",
        "-1",
        "10X",
        "1e30T",
        "99999999999T",
        "1.5.5G",
        "0x10",
        "10 G",
        "NaN",
    ] {
        let size = format!("--size={size}");
        let says = ["is no size", "like 10G"];
        refused(
            &rig,
            2,
            &["create", "b", "--template", "mini", &size],
            &says,
        );
        refused(
            &rig,
            2,
            &["template", "import", "b", "rootfs", &size],
            &says,
        );
    }
    let small = ["less than the template's"];
    refused(
        &rig,
        2,
        &["create", "b", "--template", "mini", "--size", "63M"],
        &small,
    );
    refused(
        &rig,
        2,
        &["create", "b", "--template", "mini", "--size", "0"],
        &small,
    );
    refused(
        &rig,
        2,
        &["create", "b", "--template", "mini", "--size", "8191P"],
        &["is no size"],
    );
    for size in ["0", "1M", "16777217", "16T"] {
        let args = ["template", "import", "b", "rootfs", "--size", size];
        refused(&rig, 2, &args, &["at least 16 MiB"]);
    }
    for cluster in ["0", "1", "3K", "16K", "33K", "96K", "128M", "1T"] {
        let says = ["32K", "64M"];
        let import = ["template", "import", "b", "rootfs", "--cluster", cluster];
        refused(&rig, 2, &import, &says);
        let convert = [
            "convert",
            "a",
            "out.hds",
            "--to",
            "ploop",
            "--cluster",
            cluster,
        ];
        refused(&rig, 2, &convert, &says);
    }
    for size in ["", "x", "-5", "700B"] {
        refused(&rig, 2, &["init", "-s", size, "new.hds"], &["error: "]);
    }
    refused(&rig, 2, &["init", "-s", "0", "new.hds"], &["new.hds"]);
    // More content than the disk is to hold.
    fs::write(rig.path("rootfs/large"), vec![7; 40 << 20]).unwrap();
    let args = ["template", "import", "b", "rootfs", "--size", "32M"];
    refused(&rig, 8, &args, &["33554432", "--size"]);
}

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
        let (ok, said) = qemu_io(
            "raw",
            false,
            std::ffi::OsStr::from_bytes(uri.as_bytes()),
            &commands,
        );
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
    assert!(Path::new(rig.root()).exists());
}
