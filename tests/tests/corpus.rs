//! Every case of the corpus through the library: the right bytes, or a clear refusal.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop_tests::corpus::{self, Case};

fn open(case: &Case, dir: &Path, node: &str, allow: bool) -> ploop::Result<Disk> {
    let entry = dir.join(case.text("entry"));
    let text = match node {
        "top" => entry.display().to_string(),
        guid => format!("{}@{guid}", entry.display()),
    };
    let opener = Opener::host();
    let source = Source::parse(opener.store().as_ref(), &text)?;
    let allow = if allow {
        vec![dir.to_path_buf()]
    } else {
        vec![]
    };
    opener.open(
        &source,
        &OpenOptions {
            allow,
            ..OpenOptions::default()
        },
    )
}

/// The digest of one node, and whether it is the expected one.
fn right(case: &Case, dir: &Path, node: &str, allow: bool) -> ploop::Result<bool> {
    let disk = open(case, dir, node, allow)?;
    let (full, blocks) = case.hashes().remove(node).unwrap();
    if let Some(size) = case.expect["virtual_bytes"].as_u64()
        && node == "top"
        && disk.size() != size
    {
        return Ok(false);
    }
    if disk.size() <= 1 << 30
        && let Some(full) = full
    {
        return Ok(corpus::full_digest(&disk)? == full);
    }
    Ok(corpus::blocks_digest(&disk)? == blocks.unwrap())
}

#[test]
fn every_case_reads_exactly_or_is_refused_with_the_file_named() {
    let mut wrong = Vec::new();
    for case in corpus::cases() {
        let tmp = case.unpack();
        let dir = std::fs::canonicalize(tmp.path()).unwrap();
        let rule = case.read_rule();
        let needs_allow = case.needs_allow();
        for node in case.nodes() {
            let known = case.hashes().contains_key(&node);
            let verdict = match known {
                true => right(&case, &dir, &node, needs_allow),
                false => open(&case, &dir, &node, needs_allow)
                    .and_then(|d| corpus::blocks_digest(&d).map(|_| false)),
            };
            if !case.accepts(&node, &verdict) {
                wrong.push(format!("{} {node} [{rule}]: {verdict:?}", case.name));
            }
            if std::env::var_os("PLOOP_CORPUS_VERBOSE").is_some() {
                println!("{} {node} [{rule}]: {verdict:?}", case.name);
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
