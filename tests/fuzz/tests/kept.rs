//! Every kept input, and every seed of ours, through its target: what was found once stays found.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::fs;
use std::path::Path;

use ploop_fuzz::{TARGETS, seeds};

#[test]
fn kept_inputs_pass() {
    for target in TARGETS {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
        let dir = dir.join(target.name);
        let mut count = 0;
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            (target.run)(&fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count > 0, "{} has no inputs", dir.display());
    }
}

#[test]
fn seeds_pass() {
    for target in TARGETS {
        let dir = tempfile::tempdir().unwrap();
        assert!(seeds::write(target, dir.path()) > 0, "{}", target.name);
        for entry in fs::read_dir(dir.path()).unwrap() {
            let path = entry.unwrap().path();
            println!("{} {}", target.name, path.display());
            (target.run)(&fs::read(&path).unwrap());
        }
    }
}
