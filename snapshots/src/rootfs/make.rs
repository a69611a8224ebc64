//! From a tree and its staged contents to an ext4 file system, with no privilege.
//!
//! ```text
//! 1  mke2fs -d plain     directories, regular files, hard links between them; each bears its
//!                        number in the tree as its time
//! 2  read inode tables   number → inode
//! 3  debugfs             the names of links, nodes, pipes, sockets, marked likewise
//! 4  read inode tables   number → inode, and what each inode holds
//! 5  debugfs             further names of such inodes; whatever else differs from the tree: mode,
//!                        owner, time, device, attributes
//! 6  e2fsck -fn          clean, or it is an error
//! 7  e2fsck -fyD         an index for large directories; then step 6 again
//! 8  tune2fs             the quota, when asked for: it counts by owner; then step 6 again
//! 9  read inode tables   every inode is as the tree says, or it is an error
//! ```
//!
//! Only what is not a file or directory passes its name through debugfs; everything after that goes
//! by inode number. Root and others make the same tree, since nothing of the stage but names and
//! bytes counts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use ploop::error::{Error, Kind, Result};

use super::ext4::{self, Raw};
use super::quota;
use super::rules::{refused, show};
use super::script::Script;
use super::size::{self, Needs};
use super::stage::{BLOCK, Stage};
use super::tool;
use super::tree::{Content, Entry, Inode, InodeId, Kind as Node, ROOT, Tree};
use super::{Progress, Step};

/// mke2fs's own configuration, in the work directory: the host's has no say in what is made.
pub(super) const CONFIG: &str = "mke2fs.conf";
const CONFIG_TEXT: &str = "[defaults]\n\tblocksize = 4096\n[fs_types]\n\
    \text4 = {\n\t\tinode_size = 256\n\t}\n\tfloppy = {\n\t\tinode_size = 256\n\t}\n\
    \tsmall = {\n\t\tinode_size = 256\n\t}\n\tbig = {\n\t\tinode_size = 256\n\t}\n\
    \thuge = {\n\t\tinode_size = 256\n\t}\n";
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,\
    flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
/// The most that descriptors can be kept for: the growing of 1024 blocks of them.
const RESERVE_MAX: u64 = 1024 * 64 * 32768 * BLOCK;
/// Inode of the root directory, and of `lost+found`.
const ROOT_INO: u32 = 2;
const LOST_INO: u32 = 11;
/// Fewer inodes than this bear marks that can be told from a time of today.
const MARKS: usize = 1 << 30;
const LABEL_MAX: usize = 16;
/// Subdirectories that a directory's count of links can tell: 65000, with itself and its name.
const MANY: usize = 64_998;

/// Where the file system goes and what it is made with.
#[derive(Debug)]
pub(super) struct Target<'a> {
    /// The work directory.
    pub(super) work: &'a Path,
    /// The image in it, as a bare name.
    pub(super) image: &'a str,
    /// The file system in the image.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) label: Option<&'a str>,
    pub(super) reserve: u64,
    pub(super) user_quota: bool,
}

impl Target<'_> {
    fn path(&self) -> PathBuf {
        self.work.join(self.image)
    }

    /// The name that e2fsprogs understand.
    fn name(&self) -> String {
        format!("{}?offset={}", self.image, self.offset)
    }
}

/// The number that inode `id` bears until its own time is set: never 0.
fn mark(id: InodeId) -> i64 {
    id as i64 + 1
}

/// Makes the file system; see the steps above.
pub(super) fn make(
    target: &Target<'_>,
    tree: &Tree,
    stage: Stage,
    needs: &Needs,
    progress: &dyn Fn(Progress),
) -> Result<()> {
    lost_and_found(tree)?;
    let count = needs.inodes;
    if tree.inodes().last().is_some_and(|(id, _)| id >= MARKS) {
        return Err(Error::unsupported(format!(
            "a source of more than {MARKS} members"
        )));
    }
    let step = |step, done| {
        progress(Progress {
            step,
            done,
            total: Some(count),
        })
    };
    step(Step::Make, 0);
    let plain = stage.lay_out(tree, mark)?;
    mke2fs(target, plain, needs)?;
    let plain = target.work.join(plain);
    std::fs::remove_dir_all(&plain).map_err(|e| Error::io("remove", &plain, e))?;

    step(Step::Attributes, 0);
    let image = target.path();
    let file = File::open(&image).map_err(|e| Error::io("open", &image, e))?;
    let map = inode_numbers(target, &file, tree)?;
    names(tree, &map, true)?.run(target.work, "names.debugfs", &target.name())?;
    let map = inode_numbers(target, &file, tree)?;
    names(tree, &map, false)?.run(target.work, "links.debugfs", &target.name())?;
    attributes(target, tree, &map)?.run(target.work, "attributes.debugfs", &target.name())?;
    step(Step::Check, 0);
    e2fsck(target)?;
    index_directories(target, tree)?;
    e2fsck(target)?;
    if target.user_quota {
        quota::turn_on(target.work, &target.name(), &target.path(), target.offset)?;
        e2fsck(target)?;
    }
    verify(target, &file, tree, &map)?;
    step(Step::Check, count);
    Ok(())
}

fn mke2fs(target: &Target<'_>, plain: &str, needs: &Needs) -> Result<()> {
    let config = target.work.join(CONFIG);
    std::fs::write(&config, CONFIG_TEXT).map_err(|e| Error::io("write", &config, e))?;
    let blocks = target.bytes / BLOCK;
    let mut extended = format!(
        "offset={},root_owner=0:0,no_copy_xattrs,lazy_itable_init=0,lazy_journal_init=1",
        target.offset
    );
    let reserve = target.reserve.min(RESERVE_MAX) / BLOCK;
    if reserve > blocks {
        extended.push_str(&format!(",resize={reserve}"));
    }
    let inodes = size::inodes(needs, target.bytes).to_string();
    let journal = format!("size={}", size::journal_mib(target.bytes));
    let mut args = vec![
        "-t", "ext4", "-F", "-q", "-b", "4096", "-I", "256", "-m", "1",
    ];
    args.extend([
        "-O", FEATURES, "-E", &extended, "-N", &inodes, "-J", &journal, "-d", plain,
    ]);
    if let Some(label) = target.label {
        check_label(label)?;
        args.extend(["-L", label]);
    }
    let blocks = blocks.to_string();
    args.extend([target.image, &blocks]);
    let out = tool::run("mke2fs", &args, target.work)?;
    if out.code == Some(0) {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stderr);
    let error = tool::failed("mke2fs", &target.path(), &out);
    if text.contains("Could not allocate") || text.contains("too small for a journal") {
        let what = format!(
            "the content does not fit into a disk of this size ({})",
            error.what()
        );
        return Err(Error::new(Kind::NoSpace, what)
            .fix("Ask for a larger size, or leave the size out to have it computed"));
    }
    if text.contains("no_copy_xattrs") {
        return Err(error.fix("This needs e2fsprogs 1.47 or newer: apt-get install e2fsprogs"));
    }
    Err(error)
}

/// A label that ext4 can hold: at most 16 bytes, none a control character.
pub(super) fn check_label(label: &str) -> Result<()> {
    if label.len() > LABEL_MAX || label.contains(char::is_control) {
        return Err(Error::invalid(format!(
            "the label {label:?} is not 1 to 16 bytes of text"
        )));
    }
    Ok(())
}

/// Which inode each member became, by the marks.
fn inode_numbers(
    target: &Target<'_>,
    file: &File,
    tree: &Tree,
) -> Result<HashMap<InodeId, (u32, Raw)>> {
    let lost = lost_and_found(tree)?;
    let mut map = HashMap::new();
    ext4::inodes(file, &target.path(), target.offset, |ino, raw| {
        let id = match (ino, lost) {
            (ROOT_INO, _) => Some(ROOT),
            (LOST_INO, id) => id,
            (0..LOST_INO, _) => None,
            _ if raw.mtime_extra == 0 && (1..=MARKS as u32).contains(&raw.mtime) => {
                Some(raw.mtime as usize - 1)
            }
            _ => None,
        };
        if let Some(id) = id {
            map.insert(id, (ino, raw));
        }
        Ok(())
    })?;
    Ok(map)
}

/// The source's own `lost+found`, which must be a directory.
fn lost_and_found(tree: &Tree) -> Result<Option<InodeId>> {
    let lost = tree
        .names(ROOT)
        .and_then(|names| names.get(&b"lost+found"[..]))
        .copied();
    match lost {
        Some(id) if tree.names(id).is_none() => {
            Err(refused(b"lost+found", "in ext4 this name is a directory"))
        }
        _ => Ok(lost),
    }
}

fn number(map: &HashMap<InodeId, (u32, Raw)>, id: InodeId, path: &[u8]) -> Result<u32> {
    map.get(&id).map(|(ino, _)| *ino).ok_or_else(|| {
        Error::corrupt(format!("member {} did not arrive in the image", show(path)))
            .fix("This is a defect of this program or of e2fsprogs; please report it")
    })
}

/// The script for the names of what is neither directory nor regular file. A node with several
/// names gets its first one when `first`, the others when not: those need its inode number.
fn names(tree: &Tree, map: &HashMap<InodeId, (u32, Raw)>, first: bool) -> Result<Script> {
    let mut script = Script::default();
    let mut current = None;
    let mut seen = HashSet::new();
    tree.walk(|e| {
        let plain = matches!(e.inode.kind, Node::Dir(_) | Node::File(_));
        if plain || seen.insert(e.id) != first {
            return Ok(());
        }
        if current != Some(e.parent) {
            script.add(&format!("cd <{}>", number(map, e.parent, e.path)?));
            current = Some(e.parent);
        }
        let good = if first {
            create(&mut script, tree, e)
        } else {
            let ino = format!("<{}>", number(map, e.id, e.path)?);
            script.add_quoted("ln", &[ino.as_bytes(), e.name])
        };
        if good {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "member {} is no regular file, and its name or target holds a line end or is too long \
             for debugfs",
            show(e.path)
        )))
    })?;
    Ok(script)
}

fn create(script: &mut Script, tree: &Tree, e: &Entry<'_>) -> bool {
    let here = |name: &[u8]| [b"./", name].concat();
    let mark = format!("@{}", mark(e.id));
    let made = match &e.inode.kind {
        Node::Symlink(target) => script.add_quoted("symlink", &[e.name, target]),
        Node::Char(_) => script.add_quoted("mknod", &[e.name, b"c", b"0", b"0"]),
        Node::Block(_) => script.add_quoted("mknod", &[e.name, b"b", b"0", b"0"]),
        Node::Fifo => script.add_quoted("mknod", &[e.name, b"p"]),
        Node::Socket => {
            // debugfs makes no socket: a pipe under a free name is turned into one, and gets its
            // name then, because the directory holds the type, too.
            let free = free_name(tree, e.parent);
            let temporary = here(&free);
            script.add_quoted("mknod", &[&free, b"p"])
                && script.add_quoted("sif", &[&temporary, b"mode", b"0140600"])
                && script.add_quoted("ln", &[&temporary, e.name])
                && script.add_quoted("unlink", &[&temporary])
        }
        Node::Dir(_) | Node::File(_) => true,
    };
    made && script.add_quoted("sif", &[&here(e.name), b"mtime", mark.as_bytes()])
}

fn free_name(tree: &Tree, dir: InodeId) -> Vec<u8> {
    let taken = |name: &Vec<u8>| {
        tree.names(dir)
            .is_some_and(|names| names.contains_key(name))
    };
    (0u64..)
        .map(|n| format!("s{n}").into_bytes())
        .find(|n| !taken(n))
        .unwrap_or_default()
}

/// The script that gives every inode what it lacks of the tree.
fn attributes(
    target: &Target<'_>,
    tree: &Tree,
    map: &HashMap<InodeId, (u32, Raw)>,
) -> Result<Script> {
    let mut script = Script::default();
    let mut values = Values {
        dir: target.work.join("xattr"),
        files: HashMap::new(),
    };
    for (id, inode) in tree.inodes() {
        let &(ino, raw) = match map.get(&id) {
            Some(found) => found,
            None => return number(map, id, &path_of(tree, id)).map(|_| script),
        };
        let want = wanted(tree, inode, &raw);
        let mut set = |field: &str, value: String| {
            script.add(&format!("sif <{ino}> {field} {value}"));
        };
        for (name, is, should) in [
            ("uid", raw.uid, want.uid),
            ("gid", raw.gid, want.gid),
            ("links_count", u32::from(raw.links), u32::from(want.links)),
            ("block[0]", raw.block[0], want.block[0]),
            ("block[1]", raw.block[1], want.block[1]),
        ] {
            if is != should {
                set(name, should.to_string());
            }
        }
        if raw.mode != want.mode {
            set("mode", format!("0{:o}", want.mode));
        }
        set("mtime", format!("@{}", want.mtime));
        // Some versions of debugfs write this word with the time, from the low half alone.
        if raw.mtime_extra != want.mtime_extra || want.mtime_extra != 0 || want.mtime >> 31 != 0 {
            set("mtime_extra", want.mtime_extra.to_string());
        }
        for (name, value) in &inode.meta.xattrs {
            let file = values.file(value)?;
            let at = format!("<{ino}>");
            if !script.add_quoted("ea_set", &[b"-f", file.as_bytes(), at.as_bytes(), name]) {
                return Err(refused(
                    &path_of(tree, id),
                    "debugfs cannot take an attribute's name",
                ));
            }
        }
    }
    Ok(script)
}

/// The inode as it must be; what the tree does not say is as it is.
fn wanted(tree: &Tree, inode: &Inode, now: &Raw) -> Raw {
    let (mtime, mtime_extra) = ext4::time_words(inode.meta.mtime);
    let mut out = Raw {
        mode: inode.kind.type_bits() | inode.meta.mode,
        uid: inode.meta.uid,
        gid: inode.meta.gid,
        mtime,
        mtime_extra,
        ..*now
    };
    match &inode.kind {
        Node::Dir(names) => {
            // libext2fs counts past what 16 bits hold; ext4 says 1 for "too many".
            if names.len() > MANY && subdirectories(tree, names) > MANY {
                out.links = 1;
            }
            return out;
        }
        Node::Char(d) | Node::Block(d) => out.block = ext4::device_words(*d),
        Node::File(Content { len, .. }) => out.size = *len,
        Node::Symlink(target) => out.size = target.len() as u64,
        Node::Fifo | Node::Socket => {}
    }
    // Tree::link_inode keeps them below 65000.
    out.links = inode.links as u16;
    out
}

fn subdirectories(tree: &Tree, names: &BTreeMap<Vec<u8>, InodeId>) -> usize {
    names
        .values()
        .filter(|&&id| tree.names(id).is_some())
        .count()
}

/// Values of attributes as files, one per different value.
struct Values {
    dir: PathBuf,
    files: HashMap<Vec<u8>, String>,
}

impl Values {
    fn file(&mut self, value: &[u8]) -> Result<String> {
        if let Some(name) = self.files.get(value) {
            return Ok(name.clone());
        }
        if self.files.is_empty() {
            std::fs::create_dir(&self.dir).map_err(|e| Error::io("create", &self.dir, e))?;
        }
        let number = self.files.len();
        let at = self.dir.join(number.to_string());
        std::fs::write(&at, value).map_err(|e| Error::io("write", &at, e))?;
        let name = format!("xattr/{number}");
        self.files.insert(value.to_vec(), name.clone());
        Ok(name)
    }
}

/// Compares every inode with the tree.
fn verify(
    target: &Target<'_>,
    file: &File,
    tree: &Tree,
    map: &HashMap<InodeId, (u32, Raw)>,
) -> Result<()> {
    let mut left: HashMap<u32, InodeId> = map.iter().map(|(id, (ino, _))| (*ino, *id)).collect();
    let differs = |id: InodeId, how: String| {
        Error::corrupt(format!(
            "member {} did not get into the image as it is: {how}",
            show(&path_of(tree, id))
        ))
        .on(target.path())
    };
    ext4::inodes(file, &target.path(), target.offset, |ino, raw| {
        let Some(id) = left.remove(&ino) else {
            return Ok(());
        };
        let want = wanted(tree, tree.inode(id), &raw);
        if raw == want {
            return Ok(());
        }
        Err(differs(id, format!("{raw:?}, and it should be {want:?}")))
    })?;
    match left.values().next() {
        Some(&id) => Err(differs(id, "it is not there".to_owned())),
        None => Ok(()),
    }
}

/// Gives directories of more than a block the index that mke2fs does not: without it Linux searches
/// them from end to end, forever.
fn index_directories(target: &Target<'_>, tree: &Tree) -> Result<()> {
    let large = |inode: &Inode| match &inode.kind {
        Node::Dir(names) => names.keys().map(|n| n.len() + 8).sum::<usize>() > BLOCK as usize,
        _ => false,
    };
    if !tree.inodes().any(|(_, inode)| large(inode)) {
        return Ok(());
    }
    let out = tool::run("e2fsck", &["-fyD", &target.name()], target.work)?;
    match out.code {
        Some(0 | 1) => Ok(()),
        _ => Err(tool::failed("e2fsck", &target.path(), &out)),
    }
}

fn e2fsck(target: &Target<'_>) -> Result<()> {
    let out = tool::run("e2fsck", &["-fn", &target.name()], target.work)?;
    if out.code == Some(0) {
        return Ok(());
    }
    Err(tool::failed("e2fsck", &target.path(), &out))
}

/// A name of an inode, for messages.
fn path_of(tree: &Tree, id: InodeId) -> Vec<u8> {
    let mut out = b".".to_vec();
    let _ = tree.walk(|e| {
        if e.id == id {
            out = e.path.to_vec();
        }
        Ok(())
    });
    out
}
