//! What a container takes of its host, and may take.

use super::*;
use snapshots::quota::{self, Charge};

impl Steward {
    pub(super) fn quota_of(&self, container: &str) -> Result<Quota> {
        let place = self.disks().place(container)?;
        let charge = match self.writable(container) {
            Some(disk) => quota::of_open(&place, disk.disk())?,
            None => quota::of_closed(&place)?,
        };
        Ok(shown(&place, charge))
    }

    pub(super) fn set_quota(&self, container: &str, request: &QuotaChange) -> Result<Quota> {
        let to = Some(request.quota).filter(|&q| q > 0);
        self.as_it_is(container, |place, disk| {
            quota::set_limit(place, disk.map(OpenDisk::disk), to)
        })?;
        tracing::info!(container, quota = request.quota, "quota changed");
        self.quota_of(container)
    }

    pub(super) fn quotas_now(&self) -> Vec<QuotaNow> {
        let all = self.disks().accounts().into_iter();
        let now = all.filter_map(|(container, account)| {
            Some(QuotaNow {
                container,
                quota: account.limit()?,
                charged: account.used(),
                refused: account.refused(),
            })
        });
        now.collect()
    }

    /// The container's disk, where it is open for writing.
    pub(super) fn writable(&self, container: &str) -> Option<Arc<OpenDisk>> {
        let open = self.disks().open_disk(container);
        open.filter(|_| !self.disks().read_only())
    }
}

fn shown(place: &Place<'_>, charge: Charge) -> Quota {
    Quota {
        container: place.shown().to_owned(),
        charged: charge.used,
        quota: charge.limit.unwrap_or(0),
        host: charge.host,
    }
}
