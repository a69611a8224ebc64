//! A tar archive as a source: its members become the tree and the staged contents.
//!
//! ```text
//!   file ── gunzip / unzstd ── members.rs ── tar.rs ──┬─ Tree    names and attributes
//!           (by magic bytes)   headers, PAX           └─ Stage   contents, under numbers
//! ```
//!
//! Semantics are `tar -x`'s: the later member of one name wins, a hard link leads to an earlier
//! member. What `tar` warns about and goes on (absolute names, `..`, a cut archive) is an error
//! here. An archive without its end mark is one that was cut short.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use ploop::error::{Error, Result};

use super::members::{Member, Members};
use super::rules::refused;
use super::stage::Stage;
use super::tree::{Kind, Meta, Tree};
use super::{Progress, Step};

const CHUNK: usize = 256 << 10;

/// Reads the archive `path` into `tree` and `stage`.
pub(super) fn read(
    path: &Path,
    tree: &mut Tree,
    stage: &mut Stage,
    progress: &dyn Fn(Progress),
) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let meta = file.metadata().map_err(|e| Error::io("stat", path, e))?;
    if meta.is_dir() {
        return Err(Error::invalid("a directory where a tar archive is expected").on(path));
    }
    let total = meta.is_file().then_some(meta.len());
    let read = Rc::new(Cell::new(0));
    let counted = Counted {
        inner: file,
        read: Rc::clone(&read),
    };
    let mut members = Members::new(decompress(counted, path)?);
    let mut entries = 0u64;
    while let Some(member) = members.next().map_err(|e| e.or_on(path))? {
        take(&mut members, member, tree, stage).map_err(|e| e.or_on(path))?;
        entries += 1;
        if entries.is_multiple_of(256) {
            progress(Progress {
                step: Step::Read,
                done: read.get(),
                total,
            });
        }
    }
    if entries == 0 {
        return Err(Error::invalid("the archive has no member").on(path));
    }
    members.drain().map_err(|e| e.or_on(path))?;
    progress(Progress {
        step: Step::Read,
        done: read.get(),
        total,
    });
    Ok(())
}

/// Puts the archive's path on an error that has none yet.
trait OrOn {
    fn or_on(self, path: &Path) -> Error;
}

impl OrOn for Error {
    fn or_on(self, path: &Path) -> Error {
        if self.path().is_some() {
            self
        } else {
            self.on(path)
        }
    }
}

fn take(
    members: &mut Members<Box<dyn Read>>,
    member: Member,
    tree: &mut Tree,
    stage: &mut Stage,
) -> Result<()> {
    let path = member.path;
    let freed = match member.kind {
        b'1' => tree.link(&path, &member.link)?,
        b'0' | b'7' | b'S' => {
            // The name is judged before a byte is staged.
            super::rules::components(&path)?;
            let content = content(members, &path, member.len, &member.map, stage)?;
            tree.insert(&path, Kind::File(content), member.meta)?.1
        }
        kind => {
            let node = node(kind, &path, member.link, member.device, &member.meta)?;
            tree.insert(&path, node, member.meta)?.1
        }
    };
    freed.map_or(Ok(()), |content| stage.drop_content(content))
}

fn node(
    kind: u8,
    path: &[u8],
    link: Vec<u8>,
    device: Option<super::tree::Device>,
    meta: &Meta,
) -> Result<Kind> {
    let device = || device.ok_or_else(|| refused(path, "it is a device without a number"));
    if kind != b'5' && meta.xattrs.contains_key(&b"system.posix_acl_default"[..]) {
        return Err(refused(path, "only a directory has a default ACL"));
    }
    match kind {
        b'2' => Ok(Kind::Symlink(link)),
        b'3' => Ok(Kind::Char(device()?)),
        b'4' => Ok(Kind::Block(device()?)),
        b'5' | b'D' => Ok(Kind::dir()),
        b'6' => Ok(Kind::Fifo),
        other => Err(Error::unsupported(format!(
            "member {} has type {:?}, which this program does not know",
            super::rules::show(path),
            char::from(other)
        ))),
    }
}

/// Stages the content of the current member: `map` says which ranges of its `len` bytes are in the
/// archive, in order.
fn content(
    members: &mut Members<Box<dyn Read>>,
    path: &[u8],
    len: u64,
    map: &[(u64, u64)],
    stage: &mut Stage,
) -> Result<super::tree::Content> {
    let mut writer = stage.begin(path, len)?;
    let mut buf = vec![0; len.min(CHUNK as u64) as usize];
    for &(start, bytes) in map {
        let end = start + bytes;
        let mut at = start;
        while at < end {
            let want = (end - at).min(CHUNK as u64) as usize;
            members.data(&mut buf[..want])?;
            writer.put(at, &buf[..want])?;
            at += want as u64;
        }
    }
    writer.finish()
}

/// What the first bytes say the file is, and what makes a tar of it where we don't.
const FOREIGN: [(&[u8], &str, &str); 7] = [
    (b"\xfd7zXZ\0", "xz", "xz -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
    (b"\x1f\x9d", "compress", "gzip -dc"),
    (b"LZIP", "lzip", "lzip -dc"),
    (b"\x5d\0\0", "lzma", "xz --format=lzma -dc"),
    (b"\x89LZO", "lzop", "lzop -dc"),
];

fn decompress(mut file: Counted, path: &Path) -> Result<Box<dyn Read>> {
    let mut magic = [0; 8];
    let mut got = 0;
    while got < magic.len() {
        match file.read(&mut magic[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read", path, e)),
        }
    }
    let magic = &magic[..got];
    for (bytes, name, tool) in FOREIGN {
        if magic.starts_with(bytes) {
            return Err(
                Error::unsupported(format!("the archive is compressed with {name}"))
                    .on(path)
                    .fix(format!(
                        "Convert it: {tool} '{}' | zstd > root.tar.zst",
                        path.display()
                    )),
            );
        }
    }
    let whole = BufReader::with_capacity(CHUNK, io::Cursor::new(magic.to_vec()).chain(file));
    if magic.starts_with(b"\x1f\x8b") {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(whole)));
    }
    if magic.starts_with(b"\x28\xb5\x2f\xfd") {
        let decoder = zstd::stream::read::Decoder::with_buffer(whole)
            .map_err(|e| Error::io("decompress", path, e))?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(whole))
}

/// Counts what was read of the file itself, for progress.
struct Counted {
    inner: File,
    read: Rc<Cell<u64>>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.read.set(self.read.get() + n as u64);
        Ok(n)
    }
}
