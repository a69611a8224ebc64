//! The snapshot tree of a [`Descriptor`]: walking it, changing it, and what must hold for it.

use std::collections::{HashMap, HashSet};

use super::{
    CLUSTER_SECTORS, Defect, Descriptor, Guid, Image, ImageKind, MAX_BYTES, MAX_IMAGES,
    MAX_SECTORS, Shot, Temporary, shown, text_defect,
};
use crate::error::{Error, Kind, Result};

/// What a defect is about, so that the parser can say where it stands.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Image(usize),
    Shot(usize),
    Top,
    Cluster,
    Size,
    Preallocated,
    Encryption,
    Volume,
}

impl Descriptor {
    /// The image of this GUID.
    pub fn image(&self, guid: Guid) -> Option<&Image> {
        self.images.iter().find(|image| image.guid == guid)
    }

    /// The node of this GUID.
    pub fn shot(&self, guid: Guid) -> Option<&Shot> {
        self.shots.iter().find(|shot| shot.guid == guid)
    }

    /// The same, to mark it.
    pub fn shot_mut(&mut self, guid: Guid) -> Option<&mut Shot> {
        self.shots.iter_mut().find(|shot| shot.guid == guid)
    }

    /// The nodes right above `guid`, in the order of the file; the bases for [`Guid::NONE`].
    pub fn children(&self, guid: Guid) -> Vec<Guid> {
        self.shots
            .iter()
            .filter(|shot| shot.parent == guid)
            .map(|shot| shot.guid)
            .collect()
    }

    /// The images that make up what `guid` shows, base first, `guid` last.
    ///
    /// In a volume these are its own images only; [`Descriptor::outer_parent`] says where the
    /// chain goes on. [`Kind::NotFound`] if there is no such node; [`Kind::Corrupt`] for a cycle,
    /// an unknown parent or a missing image, naming the GUID.
    pub fn chain(&self, guid: Guid) -> Result<Vec<&Image>> {
        self.walk(guid).map(|(images, _)| images)
    }

    /// The node of the parent volume that the chain of `guid` hangs on; `None` if the chain ends in
    /// a base of this descriptor. Fails like [`Descriptor::chain`].
    pub fn outer_parent(&self, guid: Guid) -> Result<Option<Guid>> {
        self.walk(guid)
            .map(|(_, below)| Some(below).filter(|&b| b != Guid::NONE))
    }

    fn walk(&self, guid: Guid) -> Result<(Vec<&Image>, Guid)> {
        let images: HashMap<Guid, &Image> = self.images.iter().map(|i| (i.guid, i)).collect();
        let parents: HashMap<Guid, Guid> = self.shots.iter().map(|s| (s.guid, s.parent)).collect();
        if !parents.contains_key(&guid) {
            let what = format!("the disk has no snapshot {guid}");
            return Err(Error::new(Kind::NotFound, what));
        }
        let mut chain = Vec::new();
        let mut at = guid;
        while let Some(&parent) = parents.get(&at) {
            if chain.len() == parents.len() {
                return Err(cycle(guid));
            }
            chain.push(*images.get(&at).ok_or_else(|| no_image(at))?);
            if parent != Guid::NONE && !parents.contains_key(&parent) && !self.continues() {
                return Err(unknown_parent(at, parent));
            }
            at = parent;
        }
        chain.reverse();
        Ok((chain, at))
    }

    /// Whether parents may lie in another descriptor.
    fn continues(&self) -> bool {
        self.volume
            .as_ref()
            .is_some_and(|volume| volume.parent.is_some())
    }

    /// Makes the top a snapshot named `old_top_becomes` and puts a new top, in `new_file`, on it.
    ///
    /// The new top has the GUID that the old one had. Its label is `Compressed` even over a raw
    /// base, for that is what the file is. Nothing is changed if it fails: [`Kind::Exists`] for a
    /// GUID or a file name that the disk already has, [`Kind::Invalid`] for an unusable one.
    pub fn push_overlay(
        &mut self,
        old_top_becomes: Guid,
        new_file: impl Into<String>,
    ) -> Result<()> {
        let (old, new) = (self.top, old_top_becomes);
        if new == Guid::NONE || new == Guid::TOP {
            return Err(Error::invalid(format!(
                "{new} is reserved: no snapshot can have it"
            )));
        }
        if self.shot(new).is_some() || self.image(new).is_some() {
            return Err(Error::new(
                Kind::Exists,
                format!("the disk already has {new}"),
            ));
        }
        let new_file = new_file.into();
        self.admit_file(&new_file)?;
        for image in self.images.iter_mut().filter(|image| image.guid == old) {
            image.guid = new;
        }
        for shot in &mut self.shots {
            for guid in [&mut shot.guid, &mut shot.parent] {
                if *guid == old {
                    *guid = new;
                }
            }
        }
        self.push_top(new, new_file);
        Ok(())
    }

    /// Drops the top and puts a new one, in `new_file`, on the snapshot `onto`: a rollback. Returns
    /// the image that was dropped, whose file is now nobody's.
    ///
    /// Nothing is changed if it fails: [`Kind::NotFound`] without such a snapshot,
    /// [`Kind::Invalid`] if it is the top or marked temporary or if something hangs on the top,
    /// and for `new_file` as in [`Descriptor::push_overlay`].
    pub fn replace_top(&mut self, onto: Guid, new_file: impl Into<String>) -> Result<Image> {
        let new_file = new_file.into();
        self.admit_base(onto)?;
        self.admit_file(&new_file)?;
        let dropped = self.remove_leaf(self.top)?;
        self.push_top(onto, new_file);
        Ok(dropped)
    }

    /// Makes the top a snapshot named `old_top_becomes` and puts a new top, in `new_file`, on the
    /// snapshot `onto`: a rollback that keeps what is there. Whatever hung on the old top still
    /// does.
    ///
    /// Nothing is changed if it fails: for `onto` as in [`Descriptor::replace_top`], for the others
    /// as in [`Descriptor::push_overlay`].
    pub fn branch_off(
        &mut self,
        old_top_becomes: Guid,
        onto: Guid,
        new_file: impl Into<String>,
    ) -> Result<()> {
        self.admit_base(onto)?;
        self.push_overlay(old_top_becomes, new_file)?;
        let top = self.top;
        if let Some(shot) = self.shot_mut(top) {
            shot.parent = onto;
        }
        Ok(())
    }

    /// Removes the snapshot `guid`; what hangs on it then hangs on its parent. Returns its image.
    ///
    /// Right only where the data allows it: a leaf, or a node whose data its child now has.
    /// [`Kind::NotFound`] without such a node, [`Kind::Invalid`] for the top.
    pub fn remove(&mut self, guid: Guid) -> Result<Image> {
        if guid == self.top {
            return Err(Error::invalid("the top of a disk cannot be removed"));
        }
        let parent = self.shot(guid).map_or(Guid::NONE, |shot| shot.parent);
        let image = self.take(guid)?;
        for shot in self.shots.iter_mut().filter(|shot| shot.parent == guid) {
            shot.parent = parent;
        }
        Ok(image)
    }

    fn remove_leaf(&mut self, guid: Guid) -> Result<Image> {
        match self.children(guid).first() {
            Some(child) => Err(Error::invalid(format!("snapshot {child} hangs on {guid}"))),
            None => self.take(guid),
        }
    }

    fn take(&mut self, guid: Guid) -> Result<Image> {
        let at = self.images.iter().position(|image| image.guid == guid);
        let at = at.ok_or_else(|| Error::new(Kind::NotFound, format!("the disk has no {guid}")))?;
        self.shots.retain(|shot| shot.guid != guid);
        Ok(self.images.remove(at))
    }

    fn push_top(&mut self, parent: Guid, file: String) {
        self.push_node(self.top, parent, ImageKind::Compressed, file);
    }

    /// Adds a node of one image. Who builds a tree of them looks at it with [`Descriptor::check`]:
    /// here nothing is refused.
    pub fn push_node(
        &mut self,
        guid: Guid,
        parent: Guid,
        kind: ImageKind,
        file: impl Into<String>,
    ) {
        self.images.push(Image {
            guid,
            kind,
            file: file.into(),
        });
        self.shots.push(Shot {
            guid,
            parent,
            temporary: Temporary::No,
        });
    }

    /// Whether a new top may stand on `onto`.
    fn admit_base(&self, onto: Guid) -> Result<()> {
        let shot = self.shot(onto).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("the disk has no snapshot {onto}"))
        })?;
        if onto == self.top {
            return Err(Error::invalid(format!("{onto} is the top, not a snapshot")));
        }
        if shot.temporary != Temporary::No {
            return Err(Error::invalid(format!(
                "snapshot {onto} is marked for removal"
            )));
        }
        Ok(())
    }

    fn admit_file(&self, file: &str) -> Result<()> {
        if let Some(defect) = text_defect(Defect::BadPath, "the file name", file) {
            return Err(Error::invalid(defect.what()));
        }
        if self.images.iter().any(|image| image.file == file) {
            return Err(Error::new(
                Kind::Exists,
                format!("the disk already has {}", shown(file)),
            ));
        }
        if self.images.len() >= MAX_IMAGES {
            let what = format!("a disk can have at most {MAX_IMAGES} images");
            return Err(Error::unsupported(what).fix("Merge or delete snapshots first"));
        }
        Ok(())
    }

    /// Whether this can be written and read back: to be called after the fields were edited.
    ///
    /// [`Kind::Invalid`], with the reason.
    pub fn check(&self) -> Result<()> {
        if let Some((_, defect)) = self.defect() {
            return Err(Error::invalid(defect.what()));
        }
        let len = self.to_xml().len();
        if len > MAX_BYTES {
            let what = format!("the descriptor would be {len} bytes; the limit is {MAX_BYTES}");
            return Err(Error::invalid(what));
        }
        Ok(())
    }

    /// The first reason why this is no sound disk. Linear in its size.
    pub(super) fn defect(&self) -> Option<(Place, Error)> {
        self.value_defect().or_else(|| self.tree_defect())
    }

    fn value_defect(&self) -> Option<(Place, Error)> {
        let cluster = self.cluster_sectors;
        if !CLUSTER_SECTORS.contains(&u64::from(cluster)) || !cluster.is_power_of_two() {
            let what =
                format!("a cluster of {cluster} sectors: not a power of two from 64 to 131072");
            return Some((Place::Cluster, Defect::BadBlocksize.refuse(what)));
        }
        let sizes = [
            self.disk_sectors,
            self.max_delta_sectors,
            self.start,
            self.end,
        ];
        if let Some(size) = sizes.into_iter().flatten().find(|&size| size > MAX_SECTORS) {
            let what = format!("{size} sectors: more than a disk can have");
            return Some((Place::Size, Defect::BadNumber.refuse(what)));
        }
        if self.max_delta_sectors == Some(0) {
            let what = "a largest delta of 0 sectors";
            return Some((Place::Size, Defect::BadNumber.refuse(what)));
        }
        if self.preallocated && self.base_is_raw() {
            let what = "<Preallocated> is 1, but an image is Plain: a raw base has no clusters";
            return Some((Place::Preallocated, Defect::BadNumber.refuse(what)));
        }
        if let Some(key) = self.encryption_key()
            && let Some(defect) = text_defect(Defect::NotWellFormed, "<KeyId>", key)
        {
            return Some((Place::Encryption, defect));
        }
        let parent = self
            .volume
            .as_ref()
            .and_then(|volume| volume.parent.as_deref());
        let defect = parent.and_then(|parent| text_defect(Defect::BadPath, "<Parent>", parent))?;
        Some((Place::Volume, defect))
    }

    fn tree_defect(&self) -> Option<(Place, Error)> {
        if self.images.is_empty() || self.images.len() > MAX_IMAGES {
            let what = format!(
                "{} images; 1 to {MAX_IMAGES} are possible",
                self.images.len()
            );
            return Some((Place::Top, Defect::MissingElement.refuse(what)));
        }
        let (mut guids, mut files) = (HashSet::new(), HashSet::new());
        for (i, image) in self.images.iter().enumerate() {
            let guid = image.guid;
            let defect = if guid == Guid::NONE {
                Defect::BadGuid.refuse(format!(
                    "<Image> with the GUID {guid}, which means \"none\""
                ))
            } else if let Some(defect) = text_defect(Defect::BadPath, "<File>", &image.file) {
                defect.while_doing(format_args!("image {guid}"))
            } else if !guids.insert(guid) {
                Defect::DuplicateGuid.refuse(format!("two <Image> elements have the GUID {guid}"))
            } else if !files.insert(image.file.as_str()) {
                Defect::DuplicateFile
                    .refuse(format!("two images have the file {}", shown(&image.file)))
            } else {
                continue;
            };
            return Some((Place::Image(i), defect));
        }
        let mut parents = HashMap::new();
        for (i, shot) in self.shots.iter().enumerate() {
            let defect = if parents.insert(shot.guid, shot.parent).is_some() {
                Defect::DuplicateGuid
                    .refuse(format!("two <Shot> elements have the GUID {}", shot.guid))
            } else if !guids.contains(&shot.guid) && shot.guid != self.top {
                no_image(shot.guid)
            } else {
                continue;
            };
            return Some((Place::Shot(i), defect));
        }
        self.top_defect(&guids, &parents)
            .or_else(|| self.parent_defect(&parents))
    }

    fn top_defect(
        &self,
        guids: &HashSet<Guid>,
        parents: &HashMap<Guid, Guid>,
    ) -> Option<(Place, Error)> {
        let top = self.top;
        if !guids.contains(&top) {
            let what = format!("the top {top} has no <Image>");
            return Some((Place::Top, Defect::TopMissing.refuse(what)));
        }
        if let Some(i) = self
            .images
            .iter()
            .position(|image| !parents.contains_key(&image.guid))
        {
            let what = format!("image {} has no <Shot>", self.images[i].guid);
            return Some((Place::Image(i), Defect::MissingShot.refuse(what)));
        }
        let i = self
            .shots
            .iter()
            .position(|s| s.guid == top && s.temporary != Temporary::No)?;
        let what = format!("the top {top} is marked for removal (Temporary)");
        Some((Place::Shot(i), Defect::TemporaryTop.refuse(what)))
    }

    /// Unknown parents, then cycles: every node is visited once, whatever the tree looks like.
    fn parent_defect(&self, parents: &HashMap<Guid, Guid>) -> Option<(Place, Error)> {
        let continues = self.continues();
        for (i, shot) in self.shots.iter().enumerate() {
            let known = shot.parent == Guid::NONE || parents.contains_key(&shot.parent);
            if !known && !continues {
                return Some((Place::Shot(i), unknown_parent(shot.guid, shot.parent)));
            }
        }
        // Where each node was first reached from; meeting the same walk again is a cycle.
        let mut walks: HashMap<Guid, usize> = HashMap::new();
        for (i, shot) in self.shots.iter().enumerate() {
            let mut at = shot.guid;
            while let Some(&parent) = parents.get(&at) {
                match walks.insert(at, i) {
                    None => at = parent,
                    Some(walk) if walk == i => {
                        return Some((Place::Shot(i), cycle(at)));
                    }
                    Some(_) => break,
                }
            }
        }
        None
    }
}

fn no_image(guid: Guid) -> Error {
    Defect::MissingImage.refuse(format!("snapshot {guid} has no <Image>"))
}

fn unknown_parent(guid: Guid, parent: Guid) -> Error {
    Defect::UnknownParent.refuse(format!(
        "the parent of snapshot {guid} is {parent}, which the disk doesn't have"
    ))
}

fn cycle(guid: Guid) -> Error {
    Defect::ParentCycle.refuse(format!("the parents of snapshot {guid} form a cycle"))
}
