//! Random operations on trees against a model ([`ploop_tests::model`]).
//!
//! A run is 13,000 operations in memory and some hundred on files. Longer:
//!
//! * `PLOOP_MODEL_SEEDS=N`: N seeds for each mix of operations instead of 3 (deep chains and files: 1);
//! * `PLOOP_MODEL_OPS=N`: N operations for each seed instead of 1,000 (files: 200);
//! * `PLOOP_MODEL_FIRST=N`: the first seed, instead of 1. What failed is printed with its seed;
//! * `PLOOP_MODEL_PATIENCE=N`: N seconds to shorten the list of what failed, instead of 120.
//!
//! ```text
//! PLOOP_MODEL_SEEDS=50 cargo test --release -p ploop-tests --test model_tree -- --nocapture
//! ```

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use ploop_tests::model::op::Op;
use ploop_tests::model::profile::Profile;
use ploop_tests::model::shrink::{attempt, number, run_seed};
use ploop_tests::model::world::{Home, Tally};

/// Runs the seeds of some mixes; what was done in all of them.
fn run(home: Home, profiles: &[Profile], seeds: u64, ops: u64) -> Tally {
    let first = number("PLOOP_MODEL_FIRST", 1);
    let mut all = Tally::default();
    for &profile in profiles {
        let mut tally = Tally::default();
        for seed in first..first + number("PLOOP_MODEL_SEEDS", seeds) {
            let ops = number("PLOOP_MODEL_OPS", ops) as usize;
            tally.join(&run_seed(home, profile, seed, ops));
        }
        println!("{profile:?}: {:?}", tally.0);
        all.join(&tally);
    }
    all
}

/// A run in which these things never happened would show nothing of them.
fn assert_done(tally: &Tally, what: &[(&str, u64)]) {
    for (what, least) in what {
        let found = tally.of(what);
        assert!(
            found >= *least,
            "{what}: {found}, at least {least} are needed"
        );
    }
}

/// Goal: every node of every container reads what was written before it, whatever is done to the
/// others, and nothing is left over. Here: chains, branches, clones, and all sorts of deletion.
#[test]
fn every_node_of_every_container_reads_what_it_must() {
    let profiles = [Profile::Mixed, Profile::Bushy, Profile::Clones];
    let tally = run(Home::Memory, &profiles, 3, 1000);
    assert_done(
        &tally,
        &[
            ("snapshots", 300),
            ("switched, branch kept", 100),
            ("switched, discarded", 20),
            ("deleted leaves", 50),
            ("deleted and hidden", 50),
            ("deleted with one child", 50),
            ("foretold, and it came true", 50),
            ("clones", 50),
            ("removed containers", 30),
            ("groups", 10),
            ("killed", 50),
            ("raw bases", 2),
            ("refused: in use", 5),
            ("compared all", 60),
            ("compared by maps", 200),
        ],
    );
}

/// Goal: the same for merges with writes, snapshots, kills and everything else in the middle.
#[test]
fn a_merge_may_be_cut_and_crossed_anywhere() {
    let tally = run(Home::Memory, &[Profile::Merges], 3, 1000);
    assert_done(
        &tally,
        &[
            ("merges into the top", 5),
            ("merges up, in the chain", 5),
            ("merges down, in the chain", 5),
            ("merges up, aside", 1),
            ("merges done step by step", 20),
            ("merges paused", 5),
            ("merges abandoned", 2),
            ("merges killed", 2),
            ("snapshots while merging into the top", 2),
        ],
    );
}

/// Goal: the same more than a hundred images deep.
#[test]
fn deep_chains_read_what_they_must() {
    let tally = run(Home::Memory, &[Profile::Deep], 1, 1000);
    assert_done(&tally, &[("most images in a chain", 128)]);
}

/// Goal: the same on files of the host with all their locks, and what QEMU says of every image.
#[test]
fn the_same_on_files_with_locks() {
    let profiles = [Profile::Mixed, Profile::Merges, Profile::Clones];
    let tally = run(Home::Files, &profiles, 1, 200);
    assert_done(&tally, &[("checked by qemu", 10), ("clones", 2)]);
}

/// Goal: a chain deeper than OpenVZ's tools open says so, goes on, reads right at 300 images, and
/// can be merged down and rolled back to its middle.
#[test]
fn three_hundred_images_deep() {
    let mut ops = vec![Op::New {
        raw: false,
        v1: false,
    }];
    for n in 0..300u16 {
        let at = n.wrapping_mul(197) % 2560;
        ops.push(Op::Write {
            ct: 0,
            at,
            len: 1 + n % 90,
        });
        let (named, offline) = (false, n.is_multiple_of(50));
        ops.push(Op::Snapshot {
            ct: 0,
            named,
            offline,
        });
    }
    ops.push(Op::Kill { ct: 0 });
    let node = 150;
    ops.push(Op::Clone {
        ct: 0,
        node,
        count: 1,
    });
    ops.push(Op::Write {
        ct: 0,
        at: 0,
        len: 2560,
    });
    let (discard, named, open) = (false, false, false);
    ops.push(Op::Switch {
        ct: 0,
        node: 200,
        discard,
        named,
        open,
    });
    ops.push(Op::Write {
        ct: 0,
        at: 1000,
        len: 500,
    });
    ops.push(Op::MergeDown {
        ct: 0,
        node: 298,
        all: true,
    });
    let tally = attempt(Home::Memory, &ops).unwrap_or_else(|e| panic!("{}", e.why));
    assert_done(
        &tally,
        &[
            ("most images in a chain", 301),
            ("nodes that went in the end", 90),
        ],
    );
}
