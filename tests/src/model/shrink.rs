//! Running a list, and finding the shortest part of one that still fails.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::op::Op;
use super::profile::{Profile, draw};
use super::world::{Home, Tally, World};

/// Seconds that a list is shortened.
const PATIENCE: u64 = 120;

/// The number that an environment variable says.
pub fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |t| {
        t.parse().unwrap_or_else(|e| panic!("{name}={t}: {e}"))
    })
}

/// A list that failed.
#[derive(Clone, Debug)]
pub struct Failed {
    /// After so many operations.
    pub after: usize,
    /// What went wrong.
    pub why: String,
}

/// Runs a list on an empty store; what was done, or why it failed. A panic is a failure.
pub fn attempt(home: Home, ops: &[Op]) -> Result<Tally, Failed> {
    let mut world = World::new(home);
    let run = catch_unwind(AssertUnwindSafe(|| world.run(ops)));
    let why = match run {
        Ok(Ok(())) => return Ok(std::mem::take(&mut world.tally)),
        Ok(Err(failure)) => failure.0,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned()));
            format!("panicked: {}", text.unwrap_or_default())
        }
    };
    let after = world.after;
    Err(Failed { after, why })
}

/// Removes chunks of a failing list as long as it still fails; the list, and its failure.
pub fn shrink(home: Home, mut ops: Vec<Op>, failed: Failed) -> (Vec<Op>, String) {
    ops.truncate(failed.after);
    let mut failure = failed.why;
    let begun = Instant::now();
    let patience = Duration::from_secs(number("PLOOP_MODEL_PATIENCE", PATIENCE));
    let mut chunk = ops.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        let mut shorter = false;
        while at < ops.len() && begun.elapsed() < patience {
            let mut without = ops.clone();
            without.drain(at..(at + chunk).min(ops.len()));
            match attempt(home, &without) {
                Err(failed) => {
                    (ops, failure, shorter) = (without, failed.why, true);
                    ops.truncate(failed.after);
                }
                Ok(_) => at += chunk,
            }
        }
        if begun.elapsed() >= patience {
            break;
        }
        chunk = match (chunk, shorter) {
            (1, true) => 1,
            _ => chunk / 2,
        };
    }
    (ops, failure)
}

/// Runs what a seed draws. Panics on a failure, with the seed and the shortest list that fails.
pub fn run_seed(home: Home, profile: Profile, seed: u64, count: usize) -> Tally {
    let ops = draw(profile, seed, count);
    let failed = match attempt(home, &ops) {
        Ok(tally) => return tally,
        Err(failed) => failed,
    };
    let why = failed.why.clone();
    println!("seed {seed} of {profile:?}, {count} operations: {why}\nshrinking …");
    let (short, shortest) = shrink(home, ops, failed);
    panic!(
        "seed {seed} of {profile:?} ({home:?}, {count} operations): {why}\n\
         {} operations are enough: {shortest}\n{short:?}",
        short.len()
    );
}
