//! What lies in a disk's directory beside its images, and what the checker finds that no repair of
//! an image can mend.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use ploop::Result;
use ploop::disk::open::Opener;
use ploop::store::{Access, EntryKind, Store, read_exact};
use ploop::verify::Class;

use super::disk::{LOST, SIDE};
use super::{Move, Plan, Remark};

/// Findings about how images fit together: nothing in one of them is wrong.
const BETWEEN: &[&str] = &[
    "cluster-size-mismatch",
    "version-mismatch",
    "child-smaller-than-parent",
    "duplicate-file",
    "path-outside",
    "bad-path",
    "missing-file",
];
/// A longer file is no side metadata.
const META_MAX: u64 = 16 << 20;

/// A name in `lost+found` that is free and in none of `taken`.
pub(super) fn free_place(
    store: &dyn Store,
    root: &Path,
    path: &Path,
    taken: &[Move],
) -> Result<PathBuf> {
    let dir = root.join(SIDE).join(LOST);
    let name = path.file_name().unwrap_or_default();
    let mut number = 0u32;
    loop {
        let mut name = name.to_os_string();
        if number > 0 {
            name.push(format!(".{number}"));
        }
        let to = dir.join(name);
        if taken.iter().all(|m| m.to != to) && store.kind(&to)?.is_none() {
            return Ok(to);
        }
        number += 1;
    }
}

/// What the checker finds of the disk beyond its images: leftovers, and what cannot be repaired.
pub(super) fn look(opener: &Opener, plan: &mut Plan) -> Result<()> {
    let report = crate::check(opener, &plan.source, &plan.options)?;
    let kept = swept_by_us(opener.store().as_ref(), &plan.root)?;
    let images: HashSet<PathBuf> = plan.survey.images.iter().map(|i| i.path.clone()).collect();
    let mut moved: HashSet<PathBuf> = plan.survey.moves.iter().map(|m| m.from.clone()).collect();
    for finding in &report.findings {
        let (kind, file) = (finding.kind, &finding.file);
        let remark = |what: String| Remark {
            file: file.clone(),
            what,
        };
        let idx = kind == "conversion-interrupted" && file.extension().is_some_and(|e| e == "idx");
        if kind == "orphan-file" || idx {
            if !moved.insert(file.clone()) {
                continue;
            }
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            if kept.contains(name.as_ref()) {
                let what = "an operation of ours left it: the next one on the disk removes it";
                plan.left.push(remark(what.into()));
                continue;
            }
            let taken = [&plan.survey.moves[..], &plan.moves[..]].concat();
            let step = Move {
                to: free_place(opener.store().as_ref(), &plan.root, file, &taken)?,
                from: file.clone(),
                with: None,
                automatic: false,
            };
            plan.steps.push(step.step());
            plan.moves.push(step);
        } else if kind == "interrupted-merge" {
            let what = format!(
                "{}: the next `ploop snapshot delete` or `ploop snapshot merge` of the disk \
                 finishes it",
                finding.what
            );
            plan.left.push(remark(what));
        } else if finding.class == Class::Corrupt && !kind.starts_with("journal") {
            // What is wrong inside of an image was planned for, or refused, by its survey.
            let between = BETWEEN.contains(&kind);
            let inside = plan.survey.seen.contains(file) || images.contains(file);
            let stale = plan.survey.descriptor.as_ref();
            let stale = stale.is_some_and(|r| r.path == *file) && kind.contains("size");
            let said = plan.unrepairable.iter().any(|r| r.file == *file);
            if between || !inside && !stale {
                match said {
                    true => {}
                    false => plan.unrepairable.push(remark(finding.what.clone())),
                }
            }
        }
    }
    Ok(())
}

/// Files that operations of ours made and may leave; they sweep them.
fn swept_by_us(store: &dyn Store, root: &Path) -> Result<HashSet<String>> {
    let path = root.join(SIDE).join("meta.json");
    if store.kind(&path)? != Some(EntryKind::File) {
        return Ok(HashSet::new());
    }
    let file = store.open(&path, Access::Read)?;
    let len = file.len()?;
    if len > META_MAX {
        return Ok(HashSet::new());
    }
    let mut bytes = vec![0; len as usize];
    read_exact(file.as_ref(), &mut bytes, 0)?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let files = value["files"].as_array().cloned().unwrap_or_default();
    Ok(files
        .iter()
        .filter_map(|f| f.as_str().map(str::to_owned))
        .collect())
}
