//! Whatever a client sends.

use proptest::prelude::*;

use super::*;
use crate::wire::string;

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        any::<bool>().prop_map(|b| info_data(if b { "disk" } else { "x" }, &[0, 1, 2, 3])),
        prop::collection::vec("[a-z:]{0,9}", 0..4)
            .prop_map(|q| { meta_data("disk", &q.iter().map(String::as_str).collect::<Vec<_>>()) }),
    ];
    (0..14u32, data, any::<Option<u32>>()).prop_map(|(option, data, length)| {
        let mut bytes = Vec::new();
        let length = length.map_or(data.len() as u32, |l| l % 200);
        Header { option, length }.emit(&mut bytes);
        bytes.extend(data);
        bytes
    })
}

proptest! {
    /// Whatever the client sends: no panic, the end is the same however the bytes arrive, and every
    /// answer is well formed.
    #[test]
    fn any_handshake(
        flags in 0..5u32,
        options in prop::collection::vec(any_option(), 0..8),
        noise in prop::collection::vec(any::<u8>(), 0..50),
        step in 1..40usize,
    ) {
        let exports = single();
        let mut script = flags.to_be_bytes().to_vec();
        script.extend(options.concat());
        script.extend(noise);
        let whole = run_in_steps(&exports, &script, usize::MAX >> 1);
        let parts = run_in_steps(&exports, &script, step);
        prop_assert_eq!(&whole.out, &parts.out);
        if !matches!(&whole.end, Some(Step::Negotiated(_))) {
            for (_, kind, data) in whole.answers() {
                prop_assert!(!rep::is_error(kind) || string(&data).is_ok());
            }
        }
    }
}
