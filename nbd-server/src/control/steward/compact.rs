//! Where the space of a container is, and giving back what it does not need.

use super::work::Throttle;
use super::*;
use snapshots::compact::{self, Report};

impl Steward {
    /// The sealed images while nobody has the disk open, then the top, beside its clients.
    pub(super) fn compact_now(
        &self,
        container: &str,
        request: &Compact,
        job: &JobHandle,
    ) -> Result<Ended> {
        self.in_turn(container, job, |place| {
            let watch = Throttle::new(job, request.rate);
            let mut report = self.compact_sealed(container, &place, request.dry_run, &watch)?;
            if !report.paused && !job.cancelled() {
                let disk = self.disks().live(container)?;
                let live = Live {
                    place: &place,
                    disk: disk.disk(),
                };
                report.join(match request.dry_run {
                    true => compact::foretell(live)?,
                    false => compact::top(live, &watch)?,
                });
            }
            let text = told(&report, request.dry_run);
            tracing::info!(container, text, "compacted");
            Ok(match report.paused || job.cancelled() {
                true => Ended::Paused(format!("{text}; the rest is for the next run")),
                false => Ended::Done(text),
            })
        })
    }

    pub(super) fn space_of(&self, container: &str) -> Result<DiskSpace> {
        let place = self.disks().place(container)?;
        let open = self.disks().open_disk(container);
        let open = open.filter(|_| !self.disks().read_only());
        let of = snapshots::space::of(&place, open.as_ref().map(|d| d.disk()))?;
        Ok(DiskSpace {
            container: container.to_owned(),
            host: of.host,
            data: of.data,
            snapshots: of.snapshots,
            unnamed: of.unnamed,
            metadata: of.metadata,
            room: of.room,
            shared: of.shared,
        })
    }

    fn compact_sealed(
        &self,
        container: &str,
        place: &Place<'_>,
        look: bool,
        watch: &Throttle<'_>,
    ) -> Result<Report> {
        let _door = self.disks().close_door(container);
        if self.disks().open_disk(container).is_some() {
            let sealed = place.descriptor()?.images.len().saturating_sub(1);
            let mut report = Report::default();
            if sealed > 0 {
                let what = "the images below the top: the disk is in use";
                report.left.push(what.to_owned());
            }
            return Ok(report);
        }
        let _held = place.lock()?;
        compact::sealed(place, look, watch)
    }
}

fn told(r: &Report, look: bool) -> String {
    let parts = [
        (r.freed.unnamed, "that nothing names"),
        (r.freed.zeros, "of zeros"),
        (r.freed.same, "that read the same without"),
    ];
    let parts = parts.iter().filter(|(bytes, _)| *bytes > 0);
    let parts: Vec<_> = parts.map(|(bytes, of)| format!("{bytes} {of}")).collect();
    let mut text = match look {
        true => format!("{} bytes can be freed", r.freed.total()),
        false => format!("{} bytes freed", r.freed.total()),
    };
    if !parts.is_empty() {
        text += &format!(" ({})", parts.join(", "));
    }
    if !look {
        text += &format!(
            "; {} clusters moved, files {} bytes shorter",
            r.moved, r.shorter
        );
    }
    for left in &r.left {
        text += &format!("; left: {left}");
    }
    text
}
