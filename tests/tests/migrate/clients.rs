//! A client that knows what it wrote.

use std::sync::atomic::{AtomicBool, Ordering};

use ploop_tests::client::Client;

use super::*;

/// Writes until `done`, and reads what it wrote: half of it in one place, as a journal would be. What was
/// answered is in `bytes`, flushed or not. Gives how often it wrote.
pub(crate) fn write(mut client: Client, bytes: &mut [u8], done: &AtomicBool, seed: u64) -> u64 {
    let mut rng = Rng(seed);
    let mut written = 0;
    let check = |client: &mut Client, bytes: &[u8], at: u64, len: u64| {
        let read = client.read(at, len);
        assert!(
            read == bytes[at as usize..][..len as usize],
            "byte {at} is another"
        );
    };
    while !done.load(Ordering::Acquire) || written < 200 {
        let (at, sectors) = match rng.below(2) {
            0 => (rng.below(16) << 12, 8),
            _ => (rng.below((SIZE >> 9) - 16) << 9, 1 + rng.below(16)),
        };
        let mut data = vec![0; (sectors << 9) as usize];
        rng.fill(&mut data);
        client.write(at, &data);
        bytes[at as usize..][..data.len()].copy_from_slice(&data);
        written += 1;
        match rng.below(20) {
            0 => client.flush(),
            1 => {
                let at = rng.below(SIZE >> 12) << 12;
                check(&mut client, bytes, at, 4096);
            }
            2..6 => {
                let at = rng.below((SIZE >> 9) - 256) << 9;
                check(&mut client, bytes, at, 128 << 9);
            }
            _ => {}
        }
    }
    client.flush();
    client.disconnect();
    written
}
