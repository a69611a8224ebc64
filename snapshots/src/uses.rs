//! Which disk stands on which layers: what the descriptors say. The references beside the layers
//! are a superset of it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use ploop::descriptor::Descriptor;
use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::store::EntryKind;
use uuid::Uuid;

use crate::meta::Meta;
use crate::store::Root;

/// What one disk of a store uses.
#[derive(Clone, Debug, Default)]
pub(crate) struct Uses {
    /// What its references may be called: one id, several where an old disk has none in its
    /// metadata.
    pub(crate) ids: HashSet<Uuid>,
    /// The layers that its descriptor names, of the whole tree.
    pub(crate) layers: HashSet<Uuid>,
    /// Its metadata.
    pub(crate) meta: Meta,
}

impl Uses {
    /// True for a container that was cloned from the template with `own`, whose uppermost layer is
    /// `top`. The container that the template is a snapshot of stands on the same layers.
    pub(crate) fn is_clone_of(&self, top: Uuid, own: &Uses) -> bool {
        let origin = own.meta.template.as_ref().and_then(|t| t.origin.as_deref());
        let origin = origin.and_then(|id| Uuid::parse_str(id).ok());
        self.layers.contains(&top) && !origin.is_some_and(|id| self.ids.contains(&id))
    }
}

/// A disk, and what it uses, or why that is not known.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) dir: PathBuf,
    pub(crate) is_template: bool,
    pub(crate) uses: Result<Uses>,
}

impl Found {
    /// Its directory's name.
    pub(crate) fn name(&self) -> String {
        let name = self.dir.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

/// Every disk of a store, also in directories whose names are none of ours. What is removed while
/// this looks is left out; nothing is, while the caller holds the store's lock alone.
pub(crate) fn scan(root: &Root) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (room, is_template) in [("templates", true), ("containers", false)] {
        let room = root.dir().join(room);
        for name in root.store().list(&room)? {
            let dir = room.join(name);
            if root.store().kind(&dir)? != Some(EntryKind::Dir) {
                continue;
            }
            let uses = of(root, &dir, is_template);
            if uses.is_err() && root.store().kind(&dir)?.is_none() {
                continue;
            }
            all.push(Found {
                dir,
                is_template,
                uses,
            });
        }
    }
    Ok(all)
}

/// What the disk in `dir` uses.
pub(crate) fn of(root: &Root, dir: &Path, is_template: bool) -> Result<Uses> {
    // In this order: an id is durable before a descriptor that needs it.
    let d = root.opener().read_descriptor(&dir.join(DESCRIPTOR))?;
    let meta = Meta::read(root.store(), dir)?;
    let mut ids = HashSet::new();
    match id_in(&meta).map_err(|e| e.on(dir))? {
        Some(id) => drop(ids.insert(id)),
        None if is_template => {
            ids.extend(
                d.images
                    .iter()
                    .map(|i| Uuid::from_bytes(*i.guid.as_bytes())),
            );
        }
        None => ids.extend(ids_in_names(&d)),
    }
    Ok(Uses {
        ids,
        layers: layers_in(&d),
        meta,
    })
}

/// The id that metadata gives a disk.
pub(crate) fn id_in(meta: &Meta) -> Result<Option<Uuid>> {
    let Some(text) = &meta.id else {
        return Ok(None);
    };
    match Uuid::parse_str(text) {
        Ok(id) => Ok(Some(id)),
        Err(e) => {
            let what = format!("the metadata gives the disk the id {text:?}, which is no UUID");
            Err(Error::new(Kind::Corrupt, what).caused_by(e))
        }
    }
}

/// What a container's id may be that has none in its metadata: its first image bore it in its name.
pub(crate) fn ids_in_names(d: &Descriptor) -> impl Iterator<Item = Uuid> {
    d.images.iter().filter_map(|image| {
        let (_, ending) = image.file.rsplit_once(".{")?;
        Uuid::parse_str(ending.trim_end_matches('}')).ok()
    })
}

/// The layers that a descriptor names. A path that only looks like one counts: what is counted in
/// vain costs space, what is missed costs data.
pub(crate) fn layers_in(d: &Descriptor) -> HashSet<Uuid> {
    let parts = d.images.iter().flat_map(|image| image.file.split('/'));
    parts
        .filter_map(|part| Uuid::parse_str(part).ok())
        .collect()
}
