//! A container moves from one service to another, with the real programs.
//!
//! What a user would lose: a write that was answered, a snapshot, a bit of a tracker; or both services
//! have the disk, or neither.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

mod clients;
mod damage;
mod doubt;
mod fed;
mod held;
mod hooks;
mod killed;
mod later;
mod mounted;
mod moves;
mod odd;
mod proxy;
mod shaped;
mod sides;
mod writers;

use std::fs;
use std::path::PathBuf;

use nbd_server::control::client::resource;
use nbd_server::control::model::{Job, Migrate, MigrateHolder};
use ploop_tests::daemon::Daemon;
use ploop_tests::fsx::Rng;
use ploop_tests::holder::unix;
use ploop_tests::mount::wait_for;
use ploop_tests::store::Rig;

/// Bytes of the container.
const SIZE: u64 = 16 << 20;

/// A store with the container `ct` over a template without zeros; the template's bytes.
fn store(rig: &Rig) -> Vec<u8> {
    let template = import(rig);
    rig.run(["create", "ct", "--template", "base"]);
    template
}

/// Imports the template.
fn import(rig: &Rig) -> Vec<u8> {
    import_other(rig, 7)
}

/// Imports one with other bytes.
fn import_other(rig: &Rig, seed: u64) -> Vec<u8> {
    let mut template = vec![0; SIZE as usize];
    Rng(seed).fill(&mut template);
    let raw = rig.path("template.raw");
    fs::write(&raw, &template).unwrap();
    rig.run([
        "template",
        "import",
        "base",
        raw.to_str().unwrap(),
        "--from",
        "raw",
    ]);
    template
}

/// Where a service takes containers.
fn socket(rig: &Rig) -> PathBuf {
    rig.root().join("migrate.sock")
}

/// The same as an address.
fn address(rig: &Rig) -> String {
    unix(&socket(rig))
}

/// Where clients find a service.
fn nbd(rig: &Rig) -> String {
    unix(&rig.root().join("nbd.sock"))
}

/// All that a client reads of `ct`.
fn content(daemon: &Daemon, export: &str) -> Vec<u8> {
    let mut client = daemon.open(export);
    let parts = (0..SIZE).step_by(1 << 20);
    let content = parts.flat_map(|at| client.read(at, 1 << 20)).collect();
    client.disconnect();
    content
}

/// There is no container, nor what might become one.
fn is_empty(rig: &Rig) -> bool {
    let room = |room| fs::read_dir(rig.root().join(room)).unwrap();
    ["containers", "tmp"]
        .iter()
        .all(|r| room(r).next().is_none())
}

/// Waits until the service has no job left.
fn merged(daemon: &Daemon) {
    wait_for("the merges", || {
        daemon.jobs().iter().all(|j| j.state.is_over())
    });
}

/// Begins to move `ct`; the job's number.
fn begin(daemon: &Daemon, to: &str, change: impl FnOnce(&mut Migrate)) -> u64 {
    let mut request = Migrate {
        to: to.to_owned(),
        ..Migrate::default()
    };
    change(&mut request);
    let path = resource(&["containers", "ct", "migrate"]);
    let job: Job = daemon.api().post(&path, &request).unwrap();
    job.id
}

/// Sends the clients of `holder` to the service of `rig`, too.
fn with_holder(holder: &ploop_tests::holder::Holder, rig: &Rig) -> MigrateHolder {
    MigrateHolder {
        control: holder.control().to_str().unwrap().to_owned(),
        to: nbd(rig),
    }
}
