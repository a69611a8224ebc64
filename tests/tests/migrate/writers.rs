//! Moves under clients that write all the time.

use std::sync::atomic::{AtomicBool, Ordering};

use nbd_server::control::model::JobState;
use nbd_server::wire::reply::Style;
use ploop_tests::daemon::Daemon;
use ploop_tests::holder::Holder;
use ploop_tests::store::Rig;

use super::*;

/// Goal: a client that writes throughout loses nothing, whatever was flushed. Method: one that knows
/// what it wrote, behind a holder, over several moves there and back.
#[test]
fn a_client_that_writes_throughout_loses_nothing() {
    let (a, b) = (Rig::new(), Rig::new());
    let mut bytes = store(&a);
    import(&b);
    let (here, there) = (Daemon::start(&a), Daemon::start(&b));
    let holder = Holder::start(&nbd(&a), &[]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut client = holder.open("ct", Style::Structured);
            let mut rng = Rng(11);
            let mut written = 0u64;
            while !done.load(Ordering::Acquire) || written < 100 {
                // Half of it in one place, as a journal would be.
                let at = match rng.below(2) {
                    0 => rng.below(16) << 12,
                    _ => rng.below(SIZE >> 12) << 12,
                };
                let mut data = [0; 4096];
                rng.fill(&mut data);
                client.write(at, &data);
                bytes[at as usize..][..4096].copy_from_slice(&data);
                written += 1;
                match rng.below(20) {
                    0 => client.flush(),
                    1 => {
                        let at = rng.below(SIZE >> 12) << 12;
                        let read = client.read(at, 4096);
                        assert!(read == bytes[at as usize..][..4096], "byte {at}");
                    }
                    _ => {}
                }
            }
            client.disconnect();
            written
        });
        for round in 0..4 {
            let (from, to, rig) = match round % 2 {
                0 => (&here, &b, &b),
                _ => (&there, &a, &a),
            };
            let id = begin(from, &address(to), |m| {
                m.holder = Some(with_holder(&holder, rig));
            });
            let job: Job = from.api().wait(id, |_| ()).unwrap();
            assert_eq!(job.state, JobState::Done, "{job:?}");
            let moved = job.migration.unwrap().moved.unwrap();
            println!(
                "move {round}: gap {:.1} ms, {} bytes, {} had to move",
                moved.gap * 1000.0,
                moved.bytes,
                moved.data + moved.written
            );
        }
        done.store(true, Ordering::Release);
        let written = writer.join().unwrap();
        println!("{written} writes");
    });
    assert!(content(&here, "ct") == bytes);
}
