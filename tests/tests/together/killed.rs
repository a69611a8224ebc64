//! kill -9.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ploop_tests::fsx::Rng;
use ploop_tests::store::Rig;

use super::kit::{CLONES, Kit, Sound, listed, names, words};

/// An operation that succeeds in the state that the store is in, and how it fails when it has been
/// done already.
struct Op {
    args: Vec<String>,
    /// What it makes or removes: a template by its name, a container by its own.
    makes: Option<String>,
    removes: Option<String>,
    again: i32,
}

impl Op {
    fn random(rig: &Rig, kit: &Kit, rng: &mut Rng) -> Op {
        let there = everything(rig);
        let t = rng.below(kit.templates.len() as u64) as usize;
        let name = kit.templates[t].0;
        let container = kit.container(t, rng.below(CLONES));
        let clones = (0..CLONES).any(|n| there.contains(&kit.container(t, n)));
        let (args, item, makes) = if !there.contains(name) {
            (kit.import(t), name.to_owned(), true)
        } else if there.contains(&container) {
            (words(&["rm", &container]), container, false)
        } else if !clones && rng.once_in(2) {
            (words(&["template", "rm", name]), name.to_owned(), false)
        } else {
            (kit.create(t, &container), container, true)
        };
        Op {
            args,
            makes: makes.then(|| item.clone()),
            removes: (!makes).then_some(item),
            again: if makes { 4 } else { 3 },
        }
    }

    /// Runs it and kills it after `delay`. True when it was still at work.
    fn killed(&self, rig: &Rig, delay: Duration) -> bool {
        let mut command = rig.ploop();
        command.args(&self.args).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        sleep(delay);
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert!(status.success() || status.signal() == Some(9), "{status}");
        !status.success()
    }

    /// Whether it happened between two states. Panics when anything else did.
    fn happened(&self, before: &BTreeSet<String>, after: &BTreeSet<String>) -> bool {
        if before == after {
            return false;
        }
        let mut want = before.clone();
        want.extend(self.makes.clone());
        if let Some(gone) = &self.removes {
            want.remove(gone);
        }
        assert_eq!(after, &want, "{:?}", self.args);
        true
    }
}

/// The names of all templates and containers.
fn everything(rig: &Rig) -> BTreeSet<String> {
    let mut names = listed(rig, &["list"]);
    names.extend(listed(rig, &["template", "list"]));
    names
}

/// Goal: kill -9 at any time costs nothing but the work that was killed. Method: operations killed
/// at random times of theirs; what is listed is whole, the operation can be done again, and what it
/// left is collected by the next one that collects.
#[test]
fn killed_at_any_time_an_operation_happened_or_not_and_is_cleared_up() {
    const KILLS: u32 = 60;
    let rig = Rig::new();
    let kit = Kit::new(&rig);
    rig.run(kit.import(0));
    let mut rng = Rng(9);
    let (mut kills, mut cut, mut usual) = (0, 0, Duration::from_millis(20));
    for _ in 0..KILLS * 10 {
        let op = Op::random(&rig, &kit, &mut rng);
        let before = everything(&rig);
        let delay = Duration::from_micros(rng.below(usual.as_micros() as u64));
        if !op.killed(&rig, delay) {
            continue;
        }
        kills += 1;
        Sound::Superset.expect(&rig);
        let happened = op.happened(&before, &everything(&rig));
        kit.judge_all(&rig);
        cut += u32::from(!happened);
        if happened {
            rig.refused(op.again, &op.args, &["there is "]);
        } else {
            let began = Instant::now();
            rig.run(&op.args);
            usual = began.elapsed();
            // An import collects what was being made, a removal all that nobody needs.
            assert!(op.args[0] == "create" || names(&rig.root().join("tmp")).is_empty());
            if op.removes.is_some() {
                Sound::Exact.expect(&rig);
            }
        }
        kit.collect(&rig);
        if kills == KILLS {
            break;
        }
    }
    // Else the operations end before they are killed, and this says nothing.
    assert!(kills >= 40 && cut >= 10, "{kills} killed, {cut} undone");
    Kit::clear(&rig);
}
