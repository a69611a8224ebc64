//! The trackers of a container, begun, ended, cleared and merged under its clients.

use super::*;
use snapshots::tracker;

impl Steward {
    pub(super) fn trackers_of(&self, container: &str) -> Result<Vec<Tracker>> {
        let place = self.disks().place(container)?;
        let open = self.writable(container);
        let all = tracker::list(&place, open.as_ref().map(|d| d.disk()))?;
        Ok(all.into_iter().map(Tracker::from).collect())
    }

    pub(super) fn start_tracker(&self, container: &str, request: &TrackerStart) -> Result<Tracker> {
        let granularity = request.granularity.unwrap_or(ploop::tracker::GRANULARITY);
        let begun = self.on_live(container, |live| {
            tracker::start(live, &request.name, granularity)
        })?;
        tracing::info!(container, tracker = begun.name, "tracked");
        Ok(begun)
    }

    pub(super) fn change_tracker(
        &self,
        container: &str,
        name: &str,
        change: &TrackerChange,
    ) -> Result<Tracker> {
        let changed = self.on_live(container, |live| match change {
            TrackerChange::Stop => tracker::stop(live, name),
            TrackerChange::Clear => tracker::clear(live, name),
            TrackerChange::Merge(merge) => tracker::merge(live, &merge.from, name),
        })?;
        tracing::info!(container, tracker = name, ?change, "tracker changed");
        Ok(changed)
    }

    fn on_live(
        &self,
        container: &str,
        work: impl FnOnce(Live<'_>) -> Result<tracker::Tracked>,
    ) -> Result<Tracker> {
        self.disks().refuse_read_only(container)?;
        self.disks().leaving().refuse(container)?;
        let place = self.disks().place(container)?;
        let disk = self.disks().live(container)?;
        let live = Live {
            place: &place,
            disk: disk.disk(),
        };
        work(live).map(Tracker::from)
    }
}
