//! The two files of a merge, taken for it alone, and the moving.
//!
//! Taking a file that this process serves from: it is opened anew for writing, the disk's chain is
//! published over that open file, and when the last lease on the old one is gone nobody else may
//! have it open. Then the writer's locks are taken; that fails, and everything is put back, when
//! another program or another export reads the file.

use std::path::PathBuf;
use std::sync::Arc;

use ploop::chain::Chain;
use ploop::descriptor::{Descriptor, Guid, ImageKind};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::MERGING;
use ploop::error::{Error, Kind, Result};
use ploop::format::Delta;
use ploop::format::ploop::top::Top;
use ploop::format::raw::RawDelta;
use ploop::locks::{Use, downgrade, lock_image};
use ploop::store::{Access, StoreFile};

use super::direction::{Costs, Direction, Walls, choose, only_child};
use super::{is_own, unknown};
use crate::place::Place;

/// Where the child is, as seen from the disk that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    /// It is the top that clients write.
    Top,
    /// It is a layer of the chain that clients read.
    Chain,
    /// On another branch: nobody reads it here.
    Aside,
}

/// The parent.
pub(super) enum Lower {
    /// Its file is written, or its space given back.
    Ploop(Arc<Top>),
    /// The same for a raw base: only its space is given back.
    Raw(Arc<dyn Delta>),
    /// Other disks use its file: it is read only.
    Shared(Arc<dyn Delta>),
}

impl Lower {
    pub(super) fn delta(&self) -> Arc<dyn Delta> {
        match self {
            Lower::Ploop(top) => top.clone(),
            Lower::Raw(delta) | Lower::Shared(delta) => delta.clone(),
        }
    }

    /// The file that is open for writing here.
    pub(super) fn own_file(&self) -> Option<&Arc<dyn StoreFile>> {
        match self {
            Lower::Ploop(top) => Some(top.file()),
            Lower::Raw(delta) => Some(delta.file()),
            Lower::Shared(_) => None,
        }
    }
}

/// See the module text.
pub(super) struct Context {
    pub(super) child: Guid,
    pub(super) at: Where,
    pub(super) direction: Direction,
    pub(super) lower: Lower,
    pub(super) upper: Arc<Top>,
    pub(super) cluster: u64,
    pub(super) costs: Costs,
    /// The next guest cluster to look at.
    pub(super) next: u64,
    /// Nobody else has the files open.
    pub(super) taken: bool,
}

impl Context {
    /// Takes the files of `node` and its only child. Errors, with nothing changed: `InUse`,
    /// `Invalid`, `Unsupported`.
    pub(super) fn enter(
        place: &Place<'_>,
        disk: &Disk,
        d: &Descriptor,
        node: Guid,
    ) -> Result<Context> {
        let child = only_child(place, d, node)?;
        if !is_own(d, child) {
            let what = format!(
                "snapshot {node} cannot be merged while other disks stand on its child {child}"
            );
            return Err(Error::unsupported(what).on(place.dir()));
        }
        let at = match () {
            () if child == d.top => Where::Top,
            () if d.chain(d.top)?.iter().any(|i| i.guid == child) => Where::Chain,
            () => Where::Aside,
        };
        let lower = open_lower(place, d, node)?;
        let upper = match at {
            Where::Top => disk.top()?,
            _ => Arc::new(Top::open(open_file(&path_of(place, d, child)?, place)?)?),
        };
        let mut context = Context {
            child,
            at,
            direction: Direction::Up,
            cluster: upper.header().cluster_bytes(),
            costs: Costs::default(),
            lower,
            upper,
            next: 0,
            taken: false,
        };
        let taken = context.take(disk).and_then(|()| context.decide());
        match taken {
            Ok(()) => Ok(context),
            Err(e) => {
                context.leave(place, disk)?;
                Err(e)
            }
        }
    }

    /// Nobody else has the files open when this returns.
    fn take(&mut self, disk: &Disk) -> Result<()> {
        let mut own: Vec<Arc<dyn Delta>> = Vec::new();
        if self.lower.own_file().is_some() {
            own.push(self.lower.delta());
        }
        if self.at != Where::Top {
            own.push(self.upper.clone());
        }
        if self.at != Where::Aside
            && let Some(below) = disk.below()
        {
            let deltas = replaced(&below, &own);
            disk.publish(Some(Arc::new(below.with_deltas(deltas)?)));
            drop(below);
            disk.drain();
        }
        for delta in own {
            lock_image(delta.file().as_ref(), Use::Write)?;
        }
        self.taken = true;
        Ok(())
    }

    fn decide(&mut self) -> Result<()> {
        let lower = self.lower.delta();
        self.costs = Costs::of(lower.as_ref(), self.upper.as_ref(), self.cluster)?;
        let walls = Walls {
            parent_fixed: !matches!(self.lower, Lower::Ploop(_)),
            child_fixed: false,
            only_up: self.at == Where::Top || lower.size() != self.upper.header().size(),
        };
        // The child is this disk's own, so up is always possible.
        self.direction = choose(self.costs, walls).unwrap_or(Direction::Up);
        Ok(())
    }

    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    /// Bytes of clusters to move.
    pub(super) fn total(&self) -> u64 {
        let clusters = match self.direction {
            Direction::Up => self.costs.up,
            Direction::Down => self.costs.down,
        };
        clusters.saturating_mul(self.cluster)
    }

    /// False when the tree has changed since.
    pub(super) fn fits(&self, disk: &Disk, d: &Descriptor, node: Guid) -> bool {
        let same_child = d.children(node) == [self.child];
        let was_top = self.at == Where::Top;
        let same_top = !was_top || disk.top().is_ok_and(|t| Arc::ptr_eq(&t, &self.upper));
        same_child && was_top == (self.child == d.top) && same_top
    }

    /// Says durably that the bytes of `node` alone mean nothing any more.
    pub(super) fn announce(&self, place: &Place<'_>, node: Guid) -> Result<()> {
        if self.lower.own_file().is_none() {
            return Ok(());
        }
        let store = place.store();
        let side = place.dir().join(".ploop");
        if store.kind(&side)?.is_none() {
            store.create_dir(&side)?;
            store.sync_dir(place.dir())?;
        }
        match store.create(&marker(place, node), 0o600) {
            Err(e) if e.kind() != Kind::Exists => return Err(e),
            _ => {}
        }
        store.sync_dir(&side)
    }

    /// Everything has moved: the node goes.
    ///
    /// 1. the file that stays is closed in order, or flushed where clients write it;
    /// 2. the metadata lists the file that goes, durable;
    /// 3. COMMIT: the descriptor without the node;
    /// 4. the chain without its layer; then its file.
    ///
    /// After an error the caller leaves ([`Context::leave`]), whether or not 3 was reached.
    pub(super) fn finish(
        &self,
        place: &Place<'_>,
        disk: &Disk,
        mut d: Descriptor,
        node: Guid,
    ) -> Result<()> {
        // 1.
        match (self.direction, self.at, &self.lower) {
            (Direction::Down, _, Lower::Ploop(lower)) => lower.close()?,
            (Direction::Up, Where::Top, _) => {
                disk.flush()?;
                self.upper.settle_entries()?;
            }
            _ => self.upper.close()?,
        }
        // 2. and 3.
        let gone = self
            .without(&mut d, node)
            .ok_or_else(|| unknown(place, node))?;
        if !gone.contains('/') {
            let mut meta = place.meta()?;
            meta.files.insert(gone.clone());
            place.set_meta(&meta)?;
        }
        place.stage(&d)?;
        place.commit()?;
        // 4. What fails from here on is swept by the next operation.
        let out = match self.direction {
            Direction::Up => self.lower.delta().file().id(),
            Direction::Down => self.upper.file().id(),
        };
        let stays = match self.direction {
            Direction::Up if self.at == Where::Top => None,
            Direction::Up => Some(self.upper.file().clone()),
            Direction::Down => self.lower.own_file().cloned(),
        };
        if let Some(file) = &stays {
            downgrade(file.as_ref())?;
        }
        if self.at != Where::Aside
            && let Some(below) = disk.below()
        {
            let mut deltas = below.deltas().to_vec();
            deltas.retain(|delta| delta.file().id() != out);
            if let Some(file) = stays {
                let plain = place.opener().sealed_delta(file.path())?;
                replace(&mut deltas, &plain);
            }
            disk.publish(place.opener().chain_of(deltas)?);
        }
        place.drop_file(&d, &gone)?;
        place.forget_side(&marker(place, node))
    }

    /// Takes `node` out of the tree; returns the file that nobody names then.
    fn without(&self, d: &mut Descriptor, node: Guid) -> Option<String> {
        let was_raw = matches!(self.lower, Lower::Raw(_));
        let parent = d.remove(node).ok()?;
        if was_raw
            || d.shots
                .iter()
                .any(|s| s.guid == self.child && s.parent == Guid::NONE)
        {
            d.preallocated = false;
        }
        if was_raw {
            for image in &mut d.images {
                image.kind = ImageKind::Compressed;
            }
        }
        if self.direction == Direction::Up {
            return Some(parent.file);
        }
        let child = d.images.iter_mut().find(|i| i.guid == self.child)?;
        Some(std::mem::replace(&mut child.file, parent.file))
    }

    /// Closes the files in order; others may open them from then on.
    pub(super) fn leave(self, place: &Place<'_>, disk: &Disk) -> Result<()> {
        let mut own: Vec<Arc<dyn StoreFile>> = Vec::new();
        let mut closed = Ok(());
        // A file that others have open is left as it was found.
        if let Lower::Ploop(lower) = &self.lower
            && self.taken
        {
            closed = closed.and(lower.close());
        }
        own.extend(self.lower.own_file().cloned());
        if self.at != Where::Top {
            if self.taken {
                closed = closed.and(self.upper.close());
            }
            own.push(self.upper.file().clone());
        }
        for file in &own {
            downgrade(file.as_ref())?;
        }
        let raw = match &self.lower {
            Lower::Raw(delta) => Some(delta.cluster_bytes()),
            _ => None,
        };
        let (at, lower_id) = (self.at, self.lower.delta().file().id());
        if at != Where::Aside
            && let Some(below) = disk.below()
        {
            let mut deltas = below.deltas().to_vec();
            for file in &own {
                let plain = match raw {
                    Some(cluster) if file.id() == lower_id => {
                        place.opener().sealed_raw(file.path(), cluster)?
                    }
                    _ => place.opener().sealed_delta(file.path())?,
                };
                replace(&mut deltas, &plain);
            }
            disk.publish(place.opener().chain_of(deltas)?);
        }
        closed
    }
}

/// The marker of a node whose bytes alone mean nothing.
pub(crate) fn marker(place: &Place<'_>, node: Guid) -> PathBuf {
    place.dir().join(".ploop").join(format!("{MERGING}{node}"))
}

fn path_of(place: &Place<'_>, d: &Descriptor, node: Guid) -> Result<PathBuf> {
    let image = d.image(node).ok_or_else(|| unknown(place, node))?;
    place.file_of(image)
}

/// Opens a file that is to be written, still as one reader among others. Not the top's: another
/// image has a journal only if something else than us made a snapshot of a disk that had crashed.
fn open_file(path: &std::path::Path, place: &Place<'_>) -> Result<Arc<dyn StoreFile>> {
    if let Some(home) = place.opener().home(path)
        && home.is_live()?
    {
        let what = "the image was not closed, and what was flushed last is in its journal";
        return Err(Error::unsupported(what)
            .on(path)
            .fix("Copy what it shows: ploop convert DISK@SNAPSHOT TARGET --to ploop"));
    }
    place.opener().refuse_arriving(path)?;
    let file = place.store().open(path, Access::Write)?;
    lock_image(file.as_ref(), Use::Read)?;
    Ok(file)
}

fn open_lower(place: &Place<'_>, d: &Descriptor, node: Guid) -> Result<Lower> {
    let path = path_of(place, d, node)?;
    let is_base = d.shot(node).is_some_and(|s| s.parent == Guid::NONE);
    let raw =
        (is_base && d.base_is_raw()).then(|| u64::from(d.cluster_sectors) * ploop::store::SECTOR);
    Ok(match (is_own(d, node), raw) {
        (true, None) => Lower::Ploop(Arc::new(Top::open(open_file(&path, place)?)?)),
        (true, Some(cluster)) => {
            let file = open_file(&path, place)?;
            Lower::Raw(Arc::new(RawDelta::with_cluster(file, cluster)?))
        }
        (false, None) => Lower::Shared(place.opener().sealed_delta(&path)?),
        (false, Some(cluster)) => Lower::Shared(place.opener().sealed_raw(&path, cluster)?),
    })
}

/// The layers of `below`, those in `own` instead of the ones on the same files.
fn replaced(below: &Chain, own: &[Arc<dyn Delta>]) -> Vec<Arc<dyn Delta>> {
    let mut deltas = below.deltas().to_vec();
    for delta in own {
        replace(&mut deltas, delta);
    }
    deltas
}

fn replace(deltas: &mut [Arc<dyn Delta>], with: &Arc<dyn Delta>) {
    for delta in deltas {
        if delta.file().id() == with.file().id() {
            *delta = with.clone();
        }
    }
}
