//! The members of a tar stream: ustar, GNU and PAX headers put together.
//!
//! ```text
//!  [x: PAX records] [L: long name] [K: long link] header  data, padded to 512   …  two zero blocks
//!   └─ override ─────┴─ override ──┴─▶ one Member, then its data by Members::data
//! ```
//!
//! The fields of one header are the `tar` crate's to decode. The stream is framed here, because
//! PAX records are counted, not lines: a capability or an ACL may hold any byte.

use std::collections::BTreeMap;
use std::io::{self, Read};

use ploop::error::{Error, Result};
use tar::Header;

use super::acl;
use super::pax::{self, Records};
use super::rules::{refused, show};
use super::sparse;
use super::tree::{Device, Meta, Time};

/// Bytes of a tar block.
pub(super) const BLOCK: usize = 512;
/// Most bytes of a GNU long name.
const NAME_MAX: u64 = 64 << 10;

/// One member, all its headers put together. Its data is the stream's next.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    /// Target of a symbolic or hard link.
    pub(super) link: Vec<u8>,
    /// The type byte; a regular file is always `0`, `7` or `S`.
    pub(super) kind: u8,
    pub(super) meta: Meta,
    pub(super) device: Option<Device>,
    /// Length of the content.
    pub(super) len: u64,
    /// The ranges (start, bytes) of the content that the archive holds, ascending, inside `len`.
    pub(super) map: Vec<(u64, u64)>,
}

/// The reader. Offsets in its errors are those of the decompressed stream.
#[derive(Debug)]
pub(super) struct Members<R> {
    inner: R,
    offset: u64,
    /// Data of the current member that was not read yet, and its padding.
    left: u64,
    padding: u64,
    global: Records,
}

impl<R: Read> Members<R> {
    pub(super) fn new(inner: R) -> Members<R> {
        Members {
            inner,
            offset: 0,
            left: 0,
            padding: 0,
            global: Records::default(),
        }
    }

    /// The next member; `None` after the end mark.
    pub(super) fn next(&mut self) -> Result<Option<Member>> {
        let mut own = Records::default();
        let (mut long_name, mut long_link) = (None, None);
        loop {
            self.skip_rest()?;
            let at = self.offset;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = || field(header.entry_size(), "size", at);
            match header.entry_type().as_byte() {
                b'x' => own.extend(&self.record_block(size()?, pax::PAX_MAX as u64, at)?, at)?,
                b'g' => {
                    let block = self.record_block(size()?, pax::PAX_MAX as u64, at)?;
                    self.global.extend(&block, at)?;
                }
                b'X' => {
                    return Err(Error::unsupported("Solaris' own extended headers (type X)").at(at));
                }
                b'L' => long_name = Some(self.long(size()?, at)?),
                b'K' => long_link = Some(self.long(size()?, at)?),
                b'V' => self.expect(size()?),
                b'M' => {
                    return Err(Error::unsupported("the archive continues another volume").at(at));
                }
                _ => {
                    let records = self.global.overlaid(own);
                    return self
                        .member(&header, records, long_name, long_link, at)
                        .map(Some);
                }
            }
        }
    }

    fn member(
        &mut self,
        header: &Header,
        pax: Records,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        at: u64,
    ) -> Result<Member> {
        let in_header = || header.path_bytes().into_owned();
        let path = pax.take_name(long_name, in_header);
        let link = match (pax.get(b"linkpath"), long_link) {
            (Some(link), _) => link.to_vec(),
            (None, Some(link)) => link,
            (None, None) => header
                .link_name_bytes()
                .map(|b| b.into_owned())
                .unwrap_or_default(),
        };
        let mut kind = header.entry_type().as_byte();
        if matches!(kind, 0 | b'0') {
            // Before ustar a directory was a file whose name ends in a slash.
            kind = if path.ends_with(b"/") { b'5' } else { b'0' };
        }
        let named = |e: Error| e.while_doing(format!("member {}", show(&path)));
        let meta = meta(header, &pax, &path, at)?;
        let stored = match pax.number(b"size").map_err(named)? {
            Some(size) => size,
            None => field(header.entry_size(), "size", at)?,
        };
        // A hard link's size is that of its target; no data follows, whatever it says.
        self.expect(if kind == b'1' { 0 } else { stored });
        let (len, map) = match kind {
            b'S' => sparse::old_gnu(self, header, at).map_err(named)?,
            b'0' | b'7' => match sparse::pax(self, &pax).map_err(named)? {
                Some(sparse) => sparse,
                None => (stored, vec![(0, stored)]),
            },
            _ => (0, Vec::new()),
        };
        sparse::check(len, &map, self.left).map_err(|e| named(e).at(at))?;
        let device = match kind {
            b'3' | b'4' => Some(Device {
                major: field(header.device_major(), "major number", at)?.unwrap_or(0),
                minor: field(header.device_minor(), "minor number", at)?.unwrap_or(0),
            }),
            _ => None,
        };
        Ok(Member {
            path,
            link,
            kind,
            meta,
            device,
            len,
            map,
        })
    }

    /// Reads data of the current member, which has at least that much left.
    pub(super) fn data(&mut self, buf: &mut [u8]) -> Result<()> {
        if buf.len() as u64 > self.left {
            return Err(
                Error::corrupt("a member's data is shorter than its map says").at(self.offset),
            );
        }
        self.exact(buf)?;
        self.left -= buf.len() as u64;
        Ok(())
    }

    /// A whole block that belongs to a header and is not counted in the member's size.
    pub(super) fn extra_block(&mut self) -> Result<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        self.exact(&mut block)?;
        Ok(block)
    }

    /// Reads on to the end of the stream: a compressed one is whole only if its end is.
    pub(super) fn drain(mut self) -> Result<()> {
        let mut buf = vec![0; 64 << 10];
        loop {
            match self.inner.read(&mut buf) {
                Ok(0) => return Ok(()),
                Ok(n) => self.offset += n as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
    }

    fn expect(&mut self, size: u64) {
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn skip_rest(&mut self) -> Result<()> {
        let mut rest = self.left.saturating_add(self.padding);
        (self.left, self.padding) = (0, 0);
        let mut buf = [0; 4096];
        while rest > 0 {
            let n = rest.min(buf.len() as u64) as usize;
            self.exact(&mut buf[..n])?;
            rest -= n as u64;
        }
        Ok(())
    }

    /// The next header, checksum verified; `None` at the end mark.
    fn header(&mut self) -> Result<Option<Header>> {
        let at = self.offset;
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut got = 0;
        while got < BLOCK {
            match self.inner.read(&mut block[got..]) {
                Ok(0) if got == 0 && at > 0 => {
                    return Err(cut(at).while_doing("no end mark where the next member would be"));
                }
                Ok(0) if at > 0 => return Err(cut(at + got as u64)),
                Ok(0) => return Err(Error::corrupt("this is not a tar archive")),
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        self.offset += BLOCK as u64;
        if block.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        if !checksum_matches(
            block,
            field(Header::from_byte_slice(block).cksum(), "sum", at),
        ) {
            let what = if at == 0 {
                "this is not a tar archive: its first header has a wrong checksum"
            } else {
                "the archive is damaged: the header of a member has a wrong checksum"
            };
            return Err(Error::corrupt(what).at(at));
        }
        Ok(Some(header))
    }

    fn record_block(&mut self, size: u64, max: u64, at: u64) -> Result<Vec<u8>> {
        if size > max {
            return Err(Error::unsupported(format!(
                "an extended header of {size} bytes; the limit is {max}"
            ))
            .at(at));
        }
        self.expect(size);
        let mut out = vec![0; size as usize];
        self.data(&mut out)?;
        Ok(out)
    }

    fn long(&mut self, size: u64, at: u64) -> Result<Vec<u8>> {
        let mut name = self.record_block(size, NAME_MAX, at)?;
        if let Some(end) = name.iter().position(|&b| b == 0) {
            name.truncate(end);
        }
        Ok(name)
    }

    fn exact(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut got = 0;
        while got < buf.len() {
            match self.inner.read(&mut buf[got..]) {
                Ok(0) => return Err(cut(self.offset)),
                Ok(n) => {
                    got += n;
                    self.offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(())
    }

    fn failed(&self, e: io::Error) -> Error {
        let error = match e.kind() {
            io::ErrorKind::UnexpectedEof => cut(self.offset),
            // An operating system's error carries its number; a decompressor's does not.
            _ if e.raw_os_error().is_some() => Error::new(ploop::error::Kind::Io, "read"),
            _ => Error::corrupt("the compressed archive is damaged"),
        };
        error.at(self.offset).caused_by(e)
    }
}

fn cut(offset: u64) -> Error {
    Error::corrupt("the archive ends too early: it was cut short").at(offset)
}

/// The sum over the header with its own field as spaces; old writers summed signed bytes.
fn checksum_matches(block: &[u8; BLOCK], stored: Result<u32>) -> bool {
    let Ok(stored) = stored else { return false };
    let byte = |(i, &b): (usize, &u8)| if (148..156).contains(&i) { b' ' } else { b };
    let unsigned: u32 = block.iter().enumerate().map(|x| u32::from(byte(x))).sum();
    let signed: i32 = block
        .iter()
        .enumerate()
        .map(|x| i32::from(byte(x).cast_signed()))
        .sum();
    stored == unsigned || i64::from(stored) == i64::from(signed)
}

fn field<T>(value: io::Result<T>, name: &str, at: u64) -> Result<T> {
    value.map_err(|e| {
        Error::corrupt(format!("the {name} in a header"))
            .at(at)
            .caused_by(e)
    })
}

fn meta(header: &Header, pax: &Records, path: &[u8], at: u64) -> Result<Meta> {
    let owner = |key: &'static [u8], in_header: io::Result<u64>| -> Result<u32> {
        let id = match pax.number(key)? {
            Some(id) => id,
            None => field(in_header, "owner", at)?,
        };
        let name = String::from_utf8_lossy(key);
        u32::try_from(id).map_err(|_| refused(path, &format!("its {name} {id} is over 32 bits")))
    };
    let mtime = match pax.get(b"mtime") {
        Some(text) => pax::time(text).ok_or_else(|| refused(path, "its mtime is no number"))?,
        None => Time {
            sec: field(header.mtime(), "time", at)?.cast_signed(),
            nsec: 0,
        },
    };
    Ok(Meta {
        mode: (field(header.mode(), "mode", at)? & 0o7777) as u16,
        uid: owner(b"uid", header.uid())?,
        gid: owner(b"gid", header.gid())?,
        mtime,
        xattrs: xattrs(pax, path)?,
    })
}

/// The extended attributes that the records hold, in each of the dialects.
fn xattrs(pax: &Records, path: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut out = BTreeMap::new();
    for (key, value) in pax.iter() {
        let acl = |text| {
            acl::from_text(text)
                .map_err(|e| e.while_doing(format!("the ACL of member {}", show(path))))
        };
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            out.insert(pax::unescape(name), value.to_vec());
        } else if key == b"SCHILY.acl.access" {
            if let Some(value) = acl(value)?.filter(|a| a.is_more_than_mode()) {
                out.entry(b"system.posix_acl_access".to_vec())
                    .or_insert(value.to_xattr());
            }
        } else if key == b"SCHILY.acl.default" {
            if let Some(value) = acl(value)? {
                out.entry(b"system.posix_acl_default".to_vec())
                    .or_insert(value.to_xattr());
            }
        } else if key == b"RHT.security.selinux" {
            let mut value = value.to_vec();
            value.push(0);
            out.entry(b"security.selinux".to_vec()).or_insert(value);
        }
    }
    // bsdtar writes both dialects; alone, this one is not read.
    for (key, _) in pax.iter() {
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.")
            && !out.contains_key(name)
        {
            return Err(Error::unsupported(format!(
                "member {} has the attribute {} in libarchive's own form only",
                show(path),
                show(name)
            ))
            .fix("Make the archive with GNU tar: tar --xattrs --xattrs-include='*'"));
        }
    }
    Ok(out)
}
