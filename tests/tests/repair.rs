//! Repair on every ploop case of the corpus: what it keeps, what it loses, that the checker and QEMU
//! call the result clean, and that undo brings every byte back.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fsck::Class;
use fsck::repair::{self, How, Plan};
use ploop::device::Device;
use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop_tests::corpus::{self, Case};
use ploop_tests::damage::state::{State, state};
use ploop_tests::tools::tool;

/// A process that is being started holds the locks of ours for an instant.
static ALONE: Mutex<()> = Mutex::new(());

/// Cases whose outcome is not an accepted one, and why. Nothing may come onto it.
const NOT_YET: &[(&str, &str)] = &[
    ("430-too-few-entries", ASKS),
    ("432-too-many-entries-used", ASKS),
    ("433-size-zero", ASKS),
    (
        "450-chain-version-mismatch",
        "repair does not convert: `ploop convert` reads no such chain either",
    ),
];
const ASKS: &str = "done with -y only: entries begin or cease to count, and with them what guests \
                    read";

/// Cases that QEMU finds something in after repair, and why that is right.
const NOT_QEMU: &[(&str, &str)] = &[];

struct Bench {
    case: Case,
    dir: PathBuf,
    undo: tempfile::TempDir,
    _tmp: tempfile::TempDir,
}

type Digests = BTreeMap<String, (Option<String>, String)>;

impl Bench {
    fn new(case: Case) -> Bench {
        let tmp = case.unpack();
        Bench {
            dir: std::fs::canonicalize(tmp.path()).unwrap(),
            undo: tempfile::tempdir().unwrap(),
            case,
            _tmp: tmp,
        }
    }

    fn options(&self) -> OpenOptions {
        let allow = match self.case.text("group") == "volume" {
            true => vec![self.dir.clone()],
            false => vec![],
        };
        OpenOptions {
            allow,
            ..OpenOptions::default()
        }
    }

    fn source(&self) -> ploop::Result<Source> {
        let path = self.dir.join(self.case.text("entry"));
        Source::parse(Opener::host().store().as_ref(), path.to_str().unwrap())
    }

    fn plan(&self) -> ploop::Result<Plan> {
        repair::plan(&Opener::host(), &self.source()?, &self.options())
    }

    /// What each node that the corpus knows shows now, and the top; those that can be read.
    fn digests(&self) -> Digests {
        let mut nodes: BTreeSet<String> = self.case.hashes().into_keys().collect();
        nodes.insert("top".into());
        let mut out = Digests::new();
        for node in nodes {
            let Ok(mut source) = self.source() else {
                continue;
            };
            if node != "top" {
                source.snapshot = Some(node.clone());
            }
            let read = || -> ploop::Result<(Option<String>, String)> {
                let disk = Opener::host().open(&source, &self.options())?;
                let full = match disk.size() <= 1 << 28 {
                    true => Some(corpus::full_digest(&disk)?),
                    false => None,
                };
                Ok((full, corpus::blocks_digest(&disk)?))
            };
            if let Ok(found) = read() {
                out.insert(node, found);
            }
        }
        out
    }

    /// Everything about one case; what is wrong, if something is.
    fn run(&self) -> Result<(), String> {
        let before = state(&self.dir);
        let shown = self.digests();
        let plan = match self.plan() {
            Ok(plan) => plan,
            Err(e) => {
                assert_eq!(state(&self.dir), before, "{}", self.case.name);
                let accepted = self.case.expect["check"]["classes_accepted"].as_array();
                let named = accepted.unwrap().iter().any(|a| a == "unsupported");
                return match named && e.kind() == ploop::Kind::Unsupported {
                    true => Ok(()),
                    false => Err(format!("no plan: {e}")),
                };
            }
        };
        assert_eq!(state(&self.dir), before, "a plan wrote");
        self.preen(&plan, &before, &shown)?;
        let u = self.undo.path().join("yes");
        let plan = self.plan().unwrap();
        let done = repair::apply(&Opener::host(), &plan, How::Yes, Some(&u)).unwrap();
        let verdict = self.judge(&plan, &done, &before, &shown);
        let qemu = self.qemu(&plan);
        self.undone(done.undo.as_deref(), &before);
        verdict.and(qemu).and_then(|()| self.losses(&plan))
    }

    /// Nothing that could be read reads otherwise after preening.
    fn preen(&self, plan: &Plan, before: &State, shown: &Digests) -> Result<(), String> {
        let u = self.undo.path().join("preen");
        let done = repair::apply(&Opener::host(), plan, How::Preen, Some(&u)).unwrap();
        assert!(done.done.iter().all(|s| s.automatic), "{:?}", done.done);
        let now = self.digests();
        for (node, digest) in shown {
            if now.get(node) != Some(digest) {
                return Err(format!("preening changed {node}: {:?}", done.done));
            }
        }
        self.undone(done.undo.as_deref(), before);
        Ok(())
    }

    /// Twice: it may be repeated.
    fn undone(&self, undo: Option<&Path>, before: &State) {
        if let Some(undo) = undo {
            repair::undo(&Opener::host(), undo).unwrap();
            assert_eq!(&state(&self.dir), before, "{}: undo", self.case.name);
            repair::undo(&Opener::host(), undo).unwrap();
        }
        assert_eq!(&state(&self.dir), before, "{}", self.case.name);
    }

    fn judge(
        &self,
        plan: &Plan,
        done: &repair::Outcome,
        before: &State,
        shown: &Digests,
    ) -> Result<(), String> {
        let expected = &self.case.expect["repair"];
        let outcome = expected["outcome"].as_str().unwrap();
        if !plan.unrepairable.is_empty() {
            assert_eq!(&state(&self.dir), before, "nothing is to be done");
            let refusing = outcome == "unrepairable"
                || self
                    .case
                    .text("expected_repair")
                    .to_lowercase()
                    .contains("refuse");
            return match refusing {
                true => Ok(()),
                false => Err(format!("unrepairable: {:?}", plan.unrepairable)),
            };
        }
        let steps = &done.done;
        if done.after.class != Class::Clean && plan.left.is_empty() {
            let findings = &done.after.findings;
            return Err(format!("not clean after {steps:?}: {findings:?}"));
        }
        let now = self.digests();
        let Some(top) = now.get("top") else {
            return Err(format!("the top cannot be read after {steps:?}"));
        };
        let accepted = expected["accepted"].as_array().cloned().unwrap_or_default();
        let usual = |a: &&serde_json::Value| {
            let how = a["how"].as_str().unwrap();
            !how.contains("explicit request")
        };
        let fits = |a: &serde_json::Value| {
            let full = a["guest_sha256"]["top"].as_str();
            let blocks = a["guest_blocks_sha256"]["top"].as_str();
            (full.is_none() || top.0.is_none() || full == top.0.as_deref())
                && (blocks.is_none() || blocks == Some(&top.1))
        };
        match accepted.is_empty() {
            true => {
                for (node, digest) in shown {
                    if now.get(node) != Some(digest) {
                        return Err(format!("{node} shows other bytes after {steps:?}"));
                    }
                }
            }
            false => {
                let found = accepted.iter().filter(usual).find(|a| fits(a));
                let Some(found) = found else {
                    return Err(format!("no accepted content after {steps:?}"));
                };
                if !found["preferred"].as_bool().unwrap() {
                    return Err(format!("accepted, not preferred: {}", found["how"]));
                }
            }
        }
        if outcome == "lossless" && !plan.is_automatic() {
            let asks: Vec<_> = plan.steps.iter().filter(|s| !s.automatic).collect();
            let orphans = asks.iter().all(|s| s.what.contains("lost+found"));
            return match orphans {
                true => Ok(()),
                false => Err(format!("asks: {asks:?}")),
            };
        }
        Ok(())
    }

    /// What is called lost could not be read before, and all that could not is.
    fn losses(&self, plan: &Plan) -> Result<(), String> {
        let Some(damaged) = self.case.expect["damaged_extents"].as_array() else {
            return Ok(());
        };
        let lost: Vec<_> = plan.steps.iter().flat_map(|s| s.lost.clone()).collect();
        let mut all: Vec<_> = Vec::new();
        for extent in damaged {
            let at = extent[0].as_u64().unwrap();
            all.push(at..at + extent[1].as_u64().unwrap());
        }
        let within = |r: &Range<u64>| all.iter().any(|d| d.start < r.end && r.start < d.end);
        let named = |d: &Range<u64>| lost.iter().any(|r| d.start < r.end && r.start < d.end);
        match plan.unrepairable.is_empty() && !(lost.iter().all(within) && all.iter().all(named)) {
            true => Err(format!("lost {lost:?}, damaged {all:?}")),
            false => Ok(()),
        }
    }

    /// A single image that was repaired is one that QEMU finds nothing in.
    fn qemu(&self, plan: &Plan) -> Result<(), String> {
        let entry = self.dir.join(self.case.text("entry"));
        let single = entry.extension().is_none_or(|e| e != "xml");
        if !single || plan.is_empty() || !plan.unrepairable.is_empty() {
            return Ok(());
        }
        if NOT_QEMU.iter().any(|(name, _)| *name == self.case.name) {
            return Ok(());
        }
        let mut check = tool("qemu-img");
        let out = check
            .args(["check", "-f", "parallels"])
            .arg(&entry)
            .output()
            .unwrap();
        match out.status.success() {
            true => Ok(()),
            false => Err(format!(
                "qemu-img check: {} {}",
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            )),
        }
    }
}

#[test]
fn every_case_is_repaired_as_the_corpus_wants_and_taken_back() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut wrong, mut report) = (BTreeSet::new(), String::new());
    for case in corpus::cases() {
        let group = case.text("group");
        if group == "qcow2" || group == "corrupt-qcow2" {
            continue;
        }
        let bench = Bench::new(case);
        if let Err(why) = bench.run() {
            report += &format!("{}: {why}\n", bench.case.name);
            wrong.insert(bench.case.name.clone());
        }
    }
    let listed = NOT_YET.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(wrong, listed, "\n{report}");
}

#[test]
fn a_qcow2_image_is_refused_by_name_and_left_alone() {
    let cases = corpus::cases().into_iter();
    for case in cases.filter(|c| c.name == "638-qcow2-refcount-zero") {
        let bench = Bench::new(case);
        let before = state(&bench.dir);
        let e = bench.plan().unwrap_err();
        assert_eq!(e.kind(), ploop::Kind::Unsupported);
        assert!(e.to_string().contains("qemu-img check -r"), "{e}");
        assert_eq!(state(&bench.dir), before);
    }
}
