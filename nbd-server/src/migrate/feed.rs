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

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind, Result};
use ploop::store::arriving::{ArrivingStore, Fetch, Filled, GRANULE};
use snapshots::moving::later::{self, Feeder, Places};
use snapshots::place::Place;

use super::wire::{PAYLOAD_MAX, Refusal, Type, Wire};

/// How long a reader waits for a source that is gone.
const STALL: Duration = Duration::from_secs(30);
/// How long it may take over an answer, and a destination that still lacks something over its next request,
/// or a source over its end.
const SILENCE: Duration = Duration::from_secs(20);
const IDLE: Duration = Duration::from_secs(90);
/// Bytes that the background asks for at a time: a reader waits for no more than that.
const FILL: u64 = 256 << 10;
/// Between two tries of what failed.
const AGAIN: Duration = Duration::from_millis(500);

/// When a link ends.
#[derive(Debug, Default)]
pub(super) struct End {
    pub(super) now: AtomicBool,
    /// It feeds a container: that goes on while the service stops, as long as clients may ask.
    feeds: AtomicBool,
}

impl End {
    /// It ends.
    pub(super) fn say(&self) {
        self.now.store(true, Ordering::Release);
    }

    /// Whether it is to end, with a service that stops or before.
    pub(super) fn is_said(&self, stopping: &AtomicBool) -> bool {
        let with_service = stopping.load(Ordering::Acquire) && !self.feeds.load(Ordering::Acquire);
        with_service || self.now.load(Ordering::Acquire)
    }
}

/// The link to the source of one container, while there is one.
pub(super) struct Feed {
    /// Locked while a request is on the link.
    wire: Mutex<Option<Wire>>,
    changed: Condvar,
    /// What breaks the link.
    link_end: Mutex<Option<Arc<End>>>,
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
    fn break_link(&self, next: Option<Arc<End>>) {
        let mut end = self.link_end.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = std::mem::replace(&mut *end, next) {
            old.say();
        }
    }

    /// Another link to the source; `end` breaks it. Whoever waits for an answer on the one before asks
    /// again on this.
    pub(super) fn give(&self, mut wire: Wire, end: Arc<End>) {
        wire.be_patient(SILENCE);
        end.feeds.store(true, Ordering::Release);
        self.break_link(Some(end));
        *self.lock() = Some(wire);
        self.changed.notify_all();
    }

    /// Nobody is to wait for anything any more.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.break_link(None);
        let _state = self.lock();
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

    /// Waits for `time`, or until nobody is to wait any more.
    fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut state = self.lock();
        while !self.ended.load(Ordering::Acquire) && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn ask(&self, image: Guid, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (at, len) = (offset.to_le_bytes(), (buf.len() as u64).to_le_bytes());
        let got = self.with(STALL, |wire| {
            wire.send(Type::Want, &[image.as_bytes(), &at, &len])?;
            wire.flush()?;
            match wire.read()? {
                Type::Have if wire.payload().len() == buf.len() => Ok(Ok(wire.payload().to_vec())),
                Type::Have => Err(wire.wrong("another number of bytes than was asked for")),
                // It cannot be read there. All else can be had all the same.
                Type::Refused => Ok(Err(wire.refused()?)),
                other => Err(wire.wrong(&format!("a frame {other:?} where bytes belong"))),
            }
        })??;
        buf.copy_from_slice(&got);
        Ok(())
    }

    /// The source, if it is there, knows that nothing is missing any more: it drops what it has.
    pub(super) fn whole(&self) -> Result<()> {
        self.with(Duration::ZERO, |wire| {
            // It lets go of its files before it answers.
            wire.be_patient(IDLE);
            wire.send(Type::Whole, &[])?;
            wire.flush()?;
            wire.expect(Type::Confirmed)
        })
    }

    /// The source knows that we know.
    pub(super) fn done(&self) -> Result<()> {
        match self.lock().as_mut() {
            Some(wire) => wire.send(Type::Done, &[]).and_then(|()| wire.flush()),
            None => Ok(()),
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

/// The background: fetches until nothing is missing; `over` says that the container needs nothing any
/// more. Gives whether all of it came. Blocks.
pub(super) fn fill(
    feed: &Feed,
    store: &ArrivingStore,
    paths: &[PathBuf],
    over: &dyn Fn() -> bool,
) -> bool {
    let mut budget = FILL;
    let mut left: VecDeque<&PathBuf> = paths.iter().collect();
    while let Some(path) = left.front() {
        if feed.ended.load(Ordering::Acquire) || over() {
            return false;
        }
        // Whoever reads goes first.
        if feed.readers.load(Ordering::Acquire) > 0 {
            std::thread::sleep(Duration::from_micros(200));
        }
        match store.fill_next(path, budget) {
            Ok(Filled::More) => budget = (budget * 2).min(FILL),
            Ok(Filled::Done) => drop(left.pop_front()),
            Err(e) => {
                tracing::debug!(file = %path.display(), error = %e, "fetching it failed");
                // Down to what alone cannot be had; that does not keep the other images waiting.
                match budget {
                    GRANULE => left.rotate_left(1),
                    _ => budget = (budget / 4).max(GRANULE),
                }
                feed.rest(AGAIN);
            }
        }
    }
    !over()
}

/// The source's side: answers until the destination has all. What cannot be read is refused by itself.
/// Error: the link's.
pub(super) fn feed(wire: &mut Wire, place: Place<'_>) -> Result<()> {
    wire.be_patient(IDLE);
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
                match feeder.read(Guid::from_bytes(image), offset, &mut buf) {
                    Ok(()) => wire.send(Type::Have, &[&buf])?,
                    Err(e) => {
                        tracing::error!(peer = wire.peer(), error = %e, "what a container that has left lacks cannot be read");
                        wire.say(Type::Refused, &Refusal::of(&e))?;
                    }
                }
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
