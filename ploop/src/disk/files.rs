//! The files that a descriptor names: which, and whether they are where they may be.

use std::path::{Path, PathBuf};

use super::open::{DESCRIPTOR, OpenOptions, Opener};
use crate::descriptor::{self, Descriptor, Guid};
use crate::error::{Error, Kind, Result};
use crate::store::Access;

/// Volumes above each other, at most (OpenVZ's limit).
const VOLUMES_MAX: usize = 256;

/// The images of one node, base first, as files.
pub(super) struct Files {
    pub(super) images: Vec<PathBuf>,
    pub(super) base_is_raw: bool,
    pub(super) cluster_sectors: u32,
}

impl Opener {
    /// The file that `file` in a descriptor in `dir` means, links resolved. Error: `Permission`
    /// when it lies neither in `dir` nor where `options` allow.
    pub fn confine(&self, dir: &Path, file: &str, options: &OpenOptions) -> Result<PathBuf> {
        let (dir, allowed) = self.rooms(&dir.join(DESCRIPTOR), options)?;
        self.confined(&dir.join(file), &allowed)
    }

    /// Every image of a disk's own tree with its file, each where it may be.
    pub(super) fn files_of_tree(
        &self,
        d: &Descriptor,
        xml: &Path,
        options: &OpenOptions,
    ) -> Result<Vec<(Guid, PathBuf)>> {
        let xml = self.store().resolve(xml)?;
        let (dir, allowed) = self.rooms(&xml, options)?;
        let file =
            |i: &descriptor::Image| Ok((i.guid, self.confined(&dir.join(&i.file), &allowed)?));
        d.images.iter().map(file).collect()
    }

    /// The directory of a descriptor, and the directories that its files may lie in.
    pub(super) fn rooms(
        &self,
        xml: &Path,
        options: &OpenOptions,
    ) -> Result<(PathBuf, Vec<PathBuf>)> {
        let dir = xml.parent().unwrap_or(Path::new("/")).to_path_buf();
        let mut allowed = vec![dir.clone()];
        for a in &options.allow {
            allowed.push(self.store().resolve(a)?);
        }
        Ok((dir, allowed))
    }

    /// Reads the descriptor at `path`.
    pub fn read_descriptor(&self, path: &Path) -> Result<Descriptor> {
        let real = self.store().resolve(path)?;
        let file = self.store().open(&real, Access::Read)?;
        let len = file.len()?;
        if len > descriptor::MAX_BYTES as u64 {
            let what = format!("{len} bytes; {} is the limit", descriptor::MAX_BYTES);
            let defect = descriptor::Defect::TooLarge;
            return Err(Error::corrupt(what).with_defect(defect).on(path));
        }
        let mut bytes = vec![0; len as usize];
        crate::store::read_exact(file.as_ref(), &mut bytes, 0)?;
        descriptor::parse(&bytes).map_err(|e| e.on(path))
    }

    /// The files of `node`, base first, parent volumes included, each inside `allowed`.
    pub(super) fn node_files(
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
    pub(super) fn confined(&self, path: &Path, allowed: &[PathBuf]) -> Result<PathBuf> {
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
        let real = self.store().resolve(path)?;
        match allowed.iter().any(|a| real.starts_with(a)) {
            true => Ok(real),
            false => Err(outside(&real)),
        }
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
