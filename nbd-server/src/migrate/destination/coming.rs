//! What has come of a container that may not stay.

use super::*;

/// A peer's name as a record can hold it.
pub(super) fn short(peer: &str) -> String {
    let end = peer.len().min(ploop::owner::PEER_MAX);
    let end = (0..=end).rev().find(|&e| peer.is_char_boundary(e));
    peer[..end.unwrap_or(0)].to_owned()
}

/// What has come of a container; gone when dropped, unless it stays.
pub(super) struct Coming<'a> {
    pub(super) root: &'a Root,
    pub(super) name: &'a str,
    pub(super) id: Guid,
    pub(super) arriving: Option<Arriving>,
    pub(super) stays: bool,
    pub(super) of: &'a Destination,
}

impl Coming<'_> {
    /// Removes it; durable on return.
    pub(super) fn remove(&mut self) -> Result<()> {
        // Nobody is to wait for what does not come.
        if let Some(feed) = self.of.fed().remove(&self.id) {
            feed.end();
        }
        // It is closed first: then its lock is free.
        self.arriving = None;
        match moving::record(self.root, self.name, self.id)? {
            Some(r) if r.state.owns() => {
                let what = format!("somebody decided meanwhile that {} is here", self.name);
                Err(Error::new(Kind::InUse, what))
            }
            Some(r) => enact(self.root, self.name, (r.id, r.state), Next::Remove),
            None => Ok(()),
        }
    }
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        if !self.stays
            && let Err(e) = self.remove()
        {
            tracing::warn!(container = self.name, error = %e, "half of a move stays until nobody has it open");
        }
    }
}
