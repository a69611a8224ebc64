//! `ploop snapshot switch`: the disk shows a snapshot again, and what it showed until now is kept.
//!
//! ```text
//!   base ── a ── b ── top           base ── a ── b ── rollback-1     (the old top, sealed)
//!                         switch a              └──── top            (new, empty)
//! ```
//!
//! Offline: somebody who has the disk open would go on writing the old top. Nothing is copied; the
//! cost is one small file, whatever the disk holds.

use std::sync::Arc;

use ploop::descriptor::{Descriptor, Guid, Image, Temporary};
use ploop::disk::info::data_bytes;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::delta::read_header;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create};
use ploop::locks::{Use, lock_image};
use ploop::store::{Access, SECTOR, StoreFile};
use ploop::tracker::bitmap::Bitmap;
use serde::Serialize;

use crate::life;
use crate::meta::{Meta, SnapshotMeta};
use crate::place::{Place, now};
use crate::share;
use crate::snapshot::{depth_note, refuse_name};
use crate::tracker;

/// What a branch that was put aside is called, with a number, when nothing else is said.
const ASIDE: &str = "rollback-";

/// Where to, and what becomes of what is there.
#[derive(Clone, Debug, Default)]
pub struct SwitchOptions {
    /// The snapshot: its GUID or its name.
    pub to: String,
    /// Destroy what was written since the snapshot below the top, instead of keeping it.
    pub discard: bool,
    /// The name of what is kept; `rollback-1` (`-2`, …) when not given.
    pub keep_as: Option<String>,
}

/// A disk that was switched.
#[derive(Clone, Debug, Serialize)]
pub struct Switched {
    /// Which disk, as the caller named it.
    pub disk: String,
    /// The snapshot that it shows now.
    pub to: String,
    /// Its name.
    pub to_name: Option<String>,
    /// The snapshot that what was there is kept as; none when it was discarded or empty.
    pub kept: Option<Kept>,
    /// Bytes of data that were given back.
    pub discarded_bytes: u64,
    /// The new top's file, in the disk's directory.
    pub new_file: String,
    /// Virtual size in bytes of the disk now.
    pub size: u64,
    /// Images in its chain.
    pub depth: usize,
    /// What else there is to say.
    pub notes: Vec<String>,
}

/// A branch that was put aside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Its node.
    pub guid: String,
    /// Its name.
    pub name: Option<String>,
}

/// Puts a new, empty top on a snapshot. Durable on return. Takes the disk's lock.
///
/// 1. the lock; what interrupted operations left is swept; the target's chain is opened, so that
///    it can be, and stays as it is; the old top is taken from everybody else and, if it is to be
///    kept, closed cleanly;
/// 2. metadata: the name of the branch that is kept, the file that is made, the file that is
///    dropped; durable;
/// 3. the new image and the next descriptor, durable; the disk's life is forgotten ([`life`]);
/// 4. COMMIT: that descriptor is in force;
/// 5. the dropped file is removed.
///
/// Cut before 4: the disk is as it was, and the new file is swept by the next operation. Cut after
/// it: so is the dropped one. An old top without any cluster is dropped: its parent, where that is
/// a snapshot that stays, shows the same. One that is damaged is kept as it is, and the report says
/// so.
///
/// Errors, with nothing changed but what step 1 closes: `InUse`; `NotFound` (also for what is being
/// removed); `Invalid` for the top itself; `Exists` for a name that is taken; `ReadOnly` for a
/// read-only volume; `Unsupported` for a disk whose top is a raw image.
pub fn switch(place: &Place<'_>, options: &SwitchOptions) -> Result<Switched> {
    // 1.
    match place.replay(&place.descriptor()?) {
        // What cannot be opened is kept, or discarded, as it is.
        Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::Unsupported | Kind::NotFound) => {}
        replayed => replayed?,
    }
    let _held = place.lock()?;
    place.sweep()?;
    if options.discard && place.root().is_some() {
        // In an old container the file that goes can be the one that says what its id is.
        share::id(place)?;
    }
    let d = place.descriptor()?;
    let meta = place.meta()?;
    let to = place.find(&d, &meta, &options.to)?;
    refuse(place, &d, &meta, to, options)?;
    let source = place.source(Some(to));
    let _target = place
        .opener()
        .open(&source, &place.open_options(false))
        .map_err(|e| e.while_doing(format_args!("open snapshot {}", options.to)))?;
    let header = header_on(place, &d, to)?;
    let changed = tracker::changed(place, &meta, to, header.size());
    let old = OldTop::take(place, &d)?;
    let fate = old.fate(place, &d, options)?;
    if fate == Fate::Keep {
        old.seal()?;
    }
    let plan = Plan::make(place, d, &meta, to, &header, &old, fate, options)?;
    // 2. to 4.
    plan.carry_out(place, &meta, &header, (&old, changed.as_ref()))?;
    // 5.
    if let Fate::Drop { .. } = fate {
        drop(old.file);
        if let Err(e) = plan.forget(place, &old.image.file) {
            tracing::warn!(disk = place.shown(), error = %e, "swept by the next operation");
        }
    }
    plan.report(place, &meta, to, &header, fate, old.damage)
}

fn refuse(
    place: &Place<'_>,
    d: &Descriptor,
    meta: &Meta,
    to: Guid,
    options: &SwitchOptions,
) -> Result<()> {
    if to == d.top {
        let what = format!("{to} is the top of the disk: it is what the disk shows now");
        return Err(Error::invalid(what).on(place.dir()));
    }
    if d.volume.as_ref().is_some_and(|v| v.read_only) {
        return Err(Error::new(Kind::ReadOnly, "the volume is marked read-only").on(place.dir()));
    }
    if is_raw(d, d.top) {
        let what = "the top of the disk is a raw image, which is no delta on anything";
        return Err(Error::unsupported(what)
            .on(place.dir())
            .fix("Convert it: ploop convert SOURCE TARGET --to ploop"));
    }
    if options.discard && options.keep_as.is_some() {
        return Err(Error::invalid(
            "what is discarded cannot be kept under a name",
        ));
    }
    refuse_name(place, d, meta, options.keep_as.as_deref())
}

/// Whether the image of `node` is a raw one.
pub(crate) fn is_raw(d: &Descriptor, node: Guid) -> bool {
    d.base_is_raw() && d.shot(node).is_some_and(|s| s.parent == Guid::NONE)
}

/// The header of an empty image on the snapshot `on`: its version, its cluster, its size. A raw
/// base is written over in v2. A size that is no multiple of the cluster is rounded up.
fn header_on(place: &Place<'_>, d: &Descriptor, on: Guid) -> Result<Header> {
    let image = d.image(on).ok_or_else(|| no_image(place, on))?;
    let file = place.store().open(&place.file_of(image)?, Access::Read)?;
    let (version, cluster, sectors) = match is_raw(d, on) {
        true => {
            let sectors = file.len()?.div_ceil(SECTOR);
            (Version::V2, d.cluster_sectors, sectors)
        }
        false => {
            let (h, _) = read_header(file.as_ref())?;
            (h.version, h.cluster_sectors, h.size_sectors)
        }
    };
    let rounded = sectors.checked_next_multiple_of(u64::from(cluster));
    let rounded = rounded.ok_or_else(|| Error::corrupt("the disk is too large").on(file.path()))?;
    Header::new(version, cluster, rounded).map_err(|e| e.on(file.path()))
}

fn no_image(place: &Place<'_>, node: Guid) -> Error {
    Error::corrupt(format!("snapshot {node} has no image")).on(place.dir())
}

/// What becomes of the old top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Keep,
    Drop {
        /// Of data, in its file.
        bytes: u64,
        empty: bool,
    },
}

/// The image that the disk was written to, taken from everybody else.
struct OldTop {
    image: Image,
    /// None where its file is missing.
    file: Option<Arc<dyn StoreFile>>,
    /// None where it is damaged.
    top: Option<Top>,
    damage: Option<String>,
}

impl OldTop {
    fn take(place: &Place<'_>, d: &Descriptor) -> Result<OldTop> {
        let image = d.image(d.top).ok_or_else(|| no_image(place, d.top))?;
        let mut old = OldTop {
            image: image.clone(),
            file: None,
            top: None,
            damage: None,
        };
        let path = place.file_of(image);
        let file = match path.and_then(|path| place.store().open(&path, Access::Write)) {
            Err(e) if e.kind() == Kind::NotFound => {
                old.damage = Some(e.to_string());
                return Ok(old);
            }
            file => file?,
        };
        lock_image(file.as_ref(), Use::Write)?;
        let home = place.opener().home(file.path());
        match Top::open_at(file.clone(), home) {
            // Opening the disk completes them, if what lies below can be read.
            Ok(top) if top.parts().count() > 0 => {
                let what = format!("{} clusters could not be completed", top.parts().count());
                old.damage = Some(what);
            }
            Ok(top) => old.top = Some(top),
            Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::Unsupported) => {
                old.damage = Some(e.to_string());
            }
            Err(e) => return Err(e),
        }
        old.file = Some(file);
        Ok(old)
    }

    fn fate(&self, place: &Place<'_>, d: &Descriptor, options: &SwitchOptions) -> Result<Fate> {
        let data = |file: &Arc<dyn StoreFile>| data_bytes(file.as_ref());
        let bytes = self.file.as_ref().map_or(Ok(0), data)?;
        if options.discard {
            refuse_drop(place, &self.image)?;
            let empty = false;
            return Ok(Fate::Drop { bytes, empty });
        }
        let droppable = Place::owns(&self.image) && options.keep_as.is_none();
        let Some(top) = self.top.as_ref().filter(|_| droppable) else {
            return Ok(Fate::Keep);
        };
        let entries = u64::from(top.header().entries);
        let empty = top.next_page_with_entries(0, entries) == entries
            && says_the_same(place, d, top.header())?;
        Ok(match empty {
            true => Fate::Drop { bytes, empty },
            false => Fate::Keep,
        })
    }

    /// Clears the mark of an image that was not closed cleanly; durable. Another is not touched.
    fn seal(&self) -> Result<()> {
        self.top.as_ref().map_or(Ok(()), Top::close)
    }
}

/// Whether the parent of a top without any cluster shows all that the top does: a node that stays,
/// of the same size (a top that was grown or shrunk says that much).
fn says_the_same(place: &Place<'_>, d: &Descriptor, top: &Header) -> Result<bool> {
    let parent = d.shot(d.top).and_then(|s| d.shot(s.parent));
    let meta = place.meta()?;
    match parent.filter(|p| p.temporary == Temporary::No) {
        Some(parent) => Ok(header_on(place, d, parent.guid)?.size() == top.size()
            && meta.size_of(d, parent.guid) == meta.size_of(d, d.top)),
        None => Ok(false),
    }
}

/// A file that is not in the disk's directory is not ours to remove.
fn refuse_drop(place: &Place<'_>, image: &Image) -> Result<()> {
    if Place::owns(image) {
        return Ok(());
    }
    let what = format!(
        "the top's image {:?} is not in the disk's directory",
        image.file
    );
    Err(Error::unsupported(what)
        .on(place.dir())
        .fix("Switch without discarding it"))
}

/// The tree and the metadata as they will be.
struct Plan {
    next: Descriptor,
    meta: Meta,
    new_file: String,
    kept: Option<Kept>,
}

impl Plan {
    #[expect(clippy::too_many_arguments, reason = "all that step 1 found")]
    fn make(
        place: &Place<'_>,
        d: Descriptor,
        before: &Meta,
        to: Guid,
        header: &Header,
        old: &OldTop,
        fate: Fate,
        options: &SwitchOptions,
    ) -> Result<Plan> {
        let mut plan = Plan {
            new_file: Place::new_file_name(&d),
            meta: before.clone(),
            kept: None,
            next: d,
        };
        plan.meta.files.insert(plan.new_file.clone());
        if let Some(bytes) = before.size_of(&plan.next, to) {
            plan.meta.sizes.insert(plan.new_file.clone(), bytes);
        }
        let limit = before.size_of(&plan.next, plan.next.top);
        let edited = match fate {
            Fate::Drop { .. } => {
                plan.meta.files.insert(old.image.file.clone());
                plan.next.replace_top(to, plan.new_file.clone()).map(drop)
            }
            Fate::Keep => {
                let guid = Guid::new_v4();
                let name = options.keep_as.clone().unwrap_or_else(|| aside(before));
                let entry = SnapshotMeta {
                    name: Some(name.clone()),
                    description: story(&plan.next, before, to),
                    created: now(),
                    ..SnapshotMeta::default()
                };
                plan.meta.snapshots.insert(guid.to_string(), entry);
                if let Some(bytes) = limit {
                    plan.meta.sizes.insert(guid.to_string(), bytes);
                }
                plan.kept = Some(Kept {
                    guid: guid.to_string(),
                    name: Some(name),
                });
                plan.next.branch_off(guid, to, plan.new_file.clone())
            }
        };
        edited.map_err(|e| e.on(place.dir()))?;
        plan.next.set_disk_sectors(header.size_sectors);
        Ok(plan)
    }

    /// Steps 2 to 4. What fails before the commit is taken back.
    fn carry_out(
        &self,
        place: &Place<'_>,
        before: &Meta,
        header: &Header,
        (old, changed): (&OldTop, Option<&Bitmap>),
    ) -> Result<()> {
        // 2.
        let prepared = place.set_meta(&self.meta).and_then(|()| {
            // 3.
            let path = place.dir().join(&self.new_file);
            let new = create(place.store(), &path, header, 0o600)?;
            tracker::carry_to_image(place, old.file.as_deref(), new, &|bits| {
                changed.map_or_else(|| bits.set_all(), |changed| bits.add(changed));
            })?;
            place.stage(&self.next)?;
            place.store().sync_dir(place.dir())?;
            life::forget(place.store(), place.dir())
        });
        if let Err(e) = prepared {
            let undone = place
                .forget_file(&self.new_file)
                .and_then(|()| place.unstage())
                // Forgotten only when it is gone for good.
                .and_then(|()| place.store().sync_dir(place.dir()))
                .and_then(|()| place.set_meta(before));
            if let Err(e) = undone {
                tracing::warn!(disk = place.shown(), error = %e, "swept by the next operation");
            }
            return Err(e);
        }
        // 4. COMMIT
        place.commit()
    }

    /// Step 5.
    fn forget(&self, place: &Place<'_>, file: &str) -> Result<()> {
        place.forget_image(file)?;
        place.store().sync_dir(place.dir())?;
        let mut meta = self.meta.clone();
        meta.files.remove(file);
        place.set_meta(&meta)
    }

    fn report(
        self,
        place: &Place<'_>,
        meta: &Meta,
        to: Guid,
        header: &Header,
        fate: Fate,
        damage: Option<String>,
    ) -> Result<Switched> {
        let depth = self.next.chain(self.next.top)?.len();
        let limit = self.meta.size_of(&self.next, self.next.top);
        let mut notes: Vec<String> = depth_note(depth).into_iter().collect();
        let discarded_bytes = match fate {
            Fate::Keep => 0,
            Fate::Drop { bytes, empty } => {
                if empty {
                    notes.push("nothing was written since the snapshot before: no branch".into());
                }
                bytes
            }
        };
        if let (Some(why), Fate::Keep) = (damage, fate) {
            notes.push(format!(
                "what was there is damaged, and kept as it is: {why}"
            ));
        }
        Ok(Switched {
            disk: place.shown().to_owned(),
            to: to.to_string(),
            to_name: meta.name_of(to).map(str::to_owned),
            kept: self.kept,
            discarded_bytes,
            new_file: self.new_file,
            size: limit.unwrap_or(u64::MAX).min(header.size()),
            depth,
            notes,
        })
    }
}

/// The first free name for what is put aside.
fn aside(meta: &Meta) -> String {
    let taken = |name: &str| {
        meta.snapshots
            .values()
            .any(|s| s.name.as_deref() == Some(name))
    };
    let mut n = 1u64;
    loop {
        let name = format!("{ASIDE}{n}");
        if !taken(&name) {
            return name;
        }
        n += 1;
    }
}

/// Where the branch came from, for people. When is said by its own time.
fn story(d: &Descriptor, meta: &Meta, to: Guid) -> String {
    let called = |g: Guid| meta.name_of(g).map_or_else(|| g.to_string(), str::to_owned);
    let below = d.shot(d.top).map_or(Guid::NONE, |s| s.parent);
    let to = called(to);
    let when = utc(now());
    match below == Guid::NONE {
        true => format!("what the disk was when it was switched to {to} at {when}"),
        false => {
            let below = called(below);
            format!("written since {below}, kept when the disk was switched to {to} at {when}")
        }
    }
}

/// `YYYY-MM-DD HH:MM:SS UTC` of seconds since 1970.
fn utc(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let leap = |y: u64| y.is_multiple_of(4) && !y.is_multiple_of(100) || y.is_multiple_of(400);
    // Whole groups of 400 years first: the rest is a loop of bounded length.
    let (mut year, mut left) = (1970 + days / 146_097 * 400, days % 146_097);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [
        31,
        28 + u64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 1;
    for length in lengths {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    let (h, m, s) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year}-{month:02}-{:02} {h:02}:{m:02}:{s:02} UTC", left + 1)
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_164_800, "2024-02-29 00:00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (13_569_465_600, "2400-01-01 00:00:00 UTC"),
        ] {
            assert_eq!(super::utc(seconds), text);
        }
        super::utc(u64::MAX);
    }
}
