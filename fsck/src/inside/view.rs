//! A private copy of a part of the guest's disk, in a file without a name.
//!
//! Holes stay holes, so it takes what the guest's data takes. Whether there is room is looked at
//! before the first byte is written: the directory may be on the host's own disk.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ploop::device::{Device, ReadLease, Segment, SegmentPlace};
use ploop::{Error, Kind, Result};

use crate::progress::{Meter, Progress, Stage};

/// Guest bytes mapped at a time, at least.
const WINDOW: u64 = 1 << 30;
/// Bytes read at a time.
const PIECE: u64 = 256 * 1024;
/// Zeros are left out by this unit.
const BLOCK: usize = 4096;
/// See [`View::patience`].
const PATIENCE: Duration = Duration::from_secs(600);
const PATIENCE_PER_GIB: Duration = Duration::from_secs(60);
/// One part in so many of the directory's room is left free.
const SPARE: u64 = 20;

/// See the module text.
#[derive(Debug)]
pub(super) struct View {
    file: File,
    /// Bytes of data in it, at most.
    data: u64,
    /// Guest bytes that could not be read, and are zeros here.
    pub(super) unknown: u64,
}

impl View {
    /// Copies `range` of the disk.
    pub(super) fn of(
        disk: &dyn Device,
        range: &Range<u64>,
        progress: &mut dyn Progress,
    ) -> Result<View> {
        let dir =
            std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let mut needed = 0;
        walk(disk, range, &mut |_, data, _, segment| {
            if !matches!(segment.place, SegmentPlace::Fault { .. }) {
                needed += data.end - data.start;
            }
            Ok(())
        })?;
        room(&dir, needed)?;
        let failed = |e| Error::io("make a copy of the disk for its checker in", &dir, e);
        let file = tempfile::tempfile_in(&dir).map_err(failed)?;
        let len = range.end - range.start;
        file.set_len(len).map_err(|e| {
            let fix =
                format!("Set TMPDIR to where a sparse file may have {len} bytes (XFS, btrfs)");
            failed(e).fix(fix)
        })?;
        let mut meter = Meter::new(progress, Stage::Copy, needed);
        let mut unknown = 0;
        let mut buf = vec![0; PIECE as usize];
        walk(disk, range, &mut |lease, data, skip, segment| {
            if matches!(segment.place, SegmentPlace::Fault { .. }) {
                unknown += data.end - data.start;
                return Ok(());
            }
            let mut at = data.start;
            while at < data.end {
                let n = (data.end - at).min(PIECE);
                let piece = &mut buf[..n as usize];
                match lease.read(segment, skip + (at - data.start), piece) {
                    Err(e) if e.kind() == Kind::Corrupt => {
                        unknown += n;
                        piece.fill(0);
                    }
                    read => read?,
                }
                for (block, i) in piece.chunks(BLOCK).zip(0u64..) {
                    if block.iter().any(|&b| b != 0) {
                        let to = at - range.start + i * BLOCK as u64;
                        file.write_all_at(block, to).map_err(failed)?;
                    }
                }
                meter.add(n);
                at += n;
            }
            Ok(())
        })?;
        Ok(View {
            file,
            data: needed,
            unknown,
        })
    }

    /// How long one look of a tool at it may take: far longer than any needs that gets on.
    pub(super) fn patience(&self) -> Duration {
        PATIENCE + PATIENCE_PER_GIB * u32::try_from(self.data >> 30).unwrap_or(u32::MAX)
    }

    /// A name that a child process can open it by.
    pub(super) fn path(&self) -> PathBuf {
        let (pid, fd) = (std::process::id(), self.file.as_raw_fd());
        PathBuf::from(format!("/proc/{pid}/fd/{fd}"))
    }

    /// Its bytes at `at`.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact_at(buf, at);
        read.map_err(|e| Error::io("read", "the copy of the disk", e))
    }
}

/// Takes a lease, a guest range that may hold data, and where in the segment it begins.
type Each<'a> = &'a mut dyn FnMut(&ReadLease, Range<u64>, u64, &Segment) -> Result<()>;

/// Calls `each` for what of `range` may be other than zeros, ascending.
fn walk(disk: &dyn Device, range: &Range<u64>, each: Each<'_>) -> Result<()> {
    let mut segments = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let end = at.saturating_add(WINDOW).min(range.end);
        segments.clear();
        let lease = disk.map(at..end, &mut segments)?;
        for s in &segments {
            let guest = s.offset..s.offset + s.len;
            match s.place {
                SegmentPlace::Hole => {}
                SegmentPlace::File { layer, offset } => {
                    let file = lease.file(layer);
                    let (mut from, to) = (offset, offset + s.len);
                    while let Some(data) = file.next_data(from, to)? {
                        let skip = data.start - offset;
                        let part = guest.start + skip..guest.start + (data.end - offset);
                        each(&lease, part, skip, s)?;
                        from = data.end;
                    }
                }
                _ => each(&lease, guest, 0, s)?,
            }
        }
        at = end;
    }
    Ok(())
}

/// Refuses to begin a copy that would fill the file system of `dir`.
fn room(dir: &Path, needed: u64) -> Result<()> {
    let stat = rustix::fs::statvfs(dir)
        .map_err(|e| Error::io("look for room in", dir, std::io::Error::from(e)))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if needed > free - free / SPARE {
        let what = format!(
            "the file system's checker needs a copy of the disk's data, {needed} bytes, and there \
             are {free} free"
        );
        return Err(Error::new(Kind::NoSpace, what)
            .on(dir)
            .fix("Set TMPDIR to a directory with more room"));
    }
    Ok(())
}
