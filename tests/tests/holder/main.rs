//! The holder with the real binaries: services are killed, stopped, exchanged and moved behind it,
//! and its clients wait, no more.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

mod changed;
mod hostile;
mod kept;
mod killed;

use std::fs;
use std::path::PathBuf;

use ploop_tests::fsx::Rng;
use ploop_tests::holder::unix;
use ploop_tests::store::Rig;

/// Bytes of the container.
const SIZE: u64 = 32 << 20;

/// A store with the container `ct` over a template without zeros; the template's bytes.
fn store(rig: &Rig) -> Vec<u8> {
    let mut template = vec![0; SIZE as usize];
    Rng(7).fill(&mut template);
    let raw = rig.path("template.raw");
    fs::write(&raw, &template).unwrap();
    let raw = raw.to_str().unwrap();
    rig.run(["template", "import", "base", raw, "--from", "raw"]);
    rig.run(["create", "ct", "--template", "base"]);
    template
}

/// Where the service of the rig's store listens, whether it is there or not.
fn address(rig: &Rig) -> String {
    unix(&socket(rig))
}

fn socket(rig: &Rig) -> PathBuf {
    rig.root().join("nbd.sock")
}
