//! Post-copy: what a container that was taken still lacks comes from its source, when somebody reads it,
//! and in the background.
//!
//! ```text
//!  client ─ disk ─ image that arrives ─ Fetcher ─┐
//!                  the background's thread ──────┴▶ Feed ── link ──▶ source: Feeder
//! ```
//!
//! One request at a time is on the link. A link that broke is waited for: the source comes back by
//! itself. Whoever reads waits for it [`STALL`] at most; then what it reads fails, and is asked for anew
//! by the next who reads. It is never zeros.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind, Result};
use ploop::store::arriving::{ArrivingStore, Fetch, Filled};
use snapshots::moving::later::{self, Feeder, Places};
use snapshots::place::Place;

use super::wire::{PAYLOAD_MAX, Type, Wire};

/// How long a reader waits for a source that is gone.
const STALL: Duration = Duration::from_secs(30);
/// Bytes that the background asks for at a time: a reader waits for no more than that.
const FILL: u64 = 256 << 10;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// Between two tries of what failed.
const AGAIN: Duration = Duration::from_millis(500);

/// The link to the source of one container, while there is one.
pub(super) struct Feed {
    /// Locked while a request is on the link.
    wire: Mutex<Option<Wire>>,
    changed: Condvar,
    /// The word that breaks the link.
    link_end: Mutex<Option<Arc<AtomicBool>>>,
    /// Readers that wait.
    readers: AtomicUsize,
    ended: AtomicBool,
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Feed").finish_non_exhaustive()
    }
}

impl Feed {
    pub(super) fn new() -> Arc<Feed> {
        Arc::new(Feed {
            wire: Mutex::default(),
            changed: Condvar::new(),
            link_end: Mutex::default(),
            readers: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Wire>> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Breaks the link that there is; `next` breaks the one that comes.
    fn break_link(&self, next: Option<Arc<AtomicBool>>) {
        let mut end = self.link_end.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = std::mem::replace(&mut *end, next) {
            old.store(true, Ordering::Release);
        }
    }

    /// Another link to the source; `end` breaks it. Whoever waits for an answer on the one before asks
    /// again on this.
    pub(super) fn give(&self, wire: Wire, end: Arc<AtomicBool>) {
        self.break_link(Some(end));
        *self.lock() = Some(wire);
        self.changed.notify_all();
    }

    /// Nobody is to wait for anything any more.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.break_link(None);
        self.changed.notify_all();
    }

    /// Does `work` on the link, waiting for one until `patience` is over; a link that fails is dropped,
    /// and the next one tried.
    fn with<T>(&self, patience: Duration, work: impl Fn(&mut Wire) -> Result<T>) -> Result<T> {
        let until = Instant::now() + patience;
        let mut state = self.lock();
        let mut last = None;
        loop {
            if self.ended.load(Ordering::Acquire) {
                return Err(Error::new(Kind::Io, "the service stops"));
            }
            if let Some(wire) = state.as_mut() {
                match work(wire) {
                    Ok(done) => return Ok(done),
                    Err(e) => {
                        tracing::warn!(error = %e, "the link to the source of a container broke");
                        last = Some(e);
                        *state = None;
                    }
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let what = "what has not arrived cannot be had from the source it comes from";
                let e = Error::new(Kind::Io, what).fix(
                    "It is asked for again by the next who reads it. See that the service that the \
                     container was moved from runs, and reaches this one",
                );
                return Err(match last {
                    Some(cause) => e.caused_by(cause),
                    None => e,
                });
            }
            let waited = self.changed.wait_timeout(state, left.min(AGAIN));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn ask(&self, image: Guid, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (at, len) = (offset.to_le_bytes(), (buf.len() as u64).to_le_bytes());
        let got = self.with(STALL, |wire| {
            wire.send(Type::Want, &[image.as_bytes(), &at, &len])?;
            wire.flush()?;
            wire.expect(Type::Have)?;
            match wire.payload().len() == buf.len() {
                true => Ok(wire.payload().to_vec()),
                false => Err(wire.wrong("another number of bytes than was asked for")),
            }
        })?;
        buf.copy_from_slice(&got);
        Ok(())
    }

    /// The source knows that nothing is missing any more.
    fn whole(&self, patience: Duration) -> Result<()> {
        self.with(patience, |wire| {
            wire.send(Type::Whole, &[])?;
            wire.flush()?;
            wire.expect(Type::Confirmed)
        })
    }

    fn done(&self) {
        if let Some(wire) = self.lock().as_mut()
            && let Err(e) = wire.send(Type::Done, &[]).and_then(|()| wire.flush())
        {
            tracing::debug!(error = %e, "the source is gone already");
        }
    }
}

/// The bytes of one image's file.
#[derive(Debug)]
struct Fetcher {
    feed: Arc<Feed>,
    image: Guid,
    places: Places,
}

impl Fetch for Fetcher {
    fn fetch(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.feed.readers.fetch_add(1, Ordering::AcqRel);
        let mut done = 0;
        let fetched = loop {
            if done == buf.len() {
                break Ok(());
            }
            let left = (buf.len() - done).min(PAYLOAD_MAX) as u64;
            let piece = self.places.find(offset + done as u64, left);
            let asked = piece.and_then(|(guest, len)| {
                let part = &mut buf[done..done + len as usize];
                self.feed.ask(self.image, guest, part).map(|()| len)
            });
            match asked {
                Ok(len) => done += len as usize,
                Err(e) => break Err(e),
            }
        };
        self.feed.readers.fetch_sub(1, Ordering::AcqRel);
        fetched
    }
}

/// Has what the images of a container lack come through `feed`. Gives their files. Before the
/// container is opened.
pub(super) fn register(
    place: &Place<'_>,
    store: &ArrivingStore,
    feed: &Arc<Feed>,
) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for (image, path) in later::missing(place)? {
        let fetcher = Fetcher {
            feed: feed.clone(),
            image,
            places: later::places(place, &path)?,
        };
        store.register(&path, Arc::new(fetcher))?;
        paths.push(path);
    }
    Ok(paths)
}

/// The background: fetches until nothing is missing and the source knows; `over` says that the
/// container is gone. Gives whether all of it came. Blocks.
pub(super) fn fill(
    feed: &Feed,
    store: &ArrivingStore,
    paths: &[PathBuf],
    over: &dyn Fn() -> bool,
    confirmed: &dyn Fn() -> Result<()>,
) -> bool {
    for path in paths {
        loop {
            if feed.ended.load(Ordering::Acquire) || over() {
                return false;
            }
            // Whoever reads goes first.
            if feed.readers.load(Ordering::Acquire) > 0 {
                std::thread::sleep(Duration::from_micros(200));
            }
            match store.fill_next(path, FILL) {
                Ok(Filled::More) => {}
                Ok(Filled::Done) => break,
                Err(e) => {
                    tracing::debug!(file = %path.display(), error = %e, "fetching it failed");
                    std::thread::sleep(AGAIN);
                }
            }
        }
    }
    while !feed.ended.load(Ordering::Acquire) && !over() {
        let told = feed.whole(AGAIN).and_then(|()| confirmed());
        match told {
            Ok(()) => {
                feed.done();
                return true;
            }
            Err(e) => tracing::debug!(error = %e, "the source does not know yet"),
        }
        std::thread::sleep(LOOK);
    }
    // All of it is here, and that is what counts.
    true
}

/// The source's side: answers until the destination has all. Error: the link's, or a file's.
pub(super) fn feed(wire: &mut Wire, place: Place<'_>) -> Result<()> {
    let mut feeder = Feeder::new(place);
    loop {
        match wire.read()? {
            Type::Want => {
                let image = wire.payload().first_chunk::<16>().copied();
                let image = image.ok_or_else(|| wire.wrong("a request that is too short"))?;
                let (offset, len) = (wire.number(16)?, wire.number(24)?);
                if len > PAYLOAD_MAX as u64 {
                    return Err(wire.wrong(&format!("a request for {len} bytes")));
                }
                let mut buf = vec![0; len as usize];
                feeder.read(Guid::from_bytes(image), offset, &mut buf)?;
                wire.send(Type::Have, &[&buf])?;
                wire.flush()?;
            }
            Type::Whole => return Ok(()),
            other => {
                let what = format!("a frame {other:?} where only requests belong");
                return Err(wire.wrong(&what));
            }
        }
    }
}
