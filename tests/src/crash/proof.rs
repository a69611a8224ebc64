//! The tests of tests: whoever takes a sync out of the code, or moves it, must see red.
//!
//! Every scenario is run with sync 0, 1, 2 … left out, performed before the last change that it
//! should cover, and performed after the change that follows it. Each line of the code that syncs
//! must be noticed missing, early and late by some scenario; and no such line may go unvisited.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ploop::store::Store;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::RecordingStore;

use super::fixture::Fixture;
use super::history::History;
use super::reorder::{Order, ReorderingStore, SyncCall};
use super::sweep::Sweep;
use super::workload::{Runner, Step};

/// Judges all states of a run. The error is the first violation.
pub type Verdict<'a> = Box<dyn FnOnce() -> Result<(), String> + 'a>;

/// Runs on the store that is given, whose log is the second one's; returns who judges it.
type Run<'a> = Box<dyn Fn(Arc<dyn Store>, &RecordingStore) -> Verdict<'a> + 'a>;

/// A run that can be repeated and judged. Each run does the same.
pub struct Scenario<'a> {
    /// For reports.
    pub name: String,
    /// What is there at its start, all durable.
    pub start: MemoryStore,
    /// What is done.
    pub run: Run<'a>,
}

impl<'a> Scenario<'a> {
    /// These steps on this image.
    pub fn of(fx: &'a Fixture, name: &str, steps: &'a [Step]) -> Scenario<'a> {
        Scenario {
            name: format!("{name}, {}", fx.name),
            start: fx.start.clone(),
            run: Box::new(move |front, store| {
                let history = History::new(store, fx.initial.clone(), fx.closed());
                Runner::new(fx, front, &history).run(steps);
                judged(fx, store, history)
            }),
        }
    }
}

/// Judges a run of steps briefly.
pub fn judged<'a>(fx: &'a Fixture, store: &RecordingStore, history: History) -> Verdict<'a> {
    let store = store.clone();
    Box::new(move || Sweep::brief().check(fx, &store, &history).map(drop))
}

/// What is done to a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Crime {
    Dropped,
    Early,
    Late,
}

#[derive(Debug, Default)]
struct Record {
    noticed: u32,
    missed_in: Vec<String>,
}

/// A crime that so many scenarios noticed needs no more of them.
const ENOUGH: u32 = 2;

/// What is known of each line that syncs. Several threads may add to it.
#[derive(Debug, Default)]
pub struct Proof {
    sites: Mutex<BTreeMap<String, BTreeMap<Crime, Record>>>,
    runs: AtomicU64,
}

impl Scenario<'_> {
    fn play(&self, drop: Option<u64>, order: Order) -> (Vec<SyncCall>, Result<(), String>) {
        let store = RecordingStore::on(&self.start);
        if let Some(n) = drop {
            store.drop_sync(n);
        }
        let front = ReorderingStore::new(&store, order);
        let verdict = (self.run)(Arc::new(front.clone()), &store);
        // The syncs of judging do not count.
        let calls = front.calls();
        (calls, verdict())
    }
}

impl Proof {
    /// Runs a scenario unharmed, which must be right, and then with each crime in one of `files`
    /// that too few have noticed so far.
    pub fn add(&self, scenario: &Scenario<'_>, files: &[&str]) {
        let (calls, verdict) = scenario.play(None, Order::Unchanged);
        verdict.unwrap_or_else(|e| panic!("{}, unharmed: {e}", scenario.name));
        let judged = |call: &SyncCall| files.iter().any(|file| call.site.starts_with(file));
        for (n, call) in (0..).zip(calls).filter(|(_, call)| judged(call)) {
            self.commit(
                scenario,
                &call.site,
                Crime::Dropped,
                Some(n),
                Order::Unchanged,
            );
            self.commit(scenario, &call.site, Crime::Late, None, Order::Late(n));
            if let Some((change, of)) = call.last {
                let early = Order::Early {
                    sync: n,
                    change,
                    of,
                };
                self.commit(scenario, &call.site, Crime::Early, None, early);
            }
        }
    }

    fn commit(
        &self,
        scenario: &Scenario<'_>,
        site: &str,
        crime: Crime,
        drop: Option<u64>,
        order: Order,
    ) {
        let of = |change: &mut dyn FnMut(&mut Record)| {
            let mut sites = self.sites.lock().unwrap();
            let crimes = sites.entry(site.to_owned()).or_default();
            change(crimes.entry(crime).or_default());
        };
        let mut enough = false;
        of(&mut |record| enough = record.noticed >= ENOUGH);
        if enough {
            return;
        }
        self.runs.fetch_add(1, Ordering::Relaxed);
        let noticed = scenario.play(drop, order).1.is_err();
        of(&mut |record| match noticed {
            true => record.noticed += 1,
            false => record.missed_in.push(scenario.name.clone()),
        });
    }

    /// Panics unless every line that syncs in `files` (relative to the workspace) was visited, and
    /// every crime on it was noticed.
    pub fn verdict(&self, files: &[&str]) {
        let mut wrong = Vec::new();
        let sites = self.sites.lock().unwrap();
        for (site, crimes) in sites.iter() {
            for (crime, record) in crimes {
                println!("{site}: {crime:?}: noticed by {}", record.noticed);
                if record.noticed == 0 {
                    let runs = record.missed_in.join("\n    ");
                    wrong.push(format!("{site}: {crime:?} and nobody noticed:\n    {runs}"));
                }
            }
        }
        for file in files {
            for (line, text) in sync_lines(file) {
                let site = format!("{file}:{line}");
                if !sites.contains_key(&site) {
                    wrong.push(format!("{site}: never visited: {text}"));
                }
            }
        }
        let runs = self.runs.load(Ordering::Relaxed);
        println!("{runs} runs with a sync left out or moved");
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

fn workspace() -> &'static Path {
    // Compiled in: the sources that were built are the ones that are read.
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}

/// The lines of a source file, up to its tests, that call a sync of the store.
fn sync_lines(file: &str) -> Vec<(usize, String)> {
    let path = workspace().join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let calls = |line: &&str| {
        let code = line.split("//").next().unwrap_or_default();
        code.contains(".sync()") || code.contains(".sync_dir(")
    };
    let numbered = (1..).zip(code.lines()).filter(|(_, line)| calls(line));
    numbered
        .map(|(n, line)| (n, line.trim().to_owned()))
        .collect()
}
