//! The way of long reads that need no copy: pages of the cache, put into a pipe, taken out by a
//! socket. The bytes of such a page are those that were in the file when it was put in, or later
//! ones: as of any read beside a write.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd};

use ploop::device::{ReadLease, Segment, SegmentPlace};
use ploop::error::Result;

/// Most bytes that are put in at once.
pub(super) const MOST: u64 = 256 << 10;

/// Room of a pipe, in bytes of whole pages: bytes that begin and end inside of pages take more.
const ROOM: usize = 2 * MOST as usize;

/// See the module text.
#[derive(Debug)]
pub struct Pipe {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Pipe {
    /// An empty one.
    pub(super) fn new() -> io::Result<Pipe> {
        let (reader, writer) = io::pipe()?;
        rustix::pipe::fcntl_setpipe_size(&writer, ROOM)?;
        Ok(Pipe { reader, writer })
    }

    /// Puts the bytes of `segments` in, if all of them are in memory; else it holds anything.
    pub(super) fn fill(&self, lease: &ReadLease, segments: &[Segment]) -> Result<bool> {
        for s in segments {
            let SegmentPlace::File { layer, offset } = s.place else {
                return Ok(false);
            };
            let (file, len) = (lease.file(layer), s.len as usize);
            if !file.pipe_now(self.writer.as_fd(), offset, len)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// True when nothing is in it.
    pub(super) fn is_empty(&self) -> bool {
        rustix::io::ioctl_fionread(&self.reader) == Ok(0)
    }

    /// The end where bytes come out.
    pub(super) fn reader(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}
