//! One state that a power cut left, against what is allowed there.
//!
//! | question | promise |
//! |---|---|
//! | Does it read, read-only, with nothing written? Is every sector an allowed value? | 1, 2, 3 |
//! | Are all entries of the table complete, for a tool that is not ours? | 3, 7 |
//! | If it says that it is closed: is it clean, and is it the content that was closed? | 3, 7 |
//! | Does it open for writing, reading the same? | 1, 3 |
//! | Written, flushed, closed and opened again: is it those bytes, and clean? | 1, 3, 7 |

use std::sync::Arc;

use ploop::device::Device;
use ploop::format::ploop::journal::{self, Home};
use ploop::store::Store;
use ploop::store::memory::MemoryStore;
use ploop::verify::{Class, FindingKind, ImageScan, Used, class_of, scan_image};

use super::fixture::Fixture;
use super::history::{View, payload, word};
use super::{CLUSTER_SECTORS, SECTOR};

/// How much is asked of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Reading and checking.
    Look,
    /// And going on to work with it.
    Work,
}

/// "Operation" that the judge writes with.
const PROBE: u64 = 0xFFFF_0004;

/// Judges a state. An error says what is wrong, for people.
pub fn judge(fx: &Fixture, view: &View, state: &MemoryStore, depth: Depth) -> Result<(), String> {
    let scan = check_image(fx, view, state)?;
    let disk = fx
        .open(state, false)
        .map_err(|e| format!("open read-only: {e}"))?;
    let words = fx.words(&disk)?;
    drop(disk);
    view.check(&words)?;
    if !scan.header.dirty()
        && let Some(contents) = &view.closed_contents
        && contents.iter().all(|c| **c != words)
    {
        let differs = words.iter().zip(contents[contents.len() - 1].iter());
        let sector = differs
            .enumerate()
            .find(|(_, (a, b))| a != b)
            .map(|(s, _)| s);
        return Err(format!(
            "it says that it is closed, but its content is not the closed one (sector {sector:?})"
        ));
    }
    if fx.is_tracked() {
        tracked(fx, state, &words)?;
    }
    match depth {
        Depth::Look => Ok(()),
        Depth::Work => work(fx, state, &words, &scan),
    }
}

/// Whatever reads otherwise than at the start has its bit, in every tracker; where nobody ever
/// wrote there is none.
fn tracked(fx: &Fixture, state: &MemoryStore, words: &[u64]) -> Result<(), String> {
    let trackers = fx.trackers(state).map_err(|e| format!("trackers: {e}"))?;
    if trackers.len() != 2 {
        return Err(format!("{} trackers of 2 are there", trackers.len()));
    }
    for tracker in trackers {
        let untouched = fx.untouched();
        let untouched = untouched.start * SECTOR..untouched.end * SECTOR;
        if let Some((run, _)) = tracker.bits.runs(untouched).find(|run| run.1) {
            return Err(format!(
                "nobody wrote to bytes {run:?}, tracker {} says otherwise",
                tracker.id
            ));
        }
        for (run, set) in tracker.bits.runs(0..tracker.bits.size()) {
            let sectors = run.start / SECTOR..run.end.div_ceil(SECTOR);
            let mut sectors = sectors.take_while(|&s| (s as usize) < words.len());
            let written = |s: &u64| words[*s as usize] != fx.initial[*s as usize];
            if !set && let Some(sector) = sectors.find(written) {
                return Err(format!(
                    "sector {sector} was written, and its bit is clear in tracker {}",
                    tracker.id
                ));
            }
        }
    }
    Ok(())
}

fn scan(fx: &Fixture, state: &MemoryStore) -> ploop::Result<ImageScan> {
    let file = fx.top_file(state);
    match fx.is_tracked() {
        // Only who knows the extension knows whose the clusters behind the last one are.
        true => ploop::verify::check_image(file.as_ref()),
        false => scan_image(file.as_ref()),
    }
}

/// The image as a foreign tool finds it.
fn check_image(fx: &Fixture, view: &View, state: &MemoryStore) -> Result<ImageScan, String> {
    let scan = scan(fx, state).map_err(|e| format!("check: {e}"))?;
    if class_of(&scan.findings) == Class::Corrupt {
        return Err(format!("corrupt: {:?}", scan.findings));
    }
    if scan.header.dirty() {
        return match view.must_be_closed {
            true => Err("it is marked in use, though its close was answered".into()),
            false => Ok(scan),
        };
    }
    let kinds: Vec<FindingKind> = scan.findings.iter().map(|f| f.kind).collect();
    if kinds != fx.findings && !clean_but_holes(fx, &kinds) {
        return Err(format!(
            "it says that it is closed, and is not clean: {:?}",
            scan.findings
        ));
    }
    Ok(scan)
}

/// Clean, but for free clusters between others where the start image had them: they are used again,
/// and until then nothing moves to fill them.
fn clean_but_holes(fx: &Fixture, kinds: &[FindingKind]) -> bool {
    let holes = FindingKind::UnreferencedClusters;
    kinds.iter().all(|k| *k == holes) && (kinds.is_empty() || fx.findings.contains(&holes))
}

fn work(
    fx: &Fixture,
    state: &MemoryStore,
    words: &[u64],
    before: &ImageScan,
) -> Result<(), String> {
    let error = |what: &str| {
        let what = what.to_owned();
        move |e: ploop::Error| format!("{what}: {e}")
    };
    let used = before.used.with(&claimed(fx, state, before)?);
    let disk = fx.open(state, true).map_err(error("open for writing"))?;
    if fx.words(&disk)? != words {
        return Err("opened for writing it reads other bytes than read-only".into());
    }
    // One sector in the first cluster that the top has, one in the first that it has not.
    let mut expect = words.to_vec();
    let file = fx.top_file(state);
    let mut has = Vec::new();
    for slot in 0..fx.clusters.min(disk.size() / super::CLUSTER) {
        let mut entry = [0; 4];
        let at = ploop::format::ploop::Header::slot_offset(slot);
        file.read_at(&mut entry, at)
            .map_err(error("read the table"))?;
        has.push(entry != [0; 4]);
    }
    for wanted in [true, false] {
        let Some(cluster) = has.iter().position(|h| *h == wanted) else {
            continue;
        };
        let sector = cluster as u64 * CLUSTER_SECTORS + 17;
        let bytes = payload(PROBE, sector..sector + 1);
        disk.write(sector * SECTOR, &bytes)
            .map_err(error("write"))?;
        expect[sector as usize] = word(PROBE, sector);
    }
    disk.flush().map_err(error("flush"))?;
    disk.close().map_err(error("close"))?;
    drop(disk);
    let scan = scan(fx, state).map_err(error("check after close"))?;
    // A cluster that lost its entry in the crash lies between others until it is used again.
    let was = hole_count(&used);
    let worse = scan
        .findings
        .iter()
        .find(|f| f.kind != FindingKind::UnreferencedClusters);
    if let Some(f) = worse {
        return Err(format!("closed again it is not clean: {f:?}"));
    }
    let is = hole_count(&scan.used);
    if is > was {
        return Err(format!("{is} free clusters between others, {was} before"));
    }
    let disk = fx.open(state, false).map_err(error("open again"))?;
    match fx.words(&disk)? == expect {
        true => Ok(()),
        false => Err("written, closed and opened again it reads other bytes".into()),
    }
}

/// The clusters that only the journal names.
fn claimed(fx: &Fixture, state: &MemoryStore, scan: &ImageScan) -> Result<Vec<u32>, String> {
    let store: Arc<dyn Store> = Arc::new(state.clone());
    let file = fx.top_file(state);
    let home = Home::of(&store, file.path()).ok_or("no home")?;
    let found = journal::find(&home, file.as_ref(), scan).map_err(|e| e.to_string())?;
    Ok(found.map(|replay| replay.claimed).unwrap_or_default())
}

/// Clusters below the last one in use that no entry names.
fn hole_count(used: &Used) -> usize {
    (used.end() - used.count()) as usize
}
