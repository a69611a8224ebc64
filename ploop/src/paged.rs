//! A table of pages that are made when first touched, and never moved or dropped while it lives.
//!
//! Two levels of `OnceLock`: a lookup is two dependent loads and no lock. The top level is the only
//! part sized by what an image claims: 16 bytes for every 512 × 1024 entries.

use std::sync::OnceLock;

use crate::error::Result;

const FAN: usize = 512;

type Branch<P> = Box<[OnceLock<P>]>;

/// Pages of type `P`, numbered from 0.
#[derive(Debug)]
pub(crate) struct Paged<P> {
    roots: Box<[OnceLock<Branch<P>>]>,
}

impl<P> Paged<P> {
    /// An empty table for `pages` pages.
    pub(crate) fn new(pages: u64) -> Paged<P> {
        let roots = pages.div_ceil(FAN as u64) as usize;
        Paged {
            roots: (0..roots).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The page, if it was made.
    pub(crate) fn get(&self, page: u64) -> Option<&P> {
        let branch = self.roots.get(page as usize / FAN)?.get()?;
        branch[page as usize % FAN].get()
    }

    /// The page, made by `make` if need be. Two threads may both make it; one result is kept, so
    /// `make` must not have effects, and nobody may change a page before this returned it.
    pub(crate) fn get_or_make(&self, page: u64, make: impl FnOnce() -> Result<P>) -> Result<&P> {
        if let Some(found) = self.get(page) {
            return Ok(found);
        }
        let made = make()?;
        let branch = self.roots[page as usize / FAN]
            .get_or_init(|| (0..FAN).map(|_| OnceLock::new()).collect());
        Ok(branch[page as usize % FAN].get_or_init(|| made))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_made_once_and_kept() {
        let t = Paged::<u64>::new(2000);
        assert_eq!(t.get(1999), None);
        assert_eq!(*t.get_or_make(1999, || Ok(7)).unwrap(), 7);
        assert_eq!(*t.get_or_make(1999, || Ok(8)).unwrap(), 7);
        assert_eq!(t.get(0), None);
        assert!(
            t.get_or_make(1, || Err(crate::Error::invalid("no")))
                .is_err()
        );
        assert_eq!(t.get(1), None);
    }
}
