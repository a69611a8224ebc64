//! An image as it will be: the file, with planned changes laid over it in memory. The checker runs
//! on it, so a plan is judged before anything is touched.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ploop::error::{Error, Result};
use ploop::store::{FileId, StoreFile, read_or_zero};

use super::fields::HeaderBytes;

/// Bytes that get a second home: `len` bytes at `from` are written to `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) len: u64,
}

/// Reading only; what would write is refused.
#[derive(Clone, Debug)]
pub(super) struct View {
    file: Arc<dyn StoreFile>,
    /// Length of the file itself: it ends there, however long the view is.
    held: u64,
    /// Another file that the first bytes are taken from, and how many.
    backup: Option<(Arc<dyn StoreFile>, u64)>,
    pub(super) len: u64,
    pub(super) header: Option<HeaderBytes>,
    /// BAT entries, by their byte in the file.
    pub(super) words: BTreeMap<u64, u32>,
    /// Ascending by `to`, not overlapping; none is from where another goes to.
    pub(super) copies: Vec<Copy>,
}

impl View {
    /// The file as it is.
    pub(super) fn of(file: &Arc<dyn StoreFile>) -> Result<View> {
        let held = file.len()?;
        Ok(View {
            file: file.clone(),
            held,
            backup: None,
            len: held,
            header: None,
            words: BTreeMap::new(),
            copies: Vec::new(),
        })
    }

    /// The file with its first `len` bytes as they are in `backup`.
    pub(super) fn restored(
        file: &Arc<dyn StoreFile>,
        backup: &Arc<dyn StoreFile>,
        len: u64,
    ) -> Result<View> {
        let mut view = View::of(file)?;
        view.len = view.len.max(len);
        view.backup = Some((backup.clone(), len));
        Ok(view)
    }

    /// The file's bytes, or the backup's, without the changes.
    fn base(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        if let Some((backup, len)) = &self.backup
            && offset < *len
        {
            done = (len - offset).min(buf.len() as u64) as usize;
            read_or_zero(backup.as_ref(), &mut buf[..done], offset)?;
        }
        read_or_zero(self.file.as_ref(), &mut buf[done..], offset + done as u64)
    }

    /// Copies that reach into `range`.
    fn copies_in(&self, range: &Range<u64>) -> &[Copy] {
        let first = self.copies.partition_point(|c| c.to + c.len <= range.start);
        let count = self.copies[first..].partition_point(|c| c.to < range.end);
        &self.copies[first..first + count]
    }

    /// The first range that a copy of data is in: a copy of a hole is one.
    fn next_copied(&self, from: u64, to: u64) -> Result<Option<Range<u64>>> {
        for copy in self.copies_in(&(from..to)) {
            let start = copy.from + from.saturating_sub(copy.to).min(copy.len);
            let end = copy.from + copy.len;
            let data = match &self.backup {
                Some((_, len)) if start < *len => Some(start..end),
                _ => self.file.next_data(start, end)?,
            };
            if let Some(data) = data.filter(|d| d.start < end) {
                let at = copy.to + (data.start - copy.from);
                return Ok(Some(at..copy.to + (data.end.min(end) - copy.from)));
            }
        }
        Ok(None)
    }

    fn refuse<T>(&self) -> Result<T> {
        Err(Error::invalid("a plan does not write").on(self.file.path()))
    }
}

impl StoreFile for View {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn id(&self) -> FileId {
        self.file.id()
    }

    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let got = self.len.saturating_sub(offset).min(buf.len() as u64);
        let buf = &mut buf[..got as usize];
        let range = offset..offset + got;
        self.base(buf, offset)?;
        for copy in self.copies_in(&range) {
            let start = copy.to.max(range.start);
            let end = (copy.to + copy.len).min(range.end);
            let part = &mut buf[(start - offset) as usize..(end - offset) as usize];
            self.base(part, copy.from + (start - copy.to))?;
        }
        if let Some(header) = &self.header
            && offset < header.len() as u64
        {
            let from = offset as usize;
            let count = (header.len() - from).min(buf.len());
            buf[..count].copy_from_slice(&header[from..from + count]);
        }
        for (&at, word) in self.words.range(offset.saturating_sub(3)..range.end) {
            for (i, byte) in word.to_le_bytes().into_iter().enumerate() {
                let here = at + i as u64;
                if range.contains(&here) {
                    buf[(here - offset) as usize] = byte;
                }
            }
        }
        Ok(got as usize)
    }

    fn next_data(&self, from: u64, to: u64) -> Result<Option<Range<u64>>> {
        let to = to.min(self.len);
        if from >= to {
            return Ok(None);
        }
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut own = from;
        if let Some((backup, len)) = &self.backup {
            found.extend(backup.next_data(from, to.min(*len))?);
            own = own.max(*len);
        }
        if own < to.min(self.held) {
            found.extend(self.file.next_data(own, to.min(self.held))?);
        }
        if let Some(header) = &self.header {
            found.push(0..header.len() as u64);
        }
        found.extend(
            self.words
                .range(from.saturating_sub(3)..to)
                .next()
                .map(|(&at, _)| at..at + 4),
        );
        found.extend(self.next_copied(from, to)?);
        // Whole words: the file may end within one.
        let whole = found
            .into_iter()
            .map(|r| r.start..r.end.next_multiple_of(4));
        let clipped = whole.map(|r| r.start.max(from)..r.end.min(to));
        Ok(clipped
            .filter(|r| !r.is_empty())
            .min_by_key(|r| (r.start, u64::MAX - r.end)))
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        self.refuse()
    }

    fn sync(&self) -> Result<()> {
        self.refuse()
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        self.refuse()
    }

    fn punch(&self, _offset: u64, _len: u64) -> Result<()> {
        self.refuse()
    }

    fn zero(&self, _offset: u64, _len: u64) -> Result<()> {
        self.refuse()
    }

    fn reserve(&self, _offset: u64, _len: u64) -> Result<()> {
        self.refuse()
    }

    fn set_mode(&self, _mode: u32) -> Result<()> {
        self.refuse()
    }

    fn lock_bytes(&self, _offset: u64, _len: u64) -> Result<()> {
        self.refuse()
    }

    fn unlock_bytes(&self, _offset: u64, _len: u64) -> Result<()> {
        self.refuse()
    }

    fn foreign_lock(&self, _offset: u64, _len: u64) -> Result<bool> {
        self.refuse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop::store::Store;
    use ploop::store::memory::MemoryStore;

    #[test]
    fn it_reads_as_the_file_will_read_when_the_changes_are_made() {
        let store = MemoryStore::new();
        let file = store.create(Path::new("/a"), 0o600).unwrap();
        let bytes: Vec<u8> = (0..200).collect();
        file.write_at(&bytes, 0).unwrap();
        let mut view = View::of(&file).unwrap();
        view.len = 230;
        view.words.insert(70, 0xAABB_CCDD);
        view.copies.push(Copy {
            from: 0,
            to: 190,
            len: 30,
        });
        view.header = Some([7; 64]);
        let mut expected = bytes.clone();
        expected.resize(230, 0);
        expected.copy_within(0..30, 190);
        expected[70..74].copy_from_slice(&[0xDD, 0xCC, 0xBB, 0xAA]);
        expected[..64].fill(7);
        for start in 0..230 {
            for len in [1, 2, 5, 64, 300] {
                let mut buf = vec![9; len];
                let got = view.read_at(&mut buf, start as u64).unwrap();
                assert_eq!(got, len.min(230 - start));
                assert_eq!(buf[..got], expected[start..start + got], "{start} {len}");
            }
        }
        let mut at = 0;
        let mut data = vec![false; 230];
        while let Some(range) = view.next_data(at, 500).unwrap() {
            data[range.start as usize..range.end as usize].fill(true);
            at = range.end;
        }
        assert!((0..230).all(|i| data[i] || expected[i] == 0));
    }
}
