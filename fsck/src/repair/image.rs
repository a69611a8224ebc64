//! What is to be done to one ploop image.
//!
//! ```text
//!  file, or its .idx ─ View ─► geometry ─► entries ─► extension ─► moved clusters ─► end ─► marks
//!                        ▲                                                                   │
//!                        └──────────── the checker, on the view with all of it ◄─────────────┘
//! ```
//!
//! The last look is the checker's: a plan that would not leave a clean image is none.

use std::path::PathBuf;
use std::sync::Arc;

use ploop::Result;
use ploop::format::ploop::extension::{Extension, FEATURE_DIRTY_BITMAP, read as read_extension};
use ploop::format::ploop::header::{
    FLAG_CONVERTING, FLAG_EMPTY, HEADER_BYTES, IN_USE_CLOSED, IN_USE_DIRTY, Unchecked,
};
use ploop::format::ploop::{Header, Version};
use ploop::store::{SECTOR, StoreFile, read_or_zero};
use ploop::verify::{Class, FindingKind, ImageScan, check_image};

use super::Step;
use super::changes::{Changes, ImagePlan, Notes};
use super::entries::{self, Table};
use super::fields::{Fields, HeaderBytes};
use super::geometry::{Refusal, settle};
use super::ranges::push;
use super::record::PIECE;
use super::view::{Copy, View};

/// Feature flag: nobody who does not know the feature may write the image.
const NECESSARY: u64 = 1;

/// The copy of header and BAT from before a conversion.
#[derive(Clone, Debug)]
pub(super) struct Backup {
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn StoreFile>,
}

/// Plans the repair of the image `file`, whose header and BAT are taken from `backup` if there is
/// one. `changed_below`: the repair of another image changes what this one shows. Refuses what
/// cannot be repaired; a clean image gives no changes.
pub(super) fn plan(
    file: &Arc<dyn StoreFile>,
    backup: Option<&Backup>,
    changed_below: bool,
) -> Result<Result<ImagePlan, Refusal>> {
    let len = file.len()?;
    let mut notes = Notes::on(file.path());
    let mut restore = None;
    let view = match backup {
        None => View::of(file)?,
        Some(backup) => match restored(file, backup, &mut notes)? {
            Ok((view, bytes)) => {
                restore = Some((backup.path.clone(), bytes));
                view
            }
            Err(why) => return Ok(Err(why)),
        },
    };
    let mut head: HeaderBytes = [0; HEADER_BYTES as usize];
    if view.read_at(&mut head, 0)? < head.len() {
        let what = format!("the file has {len} bytes, a header needs {HEADER_BYTES}");
        return Ok(Err(what));
    }
    let found = Fields(head);
    if found.version().is_some() && found.flags() & FLAG_CONVERTING != 0 {
        let what = "a conversion between v1 and v2 was interrupted, and the copy of the BAT from \
                    before it (.idx) is not there: its entries may be in two units";
        return Ok(Err(what.into()));
    }
    let fields = match settle(&view, found, view.len, &mut notes)? {
        Ok(fields) => fields,
        Err(why) => return Ok(Err(why)),
    };
    let planner = Planner {
        file,
        view,
        notes,
        found,
        fields,
        changed_below,
    };
    let mut planned = planner.plan(len)?;
    if let (Ok(plan), Some(restore)) = (&mut planned, restore) {
        if !plan.steps.iter().all(|s| s.automatic) {
            let what = "the copy of the BAT from before the conversion does not fit the image";
            return Ok(Err(what.into()));
        }
        if let Some(changes) = &mut plan.changes {
            changes.backup = Some(restore);
        }
    }
    Ok(planned)
}

/// The image with header and BAT from the backup.
fn restored(
    file: &Arc<dyn StoreFile>,
    backup: &Backup,
    notes: &mut Notes,
) -> Result<Result<(View, u64), Refusal>> {
    let unfit = |why: &str| Ok(Err(format!("{}: {why}", backup.path.display())));
    let mut heads = [[0; HEADER_BYTES as usize]; 2];
    for (head, file) in heads.iter_mut().zip([file, &backup.file]) {
        if file.read_at(head, 0)? < head.len() {
            return unfit("it or the image is shorter than a header");
        }
    }
    let (now, before) = (Fields(heads[0]), Fields(heads[1]));
    let len = backup.file.len()?;
    let header = match Unchecked::parse(&before.0).and_then(|h| h.check(len)) {
        Ok(header) => header,
        Err(e) => return unfit(e.what()),
    };
    if before.flags() & FLAG_CONVERTING != 0 || now.version().is_none() {
        return unfit("it is no copy from before the conversion");
    }
    let same = [
        now.cluster_sectors() == before.cluster_sectors(),
        now.entries() == before.entries(),
        now.size_sectors() == before.size_sectors(),
    ];
    if same.contains(&false) {
        return unfit("cluster size, entries or size are not those of the image");
    }
    // One that is not marked was converted already and can be read: it must read the same.
    if now.flags() & FLAG_CONVERTING == 0 && !same_places(file, &now, &backup.file, &before)? {
        return unfit("its entries are not those of the image, one of the two was changed");
    }
    notes.sure(format!(
        "a conversion between v1 and v2 was interrupted: put header and BAT back as they were, \
         from {}",
        backup.path.display()
    ));
    let view = View::restored(file, &backup.file, header.data_start)?;
    Ok(Ok((view, header.data_start)))
}

/// Whether every entry of the one image means the same place as that of the other, which has as many.
fn same_places(
    file: &Arc<dyn StoreFile>,
    now: &Fields,
    other: &Arc<dyn StoreFile>,
    before: &Fields,
) -> Result<bool> {
    let unit = |fields: &Fields| match fields.version() {
        Some(Version::V2) => u64::from(fields.cluster_sectors()),
        _ => 1,
    };
    let end = Header::slot_offset(u64::from(before.entries()));
    let (mut ours, mut theirs) = (vec![0; PIECE], vec![0; PIECE]);
    let mut at = HEADER_BYTES;
    while at < end {
        let next = |f: &Arc<dyn StoreFile>| Ok(f.next_data(at, end)?.map(|d| d.start));
        // Where both are holes, neither has an entry.
        let Some(data) = [next(file)?, next(other)?].into_iter().flatten().min() else {
            break;
        };
        at = data.max(HEADER_BYTES) & !3;
        let n = (end - at).min(PIECE as u64) as usize;
        let (ours, theirs) = (&mut ours[..n], &mut theirs[..n]);
        read_or_zero(file.as_ref(), ours, at)?;
        read_or_zero(other.as_ref(), theirs, at)?;
        let place = |raw: &[u8; 4], unit: u64| u64::from(u32::from_le_bytes(*raw)) * unit;
        let pairs = ours.as_chunks().0.iter().zip(theirs.as_chunks().0);
        if pairs
            .clone()
            .any(|(a, b)| place(a, unit(now)) != place(b, unit(before)))
        {
            return Ok(false);
        }
        at += n as u64;
    }
    Ok(true)
}

struct Planner<'a> {
    file: &'a Arc<dyn StoreFile>,
    /// The image, with what is planned so far.
    view: View,
    notes: Notes,
    found: Fields,
    /// The header as it is to be.
    fields: Fields,
    changed_below: bool,
}

impl Planner<'_> {
    fn plan(mut self, len: u64) -> Result<Result<ImagePlan, Refusal>> {
        let start = match self.data_start() {
            Ok(start) => start,
            Err(why) => return Ok(Err(why)),
        };
        if self.view.len < start {
            let what = format!("the file ends before the data area: extend it to {start} bytes");
            self.notes.sure(what);
        }
        let span = self.view.len.max(start);
        let header = match Unchecked::parse(&self.fields.0).and_then(|h| h.check(span)) {
            Ok(header) => header,
            Err(e) => return Ok(Err(e.what().to_owned())),
        };
        let mut table = entries::judge_all(&self.view, &header, &self.found, len)?;
        table.note(&header, &mut self.notes);
        // For the moment the homeless have no cluster either.
        let homeless = table.homeless.iter();
        let homeless = homeless.map(|o| Header::slot_offset(u64::from(o.slot)));
        let empty = table.zeroed.iter().copied().chain(homeless);
        self.view.words = empty.map(|at| (at, 0)).collect();
        self.view.header = Some(self.fields.0);
        self.view.len = span.max(table.reach);
        if table.reach > len {
            let what = format!("extend the file to {} bytes, with zeros", table.reach);
            self.notes.losing(what, table.cut.clone());
        }
        if let Err(why) = self.extension(&header, &table)? {
            return Ok(Err(why));
        }
        if let Err(why) = self.give_homes(&header, &mut table) {
            return Ok(Err(why));
        }
        let grown = self.view.len;
        self.marks();
        self.view.header = Some(self.fields.0);
        if let Err(why) = self.settle_end(&header)? {
            return Ok(Err(why));
        }
        let changes = Changes {
            path: self.file.path().to_path_buf(),
            len,
            backup: None,
            zeroed: table.zeroed,
            grown,
            copies: std::mem::take(&mut self.view.copies),
            moved: table.moved,
            end: self.view.len,
            header: (self.fields != self.found).then_some(self.fields.0),
            table_end: header.data_start,
            fields: self.fields,
        };
        if changes.nothing() && self.notes.steps.is_empty() {
            return Ok(Ok(ImagePlan::default()));
        }
        if let Some(why) = self.kept_from_us(&header)? {
            return Ok(Err(why));
        }
        Ok(Ok(ImagePlan {
            steps: self.notes.steps,
            changes: Some(changes),
        }))
    }

    fn data_start(&self) -> Result<u64, Refusal> {
        // Long enough for any field: what `settle` gave is right but for the file's length.
        match Unchecked::parse(&self.fields.0).and_then(|h| h.check(u64::MAX)) {
            Ok(header) => Ok(header.data_start),
            Err(e) => Err(e.what().to_owned()),
        }
    }

    fn scan(&self) -> Result<Result<ImageScan, Refusal>> {
        match check_image(&self.view) {
            Ok(scan) => Ok(Ok(scan)),
            Err(e) if e.kind() == ploop::Kind::Corrupt => Ok(Err(e.what().to_owned())),
            Err(e) => Err(e),
        }
    }

    /// A broken extension is dropped: nobody could use it. One whose cluster is an entry's, too. So is
    /// one whose bits do not have what repair changes: an increment by them would lack it.
    fn extension(&mut self, header: &Header, table: &Table) -> Result<Result<(), Refusal>> {
        if !self.fields.extension_in_force() {
            return Ok(Ok(()));
        }
        let scan = match self.scan()? {
            Ok(scan) => scan,
            Err(why) => return Ok(Err(why)),
        };
        let broken = scan
            .findings
            .iter()
            .any(|f| f.kind.class() > Class::Clean && f.kind.name().starts_with("extension-"));
        let shows_other =
            self.changed_below || self.notes.steps.iter().any(Step::changes_what_is_shown);
        if !broken && !shows_other {
            return Ok(Ok(()));
        }
        let at = self.fields.extension().saturating_mul(SECTOR);
        let cluster = header.cluster_bytes();
        // Without its magic it is nobody's but the entry's.
        let ours = read_extension(&self.view, header, self.view.len)?;
        let mut shared = Vec::new();
        for owner in &table.owners {
            let here = owner.offset < at.saturating_add(cluster) && at < owner.offset + cluster;
            if broken && here && matches!(ours, Extension::Sections(_)) {
                let from = u64::from(owner.slot) * cluster;
                push(&mut shared, from..from + cluster);
            }
        }
        self.fields.clear_extension();
        self.fields.set_in_use(IN_USE_CLOSED);
        self.view.header = Some(self.fields.0);
        let what = match broken {
            true => "the format extension cannot be used: drop it",
            false => "the change-tracking bitmaps do not have what repair changes: drop them",
        };
        self.notes.giving_up(
            what.into(),
            "change tracking: the next incremental backup must be a full one",
            true,
        );
        if !shared.is_empty() {
            let what = "keep the cluster that a BAT entry and the extension share, for the entry";
            self.notes.doubtful(what.into(), shared);
        }
        Ok(Ok(()))
    }

    /// Private clusters for owners that share theirs or are off the grid.
    fn give_homes(&mut self, header: &Header, table: &mut Table) -> Result<(), Refusal> {
        let cluster = header.cluster_bytes();
        // With an extension, the clusters behind the last entry's may be its.
        let used = match self.fields.extension_in_force() {
            true => self.view.len,
            false => table.used_end,
        };
        // What is copied off the grid may reach behind the last cluster in use.
        let strays = table.homeless.iter().map(|o| o.offset + cluster);
        let used = strays.fold(used.max(header.data_start), u64::max);
        let mut to = header.data_start + (used - header.data_start).next_multiple_of(cluster);
        for homeless in &table.homeless {
            let Some(entry) = header.entry_for(to) else {
                return Err("the image is too long for another cluster".into());
            };
            self.view.copies.push(Copy {
                from: homeless.offset,
                to,
                len: cluster,
            });
            let at = Header::slot_offset(u64::from(homeless.slot));
            table.moved.push((at, entry));
            to += cluster;
        }
        table.moved.sort_unstable();
        self.view.words.extend(table.moved.iter().copied());
        if !table.homeless.is_empty() {
            self.view.len = self.view.len.max(to);
        }
        Ok(())
    }

    fn marks(&mut self) {
        let flags = self.fields.flags();
        let known = flags & (FLAG_EMPTY | FLAG_CONVERTING);
        if flags != known {
            let what = format!(
                "header flags {:#x} are not defined: clear them",
                flags & !known
            );
            self.notes.sure(what);
            self.fields.set_flags(known);
        }
        if self.fields.in_use() == IN_USE_DIRTY {
            let what = "the image was not closed cleanly: clear its in-use mark";
            self.notes.sure(what.into());
            self.fields.set_in_use(IN_USE_CLOSED);
        }
    }

    /// Cuts what is behind the last cluster in use, and asks the checker.
    fn settle_end(&mut self, header: &Header) -> Result<Result<(), Refusal>> {
        let cluster = header.cluster_bytes();
        let grid = |len: u64| (len.saturating_sub(header.data_start)) / cluster * cluster;
        for _ in 0..4 {
            let scan = match self.scan()? {
                Ok(scan) => scan,
                Err(why) => return Ok(Err(why)),
            };
            let find = |kind| scan.findings.iter().find(|f| f.kind == kind);
            let rest = find(FindingKind::LengthMisaligned);
            if let Some(tail) = find(FindingKind::LeakedTail) {
                self.cut(tail.offset, "nothing is in the end of the file: cut it");
            } else if rest.is_some() {
                let down = header.data_start + grid(self.view.len);
                match self.fields.extension_in_force() {
                    true => {
                        self.view.len = down + cluster;
                        let what = "the file's length is no multiple of the cluster: extend it";
                        self.notes.sure(what.into());
                    }
                    false => {
                        let what = "the file's length is no multiple of the cluster: cut it";
                        self.cut(down, what);
                    }
                }
            } else {
                let wrong = scan.findings.iter().filter(|f| {
                    f.kind.class() > Class::Clean && f.kind != FindingKind::UnreferencedClusters
                });
                let wrong: Vec<&str> = wrong.map(|f| f.what.as_str()).take(3).collect();
                self.stale_extension();
                return Ok(match wrong.is_empty() {
                    true => Ok(()),
                    false => Err(format!("repair would leave this: {}", wrong.join("; "))),
                });
            }
        }
        Ok(Err("repair does not find an end of the image".into()))
    }

    fn cut(&mut self, to: u64, what: &str) {
        self.view.len = to;
        let what = what.to_owned();
        if self.notes.steps.iter().all(|s| s.what != what) {
            self.notes.sure(what);
        }
    }

    /// An extension that is out of date says nothing, but QEMU reads it: it goes with the first
    /// change, and when it is not there.
    fn stale_extension(&mut self) {
        if self.fields.extension() == 0 || self.fields.extension_in_force() {
            return;
        }
        let outside = self.fields.extension().saturating_mul(SECTOR) >= self.view.len;
        if outside || !self.notes.steps.is_empty() || self.fields != self.found {
            self.fields.clear_extension();
            self.view.header = Some(self.fields.0);
            let what = "the header names a format extension that is out of date: clear that";
            self.notes.sure(what.into());
        }
    }

    /// The sentence for an image that must not be written without knowing what is in it.
    fn kept_from_us(&self, header: &Header) -> Result<Option<Refusal>> {
        if !self.found.extension_in_force() {
            return Ok(None);
        }
        let Extension::Sections(all) = read_extension(self.file.as_ref(), header, self.view.len)?
        else {
            return Ok(None);
        };
        let unknown = all
            .iter()
            .find(|s| s.magic != FEATURE_DIRTY_BITMAP && s.flags & NECESSARY != 0);
        Ok(unknown.map(|s| {
            format!(
                "the image has a feature ({:#018x}) that whoever writes it must know, and it is not \
                 known here",
                s.magic
            )
        }))
    }
}
