//! Comparing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ploop::descriptor::{Descriptor, Guid, Temporary};
use ploop::disk::Disk;
use ploop::disk::info::data_bytes;
use ploop::error::Kind;
use ploop::store::Access;
use ploop::verify::Class;
use snapshots::place::Place;
use snapshots::remove::remove_container;
use snapshots::{diff, meta::Meta, tree};

use super::data::{self, read};
use super::oracle::Sectors;
use super::world::{Done, Failure, Held, Home, World, ensure};
use crate::tools::{run, tool};

fn differ(what: &str, found: &Sectors, expected: &Sectors) -> Done {
    data::differ(found, expected).map_err(|e| Failure(format!("{what}: {e}")))
}

/// Where two nodes differ their maps say so.
fn differences(name: &str, a: (&Disk, &Sectors), b: (&Disk, &Sectors)) -> Done {
    let mut found = Vec::new();
    diff::between(a.0, b.0, &mut |extent| {
        found.push(extent);
        Ok(())
    })?;
    for (sector, (x, y)) in a.1.iter().zip(b.1).enumerate() {
        let byte = data::byte(sector);
        let at = found.partition_point(|e: &std::ops::Range<u64>| e.end <= byte);
        ensure!(
            x == y || found.get(at).is_some_and(|e| e.contains(&byte)),
            "{name}: sector {sector} is {x} and {y}, and no extent of {found:?}"
        );
    }
    Ok(())
}

impl World {
    /// What a node reads for somebody who opens it now.
    pub(super) fn read_node(&self, name: &str, node: Option<Guid>) -> Done<Sectors> {
        let place = World::place(&self.root, name)?;
        let options = place.open_options(false);
        let disk = self.root.opener().open(&place.source(node), &options)?;
        read(&disk)
    }

    /// Whether a merge has files of this node's chain for itself.
    pub(super) fn is_taken(&self, name: &str, guid: Guid) -> bool {
        let chain = self.cts[name].chain(Some(guid));
        let merging = self.merging.as_ref().filter(|(ct, ..)| ct == name);
        merging.is_some_and(|(_, node, child)| {
            chain.contains(node) || child.is_some_and(|c| chain.contains(&c))
        })
    }

    /// Compares a node (none: the top) that may be gone by now.
    pub(super) fn compare(&self, name: &str, node: Option<Guid>) -> Done {
        self.compare_and_keep(name, node).map(drop)
    }

    /// The same; the disk, if it was opened for that.
    fn compare_and_keep(&self, name: &str, node: Option<Guid>) -> Done<Option<Disk>> {
        let Some(ct) = self.cts.get(name) else {
            return Ok(None);
        };
        let Some(guid) = node else {
            let found = match self.disks.get(name) {
                Some(disk) => read(disk.as_ref()),
                None => self.read_node(name, None),
            };
            return differ(&format!("the top of {name}"), &found?, &ct.top).map(|()| None);
        };
        if !ct.has(guid) {
            return Ok(None);
        }
        let node = ct.node(guid);
        let place = World::place(&self.root, name)?;
        let options = place.open_options(false);
        match self.root.opener().open(&place.source(Some(guid)), &options) {
            Err(e) if e.kind() == Kind::InUse && self.is_taken(name, guid) => Ok(None),
            // What is being merged away may be read as long as it is whole, and not at all then.
            Err(e) if node.marked && e.kind() == Kind::NotFound => Ok(None),
            // Or it is what another one was being merged into when the process died.
            Err(e) if node.marked && e.what().contains("was interrupted") => Ok(None),
            opened => {
                let marked = if node.marked { " (marked)" } else { "" };
                let what = format!("{guid}{marked} of {name}");
                let disk = opened.map_err(|e| Failure(format!("{what}: {:?}: {e}", e.kind())))?;
                differ(&what, &read(&disk)?, &node.sectors)?;
                Ok(Some(disk))
            }
        }
    }

    pub(super) fn compare_held(&self, held: &Held) -> Done {
        let what = format!("{} of {}, open all the time", held.guid, held.ct);
        differ(&what, &read(&held.disk)?, &held.sectors)
    }

    /// The tree is the model's.
    pub(super) fn shape(&self, name: &str) -> Done {
        let d = World::place(&self.root, name)?.descriptor()?;
        let ct = &self.cts[name];
        let mut expected: BTreeMap<Guid, (Guid, bool, bool)> = ct
            .nodes
            .iter()
            .map(|n| (n.guid, (n.parent.unwrap_or(Guid::NONE), n.marked, n.shared)))
            .collect();
        expected.insert(d.top, (ct.parent.unwrap_or(Guid::NONE), false, false));
        let of = |s: &ploop::descriptor::Shot| {
            let shared = d.image(s.guid).is_some_and(|i| i.file.contains('/'));
            (s.guid, (s.parent, s.temporary != Temporary::No, shared))
        };
        let found: BTreeMap<_, _> = d.shots.iter().map(of).collect();
        ensure!(
            d.images.len() == d.shots.len(),
            "{name}: images and nodes differ"
        );
        for (guid, value) in &expected {
            ensure!(
                found.get(guid) == Some(value),
                "{name}: {guid} is {:?} and not {value:?} (parent, marked, shared)",
                found.get(guid)
            );
        }
        ensure!(
            found.len() == expected.len(),
            "{name} has nodes that nobody made"
        );
        Ok(())
    }

    /// Names, parents and the place of the top, as they are listed.
    fn listed(&self, name: &str) -> Done {
        let ct = &self.cts[name];
        let visible = |at: Option<Guid>| {
            let seen = ct.chain(at).into_iter().find(|g| !ct.node(*g).marked);
            seen.map(|g| g.to_string())
        };
        let expected: BTreeSet<_> = ct
            .nodes
            .iter()
            .filter(|n| !n.marked)
            .map(|n| {
                let guid = n.guid.to_string();
                let current = visible(ct.parent).as_ref() == Some(&guid);
                (guid, n.name.clone(), visible(n.parent), current)
            })
            .collect();
        let list = tree::list(&World::place(&self.root, name)?)?;
        let found = list
            .into_iter()
            .map(|s| (s.guid, s.name, s.parent, s.current));
        let found: BTreeSet<_> = found.collect();
        ensure!(
            found == expected,
            "{name}: listed as {found:?} and not {expected:?}"
        );
        Ok(())
    }

    /// Nothing lies about in a container's directory; the layers that it names.
    fn files(&self, name: &str) -> Done<BTreeSet<PathBuf>> {
        let store = self.root.opener().store();
        let place = World::place(&self.root, name)?;
        let d = place.descriptor()?;
        let (own, layers): (Vec<_>, Vec<_>) = d.images.iter().partition(|i| Place::owns(i));
        let mut expected: BTreeSet<PathBuf> = own.iter().map(|i| i.file.clone().into()).collect();
        expected.insert("DiskDescriptor.xml".into());
        let mut found: BTreeSet<PathBuf> = store.list(place.dir())?.into_iter().collect();
        let side = found.remove(Path::new(".ploop"));
        ensure!(
            found == expected,
            "{name} has {found:?} and not {expected:?}"
        );
        if side {
            self.side_files(&d, place.dir())?;
        }
        let layers = layers.iter().map(|i| place.file_of(i));
        Ok(layers.collect::<Result<_, _>>()?)
    }

    fn side_files(&self, d: &Descriptor, dir: &Path) -> Done {
        for file in self.root.opener().store().list(&dir.join(".ploop"))? {
            let file = file.to_string_lossy().into_owned();
            let right = match file.strip_prefix("merging.") {
                Some(guid) => d
                    .shot(Guid::parse(guid)?)
                    .is_some_and(|s| s.temporary != Temporary::No),
                None if file.starts_with("journal.") => {
                    let top = d.image(d.top).map(|i| format!("journal.{}", i.file));
                    top.is_some_and(|top| top == file)
                }
                None => ["meta.json", "lock"].contains(&file.as_str()),
            };
            ensure!(right, "{}/.ploop/{file} is a leftover", dir.display());
        }
        Ok(())
    }

    /// The layers of the store are those that somebody names, each with the references of all.
    fn layers(&self) -> Done {
        let store = self.root.opener().store();
        let mut named: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
        for name in self.cts.keys() {
            for image in self.files(name)? {
                let layer = image.parent().unwrap().to_path_buf();
                named.entry(layer).or_default().push(name.clone());
            }
        }
        let room = self.root.dir().join("layers");
        let there: BTreeSet<_> = store.list(&room)?.iter().map(|n| room.join(n)).collect();
        let expected: BTreeSet<_> = named.keys().cloned().collect();
        ensure!(
            there == expected,
            "layers {there:?}, named are {expected:?}"
        );
        for (layer, users) in named {
            let references = store.list(&layer.join("refs"))?;
            for user in users {
                let id = Meta::read(store.as_ref(), &self.dir(&user))?.id;
                let id = id.ok_or_else(|| Failure(format!("{user} has layers and no id")))?;
                let there = references.iter().any(|r| r.as_os_str() == id.as_str());
                ensure!(there, "{} has no reference of {user}", layer.display());
            }
        }
        let left = store.list(&self.root.dir().join("tmp"))?;
        ensure!(left.is_empty(), "left in tmp: {left:?}");
        Ok(())
    }

    /// All nodes of all containers, and what lies about.
    pub(super) fn everything(&mut self) -> Done {
        let mut compared = 0;
        for (name, ct) in &self.cts {
            self.shape(name)?;
            self.listed(name)?;
            self.compare(name, None)?;
            // Each image is opened once for all nodes that stand on it.
            let mut open = Vec::new();
            for node in &ct.nodes {
                open.push(self.compare_and_keep(name, Some(node.guid))?);
            }
            let shown = ct.nodes.iter().map(|n| &n.sectors);
            let mut shown: Vec<(&Disk, &Sectors)> = (open.iter().zip(shown))
                .filter_map(|(disk, sectors)| Some((disk.as_ref()?, sectors)))
                .collect();
            if let Some(disk) = self.disks.get(name) {
                shown.push((disk.as_ref(), &ct.top));
                shown.rotate_right(1);
            }
            for pair in shown.windows(2) {
                differences(name, pair[0], pair[1])?;
                compared += 1;
            }
        }
        *self.tally.0.entry("compared by maps").or_default() += compared;
        for held in &self.held {
            self.compare_held(held)?;
        }
        self.layers()?;
        self.tally.add("compared all");
        Ok(())
    }

    /// Bytes of data in all image files of the store.
    pub(super) fn data(&self) -> Done<u64> {
        let mut sum = 0;
        for file in self.images()? {
            let file = self.root.opener().store().open(&file, Access::Read)?;
            sum += data_bytes(file.as_ref())?;
        }
        Ok(sum)
    }

    /// Every image file of the store, once.
    fn images(&self) -> Done<BTreeSet<PathBuf>> {
        let mut all = BTreeSet::new();
        for name in self.cts.keys() {
            let place = World::place(&self.root, name)?;
            for image in &place.descriptor()?.images {
                all.insert(place.file_of(image)?);
            }
        }
        Ok(all)
    }

    /// Everything comes to rest, is looked at by every checker, and is removed.
    pub(super) fn finish(&mut self) -> Done {
        self.held.clear();
        let names: Vec<String> = self.cts.keys().cloned().collect();
        for name in &names {
            self.go_on(name, None)?;
            self.close(name)?;
            self.at_rest(name)?;
        }
        self.everything()?;
        if self.home == Home::Files {
            self.check_with_qemu()?;
        }
        let root = self.root.clone();
        for name in &names {
            remove_container(&root, name)?;
            self.cts.remove(name);
            self.layers()?;
        }
        let containers = root.opener().store().list(&root.dir().join("containers"))?;
        ensure!(
            containers.is_empty(),
            "left after the last removal: {containers:?}"
        );
        Ok(())
    }

    fn at_rest(&self, name: &str) -> Done {
        let place = World::place(&self.root, name)?;
        {
            let _held = place.lock()?;
            place.sweep()?;
        }
        let (d, meta) = (place.descriptor()?, place.meta()?);
        for guid in meta.snapshots.keys() {
            let known = d.shot(Guid::parse(guid)?).is_some();
            ensure!(known, "{name}: the metadata knows {guid}, which is gone");
        }
        let report = fsck::check(
            self.root.opener(),
            &place.source(None),
            &place.open_options(false),
        )?;
        ensure!(
            report.class == Class::Clean,
            "{name}: {:?}",
            report.findings
        );
        let tree = tree::tree(&place)?;
        let errors: Vec<_> = tree.nodes.iter().filter_map(|n| n.error.as_ref()).collect();
        ensure!(errors.is_empty(), "{name}: {errors:?}");
        let data = tree
            .nodes
            .iter()
            .map(|n| n.exclusive + n.shared)
            .sum::<u64>();
        ensure!(
            data == tree.exclusive + tree.shared,
            "{name}: the sums of the tree"
        );
        ensure!(
            tree.depth == self.cts[name].depth(),
            "{name}: {} deep",
            tree.depth
        );
        Ok(())
    }

    fn check_with_qemu(&mut self) -> Done {
        let raw: BTreeSet<PathBuf> = self
            .cts
            .iter()
            .filter(|(_, ct)| ct.nodes.iter().any(|n| n.raw))
            .map(|(name, _)| self.dir(name).join("root.hds"))
            .collect();
        for file in self.images()?.difference(&raw) {
            run(tool("qemu-img")
                .args(["check", "-q", "-f", "parallels"])
                .arg(file));
            self.tally.add("checked by qemu");
        }
        Ok(())
    }
}
