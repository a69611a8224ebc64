//! Resizing a container's disk.

use super::work::Throttle;
use super::*;
use ploop::device::Device;
use snapshots::enlarge;
use snapshots::resize::{self, Resized};

impl Steward {
    /// A disk in use can be made larger; for anything else nobody may use it.
    pub(super) fn resize_now(
        &self,
        container: &str,
        request: &Resize,
        job: &JobHandle,
    ) -> Result<Ended> {
        self.disks().refuse_read_only(container)?;
        let connected = &self.parts.connections;
        let used = connected.staying(|export| export == container, LET_GO);
        let open = !used.is_empty() || self.disks().is_kept_open();
        match !open || request.shrink || request.flatten {
            true => self.resize_closed(container, request, job),
            false => self.resize_live(container, request, job),
        }
    }

    /// Under its clients, who learn of it when they connect again.
    fn resize_live(&self, container: &str, request: &Resize, job: &JobHandle) -> Result<Ended> {
        let Some(_working) = self.turn(container, job) else {
            return Ok(Ended::Cancelled);
        };
        let place = self.disks().place(container)?;
        let disk = self.disks().live(container)?;
        let shows = disk.disk().size();
        // As the disk rounds it.
        let size = request.size.div_ceil(disk.disk().cluster_bytes());
        if size.saturating_mul(disk.disk().cluster_bytes()) < shows {
            let what = format!("{} bytes is less than the disk's {shows}", request.size);
            let fix = "To make it smaller, disconnect its clients and say --shrink";
            return Err(Error::invalid(what).on(place.dir()).fix(fix));
        }
        let live = Live {
            place: &place,
            disk: disk.disk(),
        };
        let growth = enlarge::enlarge(live, request.size)?;
        let reason =
            "the disk is in use: who has it mounted grows what is on it, once connected anew";
        let done = Resized {
            disk: container.to_owned(),
            before: growth.from,
            size: growth.to,
            filesystem: None,
            reason: (!request.no_filesystem).then(|| reason.to_owned()),
            note: None,
        };
        let text = format!("{} bytes, from {}", done.size, done.before);
        job.resized(done.into());
        Ok(Ended::Done(text))
    }

    /// Of a disk that nobody uses: behind its closed door.
    fn resize_closed(&self, container: &str, request: &Resize, job: &JobHandle) -> Result<Ended> {
        let place = self.disks().place(container)?;
        let _alone = self.alone(container, None)?;
        let watch = Throttle::new(job, None);
        let Some(done) = resize::offline(&place, &request.into(), &watch)? else {
            return Ok(Ended::Cancelled);
        };
        tracing::info!(container, from = done.before, to = done.size, "resized");
        let text = format!("{} bytes, from {}", done.size, done.before);
        job.resized(done.into());
        Ok(Ended::Done(text))
    }
}
