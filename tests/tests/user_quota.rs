//! `--user-quota`: which templates get it, who inherits it, and what is refused. That a kernel counts
//! and enforces it is shown in a guest: `tests/guest/scenarios/user_quota`.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use ploop_tests::mount::e2fsck;
use ploop_tests::store::Rig;
use ploop_tests::tools::{run, tool};

/// A disk of the store as a raw file, its file system checked and counting by user and group.
fn counts(rig: &Rig, source: &str, offset: u64) {
    let raw = rig.path("raw");
    rig.run(["convert", source, raw.to_str().unwrap(), "--to", "raw"]);
    e2fsck(&raw, offset);
    let place = format!("{}?offset={offset}", raw.display());
    let out = run(tool("dumpe2fs").arg("-h").arg(place)).stdout;
    let out = String::from_utf8_lossy(&out).into_owned();
    for says in [
        "User quota inode:",
        "Group quota inode:",
        "usrquota,grpquota",
    ] {
        assert!(out.contains(says), "{source}: {says}: {out}");
    }
    std::fs::remove_file(raw).unwrap();
}

fn mkfs(image: &Path, kind: &str) {
    run(tool("truncate").args(["-s", "400M"]).arg(image));
    run(tool(kind).arg("-q").arg(image));
}

#[test]
fn a_template_counts_by_user_and_so_does_what_comes_of_it() {
    let rig = Rig::new();
    let source = rig.small_rootfs();
    let import = ["template", "import", "t", source.to_str().unwrap()];
    rig.run(import.iter().chain(&["--size", "64M", "--user-quota"]));
    rig.run(["create", "same", "--template", "t"]);
    rig.run(["create", "larger", "--template", "t", "--size", "1G"]);
    for name in ["same", "larger"] {
        counts(&rig, name, 1 << 20);
    }
    rig.run(["snapshot", "create", "same", "--name", "s"]);
    rig.run(["template", "create", "golden", "--from", "same@s"]);
    for name in ["t", "golden"] {
        let info = rig.json(["template", "info", name, "--json"]);
        assert_eq!(info["user_quota"], true, "{info}");
        assert!(
            rig.run(["template", "info", name])
                .contains("users and groups")
        );
    }
    rig.run(["template", "verify", "t"]);
    assert_eq!(
        rig.run(["template", "list"]).matches("ext4, quota").count(),
        2
    );

    // Nobody gets it who did not ask: not every kernel mounts it.
    rig.run(["template", "import", "plain", source.to_str().unwrap()]);
    let info = rig.json(["template", "info", "plain", "--json"]);
    assert_eq!(info["user_quota"], false, "{info}");
}

#[test]
fn an_image_gets_it_and_stays_what_it_was() {
    let rig = Rig::new();
    let image = rig.path("disk.raw");
    mkfs(&image, "mkfs.ext4");
    let before = rig.content("disk.raw");
    rig.run(["template", "import", "t", "disk.raw", "--user-quota"]);
    rig.run(["create", "c", "--template", "t"]);
    counts(&rig, "c", 0);
    rig.run(["template", "verify", "t"]);
    assert_eq!(rig.content("disk.raw"), before);
}

#[test]
fn what_cannot_have_it_is_refused_by_name() {
    let rig = Rig::new();
    mkfs(&rig.path("disk.raw"), "mkfs.xfs");
    let import = ["template", "import", "t", "disk.raw"];
    let says = ["XFS", "uquota,gquota"];
    rig.refused(7, import.iter().chain(&["--user-quota"]), &says);
    assert!(!rig.root().join("templates/t").exists());
    rig.run(import);
}
