//! What is frozen for a move, and who says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nbd_server::control::model::MigrationPhase;
use ploop_tests::daemon::wait_job;
use ploop_tests::mount::wait_for;

use super::proxy::{Flow, Proxy};
use super::sides::{Side, look, settled};
use super::*;

/// Frames, by their types.
const SYNC: u8 = 6;
const HAVE: u8 = 13;

fn pair() -> (Side, Side, Vec<u8>) {
    let (mut source, mut destination) = (Side::new(), Side::new());
    let bytes = store(&source.rig);
    import_other(&destination.rig, 8);
    source.start();
    destination.start();
    (source, destination, bytes)
}

/// Goal: what is inside is thawed when the destination has it, not when all of its data is there. Method:
/// data that does not come before the thaw.
#[test]
fn what_moves_by_post_copy_is_thawed_at_the_hand_over() {
    let (source, destination, bytes) = pair();
    let log = source.rig.path("log");
    let trace = |what: &str| format!("echo {what} >> {}", log.display());
    let proxy = Proxy::new(&socket(&destination.rig));
    let said = log.clone();
    proxy.judge(move |frame| {
        let until = Instant::now() + Duration::from_secs(60);
        let thawed = || fs::read_to_string(&said).is_ok_and(|s| s.contains("thaw"));
        while frame.kind() == HAVE && !thawed() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        Flow::Pass
    });
    let (freeze, thaw, to) = (trace("freeze"), trace("thaw"), proxy.address());
    let hooks = ["--freeze", &freeze, "--thaw", &thaw, "--hook-timeout", "60"];
    let mut command = source.rig.ploop();
    command
        .args(["migrate", "ct", &to, "--post-copy"])
        .args(hooks);
    let moved = command.output().unwrap();
    assert!(moved.status.success(), "{moved:?}");
    assert_eq!(fs::read_to_string(&log).unwrap(), "freeze\nthaw\n");
    assert!(settled(&source, &destination));
    assert!(content(destination.here(), "ct") == bytes);
}

/// Goal: a move whose command was killed while it froze does not wait for ever, its clients slowed down
/// and its tree kept as it is.
#[test]
fn a_move_does_not_wait_for_who_was_killed() {
    let (source, destination, bytes) = pair();
    let to = address(&destination.rig);
    let hooks = [
        "--freeze",
        "sleep 60",
        "--thaw",
        "true",
        "--hook-timeout",
        "10",
    ];
    let mut command = source.rig.ploop();
    let mut command = command
        .args(["migrate", "ct", &to])
        .args(hooks)
        .spawn()
        .unwrap();
    let freezes = || {
        source.here().jobs().iter().any(|j| {
            j.migration
                .as_ref()
                .is_some_and(|m| m.phase == MigrationPhase::Freeze)
        })
    };
    wait_for("the freeze", freezes);
    command.kill().unwrap();
    command.wait().unwrap();
    wait_for("the end of the move", || {
        source.here().jobs().iter().all(|j| j.state.is_over())
    });
    let said = source.here().jobs().into_iter().find_map(|j| j.error);
    let said = serde_json::to_string(&said).unwrap();
    assert!(said.contains("--hook-timeout"), "{said}");
    assert!(!settled(&source, &destination));
    look(&source, &destination);
    assert!(content(source.here(), "ct") == bytes);
}

/// Goal: however long it takes, the destination does not take the source for gone.
#[test]
fn who_freezes_for_long_is_heard_meanwhile() {
    let (source, destination, bytes) = pair();
    let proxy = Proxy::new(&socket(&destination.rig));
    let syncs = Arc::new(AtomicU64::new(0));
    let count = syncs.clone();
    proxy.judge(move |frame| {
        count.fetch_add(u64::from(frame.kind() == SYNC), Ordering::AcqRel);
        Flow::Pass
    });
    let id = begin(source.here(), &proxy.address(), |m| m.freeze = true);
    let api = source.here().api();
    wait_job(&api, id, "the freeze", |j| {
        j.migration
            .as_ref()
            .is_some_and(|m| m.phase == MigrationPhase::Freeze)
    });
    let before = syncs.load(Ordering::Acquire);
    wait_for("a sign of life", || syncs.load(Ordering::Acquire) > before);
    let frozen = resource(&["containers", "ct", "migrate", "frozen"]);
    let _: serde_json::Value = api.post(&frozen, &serde_json::json!({})).unwrap();
    api.wait(id, |_| ()).unwrap();
    assert!(content(destination.here(), "ct") == bytes);
}
