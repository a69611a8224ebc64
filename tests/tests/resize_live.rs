//! `ploop resize` of a disk in use.
//!
//! What a user would lose: what his clients write meanwhile, a snapshot's size, or the disk, if another
//! tool took the grown image for a damaged one.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nbd_server::wire::request::kind;
use ploop_tests::client::Ask;
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::store::{Rig, on_export, qemu_io};
use ploop_tests::tools::{run, tool};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Clusters of a MiB: each 256 GiB need one more for the table.
const SIZES: [u64; 4] = [96 * MIB, 300 * GIB, 800 * GIB, 801 * GIB];

fn size(rig: &Rig, source: &str) -> u64 {
    rig.json(["info", source, "--json"])["virtual_size"]
        .as_u64()
        .unwrap()
}

fn images_are_sound(rig: &Rig) {
    assert!(rig.run(["check", "ct"]).contains("clean"));
    for entry in fs::read_dir(rig.root().join("containers/ct")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_string_lossy().starts_with("root.hds") {
            run(tool("qemu-img")
                .args(["check", "-f", "parallels"])
                .arg(entry.path()));
        }
    }
}

/// Ends the writers, also when a test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Goal: clients of before go on as if nothing happened; who connects after it has the new size, and
/// can use all of it; snapshots keep theirs, can be gone back to, and deleted. Method: writers with a
/// connection each who read back, while the disk grows through sizes whose table is where data was.
#[test]
fn a_disk_grows_under_its_clients() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    let daemon = Daemon::start(&rig);
    let small = size(&rig, "ct");
    on_export(&daemon.uri("ct"), &["write -P 9 40M 3M", "flush"]);
    take(&daemon.api(), "ct", "small");
    // Was told the size of before, and asks for more once somebody tells it of that.
    let mut old = daemon.open("ct");
    let beyond = old.ask(Ask::new(kind::READ, 0, small..small + 4096));
    assert_eq!(beyond.error, 22, "EINVAL");
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|s| {
        for w in 0..4u64 {
            let (daemon, done, rounds) = (&daemon, &done, &rounds);
            s.spawn(move || {
                let mut client = daemon.open("ct");
                let mut round = 0u64;
                while !done.load(Ordering::Relaxed) {
                    let at = (4 + (round % 8) * 4 + w) * MIB + (round % 3) * 4096;
                    let bytes = vec![(round % 255) as u8 + 1; 64 * 1024];
                    client.write(at, &bytes);
                    if round.is_multiple_of(5) {
                        client.flush();
                    }
                    assert!(client.read(at, 64 * 1024) == bytes);
                    round += 1;
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                client.disconnect();
            });
        }
        let _ends = Ends(&done);
        let mut before = small;
        for to in SIZES {
            let seen = rounds.load(Ordering::Relaxed);
            while rounds.load(Ordering::Relaxed) < seen + 50 {
                std::thread::yield_now();
            }
            let said = rig.json(["resize", "ct", &to.to_string(), "--json"]);
            let resized = &said;
            assert_eq!(
                (&resized["before"], &resized["size"]),
                (&before.into(), &to.into())
            );
            let why = resized["reason"].as_str().unwrap();
            assert!(why.contains("in use"), "{why}");
            assert_eq!(size(&rig, "ct"), to);
            let end = to - 65536;
            let write = format!("write -P 7 {end} 64k");
            on_export(
                &daemon.uri("ct"),
                &[&write, &format!("read -P 7 {end} 64k")],
            );
            assert!(old.read(end, 65536) == vec![7; 65536]);
            old.write(end, &[8; 4096]);
            before = to;
        }
        // Smaller than it is, in use: refused, and nothing happens.
        rig.refused(2, ["resize", "ct", "64M"], &["less than", "--shrink"]);
        rig.refused(
            5,
            ["resize", "ct", "64M", "--shrink"],
            &["in use", "Disconnect"],
        );
    });
    old.disconnect();
    assert_eq!(size(&rig, "ct"), SIZES[3]);
    assert_eq!(size(&rig, "ct@small"), small);
    let uri = daemon.uri("ct@small");
    let (same, said) = qemu_io("raw", true, uri.as_ref(), &["read -P 9 40M 3M"]);
    assert!(same, "{said}");
    take(&daemon.api(), "ct", "large");
    rig.run(["snapshot", "switch", "ct", "small"]);
    assert_eq!(size(&rig, "ct"), small);
    rig.run(["snapshot", "switch", "ct", "large"]);
    assert_eq!(size(&rig, "ct"), SIZES[3]);
    let last = format!("read -P 7 {} 60k", SIZES[3] - 61440);
    on_export(&daemon.uri("ct"), &["read -P 9 40M 3M", &last]);
    // The small one is merged into what is larger.
    rig.run(["snapshot", "delete", "ct", "small"]);
    on_export(&daemon.uri("ct"), &["read -P 9 40M 3M", &last]);
    daemon.stop();
    images_are_sound(&rig);
}
