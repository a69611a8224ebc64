//! Targets of the fuzzer: functions of bytes that must not panic.
//!
//! ```text
//!  input ── target ──► files in memory ──► the shipped code ──► what must hold, asserted
//! ```
//!
//! `run` feeds them with libFuzzer for as long as asked; a test feeds them with the inputs that are
//! kept in `corpus/`, and needs nothing but the compiler. README.md says what each has found.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

pub mod base;
pub mod files;
pub mod guest;
pub mod rng;
pub mod seeds;
pub mod targets;
pub mod trial;

/// A function of untrusted bytes.
pub struct Target {
    /// Its name, and that of its directory in `corpus/`.
    pub name: &'static str,
    /// Runs one input. Panics on a finding.
    pub run: fn(&[u8]),
    /// Bytes of the longest input worth trying.
    pub len_max: usize,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "header",
        run: targets::header::run,
        len_max: 72,
    },
    Target {
        name: "bat",
        run: targets::image::bat,
        len_max: 1024,
    },
    Target {
        name: "extension",
        run: targets::image::extension,
        len_max: 2048,
    },
    Target {
        name: "descriptor",
        run: targets::descriptor::run,
        len_max: 4096,
    },
    Target {
        name: "qcow2",
        run: targets::qcow2::run,
        len_max: 4096,
    },
    Target {
        name: "journal",
        run: targets::journal::run,
        len_max: 4096,
    },
    Target {
        name: "undo",
        run: targets::undo::run,
        len_max: 8192,
    },
    Target {
        name: "stream",
        run: targets::stream::run,
        len_max: 4096,
    },
    Target {
        name: "migrate",
        run: targets::migrate::run,
        len_max: 16384,
    },
];

/// The target of that name.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|t| t.name == name)
}
