//! A disk: its descriptor, every image of it, what holds between them, and what lies beside them.
//!
//! ```text
//!  1  the descriptor                    a parser's refusal is the finding
//!     what it says beside the tree      size, geometry, how many images
//!  2  each image on its own             named inside the disk, there, an image, whole
//!  3  each image against its parent     cluster, version, size
//!  4  parent volumes: 1–3 for the chain that this disk hangs on
//!  5  leftovers in the directory        unfinished merges and conversions, orphans
//!  6  the top, opened as a reader would: whatever opening refuses and 1–5 did not see
//! ```

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use ploop::descriptor::{Descriptor, Guid, Image, Temporary};
use ploop::disk::open::{DESCRIPTOR, MERGING, OpenOptions, Opener, Source};
use ploop::format::ploop::Header;
use ploop::format::ploop::header::FLAG_CONVERTING;
use ploop::locks::{Use, lock_image};
use ploop::store::{Access, EntryKind, FileId, SECTOR};
use ploop::verify::Class;
use ploop::{Error, Kind, Result};

use crate::family::Family;
use crate::names::{confined, leftovers};
use crate::progress::Meter;
use crate::report::{Finding, Findings};
use crate::{descriptor, image, journal};

/// Volumes above each other, at most.
const VOLUMES_MAX: usize = 256;

struct Checker<'a, 'm> {
    opener: &'a Opener,
    found: &'a mut Findings,
    meter: &'a mut Meter<'m>,
    /// Directories that files may lie in, resolved.
    allowed: Vec<PathBuf>,
    /// Resolved paths of all images that were named.
    known: HashSet<PathBuf>,
    ids: HashMap<FileId, PathBuf>,
    /// The cluster that the source's descriptor asks for.
    cluster_sectors: u32,
    /// Who reads which image of the source's descriptor.
    family: Family,
    /// The source's top, and its size, once it was looked at.
    top: Guid,
    top_sectors: Option<u64>,
    /// The top's file, where this process has the disk open.
    held: Option<&'a Path>,
}

/// What the image of an open top looks like, and that its process knows more of.
const OF_USE: [&str; 4] = [
    "in-use",
    "leaked-tail",
    "length-misaligned",
    "unreferenced-clusters",
];

pub(crate) fn check(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    held: Option<&Path>,
    found: &mut Findings,
    meter: &mut Meter<'_>,
) -> Result<()> {
    let store = opener.store();
    let xml = store.resolve(&source.path)?;
    let dir = xml.parent().unwrap_or(Path::new("/")).to_path_buf();
    let d = match opener.read_descriptor(&xml) {
        Ok(d) => d,
        Err(e) if e.kind() == Kind::Corrupt => {
            found.corrupt(descriptor::defect(&e), &xml, &e);
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    descriptor::too_long(&d, &xml, found);
    let mut allowed = vec![dir.clone()];
    for a in &options.allow {
        allowed.push(store.resolve(a)?);
    }
    let mut checker = Checker {
        opener,
        found,
        meter,
        allowed,
        known: HashSet::from([xml.clone()]),
        ids: HashMap::new(),
        cluster_sectors: d.cluster_sectors,
        family: Family::of(&d),
        top: d.top,
        top_sectors: None,
        held,
    };
    let all: Vec<&Image> = d.images.iter().collect();
    let headers = checker.images(&d, &dir, &all, false)?;
    checker.parents(&d, &dir, &headers);
    checker.volumes(&d, &dir, &headers)?;
    if let Some(sectors) = checker.top_sectors {
        descriptor::stale(&d, &xml, sectors, checker.found);
    }
    let merging = checker.marks(&d, &xml) | checker.merges(&d, &dir)?;
    leftovers(store.as_ref(), &dir, &checker.known, merging, checker.found)?;
    match held {
        // It is open.
        Some(_) => Ok(()),
        None => open_top(opener, source, options, found),
    }
}

/// The way out of an image below others whose journal nothing replays.
pub(crate) fn copy_it(guid: Guid) -> String {
    format!("Copy what it shows: ploop convert DISK@{guid} TARGET --to ploop")
}

type Headers = HashMap<Guid, Header>;

impl Checker<'_, '_> {
    /// Checks `images`, each on its own; gives the usable headers. `outer` are those of a parent
    /// volume.
    fn images(
        &mut self,
        d: &Descriptor,
        dir: &Path,
        images: &[&Image],
        outer: bool,
    ) -> Result<Headers> {
        let mut headers = Headers::new();
        self.meter.expect(images.len() as u64);
        for image in images {
            let before = self.found.len();
            let named = dir.join(&image.file);
            let raw = d.base_is_raw() && d.shot(image.guid).is_some_and(|s| s.parent == Guid::NONE);
            let is_top = !outer && image.guid == self.top;
            match self.image(&named, raw, is_top) {
                Ok(Some(header)) => {
                    headers.insert(image.guid, header);
                }
                Ok(None) => {}
                Err(e) => self.unopened(&named, e)?,
            }
            self.meter.add(1);
            self.owned(before, (!outer).then_some(image.guid));
            for f in self.found.since(before) {
                if f.kind == "in-use" && !is_top {
                    f.what += "; it lies below others, and OpenVZ's tool merges nothing into it";
                }
                if f.kind == "journal" && !is_top {
                    f.what += "; it lies below others, where nothing puts it into the image. ";
                    f.what += &copy_it(image.guid);
                }
            }
        }
        Ok(headers)
    }

    /// The findings from number `first` on are about the image of `guid`, or a parent volume's.
    fn owned(&mut self, first: usize, guid: Option<Guid>) {
        let found = self.found.since(first);
        if found.is_empty() {
            return;
        }
        let owners = self.family.owners(guid);
        for f in found {
            f.snapshots = owners.clone();
        }
    }

    fn image(&mut self, named: &Path, raw: bool, is_top: bool) -> Result<Option<Header>> {
        let store = self.opener.store();
        let real = confined(store.as_ref(), named, &self.allowed)?;
        self.opener.refuse_missing(&real)?;
        let file = store.open(&real, Access::Read)?;
        self.known.insert(real.clone());
        if let Some(other) = self.ids.insert(file.id(), real.clone()) {
            let what = format!("two images of the disk are this file ({})", other.display());
            self.found
                .file("duplicate-file", Class::Corrupt, &real, what);
        }
        // Our own lock on it would be in our way.
        if self.held.is_none() {
            lock_image(file.as_ref(), Use::Read)?;
        }
        if raw {
            let (len, cluster) = (file.len()?, u64::from(self.cluster_sectors) * SECTOR);
            if !len.is_multiple_of(cluster) {
                let what = format!("{len} bytes in clusters of {cluster}");
                self.found.file("base-length", Class::Clean, &real, what);
            }
            if is_top {
                self.top_sectors = Some(len.div_ceil(SECTOR));
            }
            return Ok(None);
        }
        image::check_backup(store.as_ref(), &real, self.found)?;
        let in_use = self.held.is_some_and(|top| top == real);
        let known = if in_use { &OF_USE[..] } else { &[] };
        let Some(header) = image::check(file.as_ref(), known, self.found)? else {
            return Ok(None);
        };
        if is_top {
            self.top_sectors = Some(header.size_sectors);
        }
        if !in_use {
            journal::check(store, &real, file.as_ref(), &header, self.found)?;
        }
        if header.cluster_sectors != self.cluster_sectors {
            let what = format!(
                "clusters of {} sectors, the descriptor says {}",
                header.cluster_sectors, self.cluster_sectors
            );
            let e = Error::corrupt(what).at(28);
            self.found.corrupt("cluster-size-mismatch", &real, &e);
        }
        Ok(Some(header))
    }

    /// An image that could not be opened: a finding, or the end of the check.
    fn unopened(&mut self, named: &Path, e: Error) -> Result<()> {
        let kind = match e.kind() {
            Kind::NotFound => "missing-file",
            // A path rule's, not the operating system's.
            Kind::Permission if e.raw_os_error().is_none() => "path-outside",
            Kind::Invalid => "bad-path",
            Kind::Corrupt => "unreadable",
            _ => return Err(e),
        };
        self.found.corrupt(kind, named, &e);
        Ok(())
    }

    /// What must hold between an image and the one that it lies on.
    fn parents(&mut self, d: &Descriptor, dir: &Path, headers: &Headers) {
        // A conversion rewrites the images one after the other.
        if headers.values().any(|h| h.flags & FLAG_CONVERTING != 0) {
            return;
        }
        for shot in &d.shots {
            if let (Some(child), Some(parent)) =
                (headers.get(&shot.guid), headers.get(&shot.parent))
                && let Some(image) = d.image(shot.guid)
            {
                let before = self.found.len();
                self.pair(&dir.join(&image.file), child, parent);
                self.owned(before, Some(shot.guid));
            }
        }
    }

    fn pair(&mut self, file: &Path, child: &Header, parent: &Header) {
        if child.version != parent.version {
            let (c, p) = (child.version.number(), parent.version.number());
            let e = Error::corrupt(format!("a v{c} image on a v{p} one")).at(0);
            self.found.corrupt("version-mismatch", file, &e);
        }
        if child.size_sectors < parent.size_sectors {
            let (c, p) = (child.size_sectors, parent.size_sectors);
            let e = Error::corrupt(format!("{c} sectors on a parent of {p}")).at(36);
            self.found.corrupt("child-smaller-than-parent", file, &e);
        }
    }

    /// The chains of parent volumes that this disk hangs on.
    fn volumes(&mut self, d: &Descriptor, dir: &Path, headers: &Headers) -> Result<()> {
        let (mut d, mut dir, mut headers) = (d.clone(), dir.to_path_buf(), headers.clone());
        let mut seen = vec![dir.clone()];
        let mut node = d.top;
        loop {
            let Some(outer) = d.outer_parent(node)? else {
                return Ok(());
            };
            // The parser lets a parent be outside only where a volume says so.
            let Some(parent) = d.volume.as_ref().and_then(|v| v.parent.clone()) else {
                return Ok(());
            };
            let xml = dir.join(DESCRIPTOR);
            let named = dir.join(parent);
            let up = confined(self.opener.store().as_ref(), &named, &self.allowed);
            let next = match up {
                Ok(next) => next,
                Err(e) if e.kind() == Kind::NotFound => {
                    self.found.corrupt("unknown-parent", &xml, &e);
                    return Ok(());
                }
                Err(e) => return self.unopened(&named, e),
            };
            if seen.contains(&next) || seen.len() == VOLUMES_MAX {
                let e = Error::corrupt(format!("parent cycle among volumes at {}", next.display()));
                self.found.corrupt("parent-cycle", &xml, &e);
                return Ok(());
            }
            let above = match self.opener.read_descriptor(&next.join(DESCRIPTOR)) {
                Ok(above) => above,
                Err(e) => return self.unopened(&next.join(DESCRIPTOR), e),
            };
            let Ok(chain) = above.chain(outer) else {
                let e = Error::corrupt(format!("the parent volume has no snapshot {outer}"));
                self.found.corrupt("unknown-parent", &xml, &e);
                return Ok(());
            };
            let below = self.images(&above, &next, &chain, true)?;
            self.parents(&above, &next, &below);
            // The node of this volume that hangs on `outer` is the first of its chain.
            let first = d.chain(node)?.first().map(|i| (i.guid, i.file.clone()));
            if let Some((guid, file)) = first
                && let (Some(child), Some(parent)) = (headers.get(&guid), below.get(&outer))
            {
                self.pair(&dir.join(file), child, parent);
            }
            seen.push(next.clone());
            (d, dir, headers, node) = (above, next, below, outer);
        }
    }

    /// Snapshots that are marked for removal; true when there is one.
    fn marks(&mut self, d: &Descriptor, xml: &Path) -> bool {
        for shot in d.shots.iter().filter(|s| s.temporary != Temporary::No) {
            let guid = shot.guid;
            let (kind, class, what) = match shot.temporary {
                Temporary::Zero | Temporary::ZeroSwap => (
                    "interrupted-merge",
                    Class::Dirty,
                    format!("a merge into snapshot {guid} was not finished"),
                ),
                // Its data is complete, and a reader may use it: a mark alone is no damage.
                _ => (
                    "temporary-snapshot",
                    Class::Clean,
                    format!("snapshot {guid} is marked for removal"),
                ),
            };
            self.found.file(kind, class, xml, what);
        }
        d.shots.iter().any(|s| s.temporary != Temporary::No)
    }

    /// Merges of ours that were begun and not finished; true when there is one.
    fn merges(&mut self, d: &Descriptor, dir: &Path) -> Result<bool> {
        let side = dir.join(".ploop");
        let store = self.opener.store();
        if store.kind(&side)? != Some(EntryKind::Dir) {
            return Ok(false);
        }
        let mut any = false;
        for name in store.list(&side)? {
            let text = name.to_string_lossy();
            let guid = text.strip_prefix(MERGING).map(Guid::parse);
            // The mark of a node that is gone is left of a merge that was finished.
            if let Some(Ok(guid)) = guid
                && d.shot(guid).is_some()
            {
                let what = format!("the merge of snapshot {guid} was not finished");
                let file = side.join(&name);
                self.found.add(Finding {
                    snapshots: self.family.owners(Some(guid)),
                    ..Finding::new("interrupted-merge", Class::Dirty, &file, what)
                });
                any = true;
            }
        }
        Ok(any)
    }
}

/// Opens the top for reading: there is one judgement on what is readable, and it is the opener's.
fn open_top(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    found: &mut Findings,
) -> Result<()> {
    let Err(e) = opener.open(source, options) else {
        return Ok(());
    };
    match e.kind() {
        // Said already, or follows from what was said.
        Kind::Corrupt | Kind::NotFound | Kind::Permission | Kind::Unsupported | Kind::Invalid
            if found.class() >= Class::Dirty =>
        {
            Ok(())
        }
        Kind::Corrupt | Kind::NotFound | Kind::Permission => {
            found.corrupt("unreadable", &source.path, &e);
            Ok(())
        }
        _ => Err(e),
    }
}
