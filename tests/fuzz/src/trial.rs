//! One disk, whatever is wrong with it: checked, opened, repaired, taken back. Panics, with what
//! went wrong, when any of them fails or lies.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use fsck::Class;
use fsck::repair::{self, How, Outcome, Plan};
use ploop::Kind;
use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::store::memory::MemoryStore;

use crate::files::files;
use crate::guest::{Reading, read_to};

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was to be done.
    Clean,
    /// Repaired, without a loss.
    Repaired,
    /// Repaired, with losses or doubt that were named.
    Asked,
    /// Beyond repair, or nothing that is repaired here; nothing was touched.
    Refused,
    /// Left to another command.
    Left,
}

/// A disk on trial.
#[derive(Clone, Copy, Debug)]
pub struct Trial<'a> {
    /// All its files, in `/d`.
    pub store: &'a MemoryStore,
    /// What is opened.
    pub source: &'a Source,
    /// Guest bytes looked at.
    pub look: u64,
    /// Words before every complaint.
    pub about: &'a str,
}

fn opener(store: &MemoryStore) -> Opener {
    Opener::on(Arc::new(store.clone()))
}

impl Trial<'_> {
    /// The top, and a few nodes.
    fn nodes(&self) -> Vec<Option<Guid>> {
        let mut nodes = vec![None];
        if self.source.descriptor
            && let Ok(d) = opener(self.store).read_descriptor(&self.source.path)
        {
            nodes.extend(d.shots.iter().map(|s| Some(s.guid)).take(3));
        }
        nodes
    }

    fn readings(&self, store: &MemoryStore, nodes: &[Option<Guid>]) -> Vec<Option<Reading>> {
        let reading = |n: &Option<Guid>| read_to(store, self.source, *n, self.look);
        nodes.iter().map(reading).collect()
    }

    /// A check writes nothing, and what it calls clean can be read, and written where it is of a
    /// kind that is written here.
    pub fn check(&self) {
        let about = self.about;
        let before = files(self.store);
        let options = OpenOptions::default();
        let report = match fsck::check(&opener(self.store), self.source, &options) {
            Ok(report) => report,
            Err(e) => {
                assert_eq!(e.kind(), Kind::Unsupported, "{about}: check: {e}");
                return;
            }
        };
        assert!(files(self.store) == before, "{about}: a check wrote");
        if report.class != Class::Clean {
            return;
        }
        let shown = read_to(self.store, self.source, None, self.look);
        assert!(files(self.store) == before, "{about}: reading wrote");
        let Some(shown) = shown else {
            let e = opener(self.store).open(self.source, &options);
            panic!("{about}: clean, and does not open: {:?}", e.err());
        };
        assert!(shown.is_whole(), "{about}: clean, and cannot be read");
        self.write(&shown);
    }

    /// Writes a little, closes, and looks again.
    fn write(&self, shown: &Reading) {
        let about = self.about;
        let copy = self.store.snapshot();
        let options = OpenOptions {
            write: true,
            ..OpenOptions::default()
        };
        let disk = match opener(&copy).open(self.source, &options) {
            Ok(disk) => disk,
            Err(e) => {
                let known = [Kind::Unsupported, Kind::ReadOnly];
                assert!(known.contains(&e.kind()), "{about}: clean; write: {e}");
                return;
            }
        };
        let mut written = Vec::new();
        if disk.size() >= 1024 {
            for at in [0, disk.size() / 1024 * 512, disk.size() - 512] {
                // What has no room in the image is the image's limit.
                if disk.write(at, &[0xA5; 512]).is_ok() {
                    written.push(at..at + 512);
                }
            }
        }
        disk.flush()
            .unwrap_or_else(|e| panic!("{about}: clean; flush: {e}"));
        disk.close()
            .unwrap_or_else(|e| panic!("{about}: clean; close: {e}"));
        drop(disk);
        let options = OpenOptions::default();
        let report = fsck::check(&opener(&copy), self.source, &options)
            .unwrap_or_else(|e| panic!("{about}: clean, written to; check: {e}"));
        assert_eq!(
            report.class,
            Class::Clean,
            "{about}: clean until it was written to: {:#?}",
            report.findings
        );
        let now = read_to(&copy, self.source, None, self.look);
        if let Some(at) = shown.lost_in(now.as_ref(), &written) {
            panic!("{about}: byte {at} was not written and reads otherwise");
        }
    }

    fn plan(&self, store: &MemoryStore) -> Option<Plan> {
        match repair::plan(&opener(store), self.source, &OpenOptions::default()) {
            Ok(plan) => Some(plan),
            // Its bytes may ask for what is not done here.
            Err(e) if e.kind() == Kind::Unsupported => None,
            Err(e) => panic!("{}: plan: {e}", self.about),
        }
    }

    /// A plan writes nothing. Applied, it ends clean or says why not; what could be read and was
    /// not named reads the same; undone, every file is as it was.
    pub fn repair(&self) -> Verdict {
        let about = self.about;
        let before = files(self.store);
        let all = self.nodes();
        let shown = self.readings(self.store, &all);
        let Some(plan) = self.plan(self.store) else {
            return Verdict::Refused;
        };
        assert!(files(self.store) == before, "{about}: a plan wrote");
        let mut verdict = Verdict::Clean;
        for how in [How::Preen, How::Yes] {
            let copy = self.store.snapshot();
            let undo = Path::new("/undo");
            let outcome = repair::apply(&opener(&copy), &plan, how, Some(undo));
            let outcome = outcome.unwrap_or_else(|e| panic!("{about}: {how:?}: {e}"));
            let excepted = match how {
                How::Preen => vec![],
                How::Yes => named(&outcome),
            };
            let now = self.readings(&copy, &all);
            for (node, (was, is)) in all.iter().zip(shown.iter().zip(&now)) {
                let Some(was) = was else { continue };
                if let Some(at) = was.lost_in(is.as_ref(), &excepted) {
                    panic!(
                        "{about}: {how:?}: byte {at} of {node:?} reads otherwise: {:#?}",
                        outcome.done
                    );
                }
            }
            if how == How::Yes {
                verdict = self.judge(&outcome, &plan);
                if outcome.unrepairable.is_empty() {
                    let again = self.plan(&copy).map(|p| p.steps).unwrap_or_default();
                    assert!(again.is_empty(), "{about}: again {again:?}");
                }
            }
            match &outcome.undo {
                Some(undo) => {
                    let back = || repair::undo(&opener(&copy), undo);
                    back().unwrap_or_else(|e| panic!("{about}: undo: {e}"));
                    assert!(files(&copy) == before, "{about}: {how:?}, undone");
                    back().unwrap_or_else(|e| panic!("{about}: undo again: {e}"));
                }
                None => assert!(outcome.done.is_empty()),
            }
            assert!(files(&copy) == before, "{about}: {how:?}, undone again");
        }
        verdict
    }

    fn judge(&self, outcome: &Outcome, plan: &Plan) -> Verdict {
        if !outcome.unrepairable.is_empty() {
            assert!(outcome.done.is_empty() && outcome.undo.is_none());
            return Verdict::Refused;
        }
        if !outcome.left.is_empty() {
            return Verdict::Left;
        }
        let after = &outcome.after;
        let steps = &outcome.done;
        assert_eq!(
            after.class,
            Class::Clean,
            "{}: {:#?} after {steps:#?}",
            self.about,
            after.findings
        );
        match (plan.is_empty(), plan.is_automatic()) {
            (true, _) => Verdict::Clean,
            (_, true) => Verdict::Repaired,
            _ => Verdict::Asked,
        }
    }
}

fn named(outcome: &Outcome) -> Vec<Range<u64>> {
    let steps = outcome.done.iter();
    steps
        .flat_map(|s| s.lost.iter().chain(&s.suspect).cloned())
        .collect()
}
