//! Under kill -9 of either side, and of both, at any instant.
//!
//! `PLOOP_KILLS=50 cargo test --workspace --test migrate` for a longer run; `PLOOP_SEED` repeats one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nbd_server::control::model::MigrationPhase;
use nbd_server::wire::reply::Style;
use ploop_tests::fsx::env;
use ploop_tests::holder::Holder;
use ploop_tests::mount::wait_for;

use super::clients::write;
use super::proxy::{Flow, HAVE, Proxy};
use super::sides::{Side, calm, look, moved, settled};
use super::*;

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

/// Two services, the holder of the clients, and which of the two has the container.
struct Pair {
    sides: [Side; 2],
    /// Before each of them: what follows comes as slowly as a test likes.
    doors: [Proxy; 2],
    /// Milliseconds that each piece of what follows takes.
    slow: Arc<AtomicU64>,
    holder: Holder,
    at: usize,
    rng: Rng,
    later: bool,
}

impl Pair {
    fn new(seed: u64, later: bool) -> (Pair, Vec<u8>) {
        let mut sides = [Side::new(), Side::new()];
        let bytes = store(&sides[0].rig);
        import(&sides[1].rig);
        sides.iter_mut().for_each(Side::start);
        let slow = Arc::new(AtomicU64::new(0));
        let doors = [0, 1].map(|n: usize| {
            let (proxy, slow) = (Proxy::new(&socket(&sides[n].rig)), slow.clone());
            proxy.judge(move |frame| {
                if frame.kind() == HAVE {
                    std::thread::sleep(Duration::from_millis(slow.load(Ordering::Acquire)));
                }
                Flow::Pass
            });
            proxy
        });
        let holder = Holder::start(&nbd(&sides[0].rig), &[]);
        let pair = Pair {
            sides,
            doors,
            slow,
            holder,
            at: 0,
            rng: Rng(seed),
            later,
        };
        (pair, bytes)
    }

    fn request(&self, to: usize, m: &mut Migrate) {
        m.holder = Some(with_holder(&self.holder, &self.sides[to].rig));
        m.post_copy = self.later;
        // A store this small has a rate that is made of syncs.
        m.downtime_ms = Some(2_000);
    }

    /// Begins a move, and waits for the instant of the kill.
    fn under_way(&mut self, from: usize, to: usize) {
        // What comes before the hand-over is the same in both.
        let freeze = self.rng.below(if self.later { 20 } else { 4 }) > 0;
        let (source, door) = (self.sides[from].here(), self.doors[to].address());
        let id = begin(source, &door, |m| {
            self.request(to, m);
            m.freeze = freeze;
        });
        if !freeze {
            return pause(Duration::from_micros(self.rng.below(60_000)));
        }
        let api = source.api();
        let path = resource(&["jobs", &id.to_string()]);
        wait_for("the freeze", || {
            let job: Job = api.get(&path).unwrap();
            assert!(!job.state.is_over(), "{job:?}");
            job.migration
                .is_some_and(|m| m.phase == MigrationPhase::Freeze)
        });
        let frozen = resource(&["containers", "ct", "migrate", "frozen"]);
        let _: serde_json::Value = api.post(&frozen, &serde_json::json!({})).unwrap();
        let (source, destination) = (&self.sides[from], &self.sides[to]);
        let until = Instant::now() + Duration::from_millis(500);
        let wait = |there: &dyn Fn() -> bool| while !there() && Instant::now() < until {};
        // Its data follows: all of it, some of it, nothing any more.
        if self.later && self.rng.below(3) > 0 {
            wait(&|| destination.state() == "taken");
            let left = destination.lacks() / 4 * self.rng.below(5);
            wait(&|| destination.lacks() <= left);
            return pause(Duration::from_micros(self.rng.below(5_000)));
        }
        // Any instant, or one of the few in which the container changes hands.
        let states = [
            (source, "offered"),
            (destination, "ready"),
            (source, "given"),
            (destination, "taken"),
        ];
        let Some((side, state)) = states.get(self.rng.below(6) as usize) else {
            let limit = [2_000, 5_000, 20_000, 80_000][self.rng.below(4) as usize];
            return pause(Duration::from_micros(self.rng.below(limit)));
        };
        wait(&|| side.state() == *state);
        let limit = [1, 300, 2_000][self.rng.below(3) as usize];
        pause(Duration::from_micros(self.rng.below(limit)));
    }

    fn kill(&mut self, victim: usize, from: usize, to: usize) {
        self.sides[victim].kill();
        look(&self.sides[from], &self.sides[to]);
        pause(Duration::from_micros(self.rng.below(3_000)));
    }

    /// Its clients wait where it is.
    fn hold_to(&self, side: usize) {
        self.holder.move_to(&nbd(&self.sides[side].rig));
    }

    /// One move under kills of `victims`, one after the other, and the next one without.
    fn round(&mut self, victims: &[usize]) {
        let began = Instant::now();
        let (from, to) = (self.at, 1 - self.at);
        let slow = self.rng.below(10);
        self.slow.store(slow, Ordering::Release);
        self.under_way(from, to);
        for victim in victims {
            self.kill(*victim, from, to);
        }
        let left = [from, to].map(|n| self.sides[n].state());
        let lacks = self.sides[to].lacks();
        // A side that drops what it has would end them.
        match victims.contains(&from) {
            true => self.hold_to([to, from][usize::from(self.sides[from].owns())]),
            // In post-copy it does not end before the destination is there again.
            false => wait_for("the end of the job", || {
                look(&self.sides[from], &self.sides[to]);
                let jobs = self.sides[from].here().jobs();
                jobs.iter().all(|j| j.state.is_over())
            }),
        }
        for victim in victims {
            self.sides[*victim].start();
            look(&self.sides[from], &self.sides[to]);
        }
        // Again and again, while its data follows.
        let mut again = 0;
        while self.later && again < 3 && self.sides[to].lacks() > 0 && self.rng.below(3) > 0 {
            wait_for("one owner", || {
                self.sides[from].owns() || self.sides[to].owns()
            });
            if self.sides[from].owns() {
                break;
            }
            self.hold_to(to);
            pause(Duration::from_millis(self.rng.below(400)));
            let victim = self.rng.below(2) as usize;
            self.kill(victim, from, to);
            self.sides[victim].start();
            look(&self.sides[from], &self.sides[to]);
            again += 1;
        }
        if settled(&self.sides[from], &self.sides[to]) {
            self.at = to;
        }
        let at = self.at;
        println!(
            "kill {victims:?} of {from} -> {to}: {left:?}, {lacks} bytes to come, {again} more kills, now at {at}"
        );
        assert_eq!(self.sides[at].lacks(), 0);
        self.hold_to(at);
        self.slow.store(0, Ordering::Release);
        let next = 1 - at;
        let door = self.doors[next].address();
        moved(&self.sides[at], &door, |m| self.request(next, m));
        look(&self.sides[at], &self.sides[next]);
        self.at = next;
        self.sides.iter().for_each(|s| calm(s.here()));
        println!("{:.1} s", began.elapsed().as_secs_f64());
    }
}

fn kills(later: bool) {
    let seed = env("PLOOP_SEED", 1);
    println!("PLOOP_SEED={seed}");
    let (pair, mut bytes) = Pair::new(seed, later);
    let done = AtomicBool::new(false);
    let (at, sides) = std::thread::scope(|scope| {
        let client = pair.holder.open("ct", Style::Structured);
        let writer = scope.spawn(|| write(client, &mut bytes, &done, seed));
        // The holder goes when this fails, and the writer with it.
        let mut pair = pair;
        for round in 0..env("PLOOP_KILLS", if later { 4 } else { 6 }) {
            assert!(!writer.is_finished(), "{}", pair.holder.log());
            let (from, to) = (pair.at, 1 - pair.at);
            match round % 4 {
                0 => pair.round(&[from]),
                1 => pair.round(&[to]),
                2 => pair.round(&[from, to]),
                _ => pair.round(&[to, from]),
            }
        }
        done.store(true, Ordering::Release);
        println!("{} writes", writer.join().unwrap());
        (pair.at, pair.sides)
    });
    assert!(content(sides[at].here(), "ct") == bytes);
    for mut side in sides {
        side.daemon.take().unwrap().stop();
    }
}

/// Goal: at most one side has it at any time, one of them has it in the end, nothing that was answered
/// is lost, and the next move succeeds.
#[test]
fn either_side_may_be_killed_at_any_time() {
    kills(false);
}

/// Goal: the same where the data follows; and the source does not drop it before it is there. What has
/// not come is never another's, nor zeros.
#[test]
fn either_side_may_be_killed_while_data_follows() {
    kills(true);
}
