//! Post-copy: what is still to come, while something goes wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nbd_server::wire::request::kind;
use ploop_tests::client::Ask;
use ploop_tests::daemon::take;
use ploop_tests::mount::wait_for;

use super::later::post_copy;
use super::proxy::{ANSWER, Flow, HAVE, Proxy, REFUSED, WANT};
use super::sides::Side;
use super::*;

/// Goal: the source does not drop what the destination lacks, also where that cannot tell what it lacks.
/// Method: a record of what is missing that is damaged while the destination is down.
#[test]
fn the_source_stays_until_all_has_come() {
    let (mut a, mut b) = (Side::new(), Side::new());
    let bytes = store(&a.rig);
    a.start();
    b.start();
    let proxy = Proxy::new(&socket(&b.rig));
    proxy.stop_at(ANSWER, Flow::Last);
    let id = post_copy(a.here(), &proxy.address(), |_| ());
    let job: ploop::Result<Job> = a.here().api().wait(id, |_| ());
    let said = job.unwrap_err().to_string();
    assert!(said.contains("was given"), "{said}");
    b.kill();
    let side = b.rig.root().join("containers/ct/.ploop");
    let record = fs::read_dir(side).unwrap().map(|e| e.unwrap().path());
    let is_one = |p: &PathBuf| {
        p.file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("missing-")
    };
    let record = record
        .filter(is_one)
        .max_by_key(|p| fs::metadata(p).unwrap().len());
    let record = record.unwrap();
    let sound = fs::read(&record).unwrap();
    let mut damaged = sound.clone();
    damaged[600] ^= 1;
    fs::write(&record, &damaged).unwrap();
    b.start();
    let refused = Arc::new(AtomicBool::new(false));
    let seen = refused.clone();
    proxy.judge(move |frame| {
        seen.fetch_or(frame.kind() == REFUSED, Ordering::AcqRel);
        Flow::Pass
    });
    proxy.let_in();
    wait_for("the settlement", || {
        refused.load(Ordering::Acquire) || !a.has("ct")
    });
    assert!(a.has("ct"), "what the destination lacks is gone");
    fs::write(&record, &sound).unwrap();
    wait_for("all of it", || !a.has("ct") && b.state() == "none");
    assert!(content(b.here(), "ct") == bytes);
    for mut side in [a, b] {
        side.daemon.take().unwrap().stop();
    }
}

/// Goal: a service that stops in order answers what its clients asked for, also what has still to come.
#[test]
fn a_service_that_stops_answers_what_was_asked() {
    const AT: u64 = 15 << 20;
    let (mut a, mut b) = (Side::new(), Side::new());
    let bytes = store(&a.rig);
    a.start();
    b.start();
    let proxy = Proxy::new(&socket(&b.rig));
    let [asked, released] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let (seen, go) = (asked.clone(), released.clone());
    // Slow, until the reader's own request is under way; that is not answered before it is released.
    proxy.judge(move |frame| {
        let wanted = |bytes: &[u8]| {
            let at = bytes.get(28..).and_then(|b| b.first_chunk().copied());
            at.map(u64::from_le_bytes) == Some(AT)
        };
        match frame.kind() {
            WANT if wanted(frame.bytes) => seen.store(true, Ordering::Release),
            HAVE if !seen.load(Ordering::Acquire) => std::thread::sleep(Duration::from_millis(200)),
            HAVE => {
                while !go.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            _ => {}
        }
        Flow::Pass
    });
    post_copy(a.here(), &proxy.address(), |_| ());
    wait_for("the hand-over", || b.state() == "taken");
    let there = b.daemon.take().unwrap();
    let mut client = there.open("ct");
    let reader = std::thread::spawn(move || client.read(AT, 4096));
    wait_for("the question", || asked.load(Ordering::Acquire));
    let stopped = std::thread::spawn(move || there.stop());
    // It hears of the signal meanwhile.
    std::thread::sleep(Duration::from_millis(500));
    released.store(true, Ordering::Release);
    assert!(reader.join().unwrap() == bytes[AT as usize..][..4096]);
    stopped.join().unwrap();
    b.start();
    wait_for("all of it", || !a.has("ct"));
    assert!(content(b.here(), "ct") == bytes);
    for mut side in [a, b] {
        side.daemon.take().unwrap().stop();
    }
}

/// Goal: a link that falls silent, and is not closed, is no end of it: the destination gives it up, the
/// source comes back, and who reads has his bytes, or an error, and never others. Method: a question
/// that gets lost on its way.
#[test]
fn a_link_that_falls_silent_is_given_up_for_another() {
    const AT: u64 = 15 << 20;
    let (mut a, mut b) = (Side::new(), Side::new());
    let bytes = store(&a.rig);
    a.start();
    b.start();
    let proxy = Proxy::new(&socket(&b.rig));
    proxy.stop_at(ANSWER, Flow::Last);
    let id = post_copy(a.here(), &proxy.address(), |_| ());
    let job: ploop::Result<Job> = a.here().api().wait(id, |_| ());
    job.unwrap_err();
    let lost = Arc::new(AtomicBool::new(false));
    let first = lost.clone();
    proxy.judge(move |frame| {
        match frame.kind() == WANT && !first.fetch_or(true, Ordering::AcqRel) {
            true => Flow::Hold,
            false => Flow::Pass,
        }
    });
    proxy.let_in();
    wait_for("the question", || lost.load(Ordering::Acquire));
    let links = proxy.links();
    let mut client = b.here().open("ct");
    let mut errors = 0;
    loop {
        let reply = client.ask(Ask::new(kind::READ, 0, AT..AT + 4096));
        match reply.error {
            0 => {
                let got: Vec<u8> = reply.content.into_iter().flat_map(|(_, b)| b).collect();
                assert!(got == bytes[AT as usize..][..4096]);
                break;
            }
            // Its patience is longer than the link's; not on every machine by as much as it takes.
            error => assert_eq!(error, 5, "{reply:?}"),
        }
        errors += 1;
        assert!(errors < 10, "{}", b.here().log());
    }
    assert!(proxy.links() > links, "it came by the link that was lost");
    client.disconnect();
    wait_for("all of it", || !a.has("ct") && b.state() == "none");
    assert!(content(b.here(), "ct") == bytes);
    for mut side in [a, b] {
        side.daemon.take().unwrap().stop();
    }
}

/// Goal: what the source cannot read is an error to who reads that, and keeps nothing else from coming.
/// Method: one of two images is away for a while.
#[test]
fn what_the_source_cannot_read_is_missing_alone() {
    const AT: u64 = 3 << 20;
    let (mut a, mut b) = (Side::new(), Side::new());
    let mut bytes = store(&a.rig);
    a.start();
    b.start();
    let image = || {
        let all = fs::read_dir(a.rig.root().join("containers/ct")).unwrap();
        let all = all.map(|e| e.unwrap().path());
        let all = all.filter(|p| {
            p.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("root.hds")
        });
        all.collect::<Vec<_>>()
    };
    let mut client = a.here().open("ct");
    client.write(0, &vec![3; 1 << 20]);
    bytes[..1 << 20].fill(3);
    let first = image();
    take(&a.here().api(), "ct", "before");
    client.write(AT, &vec![4; 1 << 20]);
    bytes[AT as usize..][..1 << 20].fill(4);
    client.disconnect();
    let proxy = Proxy::new(&socket(&b.rig));
    proxy.stop_at(ANSWER, Flow::Last);
    import(&b.rig);
    let id = post_copy(a.here(), &proxy.address(), |_| ());
    let job: ploop::Result<Job> = a.here().api().wait(id, |_| ());
    job.unwrap_err();
    let [there] = &first[..] else {
        panic!("{first:?}");
    };
    let away = there.with_extension("away");
    fs::rename(there, &away).unwrap();
    let all = b.lacks();
    proxy.open();
    wait_for("the rest", || b.lacks() < all && b.lacks() <= 1 << 20);
    let mut client = b.here().open("ct");
    assert!(client.read(AT, 1 << 20) == bytes[AT as usize..][..1 << 20]);
    let refused = client.ask(Ask::new(kind::READ, 0, 0..4096));
    assert_eq!(refused.error, 5, "{refused:?}");
    assert!(a.has("ct"));
    fs::rename(&away, there).unwrap();
    wait_for("all of it", || !a.has("ct"));
    client.disconnect();
    assert!(content(b.here(), "ct") == bytes);
    for mut side in [a, b] {
        side.daemon.take().unwrap().stop();
    }
}

/// Goal: a container whose source is gone is a stall to its own clients, and to nobody else.
#[test]
fn who_waits_for_a_source_keeps_nobody_else_waiting() {
    let (mut a, mut b) = (Side::new(), Side::new());
    store(&a.rig);
    import(&b.rig);
    b.rig.run(["create", "other", "--template", "base"]);
    a.start();
    b.start();
    let mut client = a.here().open("ct");
    client.write(0, &vec![1; 8 << 20]);
    client.disconnect();
    let proxy = Proxy::new(&socket(&b.rig));
    proxy.stop_at(ANSWER, Flow::Last);
    let id = post_copy(a.here(), &proxy.address(), |_| ());
    let job: ploop::Result<Job> = a.here().api().wait(id, |_| ());
    job.unwrap_err();
    let waiting: Vec<_> = (0..8u64)
        .map(|n| {
            let mut client = b.here().open("ct");
            std::thread::spawn(move || {
                let ask = |i: u64| Ask::new(kind::READ, 0, i << 16..(i << 16) + 4096);
                let all: Vec<Ask> = (n * 16..n * 16 + 16).map(ask).collect();
                client.try_exchange(&all)
            })
        })
        .collect();
    let mut client = b.here().open("other");
    for n in 0..3 {
        // Several at once: a request that is alone is done where it comes in.
        let some = [
            Ask::write(0, n << 16, &[7; 4096]),
            Ask::new(kind::FLUSH, 0, 0..0),
            Ask::new(kind::READ, 0, n << 16..(n << 16) + 4096),
            Ask::new(kind::FLUSH, 0, 0..0),
        ];
        let replies = client.try_exchange(&some).unwrap();
        assert!(replies.iter().all(|r| r.error == 0));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(
        waiting.iter().all(|w| !w.is_finished()),
        "it waited for them"
    );
    proxy.open();
    for client in waiting {
        let replies = client.join().unwrap().unwrap();
        assert!(replies.iter().all(|r| r.error == 0));
    }
    for mut side in [a, b] {
        side.daemon.take().unwrap().stop();
    }
}
