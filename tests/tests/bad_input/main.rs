//! What is wrong is refused by name, with what to do about it, and leaves no trace.
//!
//! After every refusal the store and the test's own files are compared with what they were.

#![allow(clippy::unwrap_used)]

mod full;
mod hostile;
mod images;
mod words;

use ploop_tests::store::{Rig, assert_unchanged};

/// Runs `ploop`, which must fail with `code`, say all of `says`, and change nothing.
pub(crate) fn refused(rig: &Rig, code: i32, args: &[&str], says: &[&str]) {
    let before = rig.everything();
    rig.refused(code, args, says);
    assert_unchanged(&before, &rig.everything(), &format!("{args:?}"));
}

/// The same for all commands that would make something of `source`.
pub(crate) fn no_use(rig: &Rig, code: i32, source: &str, says: &[&str]) {
    no_copy(rig, code, source, says);
    let serve = ["serve", source, "--socket", "sock", "--read-only"];
    refused(rig, code, &serve, says);
}

/// The same for those that read all of it.
pub(crate) fn no_copy(rig: &Rig, code: i32, source: &str, says: &[&str]) {
    for to in ["raw", "qcow2"] {
        refused(rig, code, &["convert", source, "out", "--to", to], says);
    }
    refused(rig, code, &["template", "import", "new", source], says);
}
