//! What a request costs in instructions, from its bytes to its answer: a figure that does not depend
//! on the machine's mood. Counted by valgrind on `count`, as the difference between two runs, so
//! that start and set-up cancel out.
//!
//! The bounds are a tenth above what was measured when they were set, in the profile that the tests
//! are built with. Lower them when something became cheaper.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use ploop_tests::tools::tool;

fn instructions(what: &str, requests: u64, how: &str) -> u64 {
    let out = tool("valgrind")
        .args([
            "--tool=cachegrind",
            "--cache-sim=no",
            "--cachegrind-out-file=/dev/null",
        ])
        .arg(env!("CARGO_BIN_EXE_count"))
        .args([what, &requests.to_string(), how])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    let line = text
        .lines()
        .find(|l| l.contains("I   refs:") || l.contains("I refs:"));
    let line = line.unwrap_or_else(|| panic!("no count in: {text}"));
    let digits: String = line
        .rsplit(':')
        .next()
        .unwrap()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    digits.parse().unwrap()
}

fn per_request(what: &str, few: u64, many: u64) -> u64 {
    between(what, few, many, "") / (many - few)
}

/// What the requests between `few` and `many` cost together.
fn between(what: &str, few: u64, many: u64, how: &str) -> u64 {
    instructions(what, many, how) - instructions(what, few, how)
}

/// A container without limits pays one hundredth at most for there being limits.
#[test]
fn who_has_no_limits_hardly_pays_for_them() {
    for what in ["read", "write"] {
        let asks = between(what, 2_048, 10_240, "");
        let bare = between(what, 2_048, 10_240, "bare");
        let percent = (asks as f64 / bare as f64 - 1.0) * 100.0;
        println!("{what} of 4 KiB: {percent:.2} % more instructions");
        assert!(percent <= 1.0, "{what}: {percent:.2} % more instructions");
    }
}

/// A write to where its tracker has the granule already costs two hundredths more at most.
#[test]
fn a_tracker_hardly_costs() {
    let tracked = between("write", 2_048, 10_240, "tracked");
    let not = between("write", 2_048, 10_240, "");
    let percent = (tracked as f64 / not as f64 - 1.0) * 100.0;
    println!("a tracked write of 4 KiB: {percent:.2} % more instructions");
    assert!(percent <= 2.0, "{percent:.2} % more instructions");
}

#[test]
fn requests_cost_no_more_instructions_than_they_did() {
    let measured = [
        ("read", per_request("read", 2_048, 10_240), READ),
        ("write", per_request("write", 2_048, 10_240), WRITE),
        (
            "first-write",
            per_request("first-write", 256, 1_024),
            FIRST_WRITE,
        ),
    ];
    for (what, now, bound) in measured {
        println!("{what} of 4 KiB: {now} instructions, {bound} allowed");
    }
    for (what, now, bound) in measured {
        assert!(now <= bound, "{what}: {now} instructions, {bound} allowed");
    }
}

/// Measured: 2,054, 2,198 and 8,943 when they were set.
const READ: u64 = 2_260;
const WRITE: u64 = 2_410;
const FIRST_WRITE: u64 = 9_830;
