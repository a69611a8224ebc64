//! The model that every source fills and every image is made from: inodes, and the names that
//! lead to them.
//!
//! ```text
//! Tree ── inodes: [root, …]        an inode is numbered by its place; the root is 0
//!          └─ Kind::Dir { names }  name → inode; two names on one inode are a hard link
//! ```
//!
//! A name enters only through [`Tree::insert`] and [`Tree::link`], by [`super::rules`]: relative, no `..`,
//! no component that is a symbolic link. What stands in the tree can therefore be laid out below
//! any directory without leaving it.

use std::collections::BTreeMap;

use ploop::error::{Error, Result};

use super::rules::{check, components, refused, show};

/// Most names of one inode (ext4's).
const LINK_MAX: u32 = 65_000;
/// Place of an inode in its [`Tree`].
pub(super) type InodeId = usize;

/// The root directory.
pub(super) const ROOT: InodeId = 0;

/// A modification time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Time {
    /// Seconds since 1970, negative before.
    pub(super) sec: i64,
    /// Nanoseconds, below 10⁹, counted forward.
    pub(super) nsec: u32,
}

/// What `stat` and `getfattr` say about an inode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    /// Permission bits, setuid, setgid and sticky: 0o7777.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    /// Full names ("user.x") to raw values, as the kernel's calls give them.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The bytes of a regular file, kept by [`super::stage::Stage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// Name in the stage.
    pub(super) id: u64,
    /// Length in bytes.
    pub(super) len: u64,
    /// 4 KiB blocks that hold anything but zeros.
    pub(super) blocks: u64,
    /// Runs of such blocks.
    pub(super) runs: u64,
}

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// The type of an inode, and what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Dir(BTreeMap<Vec<u8>, InodeId>),
    File(Content),
    Symlink(Vec<u8>),
    Char(Device),
    Block(Device),
    Fifo,
    Socket,
}

impl Kind {
    /// An empty directory.
    pub(super) fn dir() -> Kind {
        Kind::Dir(BTreeMap::new())
    }

    /// The type bits of `st_mode`.
    pub(super) fn type_bits(&self) -> u16 {
        match self {
            Kind::Fifo => 0o010_000,
            Kind::Char(_) => 0o020_000,
            Kind::Dir(_) => 0o040_000,
            Kind::Block(_) => 0o060_000,
            Kind::File(_) => 0o100_000,
            Kind::Symlink(_) => 0o120_000,
            Kind::Socket => 0o140_000,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Inode {
    pub(super) kind: Kind,
    pub(super) meta: Meta,
    /// Names that lead here; 0 once every one was replaced.
    pub(super) links: u32,
}

/// A file system in memory, without its contents.
#[derive(Debug)]
pub(super) struct Tree {
    inodes: Vec<Inode>,
}

/// A name of the tree, as [`Tree::walk`] gives it.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    /// The directory.
    pub(super) parent: InodeId,
    /// The path from the root, without a leading slash.
    pub(super) path: &'a [u8],
    /// Its last component.
    pub(super) name: &'a [u8],
    pub(super) id: InodeId,
    pub(super) inode: &'a Inode,
}

impl Tree {
    /// A tree of one directory, owned by root, mode 0755, of 1970.
    pub(super) fn new() -> Tree {
        let meta = Meta {
            mode: 0o755,
            ..Meta::default()
        };
        Tree {
            inodes: vec![Inode {
                kind: Kind::dir(),
                meta,
                links: 1,
            }],
        }
    }

    pub(super) fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id]
    }

    /// Every inode that has a name, and the root.
    pub(super) fn inodes(&self) -> impl Iterator<Item = (InodeId, &Inode)> {
        self.inodes
            .iter()
            .enumerate()
            .filter(|(_, inode)| inode.links > 0)
    }

    /// The names of a directory; `None` for any other inode.
    pub(super) fn names(&self, id: InodeId) -> Option<&BTreeMap<Vec<u8>, InodeId>> {
        match &self.inodes[id].kind {
            Kind::Dir(names) => Some(names),
            _ => None,
        }
    }

    /// Puts an inode under `path`. What stood there is replaced as `tar` does: a directory over a
    /// directory keeps the names in it; anything over a directory that holds names is refused.
    /// Missing directories above are made. Returns the inode, and a content that lost its last
    /// name.
    pub(super) fn insert(
        &mut self,
        path: &[u8],
        kind: Kind,
        meta: Meta,
    ) -> Result<(InodeId, Option<Content>)> {
        check(path, &kind, &meta)?;
        let parts = components(path)?;
        let Some((name, above)) = parts.split_last() else {
            if !matches!(kind, Kind::Dir(_)) {
                return Err(refused(path, "the root can only be a directory"));
            }
            self.inodes[ROOT].meta = meta;
            return Ok((ROOT, None));
        };
        let dir = self.make_dirs(path, above)?;
        if let Some(id) = self.names(dir).and_then(|names| names.get(*name)).copied()
            && let (Kind::Dir(_), Kind::Dir(_)) = (&self.inodes[id].kind, &kind)
        {
            self.inodes[id].meta = meta;
            return Ok((id, None));
        }
        let id = self.inodes.len();
        self.inodes.push(Inode {
            kind,
            meta,
            links: 0,
        });
        let freed = self.name(path, dir, name, id)?;
        Ok((id, freed))
    }

    /// Makes `path` another name of what `target` names. Returns a content that lost its last name.
    pub(super) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<Option<Content>> {
        let missing = || {
            refused(
                path,
                &format!(
                    "it is a hard link to {}, which is no earlier file",
                    show(target)
                ),
            )
        };
        let parts = components(target).map_err(|e| {
            e.while_doing(format!(
                "member {} is a hard link to a forbidden name",
                show(path)
            ))
        })?;
        let mut id = ROOT;
        for part in parts {
            let names = self.names(id).ok_or_else(missing)?;
            id = *names.get(part).ok_or_else(missing)?;
        }
        if let Kind::Dir(_) = self.inodes[id].kind {
            return Err(refused(path, "it is a hard link to a directory"));
        }
        self.link_inode(path, id)
    }

    /// Makes `path` another name of `id`, which is not a directory.
    pub(super) fn link_inode(&mut self, path: &[u8], id: InodeId) -> Result<Option<Content>> {
        let parts = components(path)?;
        let Some((name, above)) = parts.split_last() else {
            return Err(refused(path, "the root can only be a directory"));
        };
        if self.inodes[id].links >= LINK_MAX {
            return Err(refused(path, "a file in ext4 has at most 65000 names"));
        }
        let dir = self.make_dirs(path, above)?;
        if self.names(dir).and_then(|names| names.get(*name)) == Some(&id) {
            return Ok(None);
        }
        self.name(path, dir, name, id)
    }

    /// The directory of those names, made where it is missing.
    fn make_dirs(&mut self, path: &[u8], parts: &[&[u8]]) -> Result<InodeId> {
        let mut at = ROOT;
        for part in parts {
            let next = self.inodes.len();
            let Kind::Dir(names) = &mut self.inodes[at].kind else {
                return Err(not_a_directory(path, &self.inodes[at].kind));
            };
            match names.get(*part) {
                Some(&id) => at = id,
                None => {
                    names.insert(part.to_vec(), next);
                    let meta = Meta {
                        mode: 0o755,
                        ..Meta::default()
                    };
                    self.inodes.push(Inode {
                        kind: Kind::dir(),
                        meta,
                        links: 1,
                    });
                    at = next;
                }
            }
        }
        match &self.inodes[at].kind {
            Kind::Dir(_) => Ok(at),
            other => Err(not_a_directory(path, other)),
        }
    }

    fn name(
        &mut self,
        path: &[u8],
        dir: InodeId,
        name: &[u8],
        id: InodeId,
    ) -> Result<Option<Content>> {
        let Kind::Dir(names) = &mut self.inodes[dir].kind else {
            return Err(not_a_directory(path, &self.inodes[dir].kind));
        };
        let old = names.insert(name.to_vec(), id);
        self.inodes[id].links += 1;
        let Some(old) = old else { return Ok(None) };
        if self.names(old).is_some_and(|below| !below.is_empty()) {
            return Err(refused(
                path,
                "it would replace a directory that holds names",
            ));
        }
        let old = &mut self.inodes[old];
        old.links -= 1;
        match old.kind {
            Kind::File(content) if old.links == 0 => Ok(Some(content)),
            _ => Ok(None),
        }
    }

    /// Calls `visit` for every name, a directory before what is in it, names of one directory in
    /// the order of their bytes and one after the other.
    pub(super) fn walk(&self, mut visit: impl FnMut(&Entry<'_>) -> Result<()>) -> Result<()> {
        let mut todo = vec![(ROOT, Vec::new())];
        while let Some((parent, prefix)) = todo.pop() {
            for (name, &id) in self.names(parent).into_iter().flatten() {
                let mut path: Vec<u8> = prefix.clone();
                path.extend_from_slice(name);
                let inode = &self.inodes[id];
                visit(&Entry {
                    parent,
                    path: &path,
                    name,
                    id,
                    inode,
                })?;
                if let Kind::Dir(_) = inode.kind {
                    path.push(b'/');
                    todo.push((id, path));
                }
            }
        }
        Ok(())
    }
}

fn not_a_directory(path: &[u8], kind: &Kind) -> Error {
    match kind {
        Kind::Symlink(_) => refused(path, "it lies behind a symbolic link of the same source"),
        _ => refused(path, "it lies below something that is not a directory"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(id: u64) -> Kind {
        Kind::File(Content {
            id,
            len: 1,
            blocks: 1,
            runs: 1,
        })
    }

    fn paths(tree: &Tree) -> Vec<String> {
        let mut out = Vec::new();
        tree.walk(|e| {
            out.push(String::from_utf8(e.path.to_vec()).unwrap());
            Ok(())
        })
        .unwrap();
        out.sort();
        out
    }

    #[test]
    fn nothing_is_placed_behind_a_symbolic_link() {
        let mut tree = Tree::new();
        tree.insert(b"l", Kind::Symlink(b"/tmp".to_vec()), Meta::default())
            .unwrap();
        let e = tree.insert(b"l/x", file(0), Meta::default()).unwrap_err();
        assert!(
            e.to_string().contains("l/x") && e.to_string().contains("symbolic link"),
            "{e}"
        );
        assert!(tree.link(b"h", b"l/x").is_err());
        assert!(tree.insert(b"l/x/y", file(0), Meta::default()).is_err());
    }

    #[test]
    fn the_later_member_wins_and_gives_the_content_back() {
        let mut tree = Tree::new();
        tree.insert(b"f", file(1), Meta::default()).unwrap();
        assert_eq!(tree.link(b"g", b"f").unwrap(), None);
        let (_, freed) = tree.insert(b"f", file(2), Meta::default()).unwrap();
        assert_eq!(freed, None, "g still names it");
        let (_, freed) = tree.insert(b"g", Kind::Fifo, Meta::default()).unwrap();
        assert_eq!(freed.unwrap().id, 1);
        tree.insert(b"d/e", file(3), Meta::default()).unwrap();
        tree.insert(
            b"d",
            Kind::dir(),
            Meta {
                uid: 7,
                ..Meta::default()
            },
        )
        .unwrap();
        assert_eq!(paths(&tree), ["d", "d/e", "f", "g"]);
        assert!(tree.insert(b"d", file(4), Meta::default()).is_err());
    }
}
