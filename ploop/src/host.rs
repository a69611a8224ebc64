//! What all disks of a store may still take of their host together.
//!
//! ```text
//!  take ──────────▶ taken ≤ ceiling?          landed ◀── the bytes are written, or never will be
//!                     │ no                      │
//!                     └──▶ look again:  ceiling = landed + what the host has
//! ```
//!
//! Both counts only grow. What was taken and has not landed may not be in the host's own figure yet,
//! so it is counted beside it, and nothing is spent twice; what lands while somebody looks is counted
//! twice until the next look, which errs on the safe side.
//!
//! Memory only: who knows the host ([`Look`]) is asked when a take does not fit, and looks by itself
//! now and then. Without one, everything fits.

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use crate::account::GRANULE;
use crate::error::{Error, Result};

/// Who knows how much room the host has.
pub trait Look: Send + Sync + Debug {
    /// Looks, and sets the budget ([`Budget::set`]). May block for the host's answer, nothing else.
    fn look(&self);

    /// A take of `granules` was refused: the room is not there.
    fn refused(&self, granules: u64);
}

/// See the module text. All methods may be called from many threads.
#[derive(Debug)]
pub struct Budget {
    taken: AtomicU64,
    landed: AtomicU64,
    ceiling: AtomicU64,
    place: PathBuf,
    look: OnceLock<Weak<dyn Look>>,
}

impl Budget {
    /// Of the file system that `place` is on; everything fits until [`Budget::set`].
    pub fn of(place: impl Into<PathBuf>) -> Budget {
        Budget {
            taken: AtomicU64::new(0),
            landed: AtomicU64::new(0),
            ceiling: AtomicU64::new(u64::MAX),
            place: place.into(),
            look: OnceLock::new(),
        }
    }

    /// Asks `look` from now on. Only the first one counts.
    pub fn watched_by(&self, look: Weak<dyn Look>) {
        drop(self.look.set(look));
    }

    /// Takes `granules` until what is returned is dropped: then their bytes are on the host, or never
    /// will be. Error: `NoSpace` of the operating system's kind ([`Error::is_host_full`]), with
    /// nothing taken. Blocks only for a look, when they do not fit.
    pub fn take(self: &Arc<Self>, granules: u64) -> Result<Paid> {
        if granules > 0 && !self.try_take(granules) {
            self.look_and_take(granules)?;
        }
        Ok(Paid {
            of: (granules > 0).then(|| self.clone()),
            granules,
        })
    }

    fn try_take(&self, granules: u64) -> bool {
        let ceiling = self.ceiling.load(Ordering::Relaxed);
        let fits = |taken: u64| taken.checked_add(granules).filter(|&sum| sum <= ceiling);
        let took = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        took.is_ok()
    }

    #[cold]
    fn look_and_take(&self, granules: u64) -> Result<()> {
        let look = self.look.get().and_then(Weak::upgrade);
        if let Some(look) = &look {
            look.look();
            if self.try_take(granules) {
                return Ok(());
            }
            look.refused(granules);
        }
        let what = format!(
            "the host has no room for {} bytes more of its containers' ({} are left to them)",
            granules.saturating_mul(GRANULE),
            self.left().saturating_mul(GRANULE)
        );
        let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
        Err(Error::io(what, &self.place, full)
            .fix("Make room on the host: delete containers, snapshots or other files"))
    }

    /// What had landed so far: to be read *before* the host is asked.
    pub fn landed(&self) -> u64 {
        self.landed.load(Ordering::Acquire)
    }

    /// The host had room for `granules` more when [`Budget::landed`] was `landed`. `None`: it cannot
    /// tell, and everything fits.
    pub fn set(&self, landed: u64, granules: Option<u64>) {
        let ceiling = granules.map_or(u64::MAX, |g| landed.saturating_add(g));
        self.ceiling.store(ceiling, Ordering::Relaxed);
    }

    /// Granules that still fit; very many where the host cannot tell.
    pub fn left(&self) -> u64 {
        let taken = self.taken.load(Ordering::Relaxed);
        self.ceiling.load(Ordering::Relaxed).saturating_sub(taken)
    }

    /// Granules taken so far.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}

/// Granules that were taken of the host and may not be written yet. Dropped when they are, or never
/// will be.
#[derive(Debug, Default)]
#[must_use = "dropped before the bytes are written, it lets others take the same room"]
pub struct Paid {
    of: Option<Arc<Budget>>,
    granules: u64,
}

impl Paid {
    /// Both together; they are of one host.
    pub fn add(&mut self, mut other: Paid) {
        match &self.of {
            Some(_) => self.granules += std::mem::take(&mut other.granules),
            None => *self = other,
        }
    }
}

impl Drop for Paid {
    fn drop(&mut self) {
        if let Some(budget) = &self.of {
            budget.landed.fetch_add(self.granules, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    /// A host of so many granules.
    #[derive(Debug)]
    struct Host {
        budget: Arc<Budget>,
        free: Mutex<u64>,
        refused: AtomicU64,
    }

    impl Host {
        fn new(free: u64) -> Arc<Host> {
            let host = Arc::new(Host {
                budget: Arc::new(Budget::of("/store")),
                free: Mutex::new(free),
                refused: AtomicU64::new(0),
            });
            let look: Arc<dyn Look> = host.clone();
            host.budget.watched_by(Arc::downgrade(&look));
            host
        }

        /// Bytes reach the host; false when it has no room for them.
        fn write(&self, granules: u64) -> bool {
            let mut free = self.free.lock().unwrap();
            let fits = *free >= granules;
            *free -= if fits { granules } else { 0 };
            fits
        }
    }

    impl Look for Host {
        fn look(&self) {
            let landed = self.budget.landed();
            let free = *self.free.lock().unwrap();
            self.budget.set(landed, Some(free));
        }

        fn refused(&self, granules: u64) {
            self.refused.fetch_add(granules, Ordering::Relaxed);
        }
    }

    #[test]
    fn without_a_host_that_can_tell_everything_fits() {
        let budget = Arc::new(Budget::of("/store"));
        drop(budget.take(1 << 40).unwrap());
        budget.set(budget.landed(), Some(3));
        assert!(budget.take(4).is_err());
        let e = budget.take(u64::MAX).unwrap_err();
        assert!(e.is_host_full() && e.to_string().contains("/store"), "{e}");
        budget.set(budget.landed(), None);
        drop(budget.take(1 << 40).unwrap());
    }

    #[test]
    fn what_was_taken_and_is_not_written_is_not_given_out_again_by_a_look() {
        let host = Host::new(10);
        host.look();
        let paid = host.budget.take(6).unwrap();
        host.look();
        assert_eq!(host.budget.left(), 4);
        assert!(host.budget.take(5).is_err());
        assert_eq!(host.refused.load(Ordering::Relaxed), 5);
        assert!(host.write(6));
        // There, and not said to be: counted twice, which errs on the safe side.
        host.look();
        assert_eq!(host.budget.left(), 0);
        drop(paid);
        host.look();
        assert_eq!(host.budget.left(), 4);
        // Never written: it is there for others after the next look.
        drop(host.budget.take(4).unwrap());
        let mut both = host.budget.take(1).unwrap();
        both.add(host.budget.take(3).unwrap());
        host.look();
        assert_eq!(host.budget.left(), 0);
        drop(both);
        *host.free.lock().unwrap() += 100;
        drop(host.budget.take(104).unwrap());
        drop(host.budget.take(0).unwrap());
    }

    #[test]
    fn writers_beside_looks_take_exactly_what_the_host_has() {
        let host = Host::new(5000);
        host.look();
        let over = AtomicBool::new(false);
        let wrote: u64 = std::thread::scope(|s| {
            s.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    host.look();
                }
            });
            let write = |size: u64| {
                let host = host.clone();
                move || {
                    let (mut sum, mut refused) = (0, 0);
                    // A refusal beside others in flight may be one too many; alone, none is.
                    while refused < 1000 {
                        match host.budget.take(size) {
                            Ok(_paid) => {
                                assert!(host.write(size), "given out twice");
                                sum += size;
                            }
                            Err(_) => refused += 1,
                        }
                    }
                    sum
                }
            };
            let all: Vec<_> = (1..5).map(|size| s.spawn(write(size))).collect();
            let sums: Vec<_> = all.into_iter().map(|t| t.join()).collect();
            over.store(true, Ordering::Relaxed);
            sums.into_iter().map(|sum| sum.unwrap()).sum()
        });
        let mut last = 0;
        while host.budget.take(1).is_ok() {
            assert!(host.write(1));
            last += 1;
        }
        assert_eq!((wrote + last, *host.free.lock().unwrap()), (5000, 0));
    }
}
