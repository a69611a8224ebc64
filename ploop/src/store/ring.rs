//! Reads that the kernel carries out while the thread that asked goes on: one io_uring.
//!
//! ```text
//!   begin ─▶ submit ─▶ (kernel fills the buffer) ─▶ reap
//!   └──────── the ring owns buffer and lease ───────┘
//! ```
//!
//! A [`Reading`] is given to the ring whole and comes back whole: while the kernel may write to its
//! bytes nobody else has them, and dropping the ring waits for the kernel. Files that cannot be read
//! this way (those of another store) are refused, and are then read with a system call.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, types};
use rustix::io::Errno;

use crate::device::ReadLease;

/// Reads of single ranges that one ring has in flight at most. The submission queue has as many
/// places and the completion queue twice as many, so neither can overflow.
pub const DEPTH: usize = 128;

/// Pause before what the kernel refused for want of memory is submitted again.
const PAUSE: Duration = Duration::from_millis(1);

/// Lets a ring, and nobody else, ask a file for its descriptor.
#[derive(Debug)]
pub struct RingKey(());

/// One range of a file on its way into a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Which file of the lease.
    pub layer: u32,
    /// Byte offset in that file. Past its end it reads as zeros.
    pub offset: u64,
    /// Where in the buffer the bytes go.
    pub at: usize,
    /// How many; never 0.
    pub len: usize,
}

/// Ranges of files to be read into one buffer.
#[derive(Debug)]
pub struct Reading {
    /// The caller's name for it.
    pub token: u64,
    /// Keeps the files open and the ranges true.
    pub lease: ReadLease,
    /// The buffer.
    pub bytes: Vec<u8>,
    /// What to read; no two into the same bytes.
    pub fetches: Vec<Fetch>,
}

/// A [`Reading`] in the kernel's hands.
struct Slot {
    reading: Reading,
    /// Fetches that are not complete.
    left: usize,
    failed: Option<io::Error>,
}

/// See the module text. For one thread.
pub struct Ring {
    uring: IoUring,
    key: RingKey,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    finished: VecDeque<(Reading, io::Result<()>)>,
    /// Entries that were pushed and did not come back.
    pending: usize,
    /// Some of them were not submitted.
    pushed: bool,
    /// Counts completions; lives as long as the kernel may add to it.
    _wake: Arc<OwnedFd>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring({} in flight)", self.pending)
    }
}

/// Says whether this process may use io_uring, and if not, why.
pub fn permitted() -> io::Result<()> {
    let uring = IoUring::new(2)?;
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe)?;
    if probe.is_supported(opcode::Read::CODE) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "this kernel's io_uring has no plain reads",
    ))
}

impl Ring {
    /// A ring that adds to the eventfd `wake` whenever a read completes.
    pub fn new(wake: Arc<OwnedFd>) -> io::Result<Ring> {
        // Completions are noticed at the thread's next system call, which saves an interrupt each;
        // kernels before 5.19 do not know the flag.
        let uring = IoUring::builder()
            .setup_coop_taskrun()
            .build(DEPTH as u32)
            .or_else(|_| IoUring::new(DEPTH as u32))?;
        uring.submitter().register_eventfd(wake.as_raw_fd())?;
        Ok(Ring {
            uring,
            key: RingKey(()),
            slots: Vec::new(),
            free: Vec::new(),
            finished: VecDeque::new(),
            pending: 0,
            pushed: false,
            _wake: wake,
        })
    }

    /// Takes a reading on; the kernel hears of it at the next [`Ring::submit`]. Gives it back when
    /// there is no room, or when a file of it cannot be read by a ring.
    pub fn begin(&mut self, reading: Reading) -> Result<(), Reading> {
        let count = reading.fetches.len();
        let fits = |f: &Fetch| {
            f.len > 0
                && u32::try_from(f.len).is_ok()
                && f.at
                    .checked_add(f.len)
                    .is_some_and(|end| end <= reading.bytes.len())
                && reading.lease.file(f.layer).for_ring(&self.key).is_some()
        };
        if count == 0 || self.pending + count > DEPTH || !reading.fetches.iter().all(fits) {
            return Err(reading);
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(Slot {
            reading,
            left: count,
            failed: None,
        });
        for fetch in 0..count {
            self.push(slot, fetch);
        }
        Ok(())
    }

    /// Hands one fetch, or what is left of it, to the submission queue.
    fn push(&mut self, slot: usize, fetch: usize) {
        let Some(Some(entry)) = self.slots.get_mut(slot) else {
            return;
        };
        let reading = &mut entry.reading;
        let f = reading.fetches[fetch];
        let Some(fd) = reading.lease.file(f.layer).for_ring(&self.key) else {
            return self.complete(slot, Some(io::ErrorKind::Unsupported.into()));
        };
        let into = reading.bytes[f.at..f.at + f.len].as_mut_ptr();
        let read = opcode::Read::new(types::Fd(fd.as_raw_fd()), into, f.len as u32)
            .offset(f.offset)
            .build()
            .user_data((slot as u64) << 32 | fetch as u64);
        #[expect(unsafe_code, reason = "the kernel is given a pointer into a buffer")]
        // SAFETY: `into` is the start of `f.len` bytes of a vector that stays in its slot, untouched
        // and unmoved on the heap, until the completion of this entry was taken from the completion
        // queue; `Drop` waits for that or leaks the slot. The lease in the slot keeps the file open.
        let pushed = unsafe { self.uring.submission().push(&read) };
        match pushed {
            Ok(()) => {
                self.pending += 1;
                self.pushed = true;
            }
            // Not to be had: see DEPTH.
            Err(_) => self.complete(slot, Some(io::ErrorKind::QuotaExceeded.into())),
        }
    }

    /// Notes the end of one fetch of `slot`.
    fn complete(&mut self, slot: usize, failed: Option<io::Error>) {
        let Some(place) = self.slots.get_mut(slot) else {
            return;
        };
        let Some(entry) = place else { return };
        entry.left -= 1;
        entry.failed = entry.failed.take().or(failed);
        if entry.left > 0 {
            return;
        }
        if let Some(done) = place.take() {
            self.free.push(slot);
            let result = done.failed.map_or(Ok(()), Err);
            self.finished.push_back((done.reading, result));
        }
    }

    /// Tells the kernel of everything that was begun. An error is not one of a file: the ring is of
    /// no more use.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.pushed {
            match self.uring.submit() {
                Ok(_) => self.pushed = !self.uring.submission().is_empty(),
                Err(e) => match e.raw_os_error().map(Errno::from_raw_os_error) {
                    Some(Errno::INTR) => {}
                    Some(Errno::AGAIN | Errno::BUSY | Errno::NOMEM) => std::thread::sleep(PAUSE),
                    _ => return Err(e),
                },
            }
        }
        Ok(())
    }

    /// Takes a reading that is over, with its buffer, if there is one. After an error the buffer
    /// holds anything. Does not wait. Errors as for [`Ring::submit`]: what was read short goes on.
    pub fn reap(&mut self) -> io::Result<Option<(Reading, io::Result<()>)>> {
        if self.finished.is_empty() && self.pending > 0 {
            self.collect(true);
            self.submit()?;
        }
        Ok(self.finished.pop_front())
    }

    /// True when nothing was begun that was not reaped.
    pub fn is_idle(&self) -> bool {
        self.pending == 0 && self.finished.is_empty()
    }

    /// Looks at what the kernel completed. A short read goes on where it ended, if `go_on`.
    fn collect(&mut self, go_on: bool) {
        loop {
            let Some(done) = self.uring.completion().next() else {
                return;
            };
            self.pending -= 1;
            let (slot, fetch) = ((done.user_data() >> 32) as usize, done.user_data() as u32);
            self.completed(slot, fetch as usize, done.result(), go_on);
        }
    }

    fn completed(&mut self, slot: usize, fetch: usize, result: i32, go_on: bool) {
        let Some(Some(entry)) = self.slots.get_mut(slot) else {
            return;
        };
        let reading = &mut entry.reading;
        let f = &mut reading.fetches[fetch];
        let again = match usize::try_from(result) {
            Ok(0) => {
                // The end of the file.
                reading.bytes[f.at..f.at + f.len].fill(0);
                false
            }
            Ok(n) => {
                let n = n.min(f.len);
                (f.offset, f.at, f.len) = (f.offset + n as u64, f.at + n, f.len - n);
                f.len > 0
            }
            Err(_) => {
                let error = io::Error::from_raw_os_error(result.wrapping_neg());
                let passing = matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                );
                if !passing {
                    return self.complete(slot, Some(error));
                }
                true
            }
        };
        match again {
            true if go_on => self.push(slot, fetch),
            true => self.complete(slot, Some(io::ErrorKind::Interrupted.into())),
            false => self.complete(slot, None),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.pending > 0 {
            match self.uring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // The kernel may still write to them: better lost than reused.
                    std::mem::forget(std::mem::take(&mut self.slots));
                    return;
                }
            }
            self.collect(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Layers;
    use crate::error::{Error, Result};
    use crate::store::memory::MemoryStore;
    use crate::store::{RealStore, Store, StoreFile};
    use rustix::event::{EventfdFlags, eventfd};
    use std::path::Path;

    #[derive(Debug)]
    struct Files(Vec<Arc<dyn StoreFile>>);

    impl Layers for Files {
        fn file(&self, layer: u32) -> &Arc<dyn StoreFile> {
            &self.0[layer as usize]
        }

        fn read_through(&self, _: u32, offset: u64, _: &mut [u8]) -> Result<()> {
            Err(self.fault(0, offset))
        }

        fn fault(&self, _: u32, offset: u64) -> Error {
            Error::corrupt("not here").at(offset)
        }
    }

    fn ring() -> Ring {
        let wake = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        Ring::new(Arc::new(wake)).expect("these tests need io_uring: kernel.io_uring_disabled=0")
    }

    fn wait(ring: &mut Ring) -> (Reading, io::Result<()>) {
        ring.submit().unwrap();
        loop {
            match ring.reap().unwrap() {
                Some(done) => return done,
                None => std::thread::yield_now(),
            }
        }
    }

    fn file(dir: &Path, name: &str, len: usize) -> (Arc<dyn StoreFile>, Vec<u8>) {
        let file = RealStore.create(&dir.join(name), 0o600).unwrap();
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
        file.write_at(&bytes, 0).unwrap();
        (file, bytes)
    }

    fn fetch(layer: u32, offset: u64, at: usize, len: usize) -> Fetch {
        Fetch {
            layer,
            offset,
            at,
            len,
        }
    }

    #[test]
    fn ranges_of_several_files_meet_in_one_buffer() {
        let dir = tempfile::tempdir().unwrap();
        let (a, in_a) = file(dir.path(), "a", 100_000);
        let (b, in_b) = file(dir.path(), "b", 50_000);
        let lease = ReadLease::new(Arc::new(Files(vec![a, b])));
        let mut ring = ring();
        let reading = Reading {
            token: 9,
            lease,
            bytes: vec![0xee; 60_000],
            fetches: vec![fetch(0, 5, 0, 30_000), fetch(1, 40_000, 30_000, 20_000)],
        };
        ring.begin(reading).unwrap();
        let (done, result) = wait(&mut ring);
        result.unwrap();
        assert_eq!(done.token, 9);
        assert!(done.bytes[..30_000] == in_a[5..30_005]);
        assert!(done.bytes[30_000..40_000] == in_b[40_000..]);
        assert!(
            done.bytes[40_000..50_000].iter().all(|b| *b == 0),
            "zeros past the end of a file"
        );
        assert!(
            done.bytes[50_000..].iter().all(|b| *b == 0xee),
            "nothing else is written"
        );
        assert!(ring.is_idle());
    }

    #[test]
    fn as_many_as_there_is_room_for_and_then_a_refusal() {
        let dir = tempfile::tempdir().unwrap();
        let (a, in_a) = file(dir.path(), "a", 1 << 20);
        let lease = ReadLease::new(Arc::new(Files(vec![a])));
        let mut ring = ring();
        let reading = |token: u64| Reading {
            token,
            lease: lease.clone(),
            bytes: vec![0; 4096],
            fetches: vec![fetch(0, token * 512, 0, 4096)],
        };
        for token in 0..DEPTH as u64 {
            ring.begin(reading(token)).unwrap();
        }
        assert_eq!(ring.begin(reading(500)).unwrap_err().token, 500);
        let mut seen = [false; DEPTH];
        for _ in 0..DEPTH {
            let (done, result) = wait(&mut ring);
            result.unwrap();
            let at = done.token as usize * 512;
            assert!(done.bytes == in_a[at..at + 4096]);
            assert!(!std::mem::replace(&mut seen[done.token as usize], true));
        }
        assert!(ring.is_idle() && ring.reap().unwrap().is_none());
        ring.begin(reading(1)).unwrap();
    }

    #[test]
    fn what_cannot_be_read_this_way_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (real, _) = file(dir.path(), "a", 4096);
        let memory = MemoryStore::new();
        let other = memory.create(Path::new("/a"), 0o600).unwrap();
        let lease = ReadLease::new(Arc::new(Files(vec![real, other])));
        let mut ring = ring();
        for bad in [
            vec![fetch(0, 0, 0, 512), fetch(1, 0, 512, 512)],
            vec![fetch(0, 0, 4000, 512)],
            vec![fetch(0, 0, 0, 0)],
            vec![],
        ] {
            let reading = Reading {
                token: 0,
                lease: lease.clone(),
                bytes: vec![0; 4096],
                fetches: bad,
            };
            assert!(ring.begin(reading).is_err());
            assert!(ring.is_idle());
        }
    }

    #[test]
    fn a_ring_that_is_dropped_waits_for_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let (a, _) = file(dir.path(), "a", 8 << 20);
        for submitted in [false, true] {
            let lease = ReadLease::new(Arc::new(Files(vec![a.clone()])));
            let mut ring = ring();
            for i in 0..32 {
                let reading = Reading {
                    token: i,
                    lease: lease.clone(),
                    bytes: vec![0; 256 << 10],
                    fetches: vec![fetch(0, i * (256 << 10), 0, 256 << 10)],
                };
                ring.begin(reading).unwrap();
            }
            if submitted {
                ring.submit().unwrap();
            }
            drop(ring);
            drop(lease);
            assert_eq!(Arc::strong_count(&a), 1, "no lease is left behind");
        }
    }
}
