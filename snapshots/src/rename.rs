//! `ploop snapshot rename` and `describe`: what people call a node, and what they say of it.
//!
//! Only the metadata changes, so it is right for a disk that is live as well. It is read and
//! written as a whole: the caller holds the disk's lock, or is the process that does and arranges one such
//! change at a time.

use ploop::descriptor::{Guid, Temporary};
use ploop::error::{Error, Kind, Result};
use serde::Serialize;

use crate::place::Place;
use crate::snapshot::refuse_name;

/// How a node is called from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Described {
    /// The node.
    pub guid: String,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// The text for people.
    pub description: String,
}

/// Gives `node` another name (an empty one takes it away) and another description; `None` leaves
/// each as it is. Durable on return.
///
/// 1. COMMIT: the new metadata in the place of the old.
///
/// Errors: `NotFound`; `Invalid` for the top, for what is no name and for a name that reads as a
/// GUID; `Exists` when another snapshot of the disk has it.
pub fn describe(
    place: &Place<'_>,
    node: Guid,
    name: Option<&str>,
    description: Option<&str>,
) -> Result<Described> {
    let d = place.descriptor()?;
    let mut meta = place.meta()?;
    if d.shot(node).is_none_or(|s| s.temporary != Temporary::No) {
        let what = format!("{} has no snapshot {node}", place.shown());
        return Err(Error::new(Kind::NotFound, what).on(place.dir()));
    }
    if node == d.top {
        let what = format!("{node} is the top of the disk: only snapshots have names");
        return Err(Error::invalid(what).on(place.dir()));
    }
    let name = name.map(|n| Some(n).filter(|n| !n.is_empty()));
    if let Some(Some(new)) = name
        && meta.name_of(node) != Some(new)
    {
        refuse_name(place, &d, &meta, Some(new))?;
    }
    let before = meta.clone();
    let entry = meta.snapshots.entry(node.to_string()).or_default();
    if let Some(name) = name {
        entry.name = name.map(str::to_owned);
    }
    if let Some(text) = description {
        entry.description = text.to_owned();
    }
    let described = Described {
        guid: node.to_string(),
        name: entry.name.clone(),
        description: entry.description.clone(),
    };
    if meta != before {
        // 1. COMMIT
        place.set_meta(&meta)?;
    }
    Ok(described)
}
