//! Moves under clients that write all the time.

use std::sync::atomic::{AtomicBool, Ordering};

use nbd_server::control::model::JobState;
use nbd_server::wire::reply::Style;
use ploop_tests::daemon::Daemon;
use ploop_tests::holder::Holder;
use ploop_tests::store::Rig;

use super::clients::write;
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
        let client = holder.open("ct", Style::Structured);
        let writer = scope.spawn(|| write(client, &mut bytes, &done, 11));
        for round in 0..4 {
            let (from, to, rig) = match round % 2 {
                0 => (&here, &b, &b),
                _ => (&there, &a, &a),
            };
            let id = begin(from, &address(to), |m| {
                m.holder = Some(with_holder(&holder, rig));
                m.downtime_ms = Some(500);
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
