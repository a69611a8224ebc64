//! Power cuts while an image is converted: promise 3, the target is whole or not there.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use ploop::disk::open::{OpenOptions, Opener, Source};
use ploop::store::Access;
use ploop::store::Store;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, RecordingStore};
use ploop::verify::scan_image;
use ploop_tests::crash::fixture::words_of;
use ploop_tests::crash::proof::{Proof, Scenario, Verdict};
use ploop_tests::crash::{SECTOR, tree};
use snapshots::convert::{Kind, Target, convert};

const KINDS: [(Kind, &str); 4] = [
    (Kind::Raw, "/store/x.raw"),
    (Kind::Ploop, "/store/x.hds"),
    (Kind::PloopV1, "/store/x1.hds"),
    (Kind::Qcow2, "/store/x.qcow2"),
];

fn source() -> Source {
    Source {
        path: tree::RAW.into(),
        descriptor: false,
        snapshot: None,
    }
}

fn run(store: std::sync::Arc<dyn Store>, log: &RecordingStore, kind: Kind, target: &str) {
    let opener = Opener::on(store);
    let target = Target::File(target.into());
    convert(
        &opener,
        &source(),
        &OpenOptions::default(),
        target,
        kind,
        &|_, _| (),
    )
    .unwrap();
    log.mark(1);
}

fn check(log: &RecordingStore, kind: Kind, target: &str, budget: &Budget) -> Result<u64, String> {
    let mut states = 0;
    for point in 0..=log.log().len() {
        let answered = log.marks_before(point).contains(&1);
        for state in log.states_at(point, budget) {
            states += 1;
            judge(&state.build(), kind, Path::new(target), answered)
                .map_err(|e| format!("{kind:?}: {e}\n{state}\n  {}", log.log().join("\n  ")))?;
        }
    }
    Ok(states)
}

fn judge(state: &MemoryStore, kind: Kind, target: &Path, answered: bool) -> Result<(), String> {
    if state.kind(target).map_err(|e| e.to_string())?.is_none() {
        return if answered {
            Err("it is lost, though it was answered".into())
        } else {
            Ok(())
        };
    }
    if matches!(kind, Kind::Ploop | Kind::PloopV1) {
        let file = state
            .open(target, Access::Read)
            .map_err(|e| e.to_string())?;
        let scan = scan_image(file.as_ref()).map_err(|e| e.to_string())?;
        if !scan.findings.is_empty() {
            return Err(format!("it is not clean: {:?}", scan.findings));
        }
    }
    let open = |path: &Path| {
        let source = Source {
            path: path.into(),
            ..source()
        };
        let opener = Opener::on(std::sync::Arc::new(state.clone()));
        let disk = opener
            .open(&source, &OpenOptions::default())
            .map_err(|e| e.to_string())?;
        words_of(&disk)
    };
    let mut expect = open(Path::new(tree::RAW))?;
    if matches!(kind, Kind::Ploop | Kind::PloopV1) {
        // Padded to a whole cluster.
        expect.resize(
            expect.len().next_multiple_of(64 * 1024 / SECTOR as usize),
            0,
        );
    }
    match open(target)? == expect {
        true => Ok(()),
        false => Err("it reads other bytes than its source".into()),
    }
}

/// Goal: promise 3 for each format. Method: all states of a conversion; then each sync of it
/// dropped, hastened and delayed, which must be noticed.
#[test]
fn a_converted_image_is_whole_or_not_there_and_each_sync_counts() {
    const FILES: &[&str] = &[
        "snapshots/src/convert/qcow2.rs",
        "snapshots/src/convert/raw.rs",
        "snapshots/src/convert/staged.rs",
    ];
    let proof = Proof::default();
    for (kind, target) in KINDS {
        let log = RecordingStore::on(&tree::start());
        run(log.store(), &log, kind, target);
        let states = check(&log, kind, target, &Budget::default());
        println!(
            "{kind:?}: {} states",
            states.unwrap_or_else(|e| panic!("{e}"))
        );
        let scenario = Scenario {
            name: format!("{kind:?}"),
            start: tree::start(),
            run: Box::new(move |front, log| {
                run(front, log, kind, target);
                let log = log.clone();
                let budget = Budget {
                    exhaustive_units: 8,
                    seeded: 30,
                    seed: 0,
                };
                Box::new(move || check(&log, kind, target, &budget).map(drop)) as Verdict<'_>
            }),
        };
        proof.add(&scenario, FILES);
    }
    proof.verdict(FILES);
}
