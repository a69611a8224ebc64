//! `ploop tree` and `ploop snapshot list`: every node of a disk, what its data takes, and what
//! deleting it would give back.
//!
//! Takes no lock and writes nothing: what it says of the top of a live disk is as of some instant
//! while it looked.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::descriptor::{Descriptor, Guid, Image, Temporary};
use ploop::disk::info::data_bytes;
use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::store::{Access, SECTOR, StoreFile};
use serde::Serialize;

use crate::foretell::{Part, direction, freed_by_merge};
use crate::layer;
use crate::meta::{Group, Meta};
use crate::place::Place;
use crate::switch::is_raw;
use crate::uses;

pub use crate::snapshot::{OPENVZ_DEPTH, depth_note};

/// Volumes above each other, at most (OpenVZ's limit).
const VOLUMES_MAX: usize = 256;

/// A disk, as `ploop tree` shows it. All sizes are in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Tree {
    /// Which disk, as the caller named it.
    pub disk: String,
    /// Its virtual size; 0 when the top is damaged.
    pub size: u64,
    /// Images in the chain of the top, those of parent volumes included.
    pub depth: usize,
    /// Data that only this disk uses.
    pub exclusive: u64,
    /// Data in layers that other disks use too.
    pub shared: u64,
    /// What else there is to say.
    pub note: Option<String>,
    /// Parents before their children, depth first.
    pub nodes: Vec<Node>,
}

/// One node of a [`Tree`].
#[derive(Clone, Debug, Serialize)]
pub struct Node {
    /// Its GUID.
    pub guid: String,
    /// Its name.
    pub name: Option<String>,
    /// The text for people.
    pub description: String,
    /// When it was made, in seconds since 1970; 0 when that is not known.
    pub created: u64,
    /// The group that it was made with.
    pub group: Option<Group>,
    /// The node that it stands on; none for a base. In a volume it may be another disk's.
    pub parent: Option<String>,
    /// It is what clients write.
    pub top: bool,
    /// It was deleted, and stays as long as others need it.
    pub hidden: bool,
    /// Images in its chain.
    pub depth: usize,
    /// Its image's file, as the descriptor names it.
    pub file: String,
    /// References to its image, for one in the layers of a store.
    pub references: Option<usize>,
    /// Data in its file, if only this disk uses that; else 0.
    pub exclusive: u64,
    /// Data in its file, if that is a layer that others use too; else 0.
    pub shared: u64,
    /// Data that deleting it would give back. None when an image that matters is damaged.
    pub freed_if_deleted: Option<u64>,
    /// Why the sizes are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A snapshot, as `ploop snapshot list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Its GUID.
    pub guid: String,
    /// Its name.
    pub name: Option<String>,
    /// The text for people.
    pub description: String,
    /// When it was made, in seconds since 1970; 0 when that is not known.
    pub created: u64,
    /// The group that it was made with.
    pub group: Option<Group>,
    /// The snapshot that it stands on; those that are being removed are passed over.
    pub parent: Option<String>,
    /// What the disk shows is written on this one.
    pub current: bool,
}

/// The snapshots of a disk, parents before their children: not the top, and none that is being
/// removed. Looks at no image.
pub fn list(place: &Place<'_>) -> Result<Vec<Snapshot>> {
    let (d, meta) = read(place)?;
    let parents: HashMap<Guid, Guid> = d.shots.iter().map(|s| (s.guid, s.parent)).collect();
    let hidden = d.shots.iter().filter(|s| s.temporary != Temporary::No);
    let hidden: HashSet<Guid> = hidden.map(|s| s.guid).collect();
    let visible_below = |g: Guid| {
        let mut at = parents.get(&g).copied().unwrap_or(Guid::NONE);
        while hidden.contains(&at) {
            at = parents.get(&at).copied().unwrap_or(Guid::NONE);
        }
        Some(at).filter(|at| *at != Guid::NONE)
    };
    let current = visible_below(d.top);
    let all = order(&d).into_iter().map(|(guid, _)| guid);
    let snapshots = all
        .filter(|g| *g != d.top && !hidden.contains(g))
        .map(|guid| {
            let known = meta.snapshot(guid).cloned().unwrap_or_default();
            Snapshot {
                guid: guid.to_string(),
                name: known.name,
                description: known.description,
                created: known.created,
                group: known.group,
                parent: visible_below(guid).map(|g| g.to_string()),
                current: current == Some(guid),
            }
        });
    Ok(snapshots.collect())
}

/// The whole tree of a disk with sizes. Reads tables, no data. A damaged image costs the numbers of
/// the nodes that need it, and no others.
pub fn tree(place: &Place<'_>) -> Result<Tree> {
    let (d, meta) = read(place)?;
    let looked: HashMap<Guid, Looked> = d
        .images
        .iter()
        .map(|image| (image.guid, Looked::at(place, &d, &meta, image)))
        .collect();
    let mut outer: HashMap<Guid, usize> = HashMap::new();
    let mut nodes = Vec::new();
    for (guid, own_depth) in order(&d) {
        let parent = d.shot(guid).map_or(Guid::NONE, |s| s.parent);
        let below = match outer.get(&parent) {
            Some(below) => *below,
            None => match parent == Guid::NONE || d.shot(parent).is_some() {
                true => 0,
                false => volumes(place, &d, guid)?.iter().map(|v| v.chain).sum(),
            },
        };
        outer.insert(guid, below);
        nodes.push(node(place, &d, &meta, guid, own_depth + below, &looked));
    }
    let depth = nodes.iter().find(|n| n.top).map_or(0, |n| n.depth);
    Ok(Tree {
        disk: place.shown().to_owned(),
        size: looked
            .get(&d.top)
            .map_or(0, |top| top.size)
            .min(meta.size_of(&d, d.top).unwrap_or(u64::MAX)),
        depth,
        exclusive: nodes.iter().map(|n| n.exclusive).sum(),
        shared: nodes.iter().map(|n| n.shared).sum(),
        note: depth_note(depth),
        nodes,
    })
}

/// The descriptor and the metadata of one instant: a snapshot that is made meanwhile has its name.
fn read(place: &Place<'_>) -> Result<(Descriptor, Meta)> {
    let d = place.descriptor()?;
    Ok((d, place.meta()?))
}

/// Every node and its depth among the nodes of the descriptor: parents before children, depth
/// first.
pub(crate) fn order(d: &Descriptor) -> Vec<(Guid, usize)> {
    let known: HashSet<Guid> = d.shots.iter().map(|s| s.guid).collect();
    let mut children: HashMap<Guid, Vec<Guid>> = HashMap::new();
    let mut bases = Vec::new();
    for shot in &d.shots {
        match known.contains(&shot.parent) {
            true => children.entry(shot.parent).or_default().push(shot.guid),
            false => bases.push(shot.guid),
        }
    }
    let mut todo: Vec<(Guid, usize)> = bases.into_iter().rev().map(|g| (g, 1)).collect();
    let mut all = Vec::new();
    while let Some((guid, depth)) = todo.pop() {
        all.push((guid, depth));
        let above = children.remove(&guid).unwrap_or_default();
        todo.extend(above.into_iter().rev().map(|g| (g, depth + 1)));
    }
    all
}

/// A volume below a disk.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) dir: PathBuf,
    pub(crate) descriptor: Descriptor,
    /// The node that the disk above hangs on.
    pub(crate) node: Guid,
    /// Images of its own in the chain of that node.
    pub(crate) chain: usize,
}

/// The volumes that the chain of `node` goes on in, the nearest first.
pub(crate) fn volumes(place: &Place<'_>, d: &Descriptor, node: Guid) -> Result<Vec<Volume>> {
    let mut found: Vec<Volume> = Vec::new();
    loop {
        let (dir, descriptor, at) = match found.last() {
            None => (place.dir(), d, node),
            Some(v) => (v.dir.as_path(), &v.descriptor, v.node),
        };
        let Some(outer) = descriptor.outer_parent(at)? else {
            return Ok(found);
        };
        let parent = descriptor.volume.as_ref().and_then(|v| v.parent.clone());
        let parent = parent.ok_or_else(|| {
            Error::corrupt(format!("parent {outer} is not in the descriptor")).on(dir)
        })?;
        // From the disk's own directory: what may be opened is the same for all of them.
        let path = dir.join(parent);
        let path = path
            .to_str()
            .ok_or_else(|| Error::invalid("not UTF-8").on(&path))?;
        let options = place.open_options(false);
        let dir = place.opener().confine(place.dir(), path, &options)?;
        let seen = dir == place.dir() || found.iter().any(|v| v.dir == dir);
        if seen || found.len() == VOLUMES_MAX {
            return Err(Error::corrupt("parent cycle among volumes").on(dir));
        }
        let descriptor = place.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
        let chain = descriptor.chain(outer)?.len();
        found.push(Volume {
            dir,
            descriptor,
            node: outer,
            chain,
        });
    }
}

/// What was found of one image.
struct Looked {
    path: PathBuf,
    data: u64,
    size: u64,
    /// Only this disk uses the file, and letting go of it removes it.
    ours: bool,
    references: Option<usize>,
    error: Option<String>,
}

impl Looked {
    fn at(place: &Place<'_>, d: &Descriptor, meta: &Meta, image: &Image) -> Looked {
        let mut looked = Looked {
            path: PathBuf::new(),
            data: 0,
            size: 0,
            ours: Place::owns(image),
            references: None,
            error: None,
        };
        if let Err(e) = looked.look(place, d, meta, image) {
            looked.error = Some(e.to_string());
        }
        looked
    }

    fn look(
        &mut self,
        place: &Place<'_>,
        d: &Descriptor,
        meta: &Meta,
        image: &Image,
    ) -> Result<()> {
        let path = place.file_of(image)?;
        self.references = self.look_at_layer(place, d, meta, &path)?;
        self.path = path;
        let file = place.store().open(&self.path, Access::Read)?;
        self.data = data_bytes(file.as_ref())?;
        self.size = part(d, image.guid, file)?.size();
        Ok(())
    }

    /// References to a layer, and whether all of them are this disk's: its own, and those of layers
    /// in its own tree.
    fn look_at_layer(
        &mut self,
        place: &Place<'_>,
        d: &Descriptor,
        meta: &Meta,
        path: &Path,
    ) -> Result<Option<usize>> {
        let Some((root, id)) = place.root().and_then(|r| Some((r, layer::of(r, path)?))) else {
            return Ok(None);
        };
        let names = layer::reference_names(root, id)?;
        let mut own = uses::layers_in(d);
        match uses::id_in(meta).map_err(|e| e.on(place.dir()))? {
            Some(id) => drop(own.insert(id)),
            None => own.extend(uses::ids_in_names(d)),
        }
        let mine = |name: &PathBuf| {
            let id = name.to_str().and_then(|n| uuid::Uuid::parse_str(n).ok());
            id.is_some_and(|id| own.contains(&id))
        };
        self.ours = names.iter().all(mine);
        Ok(Some(names.len()))
    }
}

/// The image of a node, to look at.
fn part(d: &Descriptor, node: Guid, file: Arc<dyn StoreFile>) -> Result<Part> {
    match is_raw(d, node) {
        true => Part::raw(file, u64::from(d.cluster_sectors) * SECTOR),
        false => Part::ploop(file),
    }
}

fn node(
    place: &Place<'_>,
    d: &Descriptor,
    meta: &Meta,
    guid: Guid,
    depth: usize,
    looked: &HashMap<Guid, Looked>,
) -> Node {
    let shot = d.shot(guid);
    let parent = shot.map_or(Guid::NONE, |s| s.parent);
    let known = meta.snapshot(guid).cloned().unwrap_or_default();
    let mut node = Node {
        guid: guid.to_string(),
        name: known.name,
        description: known.description,
        created: known.created,
        group: known.group,
        parent: Some(parent)
            .filter(|p| *p != Guid::NONE)
            .map(|p| p.to_string()),
        top: guid == d.top,
        hidden: shot.is_some_and(|s| s.temporary != Temporary::No),
        depth,
        file: d.image(guid).map_or_else(String::new, |i| i.file.clone()),
        references: None,
        exclusive: 0,
        shared: 0,
        freed_if_deleted: None,
        error: None,
    };
    if let Some(own) = looked.get(&guid) {
        node.references = own.references;
        match own.references.is_some() && !own.ours {
            true => node.shared = own.data,
            false => node.exclusive = own.data,
        }
        node.error = own.error.clone();
    }
    match freed(place, d, guid, looked) {
        Ok(freed) => node.freed_if_deleted = Some(freed),
        Err(e) => node.error = node.error.or_else(|| Some(e.to_string())),
    }
    node
}

/// Data that deleting `guid` gives back: nothing for the top, for what several nodes stand on, and
/// for a file that is not this disk's alone; all of it for a leaf; for a node with one child what
/// their merge saves.
fn freed(
    place: &Place<'_>,
    d: &Descriptor,
    guid: Guid,
    looked: &HashMap<Guid, Looked>,
) -> Result<u64> {
    let unknown = |g: Guid| {
        let why = looked.get(&g).and_then(|l| l.error.clone());
        let what = why.unwrap_or_else(|| format!("snapshot {g} has no image"));
        Error::new(Kind::Corrupt, what).on(place.dir())
    };
    let own = looked.get(&guid).ok_or_else(|| unknown(guid))?;
    if guid == d.top || !own.ours {
        return Ok(0);
    }
    let child = match d.children(guid)[..] {
        [] if own.error.is_none() => return Ok(own.data),
        [] => return Err(unknown(guid)),
        [child] => child,
        _ => return Ok(0),
    };
    let image = d.image(child).ok_or_else(|| unknown(child))?;
    if !Place::owns(image) {
        // A child that others may stand on is never written: the node stays.
        return Ok(0);
    }
    let open = |g: Guid| match looked.get(&g) {
        Some(l) if l.error.is_none() => part(d, g, place.store().open(&l.path, Access::Read)?),
        _ => Err(unknown(g)),
    };
    let (parent, child_part) = (open(guid)?, open(child)?);
    let own_file = d.image(guid).is_some_and(Place::owns);
    let up_only = child == d.top || !own_file;
    let direction = direction(&parent, &child_part, up_only)?;
    freed_by_merge(&parent, &child_part, direction)
}
