//! I/O limits: stored with the container, and in force where it is open.

use snapshots::limits::{self, Limits as Stored};

use super::*;
use crate::export::limits::Known;

impl Steward {
    /// As they are stored, and what they did.
    pub(super) fn limits_of(&self, container: &str) -> Result<Limits> {
        let place = self.disks().place(container)?;
        let stored = place.meta()?.limits;
        Ok(self.shown(&place, stored))
    }

    /// Stores a change, then puts it in force: who opens the container meanwhile has it, too.
    pub(super) fn set_limits(&self, container: &str, request: &LimitsChange) -> Result<Limits> {
        let place = self.disks().place(container)?;
        let stored = self.as_it_is(container, |place, _| {
            limits::change_limits(place, &request.into())
        })?;
        self.disks().throttle().set(place.shown(), &stored);
        tracing::info!(container, ?stored, "limits changed");
        Ok(self.shown(&place, stored))
    }

    fn shown(&self, place: &Place<'_>, limits: Stored) -> Limits {
        let known = self.disks().throttle().known(place.shown());
        let totals = known.map(|k| k.totals).unwrap_or_default();
        Known {
            name: place.shown().to_owned(),
            limits,
            totals,
        }
        .into()
    }
}
