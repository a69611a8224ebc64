//! What is promised of disks with trees at an instant, and whether a state keeps it.
//!
//! | question | promise |
//! |---|---|
//! | Does the disk read, read-only, with nothing written? Is every sector an allowed value? | 1, 2 |
//! | Are the snapshots those of before an operation, or of after it? | 3 |
//! | Does each read what the disk showed at its instant? One that is being removed: that or nothing? | 3 |
//! | Are all entries of every image complete, for a tool that is not ours? | 3, 7 |
//! | Opened for writing: is it the same, does the interrupted merge go on, and change nothing? | 3 |
//! | After the next operation: is every file named? Is every image closed and clean? | 3, 7 |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ploop::Kind;
use ploop::descriptor::{Guid, Temporary};
use ploop::device::Device;
use ploop::disk::open::{DESCRIPTOR, MERGING};
use ploop::store::Access;
use ploop::store::memory::MemoryStore;
use ploop::verify::{Class, FindingKind, class_of, scan_image};
use snapshots::delete;
use snapshots::place::Place;
use snapshots::snapshot::{Live, NewSnapshot, is_over_raw, take, take_offline};

use super::fixture::words_of;
use super::history::{View, name_of, payload};
use super::live::going;
use super::scene::Host;
use super::{CLUSTER_SECTORS, SECTOR};

/// "Operation" that the judge writes with.
const PROBE: u64 = 0xFFFF_0300;

/// How much is asked of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Reading and checking.
    Look,
    /// And going on to work with it.
    Work,
}

/// See the module text. Snapshots are (disk, name).
#[derive(Clone, Debug)]
pub struct Promise {
    /// Disks.
    pub disks: usize,
    /// They are containers.
    pub shared: bool,
    /// Sectors of each.
    pub sectors: u64,
    /// Of all disks' tops, one after the other.
    pub view: View,
    /// Snapshots that are there.
    pub must: BTreeSet<(usize, String)>,
    /// And those that may be.
    pub may: BTreeSet<(usize, String)>,
    /// What each reads.
    pub contents: BTreeMap<(usize, String), Vec<u64>>,
    /// No sync has failed: marks of closes and removals of files are as durable as they were said to
    /// be. What a failed sync covered may be lost even behind a later one that succeeds.
    pub synced: bool,
}

/// A node that is there.
struct Node {
    guid: Guid,
    name: Option<String>,
    /// It is being removed.
    hidden: bool,
}

type Judged<T> = Result<T, String>;

fn text(what: &str) -> impl Fn(ploop::Error) -> String {
    let what = what.to_owned();
    move |e| format!("{what}: {e}")
}

impl Promise {
    /// Judges a state. An error says what is wrong, for people.
    pub fn judge(&self, state: &MemoryStore, depth: Depth) -> Judged<()> {
        let host =
            Host::on(Arc::new(state.clone()), self.shared).map_err(text("open the store"))?;
        let mut words = Vec::new();
        for k in 0..self.disks {
            words.extend(host.reads(k, None).map_err(text("open read-only"))?);
        }
        self.view.check(&words)?;
        for k in 0..self.disks {
            let place = host.place(k).map_err(text("find the disk"))?;
            let nodes = nodes(&place)?;
            self.judge_tree(k, &nodes)?;
            self.judge_nodes(&host, k, &nodes)?;
            images(&place, false)?;
        }
        self.judge_clone(&host)?;
        match depth {
            Depth::Look => Ok(()),
            Depth::Work => (0..self.disks).try_for_each(|k| {
                let range = k * self.sectors as usize..(k + 1) * self.sectors as usize;
                self.work(&host, k, &words[range])
            }),
        }
    }

    fn judge_tree(&self, k: usize, nodes: &[Node]) -> Judged<()> {
        let mut there = BTreeSet::new();
        for node in nodes.iter().filter(|n| !n.hidden) {
            let Some(name) = &node.name else {
                return Err(format!("snapshot {} has lost its name", node.guid));
            };
            there.insert((k, name.clone()));
        }
        let of_disk = |all: &BTreeSet<(usize, String)>| -> BTreeSet<_> {
            all.iter().filter(|(disk, _)| *disk == k).cloned().collect()
        };
        let (must, may) = (of_disk(&self.must), of_disk(&self.may));
        if let Some((_, lost)) = must.difference(&there).next() {
            return Err(format!("snapshot {lost} of disk {k} is lost"));
        }
        match there.difference(&may).next() {
            Some((_, back)) => Err(format!("snapshot {back} of disk {k} is there")),
            None => Ok(()),
        }
    }

    fn judge_nodes(&self, host: &Host, k: usize, nodes: &[Node]) -> Judged<()> {
        for node in nodes {
            let name = node.name.clone().unwrap_or_default();
            let expect = self.contents.get(&(k, name.clone()));
            match (host.reads(k, Some(node.guid)), expect) {
                (Ok(words), Some(expect)) if words == *expect => {}
                (Ok(words), Some(expect)) => {
                    let differs = (0..)
                        .zip(words.iter().zip(expect))
                        .find(|(_, (a, b))| a != b);
                    let (sector, (is, was)) = differs.unwrap_or((0, (&0, &0)));
                    return Err(format!(
                        "snapshot {name} of disk {k} reads {} in sector {sector}, not {}",
                        name_of(*is),
                        name_of(*was)
                    ));
                }
                (Ok(_), None) => {
                    return Err(format!("snapshot {name:?} of disk {k} was never taken"));
                }
                // Its bytes may be in its child already.
                (Err(e), _) if node.hidden && e.kind() != Kind::Io => {}
                (Err(e), _) => return Err(format!("snapshot {name} of disk {k}: {e}")),
            }
        }
        Ok(())
    }

    /// Another container on the same layers reads what it always did.
    fn judge_clone(&self, host: &Host) -> Judged<()> {
        let Some(words) = host.clone_reads().map_err(|e| format!("the clone: {e}"))? else {
            return Ok(());
        };
        let known = self.contents.values().any(|content| *content == words);
        match known {
            true => Ok(()),
            false => Err("the clone reads other bytes".into()),
        }
    }

    fn work(&self, host: &Host, k: usize, words: &[u64]) -> Judged<()> {
        let place = host.place(k).map_err(text("find the disk"))?;
        let mut words = words.to_vec();
        let mut after = self.clone();
        if is_over_raw(&place).map_err(text("the descriptor"))? {
            let new = NewSnapshot {
                name: Some("first".into()),
                ..NewSnapshot::default()
            };
            take_offline(&place, &new).map_err(text("a snapshot of the raw disk"))?;
            let first = (k, "first".to_owned());
            after.contents.insert(first.clone(), words.clone());
            after.must.insert(first.clone());
            after.may.insert(first);
        }
        let disk = place.open().map_err(text("open for writing"))?;
        let same = |words: &[u64], when: &str| match words_of(&disk)? == words {
            true => Ok(()),
            false => Err(format!("{when} disk {k} reads other bytes")),
        };
        same(&words, "opened for writing")?;
        let live = Live {
            place: &place,
            disk: &disk,
        };
        delete::run(live, &going()).map_err(text("going on with the merge"))?;
        same(&words, "merged,")?;
        let write = |words: &mut Vec<u64>, sector: u64| -> Judged<()> {
            let first = k as u64 * self.sectors + sector;
            let bytes = payload(PROBE, first..first + 1);
            words[sector as usize] = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            disk.write(sector * SECTOR, &bytes).map_err(text("write"))
        };
        write(&mut words, CLUSTER_SECTORS + 17)?;
        // A name that the interrupted operation had is free, or is there.
        let before = words.clone();
        let new = NewSnapshot {
            name: Some("next".into()),
            ..NewSnapshot::default()
        };
        take(live, &new).map_err(text("the next snapshot"))?;
        write(&mut words, 2 * CLUSTER_SECTORS + 17)?;
        same(&words, "after the next snapshot")?;
        disk.close().map_err(text("close"))?;
        drop(disk);
        place.sweep().map_err(text("sweep"))?;
        if self.synced {
            named(&place)?;
        }
        images(&place, self.synced)?;
        let top = host.reads(k, None).map_err(text("open again"))?;
        if top != words {
            return Err(format!("opened again disk {k} reads other bytes"));
        }
        let nodes = nodes(&place)?;
        after.contents.insert((k, "next".into()), before);
        after.must.insert((k, "next".into()));
        after.may.insert((k, "next".into()));
        after.judge_tree(k, &nodes)?;
        after.judge_nodes(host, k, &nodes)
    }
}

fn nodes(place: &Place<'_>) -> Judged<Vec<Node>> {
    let d = place.descriptor().map_err(text("the descriptor"))?;
    let meta = place.meta().map_err(text("the metadata"))?;
    let node = |shot: &ploop::descriptor::Shot| Node {
        guid: shot.guid,
        name: meta.name_of(shot.guid).map(str::to_owned),
        hidden: shot.temporary != Temporary::No,
    };
    // What a container's template is made of are nodes too, without a name.
    let own = |s: &&ploop::descriptor::Shot| s.guid != d.top && !is_template(&d, s.guid);
    Ok(d.shots.iter().filter(own).map(node).collect())
}

/// A layer under everything that a container has itself.
fn is_template(d: &ploop::descriptor::Descriptor, guid: Guid) -> bool {
    let shared = d.image(guid).is_some_and(|i| i.file.contains('/'));
    shared && d.shot(guid).is_some_and(|s| s.parent == Guid::NONE)
}

/// No image is damaged; with `closed`, none says that it is in use.
fn images(place: &Place<'_>, closed: bool) -> Judged<()> {
    let d = place.descriptor().map_err(text("the descriptor"))?;
    for image in &d.images {
        let is_base = d.shot(image.guid).is_some_and(|s| s.parent == Guid::NONE);
        if is_base && d.base_is_raw() {
            continue;
        }
        let path = place.file_of(image).map_err(text("an image"))?;
        let file = place.store().open(&path, Access::Read);
        let scan = scan_image(file.map_err(text("an image"))?.as_ref()).map_err(text("check"))?;
        let bad = class_of(&scan.findings) == Class::Corrupt
            || closed && scan.findings.iter().any(|f| f.kind == FindingKind::InUse);
        if bad {
            return Err(format!("{}: {:?}", path.display(), scan.findings));
        }
    }
    Ok(())
}

/// Every file of the disk's directory is named by somebody.
fn named(place: &Place<'_>) -> Judged<()> {
    let d = place.descriptor().map_err(text("the descriptor"))?;
    let meta = place.meta().map_err(text("the metadata"))?;
    for name in place.store().list(place.dir()).map_err(text("list"))? {
        let name = name.to_string_lossy().into_owned();
        let known = name == ".ploop" || name == DESCRIPTOR;
        if !known && !d.images.iter().any(|i| i.file == name) {
            return Err(format!("{name} is nobody's, and stays"));
        }
    }
    for name in place
        .store()
        .list(&place.dir().join(".ploop"))
        .map_err(text("list"))?
    {
        let name = name.to_string_lossy().into_owned();
        let merging = name.strip_prefix(MERGING).and_then(|g| Guid::parse(g).ok());
        let known = ["meta.json", "lock"].contains(&name.as_str())
            || merging.is_some_and(|g| d.shot(g).is_some());
        if !known {
            return Err(format!(".ploop/{name} is nobody's, and stays"));
        }
    }
    let stale = |guid: &&String| Guid::parse(guid).map_or(true, |g| d.shot(g).is_none());
    match meta.snapshots.keys().find(stale) {
        Some(guid) => Err(format!("the metadata of {guid} stays")),
        None => Ok(()),
    }
}
