//! The directory tree: names, and what the operating system would answer to each call on them.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::file::Node;
use super::{Dir, ROOT};

/// Bytes of the longest name, as on every file system of the host.
const NAME_MAX: usize = 255;

/// All directories and all files that have a name, by inode number. No number is used twice.
pub(super) struct Names {
    pub(super) dirs: BTreeMap<u64, Dir>,
    pub(super) files: BTreeMap<u64, Arc<Node>>,
    pub(super) next: u64,
}

/// Where a path leads: the directories down to the last name, and that name. No name: the path is
/// `/` or ends in `..`, and means the last of the directories.
pub(super) struct Place {
    dirs: Vec<(u64, OsString)>,
    pub(super) name: Option<OsString>,
}

impl Place {
    pub(super) fn dir(&self) -> u64 {
        self.dirs.last().map_or(ROOT, |(ino, _)| *ino)
    }

    fn passes(&self, ino: u64) -> bool {
        self.dirs.iter().any(|(dir, _)| *dir == ino)
    }
}

type OsResult<T> = std::result::Result<T, Errno>;

impl Names {
    fn child(&self, dir: u64, name: &OsStr) -> OsResult<Option<u64>> {
        if name.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        Ok(self.dirs.get(&dir).and_then(|dir| dir.get(name)).copied())
    }

    pub(super) fn place(&self, path: &Path) -> OsResult<Place> {
        if path.as_os_str().is_empty() {
            return Err(Errno::NOENT);
        }
        if path.as_os_str().as_bytes().contains(&0) {
            return Err(Errno::INVAL);
        }
        let mut place = Place {
            dirs: vec![(ROOT, OsString::new())],
            name: None,
        };
        for part in path.components() {
            if matches!(part, Component::ParentDir | Component::Normal(_)) {
                self.descend(&mut place)?;
            }
            match part {
                Component::Normal(name) => place.name = Some(name.to_os_string()),
                Component::ParentDir if place.dirs.len() > 1 => drop(place.dirs.pop()),
                _ => {}
            }
        }
        Ok(place)
    }

    fn descend(&self, place: &mut Place) -> OsResult<()> {
        if let Some(name) = place.name.take() {
            let ino = self.child(place.dir(), &name)?.ok_or(Errno::NOENT)?;
            if !self.dirs.contains_key(&ino) {
                return Err(Errno::NOTDIR);
            }
            place.dirs.push((ino, name));
        }
        Ok(())
    }

    pub(super) fn found(&self, place: &Place) -> OsResult<Option<u64>> {
        match &place.name {
            Some(name) => self.child(place.dir(), name),
            None => Ok(Some(place.dir())),
        }
    }

    /// The inode under that name; `NOENT` when there is none.
    pub(super) fn find(&self, path: &Path) -> OsResult<u64> {
        self.found(&self.place(path)?)?.ok_or(Errno::NOENT)
    }

    pub(super) fn find_dir(&self, path: &Path) -> OsResult<u64> {
        let ino = self.find(path)?;
        if self.dirs.contains_key(&ino) {
            Ok(ino)
        } else {
            Err(Errno::NOTDIR)
        }
    }

    pub(super) fn list(&self, path: &Path) -> OsResult<Vec<PathBuf>> {
        let ino = self.find_dir(path)?;
        Ok(self
            .dirs
            .get(&ino)
            .into_iter()
            .flatten()
            .map(|(name, _)| name.into())
            .collect())
    }

    pub(super) fn resolve(&self, path: &Path) -> OsResult<PathBuf> {
        let place = self.place(path)?;
        self.found(&place)?.ok_or(Errno::NOENT)?;
        let names = place
            .dirs
            .iter()
            .skip(1)
            .map(|(_, name)| name)
            .chain(&place.name);
        Ok(Path::new("/").join(names.collect::<PathBuf>()))
    }

    fn link(&mut self, dir: u64, name: OsString, ino: u64) {
        self.dirs.entry(dir).or_default().insert(name, ino);
    }

    fn unlink(&mut self, dir: u64, name: &OsStr) {
        if let Some(dir) = self.dirs.get_mut(&dir) {
            dir.remove(name);
        }
    }

    /// A free name and a new inode number for it.
    fn free_name(&mut self, path: &Path) -> OsResult<(u64, OsString, u64)> {
        let place = self.place(path)?;
        if self.found(&place)?.is_some() {
            return Err(Errno::EXIST);
        }
        let dir = place.dir();
        let name = place.name.ok_or(Errno::EXIST)?;
        self.next += 1;
        Ok((dir, name, self.next))
    }

    pub(super) fn create(&mut self, path: &Path) -> OsResult<(u64, Arc<Node>)> {
        let (dir, name, ino) = self.free_name(path)?;
        let node = Arc::new(Node::default());
        self.files.insert(ino, Arc::clone(&node));
        self.link(dir, name, ino);
        Ok((ino, node))
    }

    pub(super) fn create_dir(&mut self, path: &Path) -> OsResult<()> {
        let (dir, name, ino) = self.free_name(path)?;
        self.dirs.insert(ino, Dir::new());
        self.link(dir, name, ino);
        Ok(())
    }

    pub(super) fn hard_link(&mut self, from: &Path, to: &Path) -> OsResult<()> {
        let ino = self.find(from)?;
        if self.dirs.contains_key(&ino) {
            return Err(Errno::PERM);
        }
        let (dir, name, _) = self.free_name(to)?;
        self.link(dir, name, ino);
        Ok(())
    }

    /// Forgets a file whose last name went; whoever has it open keeps its bytes.
    fn forget(&mut self, ino: u64) {
        let named = self
            .dirs
            .values()
            .any(|dir| dir.values().any(|&n| n == ino));
        if !named {
            self.files.remove(&ino);
        }
    }

    pub(super) fn remove_file(&mut self, path: &Path) -> OsResult<()> {
        let place = self.place(path)?;
        let ino = self.found(&place)?.ok_or(Errno::NOENT)?;
        let dir = place.dir();
        let name = place.name.ok_or(Errno::ISDIR)?;
        if self.dirs.contains_key(&ino) {
            return Err(Errno::ISDIR);
        }
        self.unlink(dir, &name);
        self.forget(ino);
        Ok(())
    }

    pub(super) fn remove_dir(&mut self, path: &Path) -> OsResult<()> {
        let place = self.place(path)?;
        let ino = self.found(&place)?.ok_or(Errno::NOENT)?;
        let children = self.dirs.get(&ino).ok_or(Errno::NOTDIR)?;
        if ino == ROOT {
            return Err(Errno::BUSY);
        }
        let dir = place.dir();
        match place.name {
            Some(name) if children.is_empty() => self.unlink(dir, &name),
            _ => return Err(Errno::NOTEMPTY),
        }
        self.dirs.remove(&ino);
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path, replace: bool) -> OsResult<()> {
        let (source, target) = (self.place(from)?, self.place(to)?);
        if source.name.is_none() {
            return Err(Errno::BUSY);
        }
        if target.name.is_none() {
            return Err(if replace { Errno::BUSY } else { Errno::EXIST });
        }
        let ino = self.found(&source)?.ok_or(Errno::NOENT)?;
        let old = self.found(&target)?;
        match old {
            Some(_) if !replace => return Err(Errno::EXIST),
            _ if target.passes(ino) => return Err(Errno::INVAL),
            Some(old) if source.passes(old) => return Err(Errno::NOTEMPTY),
            Some(old) if old == ino => return Ok(()),
            Some(old) => self.may_replace(ino, old)?,
            None => {}
        }
        let (from, to) = (source.dir(), target.dir());
        if let (Some(source), Some(target)) = (source.name, target.name) {
            self.unlink(from, &source);
            self.link(to, target, ino);
        }
        if let Some(old) = old {
            self.dirs.remove(&old);
            self.forget(old);
        }
        Ok(())
    }

    fn may_replace(&self, ino: u64, old: u64) -> OsResult<()> {
        match (self.dirs.get(&ino), self.dirs.get(&old)) {
            (Some(_), None) => Err(Errno::NOTDIR),
            (None, Some(_)) => Err(Errno::ISDIR),
            (Some(_), Some(names)) if !names.is_empty() => Err(Errno::NOTEMPTY),
            _ => Ok(()),
        }
    }
}
