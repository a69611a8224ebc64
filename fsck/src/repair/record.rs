//! The undo file: what a repair changed, byte by byte, as it was and as it is after.
//!
//! ```text
//!  magic (8)  version (u32 LE)
//!  record*    kind (u32)  length (u32)  crc32 of kind, length and payload (u32)  payload
//! ```
//!
//! | kind | payload |
//! |---|---|
//! | 1 root | the directory that all names are in, absolute |
//! | 2 file | length before, while clusters moved, after (u64 each); end of the table (u64); crc32 of the table's other sectors (u32); name |
//! | 3 bytes | of the last file: offset (u64), number of old bytes (u32), they, the new bytes; no new ones where the file ends before |
//! | 4 move | length of the name before (u32), it, the name after |
//! | 5 replace | length of the name (u32), of the old bytes (u32), name, old bytes, new bytes |
//! | 6 end | number of records before it (u64) |
//!
//! Numbers are little-endian, names are bytes and relative to the root. A file without its end
//! record was never finished, and so nothing was changed yet. Whoever reads one holds one record in
//! memory, and takes none for longer than [`PAYLOAD_MAX`].

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use ploop::descriptor::MAX_BYTES;
use ploop::store::{Store, StoreFile, read_exact};
use ploop::{Error, Result};

const MAGIC: &[u8; 8] = b"ploopUND";
const VERSION: u32 = 1;
const START: u64 = 12;
const HEAD: usize = 12;
/// Two descriptors and their name.
const PAYLOAD_MAX: usize = 2 * MAX_BYTES + 64 * 1024;
/// Bytes of one side of a bytes record, at most.
pub(super) const PIECE: usize = 64 * 1024;
const NAME_MAX: usize = 4096;

/// See the module text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Root(PathBuf),
    File {
        name: PathBuf,
        lens: [u64; 3],
        table_end: u64,
        rest: u32,
        /// The same of the bytes behind the old length, when the repair was done.
        tail: u32,
    },
    Bytes {
        offset: u64,
        old: Vec<u8>,
        new: Vec<u8>,
    },
    Move {
        from: PathBuf,
        to: PathBuf,
    },
    Replace {
        name: PathBuf,
        old: Vec<u8>,
        new: Vec<u8>,
    },
    End {
        records: u64,
    },
}

impl Record {
    fn kind(&self) -> u32 {
        match self {
            Record::Root(_) => 1,
            Record::File { .. } => 2,
            Record::Bytes { .. } => 3,
            Record::Move { .. } => 4,
            Record::Replace { .. } => 5,
            Record::End { .. } => 6,
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        let mut put = |bytes: &[u8]| payload.extend_from_slice(bytes);
        let len = |bytes: &[u8]| (bytes.len() as u32).to_le_bytes();
        match self {
            Record::Root(path) => put(path.as_os_str().as_bytes()),
            Record::File {
                name,
                lens,
                table_end,
                rest,
                tail,
            } => {
                lens.iter().for_each(|n| put(&n.to_le_bytes()));
                put(&table_end.to_le_bytes());
                put(&rest.to_le_bytes());
                put(&tail.to_le_bytes());
                put(name.as_os_str().as_bytes());
            }
            Record::Bytes { offset, old, new } => {
                put(&offset.to_le_bytes());
                put(&len(old));
                put(old);
                put(new);
            }
            Record::Move { from, to } => {
                put(&len(from.as_os_str().as_bytes()));
                put(from.as_os_str().as_bytes());
                put(to.as_os_str().as_bytes());
            }
            Record::Replace { name, old, new } => {
                put(&len(name.as_os_str().as_bytes()));
                put(&len(old));
                put(name.as_os_str().as_bytes());
                put(old);
                put(new);
            }
            Record::End { records } => put(&records.to_le_bytes()),
        }
        let mut out = Vec::with_capacity(HEAD + payload.len());
        out.extend(self.kind().to_le_bytes());
        out.extend(len(&payload));
        out.extend(checksum(&out, &payload).to_le_bytes());
        out.extend(payload);
        out
    }

    fn decode(kind: u32, payload: &[u8]) -> Option<Record> {
        let mut p = Parser(payload);
        let record = match kind {
            1 => Record::Root(path(p.0, false)?),
            2 => Record::File {
                lens: [p.place()?, p.place()?, p.place()?],
                table_end: p.place()?,
                rest: p.number()?,
                tail: p.number()?,
                name: path(p.0, true)?,
            },
            3 => {
                let offset = p.long()?;
                let old = p.number()? as usize;
                let old = p.bytes(old)?.to_vec();
                let new = p.0.to_vec();
                let sizes = (1..=PIECE).contains(&old.len())
                    && (new.is_empty() || new.len() == old.len())
                    && offset.checked_add(old.len() as u64)? <= i64::MAX as u64;
                sizes.then_some(Record::Bytes { offset, old, new })?
            }
            4 => {
                let from = p.number()? as usize;
                Record::Move {
                    from: path(p.bytes(from)?, true)?,
                    to: path(p.0, true)?,
                }
            }
            5 => {
                let (name, old) = (p.number()? as usize, p.number()? as usize);
                Record::Replace {
                    name: path(p.bytes(name)?, true)?,
                    old: p.bytes(old)?.to_vec(),
                    new: p.0.to_vec(),
                }
            }
            6 => Record::End { records: p.long()? },
            _ => return None,
        };
        Some(record)
    }
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    hash.update(&head[..8]);
    hash.update(payload);
    hash.finalize()
}

/// A name: relative and going down only, or absolute.
fn path(bytes: &[u8], relative: bool) -> Option<PathBuf> {
    let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
    let down = path.components().all(|c| match c {
        Component::Normal(_) => true,
        Component::RootDir => !relative,
        _ => false,
    });
    let fits = !bytes.is_empty() && bytes.len() <= NAME_MAX && !bytes.contains(&0);
    (down && fits && path.is_relative() == relative).then_some(path)
}

struct Parser<'a>(&'a [u8]);

impl<'a> Parser<'a> {
    fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn number(&mut self) -> Option<u32> {
        let bytes = self.bytes(4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    }

    /// A byte number that a file can have.
    fn place(&mut self) -> Option<u64> {
        self.long().filter(|&n| n <= i64::MAX as u64)
    }

    fn long(&mut self) -> Option<u64> {
        let bytes = self.bytes(8)?.try_into().ok()?;
        Some(u64::from_le_bytes(bytes))
    }
}

/// Writes an undo file.
#[derive(Debug)]
pub(super) struct Writer {
    file: Arc<dyn StoreFile>,
    at: u64,
    records: u64,
}

impl Writer {
    /// A new file at `path`. Error: `Exists`, telling what that may mean.
    pub(super) fn create(store: &dyn Store, path: &Path) -> Result<Writer> {
        let file = store.create(path, 0o600).map_err(|e| match e.kind() {
            ploop::Kind::Exists => e.fix(format!(
                "If it is of a repair that was cut short, take that back: ploop check --undo {}",
                path.display()
            )),
            _ => e,
        })?;
        let mut head = MAGIC.to_vec();
        head.extend(VERSION.to_le_bytes());
        file.write_at(&head, 0)?;
        Ok(Writer {
            file,
            at: START,
            records: 0,
        })
    }

    pub(super) fn put(&mut self, record: &Record) -> Result<()> {
        let bytes = record.encode();
        self.file.write_at(&bytes, self.at)?;
        self.at += bytes.len() as u64;
        self.records += 1;
        Ok(())
    }

    /// Ends the file and makes it durable; its name is the caller's.
    pub(super) fn finish(mut self) -> Result<()> {
        let records = self.records;
        self.put(&Record::End { records })?;
        self.file.sync()
    }
}

/// Reads an undo file, as often as need be.
#[derive(Debug)]
pub(super) struct Reader {
    file: Arc<dyn StoreFile>,
    at: u64,
    records: u64,
}

impl Reader {
    /// From the first record on. Error: `Corrupt` for any other file.
    pub(super) fn new(file: &Arc<dyn StoreFile>) -> Result<Reader> {
        let wrong = || Error::corrupt("this is no undo file").on(file.path());
        let mut head = [0; START as usize];
        if file.read_at(&mut head, 0)? < head.len() || !head.starts_with(MAGIC) {
            return Err(wrong());
        }
        if head[8..] != VERSION.to_le_bytes() {
            let what = "an undo file of another version of this program";
            return Err(Error::unsupported(what).on(file.path()));
        }
        Ok(Reader {
            file: file.clone(),
            at: START,
            records: 0,
        })
    }

    /// The next record; `None` after the end record. Error: `Corrupt`, also for a file without end.
    pub(super) fn next(&mut self) -> Result<Option<Record>> {
        let at = self.at;
        let damaged = |what: &str| Error::corrupt(what).on(self.file.path()).at(at);
        let mut head = [0; HEAD];
        read_exact(self.file.as_ref(), &mut head, at).map_err(|e| match e.kind() {
            ploop::Kind::Corrupt => damaged("the undo file was not finished: nothing was changed"),
            _ => e,
        })?;
        let mut parser = Parser(&head);
        let (kind, len, sum) = match (parser.number(), parser.number(), parser.number()) {
            (Some(kind), Some(len), Some(sum)) => (kind, len as usize, sum),
            _ => return Err(damaged("the undo file is damaged")),
        };
        let left = self.file.len()?.saturating_sub(at + HEAD as u64);
        if len > PAYLOAD_MAX || len as u64 > left {
            return Err(damaged("the undo file is damaged"));
        }
        let mut payload = vec![0; len];
        read_exact(self.file.as_ref(), &mut payload, at + HEAD as u64)?;
        if checksum(&head, &payload) != sum {
            return Err(damaged("the undo file is damaged"));
        }
        let Some(record) = Record::decode(kind, &payload) else {
            return Err(damaged("the undo file is damaged"));
        };
        if let Record::End { records } = record {
            return match records == self.records {
                true => Ok(None),
                false => Err(damaged("the undo file lacks records")),
            };
        }
        self.at += (HEAD + len) as u64;
        self.records += 1;
        Ok(Some(record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop::store::memory::MemoryStore;

    fn all() -> Vec<Record> {
        vec![
            Record::Root("/d".into()),
            Record::File {
                name: "root.hds".into(),
                lens: [1, 2, 3],
                table_end: 4,
                rest: 5,
                tail: 6,
            },
            Record::Bytes {
                offset: 512,
                old: vec![1; 512],
                new: vec![2; 512],
            },
            Record::Bytes {
                offset: 1024,
                old: vec![1; 5],
                new: vec![],
            },
            Record::Move {
                from: "a.idx".into(),
                to: ".ploop/lost+found/a.idx".into(),
            },
            Record::Replace {
                name: "DiskDescriptor.xml".into(),
                old: b"<a/>".to_vec(),
                new: vec![],
            },
        ]
    }

    #[test]
    fn records_are_read_as_they_were_written_and_damage_is_noticed() {
        let store = MemoryStore::new();
        let path = Path::new("/u");
        let mut writer = Writer::create(&store, path).unwrap();
        all().iter().for_each(|r| writer.put(r).unwrap());
        writer.finish().unwrap();
        let open = || store.open(path, ploop::store::Access::Write).unwrap();
        let read = || -> Result<Vec<Record>> {
            let mut reader = Reader::new(&open())?;
            let mut out = Vec::new();
            while let Some(record) = reader.next()? {
                out.push(record);
            }
            Ok(out)
        };
        assert_eq!(read().unwrap(), all());
        let file = open();
        let len = file.len().unwrap();
        for at in 0..len {
            let mut byte = [0];
            file.read_at(&mut byte, at).unwrap();
            file.write_at(&[byte[0] ^ 0x41], at).unwrap();
            assert!(read().is_err(), "byte {at}");
            file.write_at(&byte, at).unwrap();
        }
        let mut whole = vec![0; len as usize];
        file.read_at(&mut whole, 0).unwrap();
        for cut in 0..len {
            file.set_len(cut).unwrap();
            assert!(read().is_err(), "{cut} bytes");
            file.write_at(&whole, 0).unwrap();
        }
        assert_eq!(read().unwrap(), all());
    }

    #[test]
    fn names_that_leave_the_root_are_no_names() {
        for name in ["", "/a", "..", "a/../../b", "./a", "a\0b"] {
            assert_eq!(path(name.as_bytes(), true), None, "{name:?}");
        }
        assert!(path(b".ploop/lost+found/a", true).is_some());
        assert!(path(b"a", false).is_none() && path(b"/a/../b", false).is_none());
    }
}
