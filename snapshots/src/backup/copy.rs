//! What the snapshot of a backup shows, into its file.
//!
//! The file is written in one pass, in ascending order of the guest. Now and then it is made durable,
//! with a mark of how far it is (`TARGET.part.json`); one that was cut goes on from its last mark.
//! What lies behind that mark in the file is cut off, or written again with the same bytes.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{Header, Version, create as create_image};
use ploop::store::{Access, SECTOR, Store, StoreFile, Trail};
use ploop::tracker::bitmap::Bitmap;
use serde::{Deserialize, Serialize};

use super::record::{Record, Since, VERSION, forget, hash_file, put_json};
use super::{Base, Format, Pending, Used, find};
use crate::convert::pieces_in;
use crate::convert::qcow2::{self, Backing, CLUSTER, CLUSTER_MIN, Mark, Writer, check_size};
use crate::delete::Watch;
use crate::hash::{self, Hasher};
use crate::merge::Progress;
use crate::place::Place;
use crate::store::read_small;

/// Bytes written between two marks.
const MARK_EVERY: u64 = 64 << 20;
/// Bytes between two looks at the watch.
const LOOK_EVERY: u64 = 1 << 20;
/// Cluster of a ploop image, in sectors.
const CLUSTER_SECTORS: u32 = 128;
const STATE_MAX: u64 = 1 << 30;
const MODE: u32 = 0o600;

/// `TARGET.part.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    /// The backup's id: the part is its alone.
    id: String,
    /// All of the guest before this byte is in the file.
    at: u64,
    /// Of a qcow2 file.
    mark: Mark,
}

impl State {
    fn of(pending: &Pending) -> State {
        State {
            id: pending.id.clone(),
            ..State::default()
        }
    }
}

/// Clusters of an increment of a tracker with this granularity.
pub(super) fn cluster(granularity: u64) -> u64 {
    granularity.clamp(CLUSTER_MIN, CLUSTER)
}

/// Copies what backup `id` of the disk is to hold; `None` when `watch` stopped it. On return the file
/// is durable, has its name, and has its record beside it. Blocks.
///
/// 1. the file's bytes, from the snapshot; durable;
/// 2. its record, durable;
/// 3. COMMIT: the file is renamed to its target, which must still be free; durable.
///
/// Cut before 3, what is there of it stays, and the next call goes on. Errors: `NotFound` when the
/// backup, or its snapshot, is gone; `Exists`; those of reading the one and writing the other.
pub fn copy(place: &Place<'_>, id: &str, watch: &dyn Watch) -> Result<Option<Record>> {
    let (node, pending) = find(place, id)?;
    let store = place.store();
    if store.kind(&pending.target)?.is_some() {
        // Perhaps it was cut behind 3.
        let record = there(store, &pending)?.ok_or_else(|| taken(&pending.target))?;
        let_go(store, &pending)?;
        return Ok(Some(record));
    }
    let source = place.source(Some(node));
    let disk = place.opener().open(&source, &place.open_options(false))?;
    // 1.
    let Some((data, content)) = write(place, node, &pending, &disk, watch)? else {
        return Ok(None);
    };
    let part = pending.part();
    let content = match content {
        None if pending.base.is_none() || pending.content => {
            Some(hash::content(&disk, &|done, total| {
                watch.progress(Progress { done, total });
            })?)
        }
        content => content,
    };
    let record = Record {
        ploop_backup: VERSION,
        id: pending.id.clone(),
        disk: place.shown().to_owned(),
        time: pending.time,
        size: disk.size(),
        format: pending.format,
        tracker: pending.tracker.as_ref().map(|u| u.name.clone()),
        since: pending.base.as_ref().map(|base| Since {
            id: base.id.clone(),
            file: named(base, &pending.target).into(),
            format: base.format,
        }),
        data,
        length: store.open(&part, Access::Read)?.len()?,
        file: hash_file(place.opener(), &part, &|_, _| ())?,
        content,
    };
    // 2.
    record.write(store, &pending.target)?;
    store.sync_dir(pending.dir())?;
    // 3. COMMIT
    store
        .rename_new(&part, &pending.target)
        .map_err(|e| match e.kind() {
            Kind::Exists => taken(&pending.target),
            _ => e,
        })?;
    let_go(store, &pending)?;
    Ok(Some(record))
}

/// The part has its name, or is gone: durable before nothing says any more whose it was.
pub(super) fn let_go(store: &dyn Store, pending: &Pending) -> Result<()> {
    store.sync_dir(pending.dir())?;
    forget(store, &pending.state())?;
    store.sync_dir(pending.dir())
}

/// The record of the target, where that is the file which was our part. Its record alone does not say so:
/// it is written before the rename, which another file can be in the way of.
fn there(store: &dyn Store, pending: &Pending) -> Result<Option<Record>> {
    let Ok(record) = Record::read(store, &pending.target) else {
        return Ok(None);
    };
    let renamed = store.kind(&pending.part())?.is_none();
    let length = store.open(&pending.target, Access::Read)?.len()?;
    let ours = renamed && record.id == pending.id && record.length == length;
    Ok(ours.then_some(record))
}

fn taken(target: &Path) -> Error {
    Error::new(Kind::Exists, "there is something of that name already")
        .on(target)
        .fix("Move it away, and run the command again")
}

/// How an increment names the file that it stands on.
fn named(base: &Base, target: &Path) -> String {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    match (base.file.parent() == target.parent(), base.file.file_name()) {
        // A colon before the first slash would be a protocol's name to QEMU.
        (true, Some(name)) => match text(Path::new(name)) {
            name if name.contains(':') => format!("./{name}"),
            name => name,
        },
        _ => text(&base.file),
    }
}

/// Step 1; guest bytes written, and the hash of the content where it was taken on the way.
fn write(
    place: &Place<'_>,
    node: Guid,
    pending: &Pending,
    disk: &Disk,
    watch: &dyn Watch,
) -> Result<Option<(u64, Option<String>)>> {
    let bits = match (&pending.base, &pending.tracker) {
        (Some(_), Some(used)) => Some(bits(place, pending, used, disk.size())?),
        _ => None,
    };
    let cluster = match (&bits, pending.format) {
        (Some(bits), _) => cluster(bits.granularity()),
        (None, Format::Ploop) => u64::from(CLUSTER_SECTORS) * SECTOR,
        (None, _) => CLUSTER,
    };
    let size = disk.size();
    let ranges = match &bits {
        Some(bits) => whole_clusters(bits, size, cluster),
        None => Vec::from_iter(Some(0..size).filter(|r| !r.is_empty())),
    };
    let mut job = Job::open(place, pending, disk, cluster, watch)?;
    tracing::info!(disk = place.shown(), %node, target = %pending.target.display(), at = job.state.at, "backup");
    job.total = ranges.iter().map(|r| r.end - r.start).sum();
    for range in ranges {
        if !job.range(range)? {
            return Ok(None);
        }
    }
    let backing = pending.base.as_ref().map(|base| Backing {
        name: named(base, &pending.target),
        format: base.format.name().to_owned(),
    });
    job.end(size, backing.as_ref()).map(Some)
}

/// What its tracker had; all that it has, where that was not kept: it was never cleared for good then.
fn bits(place: &Place<'_>, pending: &Pending, used: &Used, size: u64) -> Result<Bitmap> {
    match pending.bits(place).kept(used.size)? {
        Some(bits) => Ok(bits),
        None => {
            let all = Bitmap::new(size, used.granularity)?;
            all.set_all();
            tracing::warn!(
                disk = place.shown(),
                "the bits of this backup are not there, so every granule is in it"
            );
            Ok(all)
        }
    }
}

/// The dirty ranges, as whole clusters of the file, apart from each other.
fn whole_clusters(bits: &Bitmap, size: u64, cluster: u64) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for (bytes, dirty) in bits.runs(0..bits.size().min(size)) {
        if !dirty {
            continue;
        }
        let start = bytes.start / cluster * cluster;
        let end = bytes.end.next_multiple_of(cluster).min(size);
        match out.last_mut() {
            Some(last) if last.end >= start => last.end = end,
            _ => out.push(start..end),
        }
    }
    out
}

/// Where the bytes go.
enum Out {
    Raw(Arc<dyn StoreFile>, Trail, u64),
    Qcow2(Writer),
    Ploop(Box<Disk>, u64),
}

struct Job<'a> {
    store: &'a dyn Store,
    pending: &'a Pending,
    disk: &'a Disk,
    cluster: u64,
    watch: &'a dyn Watch,
    out: Out,
    state: State,
    /// Of a full backup that was not cut.
    hasher: Option<Hasher>,
    done: u64,
    total: u64,
    /// Written since the last mark, and since the last look.
    unmarked: u64,
    unseen: u64,
}

impl<'a> Job<'a> {
    fn open(
        place: &'a Place<'_>,
        pending: &'a Pending,
        disk: &'a Disk,
        cluster: u64,
        watch: &'a dyn Watch,
    ) -> Result<Job<'a>> {
        let store = place.store();
        let part = pending.part();
        let mut state = match read_state(store, pending)? {
            Some(state) => Some(state).filter(|s| s.at > 0),
            None => {
                claim(store, pending)?;
                None
            }
        };
        let resumed = match &state {
            Some(state) => {
                match reopen(store, &part, pending.format, disk.size(), cluster, state) {
                    Ok(out) => Some(out),
                    Err(e) => {
                        tracing::warn!(error = %e, "the backup begins anew");
                        None
                    }
                }
            }
            None => None,
        };
        let out = match resumed {
            Some(out) => out,
            None => {
                if state.take().is_some() {
                    // Durable before the part begins anew: it would be believed to be that far.
                    put_json(store, &pending.state(), &State::of(pending))?;
                    store.sync_dir(pending.dir())?;
                }
                forget(store, &part)?;
                create(store, &part, pending.format, disk.size(), cluster)?
            }
        };
        let fresh = state.is_none() && pending.base.is_none();
        Ok(Job {
            store,
            pending,
            disk,
            cluster,
            watch,
            out,
            state: state.unwrap_or_else(|| State::of(pending)),
            hasher: fresh.then(|| Hasher::new(disk.size())),
            done: 0,
            total: 0,
            unmarked: 0,
            unseen: 0,
        })
    }

    /// Copies a range; false when it was stopped.
    fn range(&mut self, range: Range<u64>) -> Result<bool> {
        let start = range.start.max(self.state.at);
        let before = self.done + (start.min(range.end) - range.start.min(start).min(range.end));
        if start >= range.end {
            self.done += range.end - range.start;
            return Ok(true);
        }
        // The first cluster of which nothing is said yet.
        let mut next = start / self.cluster;
        let mut stopped = false;
        let (disk, total) = (self.disk, self.total);
        let copied = pieces_in(disk, start..range.end, &|_, _| (), &mut |offset, bytes| {
            let first = offset / self.cluster;
            if first >= next {
                self.zeros(next..first)?;
                let done = before + (offset - start);
                self.watch.progress(Progress { done, total });
                if !self.look(first * self.cluster)? {
                    stopped = true;
                    return Err(Error::invalid("stopped"));
                }
            }
            self.piece(offset, bytes)?;
            next = (offset + bytes.len() as u64 - 1) / self.cluster + 1;
            Ok(())
        });
        if stopped {
            return Ok(false);
        }
        copied?;
        self.zeros(next..range.end.div_ceil(self.cluster))?;
        self.done += range.end - range.start;
        self.watch.progress(Progress {
            done: self.done,
            total,
        });
        Ok(true)
    }

    /// Between two clusters, before byte `at`: whether to go on.
    fn look(&mut self, at: u64) -> Result<bool> {
        let mut go_on = true;
        if self.unseen >= LOOK_EVERY {
            go_on = self.watch.go_on(self.unseen);
            self.unseen = 0;
        }
        if !go_on || self.unmarked >= MARK_EVERY {
            self.mark(at)?;
        }
        Ok(go_on)
    }

    fn mark(&mut self, at: u64) -> Result<()> {
        match &mut self.out {
            Out::Raw(file, ..) => file.sync()?,
            Out::Qcow2(writer) => {
                self.state.mark = writer.mark()?;
                writer.file().sync()?;
            }
            // It is closed when it is whole; what is cut begins anew.
            Out::Ploop(..) => return Ok(()),
        }
        self.state.at = at;
        self.unmarked = 0;
        put_json(self.store, &self.pending.state(), &self.state)
    }

    fn piece(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        match &mut self.out {
            Out::Raw(file, trail, written) => {
                file.write_at(bytes, offset)?;
                trail.wrote(file.as_ref(), offset, len);
                *written += len;
            }
            Out::Qcow2(writer) => writer.piece(offset, bytes)?,
            Out::Ploop(disk, written) => {
                disk.write(offset, bytes)?;
                *written += len;
            }
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.add(offset, bytes);
        }
        self.unmarked += len;
        self.unseen += len;
        Ok(())
    }

    /// Clusters of an increment that read as zeros.
    fn zeros(&mut self, clusters: Range<u64>) -> Result<()> {
        if self.pending.base.is_none() {
            return Ok(());
        }
        match &mut self.out {
            Out::Qcow2(writer) => clusters.into_iter().try_for_each(|c| writer.zero(c)),
            Out::Raw(..) | Out::Ploop(..) => Ok(()),
        }
    }

    fn end(self, size: u64, backing: Option<&Backing>) -> Result<(u64, Option<String>)> {
        let content = self.hasher.map(Hasher::text);
        let written = match self.out {
            Out::Raw(file, _, written) => {
                file.sync()?;
                written
            }
            Out::Qcow2(writer) => {
                let written = writer.written();
                writer.finish(check_size(size, self.cluster)?, backing)?;
                written
            }
            Out::Ploop(disk, written) => {
                disk.close()?;
                written
            }
        };
        Ok((written, content))
    }
}

/// How far this backup's part is; `None` where there is no part. Error: `Exists` for another one's.
fn read_state(store: &dyn Store, pending: &Pending) -> Result<Option<State>> {
    let path = pending.state();
    if store.kind(&path)?.is_none() {
        return match store.kind(&pending.part())? {
            None => Ok(None),
            Some(_) => Err(anothers(pending)),
        };
    }
    let bytes = read_small(store, &path, STATE_MAX)?;
    let state = serde_json::from_slice::<State>(&bytes).ok();
    let ours = state.filter(|s| s.id == pending.id);
    ours.map(Some).ok_or_else(|| anothers(pending))
}

/// True when the part beside the target is this backup's, or nobody's.
pub(super) fn has_part(store: &dyn Store, pending: &Pending) -> Result<bool> {
    match read_state(store, pending) {
        Err(e) if e.kind() == Kind::Exists => Ok(false),
        state => state.map(|_| true),
    }
}

/// Takes the part's name for this backup, before the part is made: of two disks, one has it.
fn claim(store: &dyn Store, pending: &Pending) -> Result<()> {
    let own = pending.claim();
    put_json(store, &own, &State::of(pending))?;
    store
        .rename_new(&own, &pending.state())
        .map_err(|e| match e.kind() {
            Kind::Exists => anothers(pending),
            _ => e,
        })?;
    store.sync_dir(pending.dir())
}

fn anothers(pending: &Pending) -> Error {
    let what = "another backup is being written to this file";
    Error::new(Kind::Exists, what)
        .on(pending.part())
        .fix(format!(
            "Let it end, or drop this one with --abandon, and choose another target. Where there is no \
             other one, remove this file and {}",
            pending.state().display()
        ))
}

/// The file of a backup that was cut.
fn reopen(
    store: &dyn Store,
    part: &Path,
    format: Format,
    size: u64,
    cluster: u64,
    state: &State,
) -> Result<Out> {
    if state.at > size || !state.at.is_multiple_of(cluster) && state.at != size {
        return Err(Error::corrupt("its mark is no place of the disk's to go on at").on(part));
    }
    let file = store.open(part, Access::Write)?;
    match format {
        Format::Raw => Ok(Out::Raw(file, Trail::default(), 0)),
        Format::Qcow2 => {
            let writer = Writer::resume(file, cluster, state.at, state.mark.clone())?;
            Ok(Out::Qcow2(writer))
        }
        Format::Ploop => Err(Error::unsupported("a ploop image begins anew")),
    }
}

fn create(store: &dyn Store, part: &Path, format: Format, size: u64, cluster: u64) -> Result<Out> {
    match format {
        Format::Raw => {
            let file = store.create(part, MODE)?;
            file.set_len(size)?;
            Ok(Out::Raw(file, Trail::default(), 0))
        }
        Format::Qcow2 => {
            qcow2::check_size(size, cluster).map_err(|e| e.on(part))?;
            Ok(Out::Qcow2(Writer::new(store.create(part, MODE)?, cluster)))
        }
        Format::Ploop => {
            let padded = size.next_multiple_of(cluster);
            let header = Header::new(Version::V2, CLUSTER_SECTORS, padded / SECTOR)?;
            let file = create_image(store, part, &header, MODE)?;
            let disk = Disk::writable(None, Top::open(file)?, None)?;
            Ok(Out::Ploop(Box::new(disk), 0))
        }
    }
}
