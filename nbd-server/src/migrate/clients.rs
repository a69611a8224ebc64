//! The clients of a container that moves, where a holder (`ploop hold`) has their sockets: it is sent to
//! the destination in the hand-over, and is where the container is when the move has ended, also when
//! this service was killed in between.
//!
//! `.ploop/holder`, beside the record of the move and durable before it, says which holder that is, and
//! where it was; without a record of the same move it means nothing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind, Result};
use ploop::store::{Access, Store, read_exact, replace};
use serde::{Deserialize, Serialize};
use snapshots::owner::Verdict;

use crate::control::Client;
use crate::control::client::resource;
use crate::hold::Address;
use crate::hold::model::{Move, Status};

const SIDE: &str = ".ploop";
const FILE: &str = "holder";
const BYTES_MAX: u64 = 16 << 10;
/// What a holder may take to answer, where nobody waits for it.
const PATIENCE: Duration = Duration::from_secs(3);

/// Who has the clients' sockets.
#[derive(Clone, Debug)]
pub struct Holder {
    /// Its control socket.
    pub control: PathBuf,
    /// Where it finds the disk at the destination.
    pub to: String,
}

#[derive(Serialize, Deserialize)]
struct Record {
    /// The move.
    id: String,
    control: PathBuf,
    here: String,
    there: String,
}

/// Whether `export` is of `container`: the live disk, or a snapshot.
pub(super) fn is_of(container: &str, export: &str) -> bool {
    let rest = export.strip_prefix(container);
    rest.is_some_and(|r| r.is_empty() || r.starts_with('@'))
}

impl Holder {
    /// Refuses one that cannot go along with `container`, which is called `name` there. Errors: as for
    /// [`Client::connect`]; `Invalid`, `InUse`.
    pub fn check(&self, container: &str, name: &str) -> Result<()> {
        Address::parse(&self.to)?;
        let status = self.status(PATIENCE)?;
        if let Some(other) = status.exports.iter().find(|e| !is_of(container, &e.name)) {
            let what = format!(
                "the holder has clients of {}, too: they would go along",
                other.name
            );
            return Err(Error::new(Kind::InUse, what)
                .on(&self.control)
                .fix("Give each container that moves a holder of its own"));
        }
        if name != container {
            let what = format!(
                "the holder's clients ask for {container}, and it would be called {name} there"
            );
            return Err(Error::invalid(what).fix("Leave out --as, or --holder"));
        }
        Ok(())
    }

    fn status(&self, limit: Duration) -> Result<Status> {
        Client::connect_within(&self.control, limit)?.get(&resource(&["holder"]))
    }

    /// Where it is now; recorded for the move `id` of the disk in `dir`, and durable.
    pub(super) fn enter(&self, store: &dyn Store, dir: &Path, id: Guid) -> Result<String> {
        let here = self.status(PATIENCE)?.to;
        let record = Record {
            id: id.to_string(),
            control: self.control.clone(),
            here: here.clone(),
            there: self.to.clone(),
        };
        let text = serde_json::to_vec(&record);
        let text =
            text.map_err(|e| Error::invalid("a holder that JSON cannot hold").caused_by(e))?;
        replace(store, dir, SIDE, FILE, &text)?;
        Ok(here)
    }

    /// Sends it, within `limit`. After an error it may have gone or not.
    pub(super) fn send(&self, to: &str, limit: Duration) -> Result<()> {
        let to = Move { to: to.to_owned() };
        let client = Client::connect_within(&self.control, limit)?;
        let _: Status = client.post(&resource(&["holder", "to"]), &to)?;
        Ok(())
    }

    /// Sends it back to `here`, as far as that can be done.
    pub(super) fn back(&self, here: &str) {
        if let Err(e) = self.send(here, PATIENCE) {
            tracing::error!(error = %e, to = here, "the holder of the clients was not sent back here");
        }
    }
}

/// Nothing is to be said to a holder any more.
pub(super) fn forget(store: &dyn Store, dir: &Path) {
    match store.remove_file(&dir.join(SIDE).join(FILE)) {
        Err(e) if e.kind() != Kind::NotFound => {
            tracing::warn!(error = %e, "the record of a holder stays, and means nothing");
        }
        _ => {}
    }
}

/// The move `id` of the disk in `dir` ends like that: its holder, if there is one, goes where the disk
/// is. One that somebody has sent elsewhere stays there. What fails is tried again with the next try to
/// end the move.
pub(super) fn follow(store: &dyn Store, dir: &Path, id: Guid, verdict: Verdict) {
    let followed = read(store, dir, id).and_then(|record| match record {
        Some(record) => record.follow(verdict),
        None => Ok(()),
    });
    if let Err(e) = followed {
        tracing::warn!(error = %e, "the holder of the clients of a container that moves is not asked");
    }
}

impl Record {
    fn follow(self, verdict: Verdict) -> Result<()> {
        let (from, to) = match verdict {
            Verdict::Given => (self.here, self.there),
            Verdict::Aborted(_) => (self.there, self.here),
        };
        let holder = Holder {
            control: self.control,
            to: to.clone(),
        };
        if holder.status(PATIENCE)?.to != from {
            return Ok(());
        }
        tracing::info!(%to, "the holder of the clients goes where the container is");
        holder.send(&to, PATIENCE)
    }
}

fn read(store: &dyn Store, dir: &Path, id: Guid) -> Result<Option<Record>> {
    let path = dir.join(SIDE).join(FILE);
    let file = match store.open(&path, Access::Read) {
        Err(e) if e.kind() == Kind::NotFound => return Ok(None),
        file => file?,
    };
    let len = file.len()?;
    if len > BYTES_MAX {
        let what = format!("the record of a holder has {len} bytes; {BYTES_MAX} are possible");
        return Err(Error::corrupt(what).on(path));
    }
    let mut text = vec![0; len as usize];
    read_exact(file.as_ref(), &mut text, 0)?;
    let record: Record = serde_json::from_slice(&text).map_err(|e| {
        Error::corrupt("not the record of a holder")
            .on(path)
            .caused_by(e)
    })?;
    Ok((record.id == id.to_string()).then_some(record))
}
