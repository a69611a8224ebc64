//! A sealed image that is read while it arrives.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::image::Image;
use crate::error::Result;
use crate::store::StoreFile;
use crate::store::ring::RingKey;

/// Reads fetch what is missing; once nothing is, all passes through.
#[derive(Debug)]
pub(super) struct ArrivingFile {
    pub(super) inner: Arc<dyn StoreFile>,
    pub(super) image: Arc<Image>,
}

impl ArrivingFile {
    fn change(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        match self.image.is_whole() {
            true => change(),
            false => Err(self.image.in_the_way()),
        }
    }
}

impl StoreFile for ArrivingFile {
    crate::delegate! {
        path, id, len, sync, begin_sync, set_mode, rights, set_rights, host_bytes, lock_bytes,
        unlock_bytes, foreign_lock,
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        match self.image.is_whole() {
            true => self.inner.read_at(buf, offset),
            false => self.image.read(self.inner.as_ref(), buf, offset),
        }
    }

    fn read_now(&self, buf: &mut [u8], offset: u64) -> Result<Option<usize>> {
        match self.image.is_whole() {
            true => self.inner.read_now(buf, offset),
            false => self.image.read_now(self.inner.as_ref(), buf, offset),
        }
    }

    // A descriptor would go around us.
    fn for_ring(&self, key: &RingKey) -> Option<BorrowedFd<'_>> {
        match self.image.is_whole() {
            true => self.inner.for_ring(key),
            false => None,
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change(|| self.inner.write_at(buf, offset))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(|| self.inner.set_len(len))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.change(|| self.inner.punch(offset, len))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.change(|| self.inner.zero(offset, len))
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.change(|| self.inner.reserve(offset, len))
    }

    fn next_data(&self, from: u64, to: u64) -> Result<Option<Range<u64>>> {
        if self.image.is_whole() {
            return self.inner.next_data(from, to);
        }
        // In this order: what arrives between the two is in the second.
        let missing = self.image.missing(from, to);
        let there = self.inner.next_data(from, to)?;
        Ok(match (missing, there) {
            (Some(a), Some(b)) if b.start < a.start => Some(b),
            (Some(a), _) => Some(a),
            (None, there) => there,
        })
    }

    fn keep(&self, number: u64) {
        if self.image.is_whole() {
            self.inner.keep(number);
        }
    }

    fn recall(&self) -> Option<u64> {
        match self.image.is_whole() {
            true => self.inner.recall(),
            false => None,
        }
    }
}
