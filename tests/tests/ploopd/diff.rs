//! `ploop diff`, while the disks are served.

use std::ops::Range;

use ploop_tests::client::Client;
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::server::pattern;
use ploop_tests::store::Rig;
use serde_json::Value;

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

fn extents(said: &Value) -> Vec<Range<u64>> {
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let all = said["extents"].as_array().unwrap().iter().map(|extent| {
        let start = number(extent, "offset");
        start..start + number(extent, "length")
    });
    let all: Vec<_> = all.collect();
    let sum: u64 = all.iter().map(|e| e.end - e.start).sum();
    assert_eq!(said["bytes"], sum);
    all
}

/// Where the bytes of two exports differ, by clusters.
fn differences(a: &mut Client, b: &mut Client) -> Vec<u64> {
    let clusters = (0..64 * MIB).step_by(CLUSTER as usize);
    clusters
        .filter(|at| a.read(*at, CLUSTER) != b.read(*at, CLUSTER))
        .collect()
}

/// Goal: what was written between two snapshots is found while clients write on; what maps cannot
/// say is refused, with what to do. Method: clusters that the test chose, and all bytes compared.
#[test]
fn snapshots_are_compared_under_their_clients() {
    let rig = Rig::new();
    rig.small_template("t", &["a", "b"]);
    rig.run(["template", "import", "other", "rootfs", "--size", "64M"]);
    rig.run(["create", "c", "--template", "other"]);
    let daemon = Daemon::start(&rig);
    let mut client = daemon.open("a");
    let chosen = [30 * MIB, 40 * MIB, 50 * MIB];
    for (seed, at) in (1..).zip(chosen) {
        client.write(at + 5000, &pattern(4096, seed));
        if seed < 3 {
            take(&daemon.api(), "a", &format!("s{seed}"));
        }
    }
    let between = rig.json(["diff", "a@s1", "a@s2", "--json"]);
    let found = extents(&between);
    let second = 40 * MIB..40 * MIB + CLUSTER;
    assert_eq!(found, std::slice::from_ref(&second));
    let (mut one, mut two) = (daemon.open("a@s1"), daemon.open("a@s2"));
    assert_eq!(differences(&mut one, &mut two), [40 * MIB]);
    assert_eq!(between["from_size"], 64 * MIB);
    let said = rig.run(["diff", "a@s2", "a@s1"]);
    let last = said.lines().last().unwrap();
    assert_eq!(last, "64K in 1 extents may differ", "{said}");
    // What is being written has no end, and says so.
    rig.refused(5, ["diff", "a@s1"], &["snapshot create"]);
    rig.refused(5, ["diff", "a", "a@s2"], &["snapshot create"]);

    // A clone of the same template; nobody uses it.
    let clones = extents(&rig.json(["diff", "b", "a@s2", "--json"]));
    let mut clone = daemon.open("b");
    for at in differences(&mut clone, &mut two) {
        assert!(clones.iter().any(|e| e.contains(&at)), "{at}: {clones:?}");
    }
    let written: Vec<_> = chosen[..2].iter().map(|at| *at..at + CLUSTER).collect();
    assert_eq!(clones, written);
    rig.refused(
        2,
        ["diff", "a@s1", "c"],
        &["no layer in common", "one template"],
    );
    rig.refused(3, ["diff", "a@s1", "a@s9"], &["s9"]);
    for client in [client, one, two, clone] {
        client.disconnect();
    }
    daemon.stop();
    // At rest, what the disk shows now can be compared, too.
    let now = extents(&rig.json(["diff", "a@s1", "--json"]));
    let written: Vec<_> = chosen[1..].iter().map(|at| *at..at + CLUSTER).collect();
    assert_eq!(now, written);
}
