//! The receiving side: nothing that comes is believed, and nothing is seen before all of it came.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::disk::claim::adopt;
use ploop::error::{Error, Kind, Result};
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{PloopDelta, create};
use ploop::owner::Record;
use ploop::store::{Access, StoreFile, Trail};
use serde::Serialize;

use super::commit;
use super::frame::{Reader, Type};
use super::manifest::{Base, Image, Manifest, What, parse};
use super::onto::Onto;
use super::partial::{Room, State};
use super::source::{hash, walk};
use super::{Begin, Done, End, Position, Whole};
use crate::convert::Progress;
use crate::hash::Hasher;
use crate::name;
use crate::store::Root;

/// Data begins on a multiple of it.
const BLOCK: u64 = 4096;

/// How a stream is received.
#[derive(Clone, Debug, Default)]
pub struct ReceiveOptions {
    /// Keep what came when the stream is cut, so that it can go on.
    pub resumable: bool,
    /// The container is a move's, and has this record from the first instant; the stream is one of a
    /// whole tree.
    pub arriving: Option<Record>,
}

/// What was received.
#[derive(Clone, Debug, Serialize)]
pub struct Received {
    /// The container.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// What it shows, in bytes.
    pub size: u64,
    /// Images that came.
    pub images: usize,
    /// Bytes of their data.
    pub data: u64,
    /// Bytes of the stream.
    pub bytes: u64,
    /// The snapshot that came, of a stream of one.
    pub snapshot: Option<String>,
    /// The container shows what came. Else it stays as it is, on what was written to it.
    pub current: bool,
}

/// Makes container `name` of a stream, or puts a snapshot on one of its snapshots, as the stream
/// says. Durable on return. Blocks for as long as the sender does, in memory of one frame;
/// `progress` gets bytes of data.
///
/// 1. the records are read and judged; what the stream stands on is looked for;
/// 2. in a work directory: each image is made, closed, synced, its hash compared; then the end of
///    the stream;
/// 3. a container: as [`crate::clone::create_containers`] does, COMMIT by the rename of its
///    directory. A snapshot: as `onto` has it, COMMIT by the descriptor.
///
/// Cut before 3's commit there is nothing of it: on error the work directory is removed, after a
/// crash it is collected. With `resumable`, it stays when the stream is cut or a frame is damaged:
/// what came before is whole, and `partial` says where to go on. A stream that goes on is
/// verified together with what came before.
///
/// Errors: `Corrupt` for a stream that is damaged, cut, or says what no disk can be; `Unsupported`
/// for a version or feature that is not known; `Exists`; `NotFound` for what it stands on; `InUse`
/// for a container that is in use; `NoSpace`.
pub fn receive(
    root: &Root,
    name: &str,
    options: ReceiveOptions,
    input: &mut dyn Read,
    progress: Progress<'_>,
) -> Result<Received> {
    name::check(name)?;
    // 1.
    let mut reader = Reader::begin(input)?;
    let manifest = Manifest::receive(&mut reader)?;
    if options.arriving.is_some() && manifest.disk.what != What::Tree {
        return Err(reader.wrong("a move of less than a whole tree"));
    }
    let onto = match &manifest.disk.base {
        Some(Base::Snapshot { guid, content }) => {
            Some(Onto::open(root, name, &manifest, guid, content)?)
        }
        base => {
            commit::refuse_taken(root, name)?;
            if let Some(Base::Template { content, size }) = base {
                let _shared = root.lock(false)?;
                super::base::find(root, &manifest, content, *size)?;
            }
            None
        }
    };
    let (mut room, state) = match reader.continues() {
        true => {
            reader.expect(Type::Position)?;
            let position: Position = parse(&reader)?;
            let (room, state) = Room::again(root, name, &manifest)?;
            if position != state.position {
                return Err(reader
                    .wrong("the stream goes on at another place")
                    .fix(format!(
                        "Send it from there: ploop receive --resume-token {name}"
                    )));
            }
            (room, state)
        }
        false => {
            let room = Room::new(root, name, &manifest, options.resumable)?;
            (room, State::default())
        }
    };
    // 2.
    let mut filling = Filling {
        root,
        room: &mut room,
        manifest: &manifest,
        data: 0,
        progress,
    };
    let hashes = filling.all(&mut reader, state);
    let data = filling.data;
    let hashes = match hashes {
        Ok(hashes) => hashes,
        Err(e) => {
            if !(room.is_kept() && reader.is_broken()) {
                room.keep(false);
                return Err(e);
            }
            room.settle()?;
            return Err(e.fix(format!(
                "Go on: ploop send … --resume \"$(ploop receive --resume-token {name})\""
            )));
        }
    };
    // 3. What fails now may go well when it is tried again.
    room.keep(true);
    let (size, snapshot, current) = match onto {
        Some(onto) => onto.commit(room.path(), &manifest)?,
        None => {
            let arriving = options.arriving.as_ref();
            commit::container(root, name, room.path(), &manifest, &hashes, arriving)?
        }
    };
    room.keep(false);
    Ok(Received {
        name: name.to_owned(),
        dir: root.container(name),
        size,
        images: manifest.images.len(),
        data,
        bytes: reader.bytes(),
        snapshot,
        current,
    })
}

/// Step 2.
struct Filling<'r, 'a> {
    root: &'a Root,
    room: &'r mut Room<'a>,
    manifest: &'r Manifest,
    data: u64,
    progress: Progress<'r>,
}

impl Filling<'_, '_> {
    /// All images, and the end. Gives the hashes.
    fn all(&mut self, reader: &mut Reader<'_>, mut state: State) -> Result<Vec<String>> {
        let mut whole = Whole::new(&self.manifest.hash()?);
        self.verify(&state)?;
        let images = &self.manifest.images;
        while let Some(record) = images.get(state.position.image) {
            let hash = self.image(reader, record, &mut state)?;
            whole.add(&hash);
            state.hashes.push(hash);
            state.position = Position {
                image: state.position.image + 1,
                offset: 0,
            };
            self.room.note(&state)?;
        }
        let frames = reader.frames();
        reader.expect(Type::End)?;
        let end: End = parse(reader)?;
        if end.frames != frames {
            let what = format!("{frames} frames came, and {} were sent", end.frames);
            return Err(reader.wrong(&what));
        }
        if end.hash != whole.text() {
            return Err(reader.wrong("the hash of all that came is not what was sent"));
        }
        reader.end()?;
        Ok(state.hashes)
    }

    /// What came earlier is still what it was.
    fn verify(&self, state: &State) -> Result<()> {
        for (n, known) in state.hashes.iter().enumerate() {
            let Some(record) = self.manifest.images.get(n) else {
                return Err(self.changed(n));
            };
            let mut hasher = Hasher::new(record.size);
            self.read(n, record, &mut |offset, bytes| {
                hash(&mut hasher, offset, bytes);
                Ok(())
            })?;
            if hasher.text() != *known {
                return Err(self.changed(n));
            }
        }
        Ok(())
    }

    fn changed(&self, n: usize) -> Error {
        let what = "what came before the stream was cut is not there as it was";
        Error::corrupt(what)
            .on(self.path(n))
            .fix("Send it from the beginning")
    }

    fn path(&self, n: usize) -> PathBuf {
        self.room.path().join(n.to_string())
    }

    /// Walks what an image here has.
    fn read(&self, n: usize, record: &Image, sink: super::source::Sink<'_>) -> Result<()> {
        let file = self.root.store().open(&self.path(n), Access::Read)?;
        let delta = PloopDelta::open(file)?;
        let cluster = delta.header().cluster_bytes();
        walk(&[Arc::new(delta)], cluster, self.stands(record), sink)
    }

    fn stands(&self, record: &Image) -> bool {
        record.parent.is_some() || self.manifest.disk.base.is_some()
    }

    /// One image, from the position on; its hash.
    fn image(
        &mut self,
        reader: &mut Reader<'_>,
        record: &Image,
        state: &mut State,
    ) -> Result<String> {
        let n = state.position.image;
        reader.expect(Type::Begin)?;
        let begin: Begin = parse(reader)?;
        if begin.image != n {
            let what = format!("image {} where image {n} belongs", begin.image);
            return Err(reader.wrong(&what));
        }
        let (top, hasher) = self.begin(record, state)?;
        let mut filler = Filler {
            top: Arc::new(top),
            size: record.size,
            stands: self.stands(record),
            at: state.position.offset,
            hasher,
            trail: Trail::default(),
            data: 0,
        };
        let (before, progress) = (self.data, self.progress);
        let filled = filler.fill(reader, &|more| progress(before + more, before + more));
        self.data += filler.data;
        if filled.is_err() && reader.is_broken() && self.room.is_kept() {
            // Closed, so that what is there is found again.
            filler.top.close()?;
            state.position.offset = filler.at;
            self.room.note(state)?;
        }
        filled?;
        filler.top.close()?;
        let done: Done = parse(reader)?;
        let hash = filler.hasher.text();
        if done.hash != hash {
            let what = format!("image {n} came as {hash}, and was sent as {}", done.hash);
            return Err(reader.wrong(&what));
        }
        Ok(hash)
    }

    /// The image of the position, and the hash of what it has before that.
    fn begin(&self, record: &Image, state: &State) -> Result<(Top, Hasher)> {
        let Position { image: n, offset } = state.position;
        let store = self.root.store();
        let path = self.path(n);
        let mut hasher = Hasher::new(record.size);
        if offset == 0 {
            remove_file(store, &path)?;
            let header = record.header(self.manifest.disk.cluster_sectors)?;
            let file = create(store, &path, &header, 0o600)?;
            return Ok((Top::open(file)?, hasher));
        }
        self.read(n, record, &mut |at, bytes| {
            if at >= offset {
                return Err(self.changed(n));
            }
            hash(&mut hasher, at, bytes);
            Ok(())
        })?;
        // Until it is closed again, it is not said to have anything.
        self.room.note(&State {
            position: Position {
                image: n,
                offset: 0,
            },
            hashes: state.hashes.clone(),
        })?;
        Ok((Top::open(store.open(&path, Access::Write)?)?, hasher))
    }
}

fn remove_file(store: &dyn ploop::store::Store, path: &Path) -> Result<()> {
    match store.remove_file(path) {
        Err(e) if e.kind() != Kind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// An image that is being filled.
struct Filler {
    top: Arc<Top>,
    size: u64,
    stands: bool,
    /// Data may come from here on. Of what lies before, whole clusters only are there.
    at: u64,
    hasher: Hasher,
    trail: Trail,
    data: u64,
}

impl Filler {
    /// Takes data until the image is done; the frame that says so was read last.
    fn fill(&mut self, reader: &mut Reader<'_>, progress: &dyn Fn(u64)) -> Result<()> {
        loop {
            match reader.read()? {
                Type::Data => self.cluster(reader, progress)?,
                Type::Done => return Ok(()),
                other => {
                    let what = format!("a frame `{}` in the middle of an image", other.name());
                    return Err(reader.wrong(&what));
                }
            }
        }
    }

    /// Takes one cluster, whose first frame was read. It enters the image when all of it is there.
    fn cluster(&mut self, reader: &mut Reader<'_>, progress: &dyn Fn(u64)) -> Result<()> {
        let cluster = self.top.header().cluster_bytes();
        let mut next = self.judge(reader, self.at)?;
        let k = next.offset / cluster;
        let top = self.top.clone();
        let file = top.file().clone();
        let adopted = adopt(&top, k, |to| {
            loop {
                self.write(
                    file.as_ref(),
                    to + next.offset % cluster,
                    next.offset,
                    reader,
                )?;
                progress(self.data);
                let kind = reader.read()?;
                if kind != Type::Data || offset_of(reader)? / cluster != k {
                    reader.put_back(kind);
                    return Ok(());
                }
                next = self.judge(reader, next.end)?;
                if next.is_empty {
                    return Err(reader.wrong("a cluster of zeros that has data"));
                }
            }
        })?;
        if !adopted {
            return Err(reader.wrong("a cluster came twice"));
        }
        self.at = (k + 1) * cluster;
        Ok(())
    }

    /// Where the data of the frame goes, if it may go there.
    fn judge(&self, reader: &Reader<'_>, from: u64) -> Result<Piece> {
        let cluster = self.top.header().cluster_bytes();
        let offset = offset_of(reader)?;
        let len = (reader.payload().len() - 8) as u64;
        let fits = offset.is_multiple_of(BLOCK) && offset < self.size;
        let end = offset.saturating_add(len);
        if !fits || end > self.size || end > (offset / cluster + 1).saturating_mul(cluster) {
            let what = format!(
                "{len} bytes at byte {offset} of an image of {} bytes with clusters of {cluster}",
                self.size
            );
            return Err(reader.wrong(&what));
        }
        if offset < from {
            let what = format!("data at byte {offset} behind that at byte {from}");
            return Err(reader.wrong(&what));
        }
        let is_empty = len == 0;
        if is_empty && !(self.stands && offset.is_multiple_of(cluster)) {
            return Err(reader.wrong("zeros where nothing is below"));
        }
        Ok(Piece {
            offset,
            end: match is_empty {
                // Nothing more of that cluster.
                true => offset + cluster,
                false => end.next_multiple_of(BLOCK),
            },
            is_empty,
        })
    }

    fn write(
        &mut self,
        file: &dyn StoreFile,
        to: u64,
        offset: u64,
        reader: &Reader<'_>,
    ) -> Result<()> {
        let bytes = &reader.payload()[8..];
        hash(&mut self.hasher, offset, bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        file.write_at(bytes, to)?;
        self.trail.wrote(file, to, bytes.len() as u64);
        self.data += bytes.len() as u64;
        Ok(())
    }
}

/// A data frame that may be what it says.
struct Piece {
    offset: u64,
    /// The next one of the image begins here, or later.
    end: u64,
    is_empty: bool,
}

fn offset_of(reader: &Reader<'_>) -> Result<u64> {
    let Some((bytes, _)) = reader.payload().split_first_chunk::<8>() else {
        return Err(reader.wrong("data without a place"));
    };
    Ok(u64::from_le_bytes(*bytes))
}
