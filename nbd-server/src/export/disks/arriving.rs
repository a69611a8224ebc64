//! A container that arrives from another service: open here, and nobody's yet.

use super::*;

/// Whoever opens its name waits until it is published, or gone.
#[derive(Debug)]
pub struct Arriving {
    disk: Arc<OpenDisk>,
    disks: Arc<Disks>,
}

impl Disks {
    /// Opens `container`, whoever owns it, for its mover alone. Its quota holds from
    /// [`Arriving::publish`] on. Errors: `InUse` where it is open, `ReadOnly`, and those of opening.
    pub fn arriving(self: &Arc<Self>, container: &str) -> Result<Arriving> {
        self.refuse_read_only(container)?;
        let mut meant = self.meaning_of(container)?;
        meant.options.moving = true;
        {
            let mut names = self.table.lock();
            if names.open.contains_key(&meant.key) {
                let what = format!("{container} is open here");
                return Err(Error::new(Kind::InUse, what));
            }
            let entry = Entry {
                id: meant.id,
                disk: None,
                account: None,
            };
            names.open.insert(meant.key.clone(), entry);
        }
        let disk = self.open(&meant)?;
        // Counted now, while nobody waits for it.
        quota::arm(&self.place(&meant.key)?, disk.disk())?;
        disk.disk().account()?.set_limit(None);
        Ok(Arriving {
            disk,
            disks: self.clone(),
        })
    }
}

impl Arriving {
    /// The disk.
    pub fn disk(&self) -> &OpenDisk {
        &self.disk
    }

    /// It is this service's: its quota holds, and others may open it. It closes when the last of them,
    /// and whoever has the result, lets go. On an error it is published all the same.
    pub fn publish(self) -> (Arc<OpenDisk>, Result<()>) {
        let key = self.disk.freed.key.clone();
        let limit = self
            .disks
            .place(&key)
            .and_then(|place| Ok(place.meta()?.quota));
        let armed = limit.and_then(|limit| {
            self.disk.disk().account()?.set_limit(limit);
            Ok(())
        });
        self.disks.publish(&key, &self.disk);
        (self.disk, armed)
    }
}
