//! Backups of a container, under its clients.

use super::work::Throttle;
use super::*;
use crate::control::model::{Backup, BackupRun, BackupStart};
use snapshots::backup;

impl Steward {
    pub(super) fn backups_of(&self, container: &str) -> Result<Vec<Backup>> {
        let place = self.disks().place(container)?;
        let all = backup::pending(&place)?.into_iter().filter(|p| !p.done);
        Ok(all.map(|p| Backup::of(container, p)).collect())
    }

    pub(super) fn begin_backup(&self, container: &str, request: &BackupStart) -> Result<Backup> {
        self.disks().leaving().refuse(container)?;
        for done in backup::pending(&self.disks().place(container)?)? {
            if done.done {
                self.drop_snapshot(container, &done.id)?;
            }
        }
        let begun = self.with_live(container, |live| backup::begin(live, &request.into()))?;
        self.parts
            .meter
            .snapshot_pause(Duration::from_secs_f64(begun.pause));
        tracing::info!(
            container,
            backup = begun.pending.id,
            target = %begun.pending.target.display(),
            resumed = begun.resumed,
            pause = begun.pause,
            "backup begun"
        );
        Ok(Backup {
            resumed: begun.resumed,
            pause: begun.pause,
            ..Backup::of(container, begun.pending)
        })
    }

    pub(super) fn run_backup(
        &self,
        container: &str,
        id: &str,
        request: &BackupRun,
        job: &JobHandle,
    ) -> Result<Ended> {
        self.in_turn(container, job, |place| {
            let watch = Throttle::new(job, request.rate);
            let Some(record) = backup::copy(&place, id, &watch)? else {
                return Ok(Ended::Paused(
                    "it goes on with the command that began it; --abandon drops it".to_owned(),
                ));
            };
            self.with_live(container, |live| backup::finish(live, id))?;
            let text = format!("{} bytes of data, {}", record.data, record.file);
            tracing::info!(container, backup = id, text, "backup done");
            let note = match self.drop_snapshot(container, id)? {
                true => match self.run(container, job, None)? {
                    Ended::Done(_) => "",
                    _ => "; its snapshot goes later",
                },
                false => "; its snapshot is read by others, and goes with the next backup",
            };
            Ok(Ended::Done(text + note))
        })
    }

    pub(super) fn abandon_backup(
        &self,
        container: &str,
        id: &str,
        job: &JobHandle,
    ) -> Result<Ended> {
        self.in_turn(container, job, |place| {
            if let Some(node) = backup::snapshot_of(&place, id)? {
                self.refuse_exported(container, &place, node)?;
            }
            self.with_live(container, |live| backup::abandon(live, id))?;
            tracing::info!(container, backup = id, "backup abandoned");
            self.run(container, job, None)?;
            let text = "dropped; the tracker has its bits again";
            Ok(Ended::Done(text.to_owned()))
        })
    }

    /// Deletes the snapshot of a backup that is done; false while somebody reads it.
    pub(super) fn drop_snapshot(&self, container: &str, id: &str) -> Result<bool> {
        let place = self.disks().place(container)?;
        let dropped = match backup::snapshot_of(&place, id)? {
            Some(node) => self.refuse_exported(container, &place, node),
            None => Ok(()),
        };
        let dropped =
            dropped.and_then(|()| self.with_live(container, |live| backup::remove(live, id)));
        match dropped {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == Kind::InUse => {
                tracing::warn!(container, error = %e, "the snapshot of a backup stays for now");
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    fn with_live<T>(&self, container: &str, work: impl FnOnce(Live<'_>) -> Result<T>) -> Result<T> {
        self.disks().refuse_read_only(container)?;
        let place = self.disks().place(container)?;
        let disk = self.disks().live(container)?;
        work(Live {
            place: &place,
            disk: disk.disk(),
        })
    }
}
