//! Files that are no images, or no longer.

use std::fs::{self, File};
use std::path::Path;

use ploop_tests::store::{Rig, assert_unchanged};
use ploop_tests::tools::{run, tool};

use crate::{no_copy, no_use, refused};

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
    let backing = Path::new("/etc/hostname");
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
        &["/etc/hostname", "--allow-dir"],
    );
}
