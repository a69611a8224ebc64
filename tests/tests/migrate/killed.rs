//! Under kill -9 of either side, and of both, at any instant.
//!
//! `PLOOP_KILLS=50 cargo test --workspace --test migrate` for a longer run; `PLOOP_SEED` repeats one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nbd_server::control::model::MigrationPhase;
use nbd_server::wire::reply::Style;
use ploop_tests::client::Client;
use ploop_tests::fsx::env;
use ploop_tests::holder::Holder;
use ploop_tests::mount::wait_for;

use super::sides::{Side, calm, look, moved, settled};
use super::*;

/// Writes until `done`, and reads what it wrote. Answered is kept: what a kill takes of it the holder
/// writes again.
fn write(mut client: Client, bytes: &mut [u8], done: &AtomicBool, seed: u64) -> u64 {
    let mut rng = Rng(seed);
    let mut written = 0u64;
    while !done.load(Ordering::Acquire) || written < 100 {
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
                assert!(read == bytes[at as usize..][..4096], "byte {at} is another");
            }
            _ => {}
        }
    }
    client.flush();
    client.disconnect();
    written
}

/// Waits a while; the short ones to the microsecond.
fn pause(time: Duration) {
    let until = Instant::now() + time;
    if time > Duration::from_millis(5) {
        std::thread::sleep(time);
    }
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

/// Begins a move from `from`, and waits for the instant of the kill.
fn under_way(from: &Side, to: &Side, holder: &Holder, rng: &mut Rng) {
    let freeze = rng.below(4) > 0;
    let id = begin(from.here(), &address(&to.rig), |m| {
        m.holder = Some(with_holder(holder, &to.rig));
        m.freeze = freeze;
    });
    if !freeze {
        return pause(Duration::from_micros(rng.below(60_000)));
    }
    let api = from.here().api();
    let path = resource(&["jobs", &id.to_string()]);
    wait_for("the freeze", || {
        let job: Job = api.get(&path).unwrap();
        assert!(!job.state.is_over(), "{job:?}");
        job.migration
            .is_some_and(|m| m.phase == MigrationPhase::Freeze)
    });
    let frozen = resource(&["containers", "ct", "migrate", "frozen"]);
    let _: serde_json::Value = api.post(&frozen, &serde_json::json!({})).unwrap();
    // Any instant, or one of the few in which the container changes hands.
    let states = [
        (from, "offered"),
        (to, "ready"),
        (from, "given"),
        (to, "taken"),
    ];
    let Some((side, state)) = states.get(rng.below(6) as usize) else {
        let limit = [2_000, 5_000, 20_000, 80_000][rng.below(4) as usize];
        return pause(Duration::from_micros(rng.below(limit)));
    };
    let until = Instant::now() + Duration::from_millis(500);
    while side.state() != *state && Instant::now() < until {}
    let limit = [1, 300, 2_000][rng.below(3) as usize];
    pause(Duration::from_micros(rng.below(limit)));
}

/// Goal: at most one side has it at any time, one of them has it in the end, nothing that was answered
/// is lost, and the next move succeeds.
#[test]
fn either_side_may_be_killed_at_any_time() {
    let seed = env("PLOOP_SEED", 1);
    println!("PLOOP_SEED={seed}");
    let mut rng = Rng(seed);
    let mut sides = [Side::new(), Side::new()];
    let mut bytes = store(&sides[0].rig);
    import(&sides[1].rig);
    sides.iter_mut().for_each(Side::start);
    let holder = Holder::start(&nbd(&sides[0].rig), &[]);
    let done = AtomicBool::new(false);
    let mut at = 0;
    std::thread::scope(|scope| {
        let client = holder.open("ct", Style::Structured);
        let writer = scope.spawn(|| write(client, &mut bytes, &done, seed));
        // It goes when this fails, and the writer with it.
        let holder = holder;
        for round in 0..env("PLOOP_KILLS", 6) {
            let (from, to) = (at, 1 - at);
            assert!(!writer.is_finished(), "{}", holder.log());
            under_way(&sides[from], &sides[to], &holder, &mut rng);
            let victims: &[usize] = match round % 4 {
                0 => &[from],
                1 => &[to],
                2 => &[from, to],
                _ => &[to, from],
            };
            for victim in victims {
                sides[*victim].kill();
                look(&sides[from], &sides[to]);
                pause(Duration::from_micros(rng.below(3_000)));
            }
            let left = (sides[from].state(), sides[to].state());
            // Its clients wait where it is, or will be: a side that drops what it has would end them.
            match victims.contains(&from) {
                true => {
                    let has = [to, from][usize::from(sides[from].owns())];
                    holder.move_to(&nbd(&sides[has].rig));
                }
                false => wait_for("the end of the job", || {
                    look(&sides[from], &sides[to]);
                    sides[from].here().jobs().iter().all(|j| j.state.is_over())
                }),
            }
            for victim in victims {
                sides[*victim].start();
                look(&sides[from], &sides[to]);
            }
            if settled(&sides[from], &sides[to]) {
                at = to;
            }
            println!("round {round}: kill {victims:?} of {from} -> {to}: {left:?}, now at {at}");
            holder.move_to(&nbd(&sides[at].rig));
            let other = 1 - at;
            moved(&sides[at], &address(&sides[other].rig), |m| {
                m.holder = Some(with_holder(&holder, &sides[other].rig));
            });
            look(&sides[at], &sides[other]);
            at = other;
            sides.iter().for_each(|s| calm(s.here()));
        }
        done.store(true, Ordering::Release);
        println!("{} writes", writer.join().unwrap());
    });
    assert!(content(sides[at].here(), "ct") == bytes);
    for mut side in sides {
        side.daemon.take().unwrap().stop();
    }
}
