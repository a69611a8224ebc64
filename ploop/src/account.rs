//! What a disk takes of its host, and how much it may take.
//!
//! The unit is the granule of 4 KiB. A granule is charged while it holds data of the disk's own
//! files, from before its bytes are written until after they are given up. So the account is never
//! below what is there; it is above it for as long as a change is under way, and for what was
//! given up half-way, until the disk is opened again.
//!
//! Memory only, and pure: who opens a disk counts ([`Account::put`]), who writes asks
//! ([`Account::take`]), and with it the budget of the host that all disks draw on, if there is one
//! ([`crate::host`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::host::{Budget, Paid};

/// Bytes of a granule.
pub const GRANULE: u64 = 4096;

/// The account of one disk. All methods may be called from many threads and never block.
#[derive(Debug)]
pub struct Account {
    used: AtomicU64,
    limit: AtomicU64,
    /// How many granules may be charged beyond the limit.
    spare: AtomicU64,
    refused: AtomicU64,
    /// How many of `used` are of sealed images.
    sealed: Mutex<u64>,
    host: OnceLock<Arc<Budget>>,
}

impl Default for Account {
    /// Nothing taken, no limit.
    fn default() -> Account {
        Account {
            used: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
            spare: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            sealed: Mutex::default(),
            host: OnceLock::new(),
        }
    }
}

impl Account {
    /// Bytes that are charged; a multiple of [`GRANULE`].
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed).saturating_mul(GRANULE)
    }

    /// Bytes that may be charged, a multiple of [`GRANULE`]; none without a limit.
    pub fn limit(&self) -> Option<u64> {
        let limit = self.limit.load(Ordering::Relaxed);
        (limit != u64::MAX).then(|| limit * GRANULE)
    }

    /// Sets the limit in bytes, rounded down to granules; from the next [`Account::take`] on. One
    /// below what is charged takes nothing away, and lets nothing more be taken.
    pub fn set_limit(&self, bytes: Option<u64>) {
        let limit = bytes.map_or(u64::MAX, |b| b / GRANULE);
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// `granules` may be charged beyond the limit, and never more than the limit once more, for as long as
    /// nobody says otherwise: what is charged has as many that are about to be given up.
    pub fn set_spare(&self, granules: u64) {
        self.spare.store(granules, Ordering::Relaxed);
    }

    /// What is taken from now on is taken of `host`, too. Only the first one counts.
    pub fn draw_on(&self, host: Arc<Budget>) {
        drop(self.host.set(host));
    }

    /// Charges `granules`, which are to be written while what is returned lives. Error: `NoSpace`
    /// where that would be beyond the limit, or the host has no room, with nothing charged.
    pub fn take(&self, granules: u64) -> Result<Paid> {
        let limit = self.limit.load(Ordering::Relaxed);
        let spare = self.spare.load(Ordering::Relaxed).min(limit);
        let most = limit.saturating_add(spare);
        let fits = |used: u64| used.checked_add(granules).filter(|&sum| sum <= most);
        if granules == 0 {
            return Ok(Paid::default());
        }
        match self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
        {
            Ok(_) => match self.host.get() {
                Some(host) => host.take(granules).inspect_err(|_| self.give(granules)),
                None => Ok(Paid::default()),
            },
            Err(used) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                let what = format!(
                    "{} bytes more would be over the allocation limit of {} bytes, of which {} are \
                     taken",
                    granules.saturating_mul(GRANULE),
                    limit.saturating_mul(GRANULE),
                    used.saturating_mul(GRANULE)
                );
                Err(Error::new(Kind::NoSpace, what)
                    .fix("Raise the limit with `ploop set`, or delete snapshots or data"))
            }
        }
    }

    /// How often [`Account::take`] has refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Charges `granules` whatever the limit: they are there.
    pub fn put(&self, granules: u64) {
        self.used.fetch_add(granules, Ordering::Relaxed);
    }

    /// The images that nobody writes to hold `granules` together: puts that in the place of what was
    /// said of them before.
    pub fn set_sealed(&self, granules: u64) {
        let mut sealed = self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
        self.put(granules);
        self.give(std::mem::replace(&mut *sealed, granules));
    }

    /// `granules` of those that are charged are of an image that nobody writes to any more.
    pub fn seal(&self, granules: u64) {
        *self.sealed.lock().unwrap_or_else(PoisonError::into_inner) += granules;
    }

    /// `granules` of sealed images were given up.
    pub fn unseal(&self, granules: u64) {
        let mut sealed = self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = granules.min(*sealed);
        *sealed -= gone;
        self.give(gone);
    }

    /// Takes `granules` off the charge.
    pub fn give(&self, granules: u64) {
        let less = |used: u64| Some(used.saturating_sub(granules));
        let update = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        debug_assert!(update.is_ok_and(|used| used >= granules));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_the_limit_is_refused_and_what_is_there_is_counted() {
        let a = Account::default();
        drop(a.take(10).unwrap());
        a.set_limit(Some(12 * GRANULE + 1));
        assert_eq!((a.used(), a.limit()), (10 * GRANULE, Some(12 * GRANULE)));
        let e = a.take(3).unwrap_err();
        assert_eq!(e.kind(), Kind::NoSpace);
        assert!(e.to_string().contains("49152"), "{e}");
        drop(a.take(2).unwrap());
        a.put(5);
        assert!(a.take(1).is_err());
        drop(a.take(0).unwrap());
        assert_eq!(a.refused(), 2);
        a.set_spare(6);
        drop(a.take(1).unwrap());
        assert_eq!(a.limit(), Some(12 * GRANULE));
        assert!(a.take(1).is_err());
        a.set_spare(1 << 40);
        assert!(a.take(12).is_err(), "at most the limit once more");
        a.set_spare(0);
        assert!(a.take(1).is_err());
        a.give(7);
        drop(a.take(1).unwrap());
        a.set_limit(None);
        drop(a.take(1 << 40).unwrap());
        assert!(a.take(u64::MAX).is_err(), "no overflow");
    }

    #[test]
    fn a_full_host_charges_nothing_and_a_full_account_takes_nothing_of_it() {
        let (a, host) = (Account::default(), Arc::new(Budget::of("/")));
        host.set(0, Some(5));
        a.draw_on(host.clone());
        a.set_limit(Some(4 * GRANULE));
        assert!(!a.take(5).unwrap_err().is_host_full());
        assert_eq!(host.left(), 5);
        drop(a.take(4).unwrap());
        a.set_limit(None);
        assert!(a.take(2).unwrap_err().is_host_full());
        assert_eq!((a.used(), host.left()), (4 * GRANULE, 1));
        // What is there is counted, whoever has the room.
        a.put(9);
        assert_eq!(host.left(), 1);
    }

    #[test]
    fn writers_together_never_take_more_than_there_is() {
        let a = Account::default();
        a.set_limit(Some(1000 * GRANULE));
        let got: u64 = std::thread::scope(|s| {
            let take = || (0..1000).filter(|_| a.take(1).is_ok()).count() as u64;
            let all: Vec<_> = (0..4).map(|_| s.spawn(take)).collect();
            all.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!((got, a.used()), (1000, 1000 * GRANULE));
    }
}
