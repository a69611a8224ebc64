//! Trackers with the real programs: OpenVZ's and QEMU's idea of them. What kill -9 and the life of a
//! container do to them: `tracker_truth.rs`.
//!
//! What a user would lose: the change that an increment leaves out.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use ploop::device::Device;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop_tests::corpus;
use ploop_tests::daemon::Daemon;
use ploop_tests::store::{Rig, qemu_io};
use ploop_tests::tools::{ploop, run, tool};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 65536;

fn open(dir: &Path, write: bool) -> ploop::disk::Disk {
    let opener = Opener::host();
    let source = Source::parse(opener.store().as_ref(), dir.to_str().unwrap()).unwrap();
    let options = OpenOptions {
        write,
        ..OpenOptions::default()
    };
    opener.open(&source, &options).unwrap()
}

/// What `ploop tracker list` says of the disk in `dir`.
fn listed(dir: &Path) -> Vec<Value> {
    let out = run(ploop().args(["tracker", "list", "--json"]).arg(dir));
    let all: Value = serde_json::from_slice(&out.stdout).unwrap();
    all.as_array().unwrap().clone()
}

/// Goal: what OpenVZ's tool stored is read right, and nothing is believed that is stale or damaged.
#[test]
fn bitmaps_of_other_programs_load_where_they_can_be_believed() {
    let (mut good, mut bad) = (0, 0);
    for case in corpus::cases() {
        let cbt = &case.expect["cbt"];
        if cbt.is_null()
            || case.expect["descriptor"].is_null() && case.text("entry") != "DiskDescriptor.xml"
        {
            continue;
        }
        let room = case.unpack();
        let dir = room.path();
        if cbt["valid"] != true {
            // Opening it at all is refused where more is wrong with it.
            let out = ploop()
                .args(["tracker", "list", "--json"])
                .arg(dir)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&out.stdout);
            assert!(
                !out.status.success() || said.trim() == "[]",
                "{}: {said}",
                case.name
            );
            bad += 1;
            continue;
        }
        let all = listed(dir);
        assert_eq!(all.len(), 1, "{}", case.name);
        assert_eq!(all[0]["id"], cbt["uuid"], "{}", case.name);
        if let Some(granularity) = cbt["granularity_bytes"].as_u64() {
            assert_eq!(all[0]["granularity"], granularity);
        }
        let ranges = cbt["dirty_ranges"].as_array().unwrap().iter();
        let ranges = ranges.map(|r| (r[0].as_u64().unwrap(), r[1].as_u64().unwrap()));
        let ranges: Vec<_> = ranges.collect();
        let dirty: u64 = ranges.iter().map(|r| r.1).sum();
        assert_eq!(all[0]["dirty"], dirty, "{}", case.name);
        good += 1;
        if case.name.contains("unknown") {
            // With a feature that must be kept nobody may write it.
            continue;
        }
        // A write of ours keeps what was there, and adds its granule.
        let disk = open(dir, true);
        let set = || {
            let bits = disk.trackers()[0].bits.clone();
            let runs = bits.runs(0..bits.size()).filter(|run| run.1);
            runs.map(|(r, _)| (r.start, r.end - r.start))
                .collect::<Vec<_>>()
        };
        assert_eq!(set(), ranges, "{}", case.name);
        disk.write(0, &[1]).unwrap();
        let after = set();
        disk.close().unwrap();
        drop(disk);
        let disk = open(dir, true);
        let bits = disk.trackers()[0].bits.clone();
        assert_eq!(bits.runs(0..1).next().map(|run| run.1), Some(true));
        let runs = bits.runs(0..bits.size()).filter(|run| run.1);
        let runs = runs.map(|(r, _)| (r.start, r.end - r.start));
        assert_eq!(runs.collect::<Vec<_>>(), after, "{}", case.name);
    }
    assert!(good >= 5 && bad >= 5, "{good} and {bad}");
}

/// Goal: QEMU takes the images that we close with trackers in them.
#[test]
fn qemu_opens_what_is_closed_with_trackers() {
    let rig = Rig::new();
    rig.small_template("t", &["ct"]);
    for (name, granularity) in [("day", "64K"), ("fine", "512"), ("week", "1M")] {
        rig.run(["tracker", "start", "ct", name, "--granularity", granularity]);
    }
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("ct");
    for at in [5 * MIB, 17 * MIB, 40 * MIB + 512] {
        client.write(at, &[7; 4096]);
    }
    client.disconnect();
    daemon.stop();
    let all = rig.json(["tracker", "list", "ct", "--json"]);
    let dirty: Vec<_> = all
        .as_array()
        .unwrap()
        .iter()
        .map(|t| &t["dirty"])
        .collect();
    assert_eq!(dirty, [3 * GRANULE, 3 * 4096, 3 * MIB]);
    let top = rig.top("ct");
    let info = run(tool("qemu-img").args(["info", "-f", "parallels"]).arg(&top));
    assert!(String::from_utf8_lossy(&info.stdout).contains("parallels"));
    let (ok, said) = qemu_io("parallels", true, top.as_os_str(), &["read -P 7 5M 4k"]);
    assert!(ok, "{said}");
    assert!(rig.run(["check", "ct"]).contains("clean"));
    // The bits are no space that could come back.
    let space = &rig.json(["df", "ct", "--json"])["disks"][0];
    assert_eq!(space["unnamed"], 0, "{space}");
    let foretold = rig.json(["compact", "ct", "--dry-run", "--json"]);
    let said = foretold["message"].as_str().unwrap();
    assert!(said.starts_with("0 bytes"), "{said}");
    // QEMU writes, and says nothing of it to the trackers.
    let (ok, said) = qemu_io("parallels", false, top.as_os_str(), &["write -P 9 30M 4k"]);
    assert!(ok, "{said}");
    let all = rig.json(["tracker", "list", "ct", "--json"]);
    for tracker in all.as_array().unwrap() {
        assert_eq!(tracker["dirty"], 64 * MIB, "every granule counts");
    }
}
