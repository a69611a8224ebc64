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
use crate::chain::cache::LayerCache;
use crate::descriptor::{self, Descriptor, Guid, Temporary};
use crate::error::{Error, Kind, Result};
use crate::format::Delta;
use crate::format::ploop::header::has_signature;
use crate::format::ploop::top::Top;
use crate::format::ploop::{Header, PloopDelta};
use crate::format::qcow2;
use crate::format::raw::RawDelta;
use crate::locks::{DiskLock, Use, lock_image};
use crate::store::{Access, EntryKind, Store, StoreFile};

/// The descriptor's file name.
pub const DESCRIPTOR: &str = "DiskDescriptor.xml";
/// Volumes above each other, at most (OpenVZ's limit).
const VOLUMES_MAX: usize = 256;

/// The format of one image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes.
    Raw,
    /// ploop v1 or v2.
    Ploop,
    /// qcow2, read-only.
    Qcow2,
}

impl Format {
    /// `raw`, `ploop`, `qcow2`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Ploop => "ploop",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// What a user may name: a disk or an image, and perhaps one of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// A descriptor, or one image file.
    pub path: PathBuf,
    /// True for a descriptor.
    pub descriptor: bool,
    /// The GUID (or name) after `@`.
    pub snapshot: Option<String>,
}

impl Source {
    /// Reads `PATH` or `PATH@SNAPSHOT`. A path that exists as it is written wins. Error: `NotFound`.
    pub fn parse(store: &dyn Store, text: &str) -> Result<Source> {
        if let Some(source) = Source::at(store, Path::new(text), None)? {
            return Ok(source);
        }
        if let Some((path, snapshot)) = text.rsplit_once('@')
            && !snapshot.is_empty()
            && let Some(source) = Source::at(store, Path::new(path), Some(snapshot.to_owned()))?
        {
            return Ok(source);
        }
        Err(Error::new(
            Kind::NotFound,
            "no such image, disk directory or descriptor",
        )
        .on(text))
    }

    fn at(store: &dyn Store, path: &Path, snapshot: Option<String>) -> Result<Option<Source>> {
        let real = match store.resolve(path) {
            Err(e) if e.kind() == Kind::Permission => return Err(e),
            Err(_) => return Ok(None),
            Ok(real) => real,
        };
        let is_xml = path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("xml"));
        match store.kind(&real)? {
            Some(EntryKind::Dir) => {
                let path = path.join(DESCRIPTOR);
                match store.kind(&path)? {
                    None => {
                        let what = format!("the directory has no {DESCRIPTOR}: it is no disk");
                        return Err(Error::new(Kind::NotFound, what).on(real));
                    }
                    // It would make another directory the one that files may lie in.
                    Some(EntryKind::Link) => {
                        let what = "the descriptor is a link to another disk's";
                        return Err(Error::new(Kind::Permission, what)
                            .on(path)
                            .fix("If that is meant, name the disk that it leads to"));
                    }
                    Some(_) => {}
                }
                Ok(Some(Source {
                    path,
                    descriptor: true,
                    snapshot,
                }))
            }
            Some(_) if is_xml && store.kind(path)? == Some(EntryKind::Link) => {
                let what = "the descriptor is a link to another disk's";
                Err(Error::new(Kind::Permission, what)
                    .on(path)
                    .fix("If that is meant, name the file that it leads to"))
            }
            Some(_) => Ok(Some(Source {
                path: path.to_owned(),
                descriptor: is_xml,
                snapshot,
            })),
            None => Ok(None),
        }
    }
}

/// How a disk is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For writing: the top of a disk, or one ploop image.
    pub write: bool,
    /// Take an image file for this format instead of looking at its first bytes.
    pub format: Option<Format>,
    /// Further directories that files named by files may lie in.
    pub allow: Vec<PathBuf>,
    /// Refuse a qcow2 image that names a backing file, wherever that is: for images that somebody
    /// else made.
    pub alone: bool,
}

/// Opens disks; keeps what they share. One per process.
#[derive(Debug)]
pub struct Opener {
    store: Arc<dyn Store>,
    cache: LayerCache,
    disk_locks: bool,
}

/// The images of one node, base first, as files.
struct Files {
    images: Vec<PathBuf>,
    base_is_raw: bool,
    cluster_sectors: u32,
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
            cache: LayerCache::default(),
            disk_locks: false,
        }
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
        let file = self.store.open(&real, Access::Write)?;
        lock_image(file.as_ref(), Use::Write)?;
        Disk::writable(None, Top::open(file)?, None)
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

    /// Every image of a disk's own tree with its file, each where it may be.
    pub(super) fn files_of_tree(
        &self,
        d: &Descriptor,
        xml: &Path,
        options: &OpenOptions,
    ) -> Result<Vec<(Guid, PathBuf)>> {
        let xml = self.store.resolve(xml)?;
        let (dir, allowed) = self.rooms(&xml, options)?;
        let file =
            |i: &descriptor::Image| Ok((i.guid, self.confined(&dir.join(&i.file), &allowed)?));
        d.images.iter().map(file).collect()
    }

    /// The directory of a descriptor, and the directories that its files may lie in.
    fn rooms(&self, xml: &Path, options: &OpenOptions) -> Result<(PathBuf, Vec<PathBuf>)> {
        let dir = xml.parent().unwrap_or(Path::new("/")).to_path_buf();
        let mut allowed = vec![dir.clone()];
        for a in &options.allow {
            allowed.push(self.store.resolve(a)?);
        }
        Ok((dir, allowed))
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
            let file = self.store.open(real, Access::Read)?;
            lock_image(file.as_ref(), Use::Read)?;
            Ok(match ploop {
                Some(0) => Arc::new(PloopDelta::open(file)?),
                Some(cluster) => Arc::new(RawDelta::with_cluster(file, cluster)?),
                None => Arc::new(RawDelta::new(file)?),
            })
        })
    }

    /// Reads the descriptor at `path`.
    pub fn read_descriptor(&self, path: &Path) -> Result<Descriptor> {
        let real = self.store.resolve(path)?;
        let file = self.store.open(&real, Access::Read)?;
        let len = file.len()?;
        if len > descriptor::MAX_BYTES as u64 {
            let what = format!("{len} bytes; {} is the limit", descriptor::MAX_BYTES);
            return Err(Error::corrupt(what).on(path));
        }
        let mut bytes = vec![0; len as usize];
        crate::store::read_exact(file.as_ref(), &mut bytes, 0)?;
        descriptor::parse(&bytes).map_err(|e| e.on(path))
    }

    fn open_descriptor(&self, source: &Source, options: &OpenOptions) -> Result<Disk> {
        let xml = self.store.resolve(&source.path)?;
        let (dir, allowed) = self.rooms(&xml, options)?;
        // The lock comes before the descriptor is read: who changes it holds the lock.
        let lock = match options.write && self.disk_locks {
            true => Some(DiskLock::acquire(&dir)?),
            false => None,
        };
        let d = self.read_descriptor(&xml)?;
        let node = self.node(&d, source)?;
        if options.write {
            refuse_read_only(&d, node).map_err(|e| e.on(&source.path))?;
        }
        let mut files = self
            .node_files(&d, node, &dir, &allowed)
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
        if d.shot(node).is_some_and(|s| s.temporary != Temporary::No)
            && self.merge_began(&d, node, &dir, &allowed, &deltas)?
        {
            let what = format!("a merge into {node} was interrupted: what it shows is undefined");
            return Err(Error::corrupt(what).on(&source.path));
        }
        let below = match deltas.is_empty() {
            true => None,
            false => Some(self.cache.chain(deltas)?),
        };
        match (top, below) {
            (None, Some(chain)) => Ok(Disk::sealed(chain)),
            (None, None) => Err(Error::corrupt("the disk has no images").on(&source.path)),
            (Some(top), below) => {
                let file = self.store.open(&top, Access::Write)?;
                lock_image(file.as_ref(), Use::Write)?;
                let top = Top::open(file)?;
                same_cluster(top.header(), top.file().as_ref(), files.cluster_sectors)?;
                if let Some(chain) = &below {
                    same_version(chain.deltas(), top.header(), top.file().as_ref())?;
                }
                Disk::writable(below, top, lock)
            }
        }
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

    /// The files of `node`, base first, parent volumes included, each inside `allowed`.
    fn node_files(
        &self,
        d: &Descriptor,
        node: Guid,
        dir: &Path,
        allowed: &[PathBuf],
    ) -> Result<Files> {
        let mut files = Files {
            images: Vec::new(),
            base_is_raw: d.base_is_raw(),
            cluster_sectors: d.cluster_sectors,
        };
        let (mut d, mut node, mut dir) = (d.clone(), node, dir.to_path_buf());
        let mut seen = vec![dir.clone()];
        loop {
            let chain = d.chain(node)?;
            for image in chain.iter().rev() {
                let path = self.confined(&dir.join(&image.file), allowed)?;
                if files.images.contains(&path) {
                    let what = "one file is two images of the chain";
                    return Err(Error::corrupt(what).on(path));
                }
                files.images.push(path);
            }
            let Some(outer) = d.outer_parent(node)? else {
                break;
            };
            let Some(parent) = d.volume.as_ref().and_then(|v| v.parent.as_deref()) else {
                return Err(Error::corrupt(format!(
                    "parent {outer} is not in the descriptor"
                )));
            };
            dir = self.confined(&dir.join(parent), allowed)?;
            if seen.contains(&dir) || seen.len() == VOLUMES_MAX {
                return Err(Error::corrupt("parent cycle among volumes").on(dir));
            }
            seen.push(dir.clone());
            d = self.read_descriptor(&dir.join(DESCRIPTOR))?;
            files.base_is_raw = d.base_is_raw();
            node = outer;
        }
        files.images.reverse();
        Ok(files)
    }

    /// `path` with all links resolved, when it lies in one of `allowed`.
    fn confined(&self, path: &Path, allowed: &[PathBuf]) -> Result<PathBuf> {
        let outside = |real: &Path| {
            let what = "the descriptor names a file outside of the disk's directory";
            Error::new(Kind::Permission, what)
                .on(real)
                .fix("If that is meant, allow its directory with --allow-dir DIR")
        };
        // Before anything is looked up: names outside are not even probed for existence.
        let plain = lexical(path);
        if !allowed.iter().any(|a| plain.starts_with(a)) {
            return Err(outside(&plain));
        }
        let real = self.store.resolve(path)?;
        match allowed.iter().any(|a| real.starts_with(a)) {
            true => Ok(real),
            false => Err(outside(&real)),
        }
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

/// `path` without `.` and `..`, links not looked at.
fn lexical(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut out = PathBuf::new();
    for c in path.components() {
        match c {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
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
