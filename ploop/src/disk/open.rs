//! From what the user names to an open disk.
//!
//! ```text
//! SOURCE ─ Source::parse ─┬─ disk directory, DiskDescriptor.xml [@snapshot] ─ chain of files ─┐
//!                         └─ image file (ploop, qcow2; raw only when told so) ────────────────┴─ Disk
//! ```
//!
//! Every file that a *file* names (an image in a descriptor, a parent volume, a qcow2 backing file)
//! must lie, with all links resolved, in the directory of the file that the user named, or in one
//! that the user allowed. What a user names may lie anywhere.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Disk;
use super::files::Files;
use crate::chain::Chain;
use crate::chain::cache::LayerCache;
use crate::descriptor::{Descriptor, Guid, Temporary};
use crate::error::{Error, Kind, Result};
use crate::format::Delta;
use crate::format::ploop::header::has_signature;
use crate::format::ploop::journal::{self, Home};
use crate::format::ploop::top::Top;
use crate::format::ploop::{Header, PloopDelta};
use crate::format::qcow2;
use crate::format::raw::RawDelta;
use crate::locks::{DiskLock, Use, lock_image};
use crate::owner;
use crate::store::arriving::{ArrivingStore, Missing};
use crate::store::reserved::{Reserve, Reserved};
use crate::store::{Access, Store, StoreFile};

pub use super::limit::size_key;
pub use super::source::{Format, OpenOptions, Source};

/// The descriptor's file name.
pub const DESCRIPTOR: &str = "DiskDescriptor.xml";
/// Stands, in `.ploop`, before the GUID of a node that is being merged away: some of its bytes are
/// only in its child already. On disk before the first of them is.
pub const MERGING: &str = "merging.";
/// How often an open for reading is tried again because the tree changed under it.
const TRIES: u32 = 10;

/// Opens disks; keeps what they share. One per process.
#[derive(Debug)]
pub struct Opener {
    store: Arc<dyn Store>,
    arriving: Option<Arc<ArrivingStore>>,
    cache: LayerCache,
    disk_locks: bool,
    control: Option<PathBuf>,
    journal_limit: u64,
}

impl Opener {
    /// On the host's files, with the lock of each disk directory that is opened for writing.
    pub fn host() -> Opener {
        Opener {
            disk_locks: true,
            ..Opener::on(crate::store::RealStore::shared())
        }
    }

    /// On any store, without disk directory locks (their files are the host's own).
    pub fn on(store: Arc<dyn Store>) -> Opener {
        Opener {
            store,
            arriving: None,
            cache: LayerCache::default(),
            disk_locks: false,
            control: None,
            journal_limit: journal::LIMIT,
        }
    }

    /// The same; a disk's journal is begun anew after `bytes` of records, instead of
    /// [`journal::LIMIT`].
    #[must_use]
    pub fn with_journal_limit(mut self, bytes: u64) -> Opener {
        self.journal_limit = bytes;
        self
    }

    /// Where the journal of the image at `path` is.
    pub fn home(&self, path: &Path) -> Option<Home> {
        let home = Home::of(&self.store, path)?;
        Some(home.with_limit(self.journal_limit))
    }

    /// The same, for the store of disks at `dir` (resolved): its files may use the store's reserve.
    /// With the reserve.
    #[must_use]
    pub fn reserving(mut self, dir: &Path) -> (Opener, Arc<Reserve>) {
        let reserved = Reserved::new(self.store, dir);
        let reserve = reserved.reserve().clone();
        self.store = Arc::new(reserved);
        (self, reserve)
    }

    /// The same, in a process that fetches what images lack: those that are registered are read while
    /// they arrive. With the store that they are registered in.
    #[must_use]
    pub fn arriving(mut self) -> (Opener, Arc<ArrivingStore>) {
        let arriving = Arc::new(ArrivingStore::new(self.store));
        self.store = arriving.clone();
        self.arriving = Some(arriving.clone());
        (self, arriving)
    }

    /// What images that arrive are registered in, where this process fetches them.
    pub fn arrivals(&self) -> Option<&Arc<ArrivingStore>> {
        self.arriving.as_ref()
    }

    /// Refuses the image at `path` (resolved) where some of its bytes have not arrived and nobody here
    /// fetches them: its holes are no zeros. Errors: `InUse`, with what to do; `Corrupt` where it cannot
    /// be told what it lacks.
    pub fn refuse_missing(&self, path: &Path) -> Result<()> {
        match &self.arriving {
            Some(arriving) if arriving.is_registered(path) => Ok(()),
            _ => Missing::refuse(self.store.as_ref(), path),
        }
    }

    /// The same for who rewrites the image, or gives its file another name: one that arrives is refused
    /// until all of it is here, whoever fetches it.
    pub fn refuse_arriving(&self, path: &Path) -> Result<()> {
        self.refuse_missing(path)?;
        match self.is_arriving(path)? {
            true => Err(crate::store::arriving::arriving(path)),
            false => Ok(()),
        }
    }

    /// Whether the image at `path` has not arrived as a whole, as its record says that is there until
    /// then.
    pub fn is_arriving(&self, path: &Path) -> Result<bool> {
        Missing::is_there(self.store.as_ref(), path)
    }

    /// The same, in a process that answers the control API at `socket`: the lock of every disk that
    /// it opens says so.
    #[must_use]
    pub fn with_control(mut self, socket: PathBuf) -> Opener {
        self.control = Some(socket);
        self
    }

    /// Whether disks that are opened for writing are locked, each by its directory.
    pub fn locks_disks(&self) -> bool {
        self.disk_locks
    }

    /// Takes the lock of the disk in `dir`. Errors: `InUse`, naming the holder; those of
    /// [`owner::check`].
    pub fn lock_disk(&self, dir: &Path) -> Result<DiskLock> {
        let lock = self.lock_moving(dir)?;
        owner::check(self.store.as_ref(), dir)?;
        Ok(lock)
    }

    /// The same, whoever owns the disk: for who moves it, or decides that. Error: `InUse`.
    pub fn lock_moving(&self, dir: &Path) -> Result<DiskLock> {
        DiskLock::acquire(dir, self.control.as_deref())
    }

    /// The store it opens files of.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Opens `source`. Read-only opens write nothing. Errors name the file and byte.
    pub fn open(&self, source: &Source, options: &OpenOptions) -> Result<Disk> {
        if source.descriptor {
            return self.open_descriptor(source, options);
        }
        if source.snapshot.is_some() {
            return Err(
                Error::unsupported("a single image has no snapshots to choose from")
                    .on(&source.path),
            );
        }
        self.open_image(&source.path, options)
    }

    fn open_image(&self, path: &Path, options: &OpenOptions) -> Result<Disk> {
        let real = self.store.resolve(path)?;
        let format = self.format_of(&real, options)?;
        if !options.write {
            let deltas = match format {
                Format::Raw => vec![self.layer(&real, None)?],
                Format::Ploop => vec![self.layer(&real, Some(0))?],
                Format::Qcow2 => self.open_qcow2(&real, options)?,
            };
            return Ok(Disk::sealed(self.cache.chain(deltas)?));
        }
        if format != Format::Ploop {
            let name = format.name();
            let what = format!("a {name} image is read-only here");
            return Err(Error::unsupported(what).on(path).fix(
                "Serve it with --read-only, or convert it: ploop convert SOURCE TARGET --to ploop",
            ));
        }
        self.refuse_arriving(&real)?;
        let file = self.store.open(&real, Access::Write)?;
        lock_image(file.as_ref(), Use::Write)?;
        let home = self.home(&real).map(Home::if_there);
        let home = home.transpose()?;
        let top = Top::open_at(file, home)?;
        if top.parts().count() > 0 {
            // Closing would complete them with zeros.
            let what = "the image was not closed, and the rest of some of its clusters is in the \
                        images below it";
            return Err(Error::invalid(what)
                .on(path)
                .fix("Open the disk that it belongs to: name its directory"));
        }
        Disk::writable(None, top, None)
    }

    fn open_qcow2(&self, real: &Path, options: &OpenOptions) -> Result<Vec<Arc<dyn Delta>>> {
        if options.alone {
            let file = self.store.open(real, Access::Read)?;
            if let Some(backing) = qcow2::Qcow2Delta::open(file)?.backing() {
                let what = format!("the image names a backing file, {:?}", backing.name);
                return Err(Error::new(Kind::Permission, what)
                    .on(real)
                    .fix("Flatten it where it comes from: ploop convert IMAGE FLAT.raw --to raw"));
            }
        }
        let mut allowed: Vec<&Path> = options.allow.iter().map(PathBuf::as_path).collect();
        allowed.extend(real.parent());
        let deltas = qcow2::open_chain(self.store.as_ref(), real, &allowed)?;
        for d in &deltas {
            lock_image(d.file().as_ref(), Use::Read)?;
        }
        Ok(deltas)
    }

    /// The format of an image file: what the user said, or what its first bytes say.
    pub(super) fn format_of(&self, real: &Path, options: &OpenOptions) -> Result<Format> {
        options.format.map_or_else(|| self.probe(real), Ok)
    }

    /// The node of a disk that `source` names: a snapshot, or the top.
    pub(super) fn node(&self, d: &Descriptor, source: &Source) -> Result<Guid> {
        match &source.snapshot {
            Some(name) => find_snapshot(d, name).map_err(|e| e.on(&source.path)),
            None => Ok(d.top),
        }
    }

    /// What the first bytes of an image file say. A raw file says nothing, so it is only taken for
    /// one by its name (`.raw`), whatever it begins with.
    fn probe(&self, path: &Path) -> Result<Format> {
        if path.extension().is_some_and(|e| e == "raw") {
            return Ok(Format::Raw);
        }
        let mut head = [0; 16];
        let got = self.store.open(path, Access::Read)?.read_at(&mut head, 0)?;
        if has_signature(&head[..got]) {
            Ok(Format::Ploop)
        } else if qcow2::is_qcow2(&head[..got]) {
            Ok(Format::Qcow2)
        } else {
            Err(
                Error::corrupt("neither the signature of a ploop image nor that of a qcow2 image")
                    .on(path)
                    .at(0)
                    .fix("If it is a raw image, say so: --from raw"),
            )
        }
    }

    /// A sealed layer: raw (`None`, or with the cluster of its overlays) or ploop (`Some(0)`).
    fn layer(&self, real: &Path, ploop: Option<u64>) -> Result<Arc<dyn Delta>> {
        let key = ploop.unwrap_or(1);
        self.cache.layer(real.to_path_buf(), key, || {
            // Before it is opened: what is registered later was opened as it is.
            self.refuse_missing(real)?;
            let file = self.store.open(real, Access::Read)?;
            lock_image(file.as_ref(), Use::Read)?;
            Ok(match ploop {
                Some(0) => Arc::new(PloopDelta::open_at(file, self.home(real))?),
                Some(cluster) => Arc::new(RawDelta::with_cluster(file, cluster)?),
                None => Arc::new(RawDelta::new(file)?),
            })
        })
    }

    /// The ploop image at `path`, sealed, as a layer; shared with whoever has it open here.
    pub fn sealed_delta(&self, path: &Path) -> Result<Arc<dyn Delta>> {
        self.layer(&self.store.resolve(path)?, Some(0))
    }

    /// The same for a raw image under overlays with clusters of `cluster` bytes.
    pub fn sealed_raw(&self, path: &Path, cluster: u64) -> Result<Arc<dyn Delta>> {
        self.layer(&self.store.resolve(path)?, Some(cluster))
    }

    /// The chain of `delta` over `below`, shared like [`Opener::sealed_delta`].
    pub fn chain_over(
        &self,
        below: Option<&Arc<Chain>>,
        delta: Arc<dyn Delta>,
    ) -> Result<Arc<Chain>> {
        match below {
            Some(below) => self.cache.over(below, delta),
            None => self.cache.chain(vec![delta]),
        }
    }

    /// The chain of `deltas`, base first; `None` of none.
    pub fn chain_of(&self, deltas: Vec<Arc<dyn Delta>>) -> Result<Option<Arc<Chain>>> {
        match deltas.is_empty() {
            true => Ok(None),
            false => self.cache.chain(deltas).map(Some),
        }
    }

    fn open_descriptor(&self, source: &Source, options: &OpenOptions) -> Result<Disk> {
        let xml = self.store.resolve(&source.path)?;
        let (dir, allowed) = self.rooms(&xml, options)?;
        // The lock comes before the descriptor is read: who changes it holds the lock.
        let lock = match options.write && self.disk_locks {
            true => Some(self.lock_moving(&dir)?),
            false => None,
        };
        if options.write {
            if !options.moving {
                owner::check(self.store.as_ref(), &dir)?;
            }
            // The descriptor may be one whose rename a killed process did not make durable. What is
            // flushed from here on is found by it only.
            self.store.sync_dir(&dir)?;
        }
        let mut tries = 0;
        loop {
            let d = self.read_descriptor(&xml)?;
            let opened = self.open_node(&d, &dir, &allowed, source, options);
            let limit = self
                .node(&d, source)
                .and_then(|node| self.side(&dir)?.size_limit(&d, node));
            // Reading takes no lock on the tree: files may have been exchanged since. From here on
            // the locks on them keep them as they are.
            let again = !options.write && tries < TRIES && self.read_descriptor(&xml)? != d;
            if !again {
                let (below, top) = opened?;
                let disk = match (top, below) {
                    (Some(top), below) => Disk::writable(below, top, lock),
                    (None, Some(chain)) => Ok(Disk::sealed(chain)),
                    (None, None) => Err(Error::corrupt("the disk has no images").on(&source.path)),
                };
                return Ok(disk?.limited(limit?));
            }
            tries += 1;
        }
    }

    /// Opens a node of `d`: what is below, and the top when it is for writing.
    fn open_node(
        &self,
        d: &Descriptor,
        dir: &Path,
        allowed: &[PathBuf],
        source: &Source,
        options: &OpenOptions,
    ) -> Result<(Option<Arc<Chain>>, Option<Top>)> {
        let node = self.node(d, source)?;
        if options.write {
            refuse_read_only(d, node).map_err(|e| e.on(&source.path))?;
        }
        let mut files = self
            .node_files(d, node, dir, allowed)
            .map_err(|e| match e.path() {
                Some(_) => e,
                None => e.on(&source.path),
            })?;
        let top = if options.write {
            files.images.pop()
        } else {
            None
        };
        if top.is_some() && files.images.is_empty() && files.base_is_raw {
            return Err(
                Error::unsupported("a raw disk without an overlay is read-only here")
                    .on(&source.path)
                    .fix("Convert it: ploop convert SOURCE TARGET --to ploop"),
            );
        }
        let deltas = self.layers(&files)?;
        let removing = d.shot(node).is_some_and(|s| s.temporary != Temporary::No);
        let marker = dir.join(".ploop").join(format!("{MERGING}{node}"));
        if removing && self.store.kind(&marker)?.is_some() {
            let what = format!("{node} is being merged into another and cannot be read any more");
            return Err(Error::new(Kind::NotFound, what).on(&source.path));
        }
        if removing && self.merge_began(d, node, dir, allowed, &deltas)? {
            let what = format!("a merge into {node} was interrupted: what it shows is undefined");
            return Err(Error::corrupt(what).on(&source.path));
        }
        let below = self.chain_of(deltas)?;
        let Some(top) = top else {
            return Ok((below, None));
        };
        self.refuse_arriving(&top)?;
        let file = self.store.open(&top, Access::Write)?;
        lock_image(file.as_ref(), Use::Write)?;
        // An image elsewhere, or of another disk, has no journal here.
        let home = self.home(&top).filter(|_| top.parent() == Some(dir));
        let own = top.parent() == Some(dir);
        let top = Top::open_at(file, home)?;
        if own {
            self.track(dir, &top)?;
        }
        same_cluster(top.header(), top.file().as_ref(), files.cluster_sectors)?;
        if let Some(chain) = &below {
            same_version(chain.deltas(), top.header(), top.file().as_ref())?;
        }
        Ok((below, Some(top)))
    }

    /// Whether the interrupted merge into `node`, whose layers are `deltas`, may have changed it.
    fn merge_began(
        &self,
        d: &Descriptor,
        node: Guid,
        dir: &Path,
        allowed: &[PathBuf],
        deltas: &[Arc<dyn Delta>],
    ) -> Result<bool> {
        let Some(parent) = deltas.last().filter(|l| is_dirty(l.as_ref())) else {
            return Ok(false);
        };
        let [child] = d.children(node)[..] else {
            return Ok(true);
        };
        let Some(image) = d.image(child) else {
            return Ok(true);
        };
        let child = self.layer(&self.confined(&dir.join(&image.file), allowed)?, Some(0))?;
        Ok(!crate::verify::merge_untouched(
            parent.as_ref(),
            child.as_ref(),
        )?)
    }

    fn layers(&self, files: &Files) -> Result<Vec<Arc<dyn Delta>>> {
        let cluster = u64::from(files.cluster_sectors) * crate::store::SECTOR;
        let mut deltas: Vec<Arc<dyn Delta>> = Vec::with_capacity(files.images.len());
        let mut first: Option<Header> = None;
        for (i, path) in files.images.iter().enumerate() {
            if i == 0 && files.base_is_raw {
                deltas.push(self.layer(path, Some(cluster))?);
                continue;
            }
            let delta = self.layer(path, Some(0))?;
            let (header, _) = crate::format::ploop::delta::read_header(delta.file().as_ref())?;
            same_cluster(&header, delta.file().as_ref(), files.cluster_sectors)?;
            match &first {
                None => first = Some(header),
                Some(base) if base.version != header.version => {
                    return Err(mixed_versions(delta.file().as_ref(), &header, base));
                }
                Some(base) if base.size_sectors > header.size_sectors => {
                    let what = format!(
                        "{} sectors on a parent of {}: sizes must not shrink upwards",
                        header.size_sectors, base.size_sectors
                    );
                    return Err(Error::corrupt(what).on(path).at(36));
                }
                Some(_) => first = Some(header),
            }
            deltas.push(delta);
        }
        Ok(deltas)
    }
}

fn is_dirty(delta: &dyn Delta) -> bool {
    let header = crate::format::ploop::delta::read_header(delta.file().as_ref());
    header.is_ok_and(|(h, _)| h.dirty())
}

fn same_cluster(header: &Header, file: &dyn StoreFile, cluster_sectors: u32) -> Result<()> {
    if header.cluster_sectors == cluster_sectors {
        return Ok(());
    }
    let what = format!(
        "clusters of {} sectors, the descriptor says {cluster_sectors}",
        header.cluster_sectors
    );
    Err(Error::corrupt(what).on(file.path()).at(28))
}

fn same_version(deltas: &[Arc<dyn Delta>], top: &Header, file: &dyn StoreFile) -> Result<()> {
    let Some(last) = deltas.last() else {
        return Ok(());
    };
    match crate::format::ploop::delta::read_header(last.file().as_ref()) {
        Ok((below, _)) if below.version != top.version => Err(mixed_versions(file, top, &below)),
        // A raw base has no header.
        _ => Ok(()),
    }
}

fn mixed_versions(file: &dyn StoreFile, here: &Header, below: &Header) -> Error {
    let what = format!(
        "a v{} image on a v{} one: a chain has one version",
        here.version.number(),
        below.version.number()
    );
    Error::corrupt(what).on(file.path()).at(0)
}

fn find_snapshot(d: &Descriptor, name: &str) -> Result<Guid> {
    let guid = Guid::parse(name)
        .map_err(|_| Error::new(Kind::NotFound, format!("no snapshot is named {name:?}")))?;
    match d.shot(guid) {
        Some(_) => Ok(guid),
        None => Err(Error::new(
            Kind::NotFound,
            format!("the disk has no snapshot {guid}"),
        )),
    }
}

fn refuse_read_only(d: &Descriptor, node: Guid) -> Result<()> {
    if node != d.top {
        let what = format!("{node} is a snapshot: only the top of a disk can be written");
        return Err(Error::new(Kind::ReadOnly, what));
    }
    if d.volume.as_ref().is_some_and(|v| v.read_only) {
        return Err(Error::new(Kind::ReadOnly, "the volume is marked read-only"));
    }
    Ok(())
}
