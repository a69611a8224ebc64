//! The trees of the corpus, made by other programs: gone back in to every node, and taken away.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fsck::Class;
use ploop::device::Device;
use ploop::disk::open::{Opener, Source};
use ploop::{Kind, Result};
use ploop_tests::corpus::{self, Case};
use ploop_tests::tools::tool;
use snapshots::delete::{self, Watch};
use snapshots::export::export_disk;
use snapshots::merge::Progress;
use snapshots::place::Place;
use snapshots::snapshot::Live;
use snapshots::switch::{SwitchOptions, Switched, switch};
use snapshots::tree;

/// A process that is being started holds the locks of ours for an instant, so a test that starts
/// some does not run beside one that takes and gives back locks.
static ALONE: Mutex<()> = Mutex::new(());

/// How a reason begins that is the library's.
const REFUSED: &str = "refused: ";

/// A program that has an unpacked case in front of it, and may open all of it.
struct Bench {
    opener: Opener,
    dir: PathBuf,
}

impl Bench {
    fn at(dir: &Path) -> Bench {
        Bench {
            opener: Opener::host(),
            dir: std::fs::canonicalize(dir).unwrap(),
        }
    }

    fn place(&self, entry: &Path) -> Result<Place<'_>> {
        let text = self.dir.join(entry).display().to_string();
        let source = Source::parse(self.opener.store().as_ref(), &text)?;
        Place::disk(&self.opener, &source, std::slice::from_ref(&self.dir), true)
    }

    /// Both digests of a node: of all bytes (of small disks) and of what is not zero.
    fn digests(&self, place: &Place<'_>, node: Option<&str>) -> Result<(Option<String>, String)> {
        let mut source = place.source(None);
        source.snapshot = node.map(str::to_owned);
        let disk = self.opener.open(&source, &place.open_options(false))?;
        let full = match disk.size() <= 1 << 30 {
            true => Some(corpus::full_digest(&disk)?),
            false => None,
        };
        Ok((full, corpus::blocks_digest(&disk)?))
    }
}

fn to(place: &Place<'_>, node: &str) -> Result<Switched> {
    let options = SwitchOptions {
        to: node.to_owned(),
        ..SwitchOptions::default()
    };
    switch(place, &options)
}

/// The snapshots whose content is known, and what it is.
type Known = Vec<(String, (Option<String>, Option<String>))>;

fn known(case: &Case, place: &Place<'_>) -> Result<Known> {
    let list = tree::list(place)?;
    let hashes = case.hashes().into_iter().filter(|(node, _)| {
        let guid = ploop::descriptor::Guid::parse(node);
        guid.is_ok_and(|g| list.iter().any(|s| s.guid == g.to_string()))
    });
    Ok(hashes.collect())
}

/// Those snapshots; none where the tree cannot be read.
fn nodes(case: &Case) -> Vec<String> {
    let tmp = case.unpack();
    let bench = Bench::at(tmp.path());
    let place = bench.place(Path::new(case.text("entry")));
    let nodes = place.and_then(|place| known(case, &place));
    let nodes = nodes.unwrap_or_default().into_iter();
    nodes.map(|(node, _)| node).collect()
}

fn same(found: &(Option<String>, String), wanted: &(Option<String>, Option<String>)) -> bool {
    let full = match (&found.0, &wanted.0) {
        (Some(a), Some(b)) => a == b,
        _ => true,
    };
    full && wanted.1.as_ref().is_none_or(|b| *b == found.1)
}

/// There, and back again; `Err` with the reason.
fn round_trip(case: &Case, bench: &Bench, node: &str) -> std::result::Result<(), String> {
    let text = |e: ploop::Error| format!("{REFUSED}{e}");
    let place = bench.place(Path::new(case.text("entry"))).map_err(text)?;
    let wanted = known(case, &place).map_err(text)?;
    let wanted = &wanted.iter().find(|(n, _)| n == node).unwrap().1;
    let top = bench.digests(&place, None).map_err(text)?;
    let done = to(&place, node).map_err(text)?;
    let now = bench.digests(&place, None).map_err(text)?;
    if !same(&now, wanted) {
        return Err(format!("it shows {now:?} instead of {wanted:?}"));
    }
    tree::tree(&place).map_err(text)?;
    let Some(kept) = done.kept else {
        // Only what says nothing is not kept.
        let parent = done.notes.iter().any(|n| n.contains("nothing was written"));
        return parent.then_some(()).ok_or_else(|| "lost".to_owned());
    };
    if bench.digests(&place, Some(&kept.guid)).map_err(text)? != top {
        return Err("what is kept shows other bytes".into());
    }
    to(&place, &kept.guid).map_err(text)?;
    match bench.digests(&place, None).map_err(text)? == top {
        true => Ok(()),
        false => Err("back again it shows other bytes".into()),
    }
}

/// Cases with a descriptor of which snapshots are known.
fn cases() -> impl Iterator<Item = Case> {
    let with_tree = |c: &Case| c.text("entry").ends_with(".xml");
    corpus::cases().into_iter().filter(with_tree)
}

#[test]
fn every_snapshot_of_every_tree_can_be_gone_back_to() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut wrong, mut trips) = (Vec::new(), 0);
    for case in cases() {
        for node in nodes(&case) {
            let tmp = case.unpack();
            let done = round_trip(&case, &Bench::at(tmp.path()), &node);
            trips += u32::from(done.is_ok());
            // Of a damaged tree a refusal is right, and so is what still can be read.
            let strict = matches!(case.read_rule(), "exact" | "needs-permission");
            let refused = done.as_ref().is_err_and(|e| e.starts_with(REFUSED));
            if !(done.is_ok() || refused && !strict) {
                wrong.push(format!("{} {node}: {done:?}", case.name));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(trips > 120, "{trips} round trips only");
}

/// Exports the whole tree, and each snapshot; compares what they show; checks them.
fn exports(case: &Case, bench: &Bench) -> std::result::Result<u32, String> {
    let text = |e: ploop::Error| format!("{REFUSED}{e}");
    let place = bench.place(Path::new(case.text("entry"))).map_err(text)?;
    let top = bench.digests(&place, None).map_err(text)?;
    let before = known(case, &place).map_err(text)?;
    let out = tempfile::tempdir().unwrap();
    let away = Bench::at(out.path());
    export_disk(&place, None, &away.dir.join("all"), &|_, _| ()).map_err(text)?;
    let all = away.place(Path::new("all")).map_err(text)?;
    if away.digests(&all, None).map_err(text)? != top {
        return Err("the copy of the tree shows other bytes".into());
    }
    clean(&away, "all")?;
    for (n, (node, wanted)) in before.iter().enumerate() {
        if !same(&away.digests(&all, Some(node)).map_err(text)?, wanted) {
            return Err(format!("{node} in the copy shows other bytes"));
        }
        let name = n.to_string();
        let guid = ploop::descriptor::Guid::parse(node).unwrap();
        export_disk(&place, Some(guid), &away.dir.join(&name), &|_, _| ()).map_err(text)?;
        let one = away.place(Path::new(&name)).map_err(text)?;
        if !same(&away.digests(&one, None).map_err(text)?, wanted) {
            return Err(format!("the copy of {node} shows other bytes"));
        }
        clean(&away, &name)?;
    }
    Ok(before.len() as u32 + 1)
}

/// Clean here, and every image clean for another program.
fn clean(away: &Bench, name: &str) -> std::result::Result<(), String> {
    let text = |e: ploop::Error| format!("{REFUSED}{e}");
    let place = away.place(Path::new(name)).map_err(text)?;
    let source = place.source(None);
    let report = fsck::check(&away.opener, &source, &place.open_options(false)).map_err(text)?;
    if report.class > Class::Leak {
        return Err(format!("{name}: {:?}", report.findings));
    }
    let d = place.descriptor().map_err(text)?;
    for image in &d.images {
        if image.file.contains('/') {
            return Err(format!("a path leads out: {}", image.file));
        }
        if image.kind == ploop::descriptor::ImageKind::Plain {
            continue;
        }
        let path = place.dir().join(&image.file);
        let check = tool("qemu-img")
            .args(["check", "-q", "-f", "parallels"])
            .arg(&path)
            .output()
            .unwrap();
        // 3: leaked clusters, which the original had. And of a bitmap that OpenVZ's tool made empty
        // QEMU does not open the original either.
        let empty_bitmap = String::from_utf8_lossy(&check.stderr).contains("Bitmap table size 0");
        if !matches!(check.status.code(), Some(0 | 3)) && !empty_bitmap {
            return Err(format!("{path:?}: {check:?}"));
        }
    }
    Ok(())
}

#[test]
fn every_tree_can_be_taken_away_and_stands_for_itself() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut wrong, mut made) = (Vec::new(), 0);
    for case in cases() {
        let tmp = case.unpack();
        let done = exports(&case, &Bench::at(tmp.path()));
        made += done.as_ref().map_or(0, |n| *n);
        let refused = done.as_ref().is_err_and(|e| e.starts_with(REFUSED));
        // A tree in the middle of a merge is refused, and one with a damaged image.
        if !(done.is_ok() || refused) {
            wrong.push(format!("{}: {done:?}", case.name));
        }
        if case.read_rule() == "exact" && done.is_err() {
            println!("{}: {done:?}", case.name);
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(made > 170, "{made} exports only");
}

#[test]
fn a_volume_becomes_a_disk_of_its_own_and_a_read_only_one_is_not_switched() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let case = cases().find(|c| c.text("group") == "volume").unwrap();
    let tmp = case.unpack();
    let bench = Bench::at(tmp.path());
    let mut entries = vec![case.text("entry").to_owned()];
    let others = case.expect["other_entries"].as_object().unwrap();
    entries.extend(others.keys().cloned());
    for entry in entries {
        let place = bench.place(Path::new(&entry)).unwrap();
        let shown = bench.digests(&place, None).unwrap();
        let tree = tree::tree(&place).unwrap();
        assert!(tree.nodes.iter().all(|n| n.error.is_none()), "{tree:?}");
        let out = tempfile::tempdir().unwrap();
        let away = Bench::at(out.path());
        let done = export_disk(&place, None, &away.dir.join("x"), &|_, _| ()).unwrap();
        assert!(done.images >= tree.depth, "{entry}");
        let copy = away.place(Path::new("x")).unwrap();
        assert_eq!(away.digests(&copy, None).unwrap(), shown, "{entry}");
        assert_eq!(tree::tree(&copy).unwrap().depth, tree.depth);
        let read_only = others.get(&entry).is_some_and(|o| o["read_only"] == true);
        for s in tree::list(&place).unwrap() {
            match to(&place, &s.guid) {
                Err(e) => assert!(read_only && e.kind() == Kind::ReadOnly, "{entry}: {e}"),
                Ok(_) => assert!(!read_only),
            }
        }
    }
}

struct Quiet;

impl Watch for Quiet {
    fn go_on(&self, _: u64) -> bool {
        true
    }
    fn progress(&self, _: Progress) {}
}

/// Every node that is listed, and the top, with what it shows.
fn all_digests(bench: &Bench, place: &Place<'_>) -> Result<Vec<(Option<String>, String)>> {
    let nodes = tree::list(place)?.into_iter().map(|s| Some(s.guid));
    nodes
        .chain([None])
        .map(|node| {
            let (_, blocks) = bench.digests(place, node.as_deref())?;
            Ok((node, blocks))
        })
        .collect()
}

/// Deletes `node`, finishes whatever waits, and looks at all that stays.
fn delete_one(case: &Case, bench: &Bench, node: Option<&str>) -> std::result::Result<(), String> {
    let text = |e: ploop::Error| format!("{REFUSED}{e}");
    let place = bench.place(Path::new(case.text("entry"))).map_err(text)?;
    let before = all_digests(bench, &place).map_err(text)?;
    {
        let disk = place.open().map_err(text)?;
        let live = Live {
            place: &place,
            disk: &disk,
        };
        if let Some(node) = node {
            let guid = ploop::descriptor::Guid::parse(node).unwrap();
            delete::delete(live, guid).map_err(text)?;
        }
        let ran = delete::run(live, &Quiet).map_err(text)?;
        if ran.paused {
            return Err("it was paused".into());
        }
        disk.close().map_err(text)?;
    }
    let after = all_digests(bench, &place).map_err(text)?;
    for (stays, shows) in &after {
        if !before.contains(&(stays.clone(), shows.clone())) {
            return Err(format!("{stays:?} shows other bytes than before"));
        }
    }
    let gone = before.iter().filter(|b| !after.contains(b)).count();
    match gone == usize::from(node.is_some()) {
        true => Ok(()),
        false => Err(format!("{gone} nodes are gone: {after:?}")),
    }
}

#[test]
fn every_snapshot_of_every_tree_can_be_deleted_and_interrupted_merges_end() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut wrong, mut deleted) = (Vec::new(), 0);
    for case in cases() {
        let nodes = nodes(&case).into_iter().map(Some);
        for node in nodes.chain([None]) {
            let tmp = case.unpack();
            let bench = Bench::at(tmp.path());
            let done = delete_one(&case, &bench, node.as_deref());
            deleted += u32::from(done.is_ok() && node.is_some());
            let refused = done.as_ref().is_err_and(|e| e.starts_with(REFUSED));
            let elsewhere = done
                .as_ref()
                .is_err_and(|e| e.contains("not in the disk's directory"));
            let raw = done
                .as_ref()
                .is_err_and(|e| e.contains("raw disk without an overlay"));
            let strict = case.read_rule() == "exact" && !elsewhere && !raw;
            if !(done.is_ok() || refused && !strict) {
                wrong.push(format!("{} {node:?}: {done:?}", case.name));
            }
            if done.is_ok() {
                for image in images(tmp.path()) {
                    let out = tool("qemu-img")
                        .args(["check", "-f", "parallels"])
                        .arg(&image)
                        .output();
                    let out = out.unwrap();
                    // Clusters that nobody names may have been there before.
                    if !matches!(out.status.code(), Some(0 | 3)) && case.text("group") == "chain" {
                        let says = String::from_utf8_lossy(&out.stderr).into_owned();
                        wrong.push(format!("{} {node:?}: {image:?}: {says}", case.name));
                    }
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(deleted > 120, "{deleted} snapshots were deleted");
}

/// The ploop images in a directory.
fn images(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let is_one = |p: &PathBuf| {
        let mut head = [0; 16];
        let read = std::fs::File::open(p)
            .and_then(|f| std::os::unix::fs::FileExt::read_exact_at(&f, &mut head, 0));
        read.is_ok() && ploop::format::ploop::header::has_signature(&head)
    };
    files.filter(|p| p.is_file()).filter(is_one).collect()
}
