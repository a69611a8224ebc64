//! The fuzzer: libFuzzer around one target, which `PLOOP_FUZZ` names. With `PLOOP_FUZZ_SEEDS`, a
//! directory, it writes that target's seeds there and ends.

#![no_main]
#![allow(unsafe_code, reason = "libFuzzer's entry")]

use std::sync::OnceLock;

use ploop_fuzz::{Target, find, seeds};

fn target() -> &'static Target {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("PLOOP_FUZZ").unwrap_or_default();
        find(&name).unwrap_or_else(|| panic!("PLOOP_FUZZ must name a target"))
    })
}

libfuzzer_sys::fuzz_target!(
    init: {
        let target = target();
        if let Some(dir) = std::env::var_os("PLOOP_FUZZ_SEEDS") {
            let count = seeds::write(target, dir.as_ref());
            println!("{}: {count} seeds", target.name);
            std::process::exit(0);
        }
    },
    |input: &[u8]| (target().run)(input)
);
