//! What the connections of one server share to move bytes: which engine, its threads, and how much
//! may be in flight.
//!
//! | engine | a read from the page cache | another read | a flush, a long erase, CACHE |
//! |---|---|---|---|
//! | inline | on the connection's thread | there, too | there, too |
//! | portable | on the connection's thread | a thread of the pool | a thread of the pool |
//! | uring | on the connection's thread | the connection's ring | a thread of the pool |

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use ploop::error::{Error, Kind, Result};
use ploop::store::ring::{self, Ring};

use super::pool::Pool;

/// Bytes of requests that wait for a disk, in all connections together. What comes above that is
/// executed where it is, in the buffer that its connection has anyway. It keeps sixteen connections
/// at their own bound busy, and is a small part of any machine that has more.
const IN_FLIGHT: u64 = 256 << 20;

/// Bytes of writes that wait for their turn by the limits of their containers, in all connections
/// together. One request of each connection comes on top, which its input has room for anyway.
const HELD: u64 = 256 << 20;

/// How requests are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// All on the thread of their connection, one after the other.
    Inline,
    /// Those that wait for a disk on io_uring, or on threads where that cannot do it.
    Uring,
    /// Those that wait for a disk on threads.
    Portable,
}

impl EngineKind {
    /// All of them.
    pub const ALL: [EngineKind; 3] = [EngineKind::Inline, EngineKind::Uring, EngineKind::Portable];

    /// Its name in options, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            EngineKind::Inline => "inline",
            EngineKind::Uring => "uring",
            EngineKind::Portable => "portable",
        }
    }

    /// The best that this process may use.
    pub fn best() -> EngineKind {
        static BEST: OnceLock<EngineKind> = OnceLock::new();
        *BEST.get_or_init(|| decide(None, ring::permitted()).unwrap_or(EngineKind::Portable))
    }

    /// The engine that was asked for, or else the best. Error: `Unsupported` for io_uring where it
    /// is not permitted.
    pub fn choose(asked: Option<EngineKind>) -> Result<EngineKind> {
        match asked {
            None => Ok(EngineKind::best()),
            Some(EngineKind::Uring) => decide(asked, ring::permitted()),
            Some(other) => Ok(other),
        }
    }
}

/// What is to be used where io_uring is `permitted`, or not.
fn decide(asked: Option<EngineKind>, permitted: io::Result<()>) -> Result<EngineKind> {
    match (asked, permitted) {
        (Some(kind), _) if kind != EngineKind::Uring => Ok(kind),
        (_, Ok(())) => Ok(EngineKind::Uring),
        (Some(_), Err(e)) => Err(Error::new(
            Kind::Unsupported,
            "the engine uring needs io_uring, which is not permitted here",
        )
        .caused_by(e)
        .fix(
            "Use --engine portable, or permit it: sysctl kernel.io_uring_disabled=0, and in the \
              container's seccomp profile",
        )),
        (None, Err(e)) => {
            tracing::info!(reason = %e, "io_uring is not permitted here; threads do its work");
            Ok(EngineKind::Portable)
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for EngineKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<EngineKind, String> {
        let found = EngineKind::ALL.into_iter().find(|k| k.name() == text);
        found.ok_or_else(|| format!("'{text}' is not one of inline, uring, portable"))
    }
}

/// Makes a ring that tells the eventfd.
pub(super) type MakeRing = fn(Arc<OwnedFd>) -> io::Result<Ring>;

/// See the module text.
#[derive(Debug)]
pub struct Plane {
    pub(super) kind: EngineKind,
    pub(super) pool: Pool,
    pub(super) make_ring: MakeRing,
    in_flight: AtomicU64,
    held: AtomicU64,
}

impl Plane {
    /// A plane of its own, for the connections of one server.
    pub fn new(kind: EngineKind) -> Arc<Plane> {
        Plane::with_rings(kind, Ring::new)
    }

    pub(super) fn with_rings(kind: EngineKind, make_ring: MakeRing) -> Arc<Plane> {
        Arc::new(Plane {
            kind,
            pool: Pool::default(),
            make_ring,
            in_flight: AtomicU64::new(0),
            held: AtomicU64::new(0),
        })
    }

    /// Its engine.
    pub fn kind(&self) -> EngineKind {
        self.kind
    }

    /// Counts `bytes` as in flight; false, and nothing counted, when that were too many.
    pub(super) fn admit(&self, bytes: u64) -> bool {
        let admitted = self.in_flight.fetch_add(bytes, Relaxed) + bytes <= IN_FLIGHT;
        if !admitted {
            self.leave(bytes);
        }
        admitted
    }

    /// Counts them as landed.
    pub(super) fn leave(&self, bytes: u64) {
        self.in_flight.fetch_sub(bytes, Relaxed);
    }

    /// Counts payloads that are held until their turn comes.
    pub(super) fn hold(&self, bytes: u64) {
        self.held.fetch_add(bytes, Relaxed);
    }

    /// They went on.
    pub(super) fn let_go(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Relaxed);
    }

    /// True when so much is held that nobody who holds a request takes another.
    pub(super) fn holds_much(&self) -> bool {
        self.held.load(Relaxed) >= HELD
    }

    /// Bytes in flight in all connections.
    #[cfg(test)]
    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_io_uring_is_not_permitted_threads_do_its_work_unless_it_was_asked_for() {
        let no = || Err(io::Error::from_raw_os_error(1));
        assert_eq!(decide(None, Ok(())).unwrap(), EngineKind::Uring);
        assert_eq!(decide(None, no()).unwrap(), EngineKind::Portable);
        for kind in [EngineKind::Inline, EngineKind::Portable] {
            assert_eq!(decide(Some(kind), no()).unwrap(), kind);
        }
        let refused = decide(Some(EngineKind::Uring), no()).unwrap_err();
        assert_eq!(refused.kind(), Kind::Unsupported);
        assert!(refused.to_string().contains("io_uring"), "{refused}");
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for kind in EngineKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("Uring".parse::<EngineKind>().is_err());
    }

    #[test]
    fn what_is_in_flight_is_bounded() {
        let plane = Plane::new(EngineKind::Portable);
        assert!(plane.admit(IN_FLIGHT) && !plane.admit(1));
        plane.leave(IN_FLIGHT);
        assert!(plane.admit(1));
        assert_eq!(plane.in_flight(), 1);
    }
}
