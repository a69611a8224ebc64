//! A table of pages that are made when first touched, and never moved or dropped while it lives.
//!
//! Three levels of `OnceLock`: a lookup is three dependent loads and no lock. The top level is the
//! only part sized by what an image claims: 24 bytes for every 2^28 entries.

use std::sync::OnceLock;

use crate::error::Result;

const FAN: usize = 512;

/// One level: `FAN` places, each filled when first needed.
type Level<T> = Box<[OnceLock<T>]>;

/// Pages of type `P`, numbered from 0.
#[derive(Debug)]
pub(crate) struct Paged<P> {
    roots: Level<Level<Level<P>>>,
}

fn empty<T>(places: usize) -> Level<T> {
    (0..places).map(|_| OnceLock::new()).collect()
}

impl<P> Paged<P> {
    /// An empty table for `pages` pages.
    pub(crate) fn new(pages: u64) -> Paged<P> {
        let roots = pages.div_ceil((FAN * FAN) as u64) as usize;
        Paged {
            roots: empty(roots),
        }
    }

    /// The page, if it was made.
    pub(crate) fn get(&self, page: u64) -> Option<&P> {
        let page = page as usize;
        let middle = self.roots.get(page / (FAN * FAN))?.get()?;
        middle[page / FAN % FAN].get()?[page % FAN].get()
    }

    /// Calls `f` with every page that was made, ascending.
    pub(crate) fn each(&self, mut f: impl FnMut(u64, &P) -> Result<()>) -> Result<()> {
        for (i, root) in self.roots.iter().enumerate() {
            for (j, middle) in root.get().into_iter().flat_map(|r| r.iter()).enumerate() {
                for (k, page) in middle.get().into_iter().flat_map(|m| m.iter()).enumerate() {
                    if let Some(page) = page.get() {
                        f(((i * FAN + j) * FAN + k) as u64, page)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The page, made by `make` if need be. Two threads may both make it; one result is kept, so
    /// `make` must not have effects, and nobody may change a page before this returned it.
    pub(crate) fn get_or_make(&self, page: u64, make: impl FnOnce() -> Result<P>) -> Result<&P> {
        if let Some(found) = self.get(page) {
            return Ok(found);
        }
        let made = make()?;
        let page = page as usize;
        let middle = self.roots[page / (FAN * FAN)].get_or_init(|| empty(FAN));
        let branch = middle[page / FAN % FAN].get_or_init(|| empty(FAN));
        Ok(branch[page % FAN].get_or_init(|| made))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_made_once_and_kept() {
        let t = Paged::<u64>::new(600_000);
        assert_eq!(*t.get_or_make(599_999, || Ok(1)).unwrap(), 1);
        assert_eq!(t.get(299_999), None);
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
