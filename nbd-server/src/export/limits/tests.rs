//! The limiter in virtual time.

use proptest::prelude::*;
use snapshots::limits::Limits;

use std::cell::Cell;
use std::sync::Arc;

use ploop::store::FileId;

use super::Throttle;
use super::limiter::{Cost, Limiter};

const SECOND: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;

fn read(bytes: u64) -> Cost {
    Cost {
        write: false,
        bytes,
    }
}

fn write(bytes: u64) -> Cost {
    Cost { write: true, bytes }
}

/// A request that was served.
#[derive(Clone, Copy, Debug)]
struct Served {
    came: u64,
    went: u64,
    bytes: u64,
}

/// One container's requests, each at its time, in order; `period`: who waits is looked at only at
/// its multiples, else when it is due.
fn serve(limits: &Limits, arrivals: &[(u64, Cost)], period: Option<u64>) -> Vec<Served> {
    let mut limiter = Limiter::new();
    limiter.set(1, limits, 0);
    let mut served = Vec::new();
    let mut granted = Vec::new();
    let (mut due, mut next, mut previous) = (None::<u64>, 0, 0);
    loop {
        let looked = due.map(|d| period.map_or(d, |p| d.div_ceil(p) * p).max(previous));
        let come = arrivals.get(next).map(|a| a.0);
        let now = match (looked, come) {
            (None, None) => break,
            (Some(look), come) if come.is_none_or(|c| look < c) => {
                assert!(period.is_some() || look > previous || granted.is_empty());
                due = limiter.grant(look, &mut granted);
                look
            }
            (_, come) => {
                let (now, (_, cost)) = (come.unwrap(), arrivals[next]);
                if limiter.pass(1, cost, now) {
                    granted.push((0, next));
                } else {
                    limiter.wait(1, cost, next, now);
                    let again = limiter.grant_new(1, now, &mut granted);
                    due = due.into_iter().chain(again).min();
                }
                next += 1;
                now
            }
        };
        for (_, i) in granted.drain(..) {
            let (came, cost) = arrivals[i];
            served.push(Served {
                came,
                went: now,
                bytes: cost.bytes,
            });
        }
        previous = now;
    }
    assert_eq!(served.len(), arrivals.len(), "every request is served once");
    served
}

/// In every window: at most `rate·w + burst`, and what one request is larger than the burst.
fn check_most(served: &[Served], rate: u64, burst: u64, amount: impl Fn(&Served) -> u64) {
    let parts = u128::from(SECOND);
    let full = (u128::from(rate) * u128::from(burst)).max(parts);
    let largest = served.iter().map(|s| u128::from(amount(s)) * parts).max();
    for (i, first) in served.iter().enumerate() {
        let mut sum = 0;
        for last in &served[i..] {
            sum += u128::from(amount(last)) * parts;
            let most = u128::from(rate) * u128::from(last.went - first.went);
            let most = most + full.max(largest.unwrap_or(0));
            assert!(sum <= most, "{sum} in {first:?} … {last:?}, {most} allowed");
        }
    }
}

/// While something waits: at least `rate·w`, but for one refill and one request.
fn check_least(served: &[Served], rate: u64, period: u64, amount: impl Fn(&Served) -> u64) {
    let parts = u128::from(SECOND);
    let refill = u128::from(rate) * u128::from(period);
    let largest = served.iter().map(|s| u128::from(amount(s)) * parts).max();
    for (i, first) in served.iter().enumerate() {
        // From where it was the first in the queue.
        let before = i.checked_sub(1).map_or(0, |b| served[b].went);
        let (mut sum, from) = (0, first.came.max(before));
        let mut end = first.went;
        for s in &served[i..] {
            // Somebody waits until here.
            if s.came > end {
                break;
            }
            end = s.went;
            sum += u128::from(amount(s)) * parts;
            let least = u128::from(rate) * u128::from(end - from);
            let slack = refill + largest.unwrap_or(0);
            assert!(
                sum + slack >= least,
                "{sum} from {first:?} to {s:?}, {least} earned"
            );
        }
    }
}

/// All arrivals of five requests that come after one of three gaps and have one of three sizes.
#[test]
fn no_pattern_of_a_small_domain_gets_too_much_or_too_little() {
    let (gaps, sizes) = ([0, 300 * MS, SECOND], [1, 2, 5]);
    let mut patterns = vec![Vec::new()];
    for _ in 0..5 {
        let longer = |p: &Vec<(u64, Cost)>| {
            let at = p.last().map_or(0, |a| a.0);
            let with = |(gap, size): (u64, u64)| [&p[..], &[(at + gap, read(size))]].concat();
            let all = gaps
                .iter()
                .flat_map(|&g| sizes.iter().map(move |&s| (g, s)));
            all.map(with).collect::<Vec<_>>()
        };
        patterns = patterns.iter().flat_map(longer).collect();
    }
    for (rate, burst_ms) in [(1, 500), (2, 1000), (3, 700)] {
        let requests = Limits {
            iops: rate,
            burst_ms,
            ..Limits::default()
        };
        let bytes = Limits {
            read_bps: rate,
            burst_ms,
            ..Limits::default()
        };
        for pattern in &patterns {
            for period in [None, Some(250 * MS)] {
                let refill = period.unwrap_or(0);
                let served = serve(&requests, pattern, period);
                check_most(&served, rate, burst_ms * MS, |_| 1);
                check_least(&served, rate, refill, |_| 1);
                let served = serve(&bytes, pattern, period);
                check_most(&served, rate, burst_ms * MS, |s| s.bytes);
                check_least(&served, rate, refill, |s| s.bytes);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn nor_does_any_of_a_large_one(
        iops in 1u64..1_000_000,
        bps in 1u64..10_000_000_000,
        burst_ms in 10u64..2000,
        period in 1u64..50,
        requests in prop::collection::vec((0u64..20 * MS, 0u64..32 << 20, any::<bool>()), 1..120),
    ) {
        let limits = Limits { iops, bps, burst_ms, ..Limits::default() };
        let mut at = 0;
        let arrivals: Vec<_> = requests
            .into_iter()
            .map(|(gap, bytes, write)| { at += gap; (at, Cost { write, bytes }) })
            .collect();
        for period in [None, Some(period * MS)] {
            let served = serve(&limits, &arrivals, period);
            check_most(&served, iops, burst_ms * MS, |_| 1);
            check_most(&served, bps, burst_ms * MS, |s| s.bytes);
            // In order, though reads and writes mix: both wait for the same.
            prop_assert!(served.windows(2).all(|w| w[0].came <= w[1].came));
        }
        let limits = Limits { bps: 0, ..limits };
        let served = serve(&limits, &arrivals, Some(period * MS));
        check_least(&served, iops, period * MS, |_| 1);
    }

    /// However often or seldom a bucket is looked at, within its burst: what it earned is served, to
    /// the last token.
    #[test]
    fn no_token_is_lost(
        rate in 100u64..100_000,
        looks in prop::collection::vec(1u64..90 * MS, 1..300),
    ) {
        let mut limiter = Limiter::new();
        limiter.set(1, &Limits { write_iops: rate, ..Limits::default() }, 0);
        let (mut now, mut served, mut granted) = (0, 0, Vec::new());
        for gap in looks {
            for _ in 0..rate / 10 + 2 {
                limiter.wait(1, write(0), (), now);
            }
            limiter.grant(now, &mut granted);
            served += granted.drain(..).count() as u64;
            prop_assert_eq!(served, (rate * 100 * MS + rate * now) / SECOND);
            now += gap;
        }
    }
}

/// The trap of limiters that cool down: the rate must hold, however long the refills are apart.
#[test]
fn the_rate_holds_whatever_the_period_of_refills() {
    for rate in [100, 1000, 9973] {
        for period in [MS, 10 * MS, 100 * MS] {
            let limits = Limits {
                iops: rate,
                ..Limits::default()
            };
            let all: Vec<_> = (0..rate * 20).map(|_| (0, read(4096))).collect();
            let served = serve(&limits, &all, Some(period));
            // Without the second that the burst was in.
            let within = served
                .iter()
                .filter(|s| (SECOND..11 * SECOND).contains(&s.went));
            let (count, want) = (within.count() as f64, rate as f64 * 10.0);
            let error = (count - want).abs() / want;
            assert!(
                error <= 0.02,
                "{count} of {want} with a period of {period} ns"
            );
        }
    }
}

/// Containers that always have requests, of such priorities and sizes, under a budget of the store;
/// what each got, after a second in which what was saved up went.
fn compete(store: (u64, u64), those: &[(u8, u64)], own: &[Limits], seconds: u64) -> Vec<u64> {
    let mut limiter = Limiter::new();
    limiter.set_store(store.0, store.1, 0);
    let mut got = vec![0; those.len()];
    for (i, (priority, bytes)) in those.iter().enumerate() {
        let limits = own.get(i).cloned().unwrap_or_default();
        let limits = Limits {
            priority: Some(*priority),
            ..limits
        };
        limiter.set(i as u64, &limits, 0);
        for _ in 0..8 {
            limiter.wait(i as u64, read(*bytes), i, 0);
        }
    }
    let (mut now, mut granted) = (0, Vec::new());
    while now < (seconds + 1) * SECOND {
        let due = limiter.grant(now, &mut granted);
        if granted.is_empty() {
            now = due.unwrap().max(now + 1);
        }
        for (_, i) in granted.drain(..) {
            got[i] += u64::from(now >= SECOND);
            limiter.wait(i as u64, read(those[i].1), i, now);
        }
    }
    got
}

#[test]
fn weights_share_what_the_store_has() {
    let near = |a: f64, b: f64| (a - b).abs() <= 0.05 * b;
    // By requests, by bytes, and both where one binds.
    for (store, bytes) in [
        ((1000, 0), [4096, 4096]),
        ((0, 10 << 20), [4096, 4096]),
        ((0, 10 << 20), [65536, 4096]),
        ((1000, 1 << 40), [65536, 512]),
    ] {
        let got = compete(store, &[(6, bytes[0]), (4, bytes[1])], &[], 20);
        let amounts: Vec<_> = match store.0 {
            0 => got.iter().zip(bytes).map(|(n, b)| n * b).collect(),
            _ => got,
        };
        let ratio = amounts[0] as f64 / amounts[1] as f64;
        assert!(near(ratio, 4.0), "{amounts:?} of {store:?}");
        let rate = if store.0 > 0 { store.0 } else { store.1 } as f64;
        let sum = amounts.iter().sum::<u64>() as f64;
        assert!(near(sum, rate * 20.0), "{sum} of {rate}");
    }
    // From the lowest to the highest: 1, 2, 4, … 128.
    let all: Vec<_> = (0..8).map(|p| (p, 4096)).collect();
    let got = compete((2550, 0), &all, &[], 20);
    for (p, n) in got.iter().enumerate() {
        assert!(near(*n as f64, f64::from(200 << p)), "{got:?}");
    }
}

#[test]
fn what_one_does_not_use_is_the_others() {
    let slow = Limits {
        iops: 50,
        ..Limits::default()
    };
    let got = compete((1000, 0), &[(7, 4096), (0, 4096), (0, 4096)], &[slow], 10);
    assert!((450..=560).contains(&got[0]), "{got:?}");
    assert!((got[1] + got[2]).abs_diff(9500) < 200, "{got:?}");
    assert!(got[1].abs_diff(got[2]) < 50, "{got:?}");
}

/// A large request is not overtaken for ever, whoever is heavier.
#[test]
fn nobody_starves() {
    let got = compete((0, 1 << 20), &[(7, 65536), (0, 32 << 20)], &[], 20_000);
    assert!(got[1] >= 2, "{got:?}");
    let got = compete((0, 1 << 20), &[(0, 4096), (7, 32 << 20)], &[], 20_000);
    assert!(got[0] >= 10, "{got:?}");
}

/// Requests of `cost` that may go by `now`.
fn taken(limiter: &mut Limiter<()>, now: u64) -> usize {
    let mut granted = Vec::new();
    limiter.grant(now, &mut granted);
    granted.len()
}

#[test]
fn a_change_binds_at_once() {
    let set = |iops| Limits {
        iops,
        ..Limits::default()
    };
    let mut limiter = Limiter::new();
    limiter.set(1, &set(1), 0);
    for _ in 0..1000 {
        limiter.wait(1, read(4096), (), 0);
    }
    assert_eq!(taken(&mut limiter, 0), 1);
    assert_eq!(taken(&mut limiter, SECOND / 2), 0);
    // Raised: what half a second at the old rate earned, and then the new rate.
    limiter.set(1, &set(100), SECOND / 2);
    assert_eq!(taken(&mut limiter, SECOND / 2 + 50 * MS), 5);
    // Lowered.
    limiter.set(1, &set(1), SECOND);
    assert!(taken(&mut limiter, SECOND) <= 10);
    assert_eq!(taken(&mut limiter, SECOND + 900 * MS), 0);
    // Gone.
    limiter.set(1, &set(0), 2 * SECOND);
    assert!(!limiter.binds(1));
    assert!(taken(&mut limiter, 2 * SECOND) > 980);
    assert_eq!(limiter.totals(1).waiting, 0);
    // Of the store, too.
    limiter.set_store(10, 0, 2 * SECOND);
    assert!(limiter.binds(1));
    for _ in 0..100 {
        limiter.wait(1, read(4096), (), 2 * SECOND);
    }
    assert_eq!(taken(&mut limiter, 3 * SECOND), 1);
    limiter.set_store(0, 0, 3 * SECOND);
    assert_eq!(taken(&mut limiter, 3 * SECOND), 99);
}

/// A debt made at a high rate is not paid for hours at a low one.
#[test]
fn a_debt_takes_no_longer_than_it_would_have() {
    let set = |bps| Limits {
        bps,
        ..Limits::default()
    };
    let mut limiter = Limiter::new();
    limiter.set(1, &set(100 << 20), 0);
    limiter.wait(1, read(32 << 20), (), 0);
    limiter.wait(1, read(1), (), 0);
    assert_eq!(taken(&mut limiter, 0), 1);
    limiter.set(1, &set(1 << 10), 0);
    assert_eq!(taken(&mut limiter, 100 * MS), 0);
    assert_eq!(taken(&mut limiter, 350 * MS), 1);
}

#[test]
fn reads_do_not_wait_for_writes_that_only_their_own_limit_holds() {
    let mut limiter = Limiter::new();
    let limits = Limits {
        write_iops: 1,
        ..Limits::default()
    };
    limiter.set(1, &limits, 0);
    let ask = |limiter: &mut Limiter<char>, cost, who, now| {
        let mut granted = Vec::new();
        limiter.wait(1, cost, who, now);
        limiter.grant_new(1, now, &mut granted);
        granted.into_iter().map(|g| g.1).collect::<String>()
    };
    assert_eq!(ask(&mut limiter, write(1), 'a', 0), "a");
    assert_eq!(ask(&mut limiter, write(1), 'b', 0), "");
    assert_eq!(ask(&mut limiter, read(1), 'c', 0), "c");
    assert_eq!(limiter.totals(1).waiting, 1);
    // Who leaves does not hold up those behind.
    assert_eq!(ask(&mut limiter, write(1), 'd', 0), "");
    limiter.cancel(1, |ticket| ticket == 2);
    let mut granted = Vec::new();
    assert_eq!(limiter.grant(SECOND, &mut granted), None);
    assert_eq!(granted.len(), 1);
    assert_eq!((granted[0].1, limiter.totals(1).waited), ('d', 1));
    limiter.forget(1);
    assert!(limiter.pass(1, write(u64::MAX), u64::MAX));
}

#[test]
fn no_number_overflows() {
    let limits = Limits {
        iops: u64::MAX,
        bps: 1,
        burst_ms: u64::MAX,
        ..Limits::default()
    };
    let mut limiter = Limiter::new();
    limiter.set_store(u64::MAX, 1, 0);
    for now in [0, 1, u64::MAX - 1, u64::MAX, 5] {
        limiter.set(1, &limits, now);
        limiter.wait(1, write(u64::MAX), (), now);
        let mut granted = Vec::new();
        limiter.grant(now, &mut granted);
        limiter.set(
            1,
            &Limits {
                bps: u64::MAX,
                ..limits.clone()
            },
            now,
        );
        limiter.grant(now, &mut granted);
    }
}

/// Goal: a limit that an operator was told is in force stays so, whoever opens the container or one of
/// its snapshots at that instant. Method: it is set after the opener has read the older one; with no
/// door there yet, with one that is used, with one that is gone.
#[test]
fn an_opener_does_not_put_an_older_limit_in_force() {
    let disk = FileId { dev: 1, ino: 1 };
    let limits = |iops| Limits {
        iops,
        ..Limits::default()
    };
    let in_force = |throttle: &Throttle| throttle.known("ct").unwrap().limits.iops;
    let throttle = Arc::new(Throttle::default());
    let mut gates = Vec::new();
    for iops in [10, 20, 30] {
        let stored = Cell::new(limits(iops));
        let looks = Cell::new(0);
        let gate = throttle.gate("ct", disk, || {
            let read = stored.take();
            stored.set(read.clone());
            if looks.replace(looks.get() + 1) == 0 {
                stored.set(limits(iops + 5));
                throttle.set("ct", &limits(iops + 5));
            }
            Some(read)
        });
        assert_eq!((in_force(&throttle), looks.get()), (iops + 5, 2));
        match iops {
            20 => gates.clear(),
            _ => gates.push(gate),
        }
    }
    // What cannot be read takes no limit away.
    gates.push(throttle.gate("ct", disk, || None));
    assert_eq!(in_force(&throttle), 35);
    assert!(gates.iter().all(|g| g.binds()));
}

/// Goal: while a container is held back nothing of it goes, flushes aside, and then all of it does, in
/// order; whatever is set meanwhile. Who shares the store's budget with it is not held up.
#[test]
fn a_halted_container_goes_on_where_it_was() {
    let mut limiter = Limiter::new();
    for id in [1, 2] {
        limiter.set(id, &Limits::default(), 0);
    }
    assert!(!limiter.binds(1));
    limiter.halt(1, true);
    assert!(limiter.binds(1) && !limiter.binds(2));
    let mut granted = Vec::new();
    for who in 0..4u32 {
        assert!(!limiter.pass(1, if who % 2 == 0 { read(1) } else { write(1) }, SECOND));
        limiter.wait(
            1,
            if who % 2 == 0 { read(1) } else { write(1) },
            who,
            SECOND,
        );
        assert_eq!(
            limiter.grant_new(1, SECOND, &mut granted),
            None,
            "nothing to wait for"
        );
    }
    assert!(limiter.pass(2, write(1), SECOND));
    limiter.set_store(1000, 0, SECOND);
    limiter.set(1, &Limits::default(), SECOND);
    limiter.wait(2, write(1), 9, SECOND);
    limiter.grant(2 * SECOND, &mut granted);
    let who: Vec<u32> = granted.drain(..).map(|(_, who)| who).collect();
    assert_eq!(who, [9]);
    limiter.halt(1, false);
    limiter.grant(3 * SECOND, &mut granted);
    let who: Vec<u32> = granted.drain(..).map(|(_, who)| who).collect();
    assert_eq!(who, [0, 1, 2, 3]);
}

/// Goal: a brake holds for what is written, beside the limits, and goes without a trace.
#[test]
fn a_brake_holds_for_writes_alone() {
    let mut limiter = Limiter::<u32>::new();
    limiter.set(1, &Limits::default(), 0);
    limiter.brake(1, 1 << 20, 0);
    assert!(limiter.binds(1));
    let (mut passed, mut granted) = (0u64, Vec::new());
    let mut now = 0;
    while now < 4 * SECOND {
        assert!(limiter.pass(1, read(1 << 20), now), "reads go on");
        if limiter.pass(1, write(4096), now) {
            passed += 4096;
        }
        now += MS / 4;
    }
    // Its burst, and what one request is larger.
    let most = (4 << 20) + (1 << 20) / 5 + 4096;
    assert!((4 << 20..=most).contains(&passed), "{passed}");
    limiter.wait(1, write(8 << 20), 7, now);
    limiter.brake(1, 0, now);
    limiter.grant(now, &mut granted);
    assert_eq!(granted, [(1, 7)]);
    assert!(!limiter.binds(1));
}
