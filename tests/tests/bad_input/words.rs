//! Names, sizes, places and permissions.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown, symlink};

use ploop_tests::store::{Rig, on_export};

use crate::{no_use, refused};

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
    // Several are made together, or none.
    rig.refused(
        4,
        ["create", "b", "a", "c", "--template", "mini"],
        &["containers/a"],
    );
    let names: Vec<_> = rig.listing().into_keys().collect();
    assert!(!names.contains(&"containers/b".into()) && !names.contains(&"containers/c".into()));
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
        fs::set_permissions(rig.path(name), fs::Permissions::from_mode(0o000)).unwrap();
        chown(rig.path(name), Some(0), Some(0)).unwrap();
    }
    fs::create_dir(rig.path("shut")).unwrap();
    fs::write(rig.path("shut/in.img"), "x").unwrap();
    fs::create_dir(rig.path("shut/dir")).unwrap();
    fs::set_permissions(rig.path("shut"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::create_dir_all(rig.path("rootfs/etc")).unwrap();
    fs::write(rig.path("rootfs/etc/shadow"), "x").unwrap();
    fs::set_permissions(
        rig.path("rootfs/etc/shadow"),
        fs::Permissions::from_mode(0o000),
    )
    .unwrap();
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
        let convert = ["convert", "good.hds", target, "--to", "qcow2"];
        refused(&rig, 9, &convert, &[target, says[0], says[1]]);
        let dir = target.strip_suffix("new").unwrap();
        refused(
            &rig,
            9,
            &["init", "-s", "1M", target],
            &[dir, says[0], says[1]],
        );
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
        // That the host has little room is logged before.
        &["serve", "a", "--socket", "file", "--space-soft", "100%"],
        &["file", "not a socket", "Remove it", "little room left"],
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
    let small = ["is less than the"];
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
    refused(&rig, 2, &["init", "-s", "0", "new.hds"], &["non-zero"]);
    // More content than the disk is to hold.
    fs::write(rig.path("rootfs/large"), vec![7; 40 << 20]).unwrap();
    let args = ["template", "import", "b", "rootfs", "--size", "32M"];
    refused(&rig, 8, &args, &["33554432", "larger size"]);
}
