//! A disk whose tree is about to change: its directory, its descriptor, its metadata, and the one
//! way in which each of them is replaced.
//!
//! Whoever changes a disk holds its lock: an offline operation takes it ([`Place::lock`]), a live
//! one runs in the process that has the disk open and holds it since.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use ploop::descriptor::{Descriptor, Guid, Image, Temporary, new_delta_file_name};
use ploop::disk::Disk;
use ploop::disk::open::{DESCRIPTOR, MERGING, OpenOptions, Opener, Source, size_key};
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::journal;
use ploop::locks::DiskLock;
use ploop::store::Store;
use ploop::store::arriving::Missing;

use crate::meta::Meta;
use crate::store::{Root, remove_tree, write_new};

/// The new descriptor before it is renamed over the old one: OpenVZ's name for it.
const TEMPORARY: &str = "DiskDescriptor.xml.tmp";
/// In `.ploop`: where an operation works on copies.
const ROOM: &str = "work";

/// See the module text.
#[derive(Debug)]
pub struct Place<'a> {
    opener: &'a Opener,
    root: Option<&'a Root>,
    dir: PathBuf,
    allow: Vec<PathBuf>,
    locks: bool,
    shown: String,
}

impl<'a> Place<'a> {
    /// Container `name` of a store. Error: `NotFound`.
    pub fn container(root: &'a Root, name: &str) -> Result<Place<'a>> {
        let dir = root.existing_container(name)?;
        Ok(Place {
            opener: root.opener(),
            root: Some(root),
            dir,
            allow: vec![root.layers()],
            locks: root.has_locks(),
            shown: name.to_owned(),
        })
    }

    /// Any disk directory. `allow`: further directories that its files may lie in. `locks` only
    /// where files are the host's.
    pub fn disk(
        opener: &'a Opener,
        source: &Source,
        allow: &[PathBuf],
        locks: bool,
    ) -> Result<Place<'a>> {
        if !source.descriptor {
            return Err(Error::unsupported("a single image file has no tree")
                .on(&source.path)
                .fix("Name a disk directory, its DiskDescriptor.xml, or a container"));
        }
        let xml = opener.store().resolve(&source.path)?;
        if xml.file_name().is_none_or(|n| n != DESCRIPTOR) {
            let what = format!("the descriptor must be named {DESCRIPTOR} to be changed");
            return Err(Error::unsupported(what).on(xml));
        }
        let dir = xml.parent().unwrap_or(Path::new("/")).to_path_buf();
        Ok(Place {
            opener,
            root: None,
            shown: source.path.display().to_string(),
            allow: allow.to_vec(),
            dir,
            locks,
        })
    }

    /// The same, called otherwise.
    #[must_use]
    pub fn called(mut self, name: impl Into<String>) -> Place<'a> {
        self.shown = name.into();
        self
    }

    /// Its directory, resolved.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How people call it: the container's name, or the path that they gave.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// The store that it is a container of.
    pub fn root(&self) -> Option<&'a Root> {
        self.root
    }

    /// What opens its images.
    pub fn opener(&self) -> &'a Opener {
        self.opener
    }

    /// Where its files are.
    pub fn store(&self) -> &'a dyn Store {
        self.opener.store().as_ref()
    }

    /// The node `guid` of it as something to open; the top for `None`.
    pub fn source(&self, guid: Option<Guid>) -> Source {
        Source {
            path: self.dir.join(DESCRIPTOR),
            descriptor: true,
            snapshot: guid.map(|g| g.to_string()),
        }
    }

    /// Options that let it reach its files.
    pub fn open_options(&self, write: bool) -> OpenOptions {
        OpenOptions {
            write,
            allow: self.allow.clone(),
            ..OpenOptions::default()
        }
    }

    /// Takes its lock, for an offline operation. Error: `InUse`, with the holder.
    pub fn lock(&self) -> Result<Option<DiskLock>> {
        self.locks
            .then(|| self.opener.lock_disk(&self.dir))
            .transpose()
    }

    /// Its descriptor as it is now.
    pub fn descriptor(&self) -> Result<Descriptor> {
        self.opener.read_descriptor(&self.dir.join(DESCRIPTOR))
    }

    /// Its metadata as it is now.
    pub fn meta(&self) -> Result<Meta> {
        Meta::read(self.store(), &self.dir)
    }

    /// Replaces its metadata; durable on return.
    pub fn set_meta(&self, meta: &Meta) -> Result<()> {
        meta.write(self.store(), &self.dir)
    }

    /// Writes the next descriptor beside the one in force; durable on return, its name excepted.
    /// Whatever can fail for want of room fails here.
    pub fn stage(&self, next: &Descriptor) -> Result<()> {
        next.check()?;
        let path = self.dir.join(TEMPORARY);
        self.forget_file(TEMPORARY)?;
        write_new(self.store(), &path, &next.to_xml())
    }

    /// Takes [`Place::stage`] back.
    pub fn unstage(&self) -> Result<()> {
        self.forget_file(TEMPORARY)
    }

    /// Opens the disk for writing; that takes its lock. Error: `InUse`.
    pub fn open(&self) -> Result<Disk> {
        self.opener
            .open(&self.source(None), &self.open_options(true))
    }

    /// COMMIT: puts the staged descriptor in force; durable on return. After an error it may be in
    /// force or not.
    pub fn commit(&self) -> Result<()> {
        let (from, to) = (self.dir.join(TEMPORARY), self.dir.join(DESCRIPTOR));
        self.store().rename(&from, &to)?;
        self.store().sync_dir(&self.dir)
    }

    /// Removes what an interrupted operation left of its work copies: they may be as large as the disk.
    /// The caller holds the disk's lock.
    pub fn clear_room(&self) -> Result<()> {
        remove_tree(self.store(), &self.room())
    }

    /// Removes a file of the directory; one that is not there is fine.
    pub fn forget_file(&self, name: &str) -> Result<()> {
        match self.store().remove_file(&self.dir.join(name)) {
            Err(e) if e.kind() != Kind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Removes an image of the directory with its journal; what is not there is fine.
    pub(crate) fn forget_image(&self, name: &str) -> Result<()> {
        if let Some(home) = self.opener.home(&self.dir.join(name)) {
            home.forget()?;
        }
        self.forget_file(name)?;
        // The record of what it lacked.
        let path = self.dir.join(name);
        match self.opener.is_arriving(&path)? {
            true => Missing::remove(self.store(), &path),
            false => Ok(()),
        }
    }

    /// Opens and closes a disk whose top was not closed and has a journal: from then on the image
    /// says all. Another is not touched. Errors: those of opening; `InUse`.
    pub(crate) fn replay(&self, d: &Descriptor) -> Result<()> {
        let image = d.image(d.top).filter(|i| Place::owns(i));
        let home = image.and_then(|i| self.opener.home(&self.dir.join(&i.file)));
        match home {
            Some(home) if home.is_live()? => self.open()?.close(),
            _ => Ok(()),
        }
    }

    /// Removes a file of the directory by its path; one that is not there is fine.
    pub(crate) fn forget_side(&self, path: &Path) -> Result<()> {
        match self.store().remove_file(path) {
            Err(e) if e.kind() != Kind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Lets go of an image's file that `d` does not name any more: removes it where it is the
    /// disk's own, else gives back the reference to the layer that it is in.
    pub(crate) fn drop_file(&self, d: &Descriptor, file: &str) -> Result<()> {
        if d.images.iter().any(|i| i.file == file) {
            return Ok(());
        }
        if !file.contains('/') {
            return self.forget_image(file);
        }
        match self.root {
            Some(root) => {
                let layer = self
                    .opener
                    .confine(&self.dir, file, &self.open_options(false))?;
                crate::share::release(root, &[layer], crate::share::id(self)?).map(drop)
            }
            None => Ok(()),
        }
    }

    /// The file of an image, resolved and inside of what may be opened. Error: `Permission`.
    pub fn file_of(&self, image: &Image) -> Result<PathBuf> {
        self.opener
            .confine(&self.dir, &image.file, &self.open_options(false))
    }

    /// True when an image's file is in the directory itself, under a plain name.
    pub fn owns(image: &Image) -> bool {
        !image.file.contains('/') && image.file != "." && image.file != ".."
    }

    /// A name for a new delta.
    pub fn new_file_name(d: &Descriptor) -> String {
        // A first image elsewhere (a layer) gives no name: the container's own are `root.hds.…`.
        let first = d.images.iter().find(|i| Place::owns(i));
        let first = first.map_or("root.hds", |i| i.file.as_str());
        new_delta_file_name(first, Guid::new_v4())
    }

    /// A directory for work copies; who makes it holds the disk's lock and removes it.
    pub(crate) fn room(&self) -> PathBuf {
        self.dir.join(".ploop").join(ROOM)
    }

    /// Removes what interrupted operations left: staged files, and files of ours that neither the
    /// descriptor names nor anybody will. The caller holds the disk's lock.
    ///
    /// The descriptor that is read may be one whose rename is not durable, because the process that
    /// renamed it was killed or its sync failed. What only the one before it needs goes after this
    /// one was put in force again.
    pub fn sweep(&self) -> Result<()> {
        self.forget_file(TEMPORARY)?;
        self.clear_room()?;
        let mut meta = self.meta()?;
        let d = self.descriptor()?;
        let named = |file: &str| d.images.iter().any(|i| i.file == file);
        let left: Vec<String> = meta.files.iter().filter(|f| !named(f)).cloned().collect();
        let markers = self.stale_markers(&d)?;
        let stale = |guid: &str| Guid::parse(guid).map_or(true, |g| d.shot(g).is_none());
        let known = meta.snapshots.len() + meta.sizes.len();
        meta.snapshots.retain(|guid, _| !stale(guid));
        let top = size_key(&d, d.top);
        meta.sizes.retain(|key, _| *key == top || !stale(key));
        let listed = !left.is_empty() || meta.snapshots.len() + meta.sizes.len() != known;
        if !listed && markers.is_empty() {
            return Ok(());
        }
        self.stage(&d)?;
        self.commit()?;
        for marker in markers {
            self.forget_side(&marker)?;
        }
        if !listed {
            return Ok(());
        }
        for file in left {
            if !file.contains('/') {
                self.forget_image(&file)?;
            }
            meta.files.remove(&file);
        }
        self.store().sync_dir(&self.dir)?;
        self.set_meta(&meta)
    }

    /// The markers of merges whose node is gone, and journals that have ended or are of no image of
    /// the disk. Of an image that is not the top, too, one may be all that has what was flushed last.
    fn stale_markers(&self, d: &Descriptor) -> Result<Vec<PathBuf>> {
        let side = self.dir.join(".ploop");
        if self.store().kind(&side)?.is_none() {
            return Ok(Vec::new());
        }
        let gone = |g: &str| Guid::parse(g).is_ok_and(|g| d.shot(g).is_none());
        let named = |name: &str| d.images.iter().any(|i| i.file == name);
        let is_stale = |name: &Path| {
            name.to_str().is_some_and(|name| {
                name.strip_prefix(MERGING).is_some_and(gone) || journal::is_stale(name, named)
            })
        };
        let names = self.store().list(&side)?;
        let stale = names.iter().filter(|n| is_stale(n));
        let mut stale: Vec<PathBuf> = stale.map(|n| side.join(n)).collect();
        for image in d.images.iter().filter(|i| Place::owns(i)) {
            if let Some(home) = self.opener.home(&self.dir.join(&image.file))
                && home.has_ended()?
            {
                stale.push(home.path().to_path_buf());
            }
        }
        Ok(stale)
    }

    /// The node that `text` names: a GUID, or a snapshot's name. Nodes that are being removed have
    /// neither. Error: `NotFound`.
    pub fn find(&self, d: &Descriptor, meta: &Meta, text: &str) -> Result<Guid> {
        let hidden = |g: Guid| d.shot(g).is_none_or(|s| s.temporary != Temporary::No);
        let found = match Guid::parse(text) {
            Ok(guid) => Some(guid),
            Err(_) => d
                .shots
                .iter()
                .map(|s| s.guid)
                .find(|g| !hidden(*g) && meta.name_of(*g) == Some(text)),
        };
        match found {
            Some(guid) if d.shot(guid).is_some() && !hidden(guid) => Ok(guid),
            Some(guid) if d.shot(guid).is_some() => {
                let what = format!("snapshot {guid} of {} is being removed", self.shown);
                Err(Error::new(Kind::NotFound, what).on(&self.dir))
            }
            _ => {
                let what = format!("{} has no snapshot {text:?}", self.shown);
                Err(Error::new(Kind::NotFound, what)
                    .on(&self.dir)
                    .fix(format!("`ploop snapshot list {}` shows them", self.shown)))
            }
        }
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}
