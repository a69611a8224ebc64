//! The second opinion: QEMU's driver on a state that was written out to real files.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use ploop::store::memory::MemoryStore;
use ploop::store::{Store, StoreFile};
use serde_json::Value;
use tempfile::TempDir;

use super::SECTOR;
use super::fixture::{Fixture, uniform};
use crate::tools::{run, tool};

/// Copies one file of a store to the host, holes left out.
pub fn write_out(file: &dyn StoreFile, to: &Path) {
    let out = File::create(to).unwrap();
    let len = file.len().unwrap();
    out.set_len(len).unwrap();
    let mut at = 0;
    while let Some(data) = file.next_data(at, len).unwrap() {
        let mut bytes = vec![0; (data.end - data.start) as usize];
        file.read_at(&mut bytes, data.start).unwrap();
        out.write_all_at(&bytes, data.start).unwrap();
        at = data.end;
    }
}

/// What `qemu-img` says of the top image in `state`.
#[derive(Debug)]
pub struct Opinion {
    /// Things that it calls corruption, but for the mark of an unclean close.
    pub corruptions: u64,
    /// The guest's bytes as one number per sector; what the image has not is zeros.
    pub words: Vec<u64>,
}

/// Asks `qemu-img check` and `qemu-img convert`.
pub fn opinion(fx: &Fixture, state: &MemoryStore, dirty: bool) -> Opinion {
    let dir = TempDir::new().unwrap();
    let (image, raw) = (dir.path().join("image.hds"), dir.path().join("image.raw"));
    write_out(fx.top_file(state as &dyn Store).as_ref(), &image);
    // The exit code tells findings apart from failures; the JSON is there in all cases.
    let mut check = tool("qemu-img");
    check
        .args(["check", "-f", "parallels", "--output=json"])
        .arg(&image);
    let out = check.output().unwrap();
    let report: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
        panic!(
            "qemu-img check: {e}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    });
    let number = |key: &str| report[key].as_u64().unwrap_or(0);
    let errors = number("corruptions") + number("check-errors");
    run(tool("qemu-img")
        .args(["convert", "-f", "parallels", "-O", "raw"])
        .arg(&image)
        .arg(&raw));
    let bytes = fs::read(&raw).unwrap();
    let words = bytes
        .chunks(SECTOR as usize)
        .map(|s| uniform(s).unwrap_or(u64::MAX))
        .collect();
    Opinion {
        corruptions: errors.saturating_sub(u64::from(dirty)),
        words,
    }
}
