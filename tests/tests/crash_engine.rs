//! Power cuts under the serving engine: the code that ships, from request bytes to the store, with
//! several connections on one disk (promises 1 and 2).

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::sync::Arc;

use nbd_server::export::{Counted, Counters};
use nbd_server::wire::reply::Style;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::format::ploop::Version;
use ploop::store::recording::{Budget, RecordingStore};
use ploop_tests::crash::history::Asked;
use ploop_tests::crash::nbd::{Ask, Client, Forgetful, seeded};
use ploop_tests::crash::{
    CLUSTER_SECTORS, Fixture, History, Rng, Shape, Sweep, Tally, env, fixture,
};

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

struct Run {
    store: RecordingStore,
    history: History,
    disk: Arc<Disk>,
    device: Arc<dyn Device>,
}

impl Run {
    fn on(fx: &Fixture) -> Run {
        let store = RecordingStore::on(&fx.start);
        let history = History::new(&store, fx.initial.clone(), fx.closed());
        let disk = Arc::new(fx.open(&store, true).unwrap());
        let device = Arc::new(Counted::new(disk.clone(), Arc::new(Counters::default())));
        Run {
            store,
            history,
            disk,
            device,
        }
    }

    fn close(&self) {
        let words = fixture::words_of(&self.disk).unwrap();
        let id = self
            .history
            .begin(Asked::Close(Some(Arc::new(words))), false);
        self.disk.close().unwrap();
        self.history.ok(id);
    }

    fn check(&self, fx: &Fixture, budget: Budget, work_every: u64) -> Result<Tally, String> {
        Sweep { budget, work_every }.check(fx, &self.store, &self.history)
    }
}

fn script() -> Vec<(usize, Vec<Ask>)> {
    let c = CLUSTER_SECTORS;
    vec![
        (
            0,
            vec![Ask::Write(2 * c, 2, false), Ask::Write(4 * c, 1, false)],
        ),
        // Another connection makes it durable.
        (1, vec![Ask::Flush]),
        (1, vec![Ask::Write(2 * c + 1, 1, true), Ask::Read(2 * c, 4)]),
        (2, vec![Ask::Zero(2 * c, 1, true, false)]),
        // A flush in the same piece is asked for before the write is answered: no promise.
        (0, vec![Ask::Write(5 * c + 3, 1, false)]),
        (0, vec![Ask::Flush]),
        (
            2,
            vec![
                Ask::Write(3 * c - 1, 2, false),
                Ask::Zero(0, c, true, true),
                Ask::Write(6 * c + 1, 1, false),
            ],
        ),
        (1, vec![Ask::Flush]),
        (0, vec![Ask::Write(3 * c, 1, false), Ask::Trim(4 * c, c)]),
    ]
}

/// Goal: promises 1 and 2 for every reply that a client sees. Method: a script on three connections
/// of three reply styles, every state of it; then the same with each flush that the engine asks for
/// forgotten, and each of its data syncs dropped: all of that must be noticed.
#[test]
fn what_the_engine_answered_is_kept_and_each_of_its_flushes_counts() {
    for (version, shape) in [(Version::V2, Shape::Empty), (Version::V1, Shape::Holes)] {
        let fx = Fixture::new(version, shape, true, 8);
        let play = |forget: Option<u64>, drop: Option<u64>| {
            let run = Run::on(&fx);
            // Those of opening are others' to prove.
            let opened = run.store.syncs();
            if let Some(n) = drop {
                run.store.drop_sync(opened + n);
            }
            let device = Arc::new(Forgetful::new(
                run.device.clone(),
                forget.unwrap_or(u64::MAX),
            ));
            let shared: Arc<dyn Device> = device.clone();
            let mut clients = STYLES.map(|style| Client::new(&shared, style, &run.history));
            for (client, asks) in script() {
                clients[client].send(&asks);
            }
            drop_all(clients);
            let small = Budget {
                exhaustive_units: 8,
                seeded: 60,
                seed: 0,
            };
            let budget = if forget.or(drop).is_some() {
                small
            } else {
                Budget::default()
            };
            (
                device.flushes(),
                run.store.syncs() - opened,
                run.check(&fx, budget, 6),
            )
        };
        let (flushes, syncs, unharmed) = play(None, None);
        println!(
            "{}: {}",
            fx.name,
            unharmed.unwrap_or_else(|e| panic!("{e}"))
        );
        // The last flush is that of the trim: nothing is promised of it.
        for n in 0..flushes - 1 {
            assert!(
                play(Some(n), None).2.is_err(),
                "flush {n} was forgotten, and nobody noticed"
            );
        }
        let promised = play(Some(flushes - 1), None).1;
        assert!(promised < syncs);
        for n in 0..promised {
            assert!(
                play(None, Some(n)).2.is_err(),
                "sync {n} was dropped, and nobody noticed"
            );
        }
    }
}

fn drop_all(clients: [Client<'_>; 3]) {
    for client in clients {
        drop(client);
    }
}

/// Goal: the same for requests that nobody thought of, pipelined, interleaved. Method: three
/// connections take turns, drawn from a seed.
#[test]
fn seeded_requests_on_three_connections_are_kept() {
    let first = env("PLOOP_CRASH_SEED", 1);
    for seed in first..first + env("PLOOP_CRASH_SEEDS", 8) {
        println!("PLOOP_CRASH_SEED={seed}");
        let mut rng = Rng(seed);
        let version = [Version::V1, Version::V2][rng.below(2) as usize];
        let shape = Shape::ALL[rng.below(5) as usize];
        let fx = Fixture::new(version, shape, rng.below(2) == 0, 10);
        let run = Run::on(&fx);
        let mut clients = STYLES.map(|style| Client::new(&run.device, style, &run.history));
        for _ in 0..14 {
            let asks: Vec<Ask> = (0..1 + rng.below(3))
                .map(|_| seeded(&mut rng, fx.sectors()))
                .collect();
            clients[rng.below(3) as usize].send(&asks);
        }
        drop_all(clients);
        run.close();
        let budget = Budget {
            exhaustive_units: 7,
            seeded: 10,
            seed,
        };
        let tally = run
            .check(&fx, budget, 6)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        println!("{}: {tally}", fx.name);
    }
}

/// Goal: the same when connections are threads. Method: three engines at once, on the same few
/// clusters; the log says in which order things were asked and answered.
#[test]
fn engines_on_three_threads_keep_what_they_answered() {
    let first = env("PLOOP_CRASH_SEED", 1);
    for seed in first..first + env("PLOOP_CRASH_SEEDS", 6) {
        println!("PLOOP_CRASH_SEED={seed} (threads: repeats are similar, not equal)");
        let fx = Fixture::new(Version::V2, Shape::Holes, seed % 2 == 0, 8);
        let run = Run::on(&fx);
        std::thread::scope(|scope| {
            for (n, style) in (0..).zip(STYLES) {
                let run = &run;
                let sectors = fx.sectors();
                scope.spawn(move || {
                    let mut rng = Rng(seed * 3 + n);
                    let mut client = Client::new(&run.device, style, &run.history);
                    for _ in 0..7 {
                        let count = 1 + rng.below(2);
                        let asks: Vec<Ask> =
                            (0..count).map(|_| seeded(&mut rng, sectors)).collect();
                        client.send(&asks);
                    }
                });
            }
        });
        run.close();
        let budget = Budget {
            exhaustive_units: 6,
            seeded: 10,
            seed,
        };
        let tally = run
            .check(&fx, budget, 6)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        println!("{}: {tally}", fx.name);
    }
}
