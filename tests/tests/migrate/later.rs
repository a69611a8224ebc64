//! Post-copy: the destination serves at once, and its data follows.

use std::sync::atomic::{AtomicBool, Ordering};

use nbd_server::control::model::JobState;
use nbd_server::wire::reply::Style;
use ploop_tests::daemon::{Daemon, take};
use ploop_tests::holder::Holder;
use ploop_tests::mount::wait_for;
use ploop_tests::store::Rig;

use super::clients::write;
use super::proxy::{ANSWER, Flow, Proxy};
use super::*;

/// Moves `ct` that way; the job.
pub(crate) fn post_copy(from: &Daemon, to: &str, change: impl FnOnce(&mut Migrate)) -> u64 {
    begin(from, to, |m| {
        m.post_copy = true;
        change(m);
    })
}

/// Goal: it converges whatever is written, and nothing is lost: a client that writes and reads as fast
/// as it can, while the disk moves there and back, its data behind it.
#[test]
fn a_client_reads_what_has_not_arrived() {
    let (a, b) = (Rig::new(), Rig::new());
    let mut bytes = store(&a);
    let (here, there) = (Daemon::start(&a), Daemon::start(&b));
    take(&here.api(), "ct", "before");
    let before = bytes.clone();
    let holder = Holder::start(&nbd(&a), &[]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let client = holder.open("ct", Style::Structured);
        let writer = scope.spawn(|| write(client, &mut bytes, &done, 23));
        for round in 0..4 {
            let (from, rig) = match round % 2 {
                0 => (&here, &b),
                _ => (&there, &a),
            };
            let id = post_copy(from, &address(rig), |m| {
                m.holder = Some(with_holder(&holder, rig));
            });
            let job: Job = from.api().wait(id, |_| ()).unwrap();
            assert_eq!(job.state, JobState::Done, "{job:?}");
            let moved = job.migration.unwrap().moved.unwrap();
            println!("post-copy {round}: gap {:.1} ms", moved.gap * 1000.0);
        }
        done.store(true, Ordering::Release);
        writer.join().unwrap();
    });
    assert!(content(&here, "ct") == bytes);
    assert!(content(&here, "ct@before") == before);
    drop(holder);
    b.refused(3, ["info", "ct"], &["ct"]);
    // What the moves left to be merged.
    wait_for("the merges", || {
        here.jobs().iter().all(|j| j.state.is_over())
    });
    here.stop();
    a.run(["check", a.root().join("containers/ct").to_str().unwrap()]);
}

/// Goal: what has not arrived is waited for, whoever goes away, and comes; it is never zeros. Method: a
/// link that is cut as soon as the destination has said that it has the disk; then both services are
/// killed, and each comes back.
#[test]
fn what_has_not_arrived_is_waited_for() {
    let (a, b) = (Rig::new(), Rig::new());
    let mut bytes = store(&a);
    let (here, there) = (Daemon::start(&a), Daemon::start(&b));
    let proxy = Proxy::new(&socket(&b));
    proxy.stop_at(ANSWER, Flow::Last);
    let id = post_copy(&here, &proxy.address(), |_| ());
    let job: ploop::Result<Job> = here.api().wait(id, |_| ());
    let said = job.unwrap_err().to_string();
    assert!(said.contains("was given"), "{said}");
    a.refused(5, ["snapshot", "create", "ct"], &["was given"]);
    // Snapshots need nothing that is not there.
    let mut client = there.open("ct");
    client.write(4 << 20, &vec![8; 1 << 20]);
    bytes[4 << 20..][..1 << 20].fill(8);
    b.run(["snapshot", "create", "ct", "--name", "meanwhile"]);
    // Written over what has not arrived, and beside it in the same cluster.
    client.write(1 << 20, &[7; 4096]);
    bytes[1 << 20..][..4096].fill(7);
    client.flush();
    let shown = b.json(["info", "ct", "--json"]);
    assert_eq!(shown["move"]["state"], "taken", "{shown}");
    // It says what it depends on.
    assert!(
        shown["move"]["missing"].as_u64().unwrap() > SIZE / 2,
        "{shown}"
    );
    let text = b.run(["info", "ct"]);
    assert!(text.contains("needs that service"), "{text}");
    // Nor is that forgotten by a decision, or by a move.
    let take = ["migrate", "ct", "--resolve", "take"];
    b.refused(5, take, &["still to come"]);
    b.refused(
        5,
        ["migrate", "ct", &address(&a), "--as", "on"],
        &["still to come"],
    );
    there.kill();
    here.kill();
    drop(client);
    // No other program takes what is missing for zeros.
    let image = |rig: &Rig| rig.root().join("containers/ct");
    let args = ["check", image(&b).to_str().unwrap()].map(str::to_owned);
    b.refused(5, args, &["have not arrived"]);
    let there = Daemon::start(&b);
    let reader = std::thread::spawn(move || {
        let read = content(&there, "ct");
        (there, read)
    });
    let here = Daemon::start(&a);
    proxy.open();
    let (there, read) = reader.join().unwrap();
    assert!(read == bytes);
    wait_for("nothing is missing", || {
        b.json(["info", "ct", "--json"])["move"].is_null()
    });
    wait_for("nothing is left", || {
        let info = a.ploop().args(["info", "ct"]).output().unwrap();
        info.status.code() == Some(3)
    });
    here.stop();
    there.stop();
    b.run(["check", image(&b).to_str().unwrap()]);
}
