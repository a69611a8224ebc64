//! The side that a container leaves, under its clients.
//!
//! ```text
//!  snapshot   tree, as a stream   rounds of what was written    halted: the rest   given   taken
//!  ───┬───────────────────────┬──────────────────────────────┬──────────────────┬───────┬──▶
//!     └ a tracker counts from here on                        └── requests wait ─┴ clients are cut
//! ```
//!
//! 1. a tracker in memory begins; a snapshot is made, and marked to be merged away wherever the disk
//!    ends up. All below the top is final from here on;
//! 2. the tree is sent, as `ploop send` does it;
//! 3. rounds: the tracker is cleared at one instant, and what it had is sent; what is written often
//!    goes last, and what was written again waits for the next round;
//! 4. when the rest fits the downtime, the bits of its trackers; and the record: `offered`, durable;
//! 5. requests are held back, the gate is closed; the rest is sent. The destination says `ready`;
//! 6. COMMIT: the record says `given`, durable. Clients are cut, and the destination is told;
//! 7. it has taken it: the container is removed here, and the destination told that.
//!
//! Post-copy ([`Options::later`]) has no rounds. In 2 the tree goes without its data, then where that is;
//! in 3 what was written since becomes a second snapshot, and goes like that, too: meanwhile clients are
//! slowed down, so that little is left for 5. The destination answers that it has taken it and needs us:
//! it is fed from here (`feed`), and 7 follows when it has all.
//!
//! Until 6 an error, or a word, ends the move: requests go on here. From 6 on the disk is not opened
//! here any more; where the destination does not answer, it is told when the service next reaches it.

mod course;
mod last;
mod pieces;
mod terms;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::live::Barrier;
use ploop::disk::open::DESCRIPTOR;
use ploop::error::{Error, Kind, Result};
use ploop::owner::{Owner, Record, State, past};
use ploop::tracker::Id;
use ploop::tracker::bitmap::Bitmap;
use snapshots::moving::{self, Luggage, later};
use snapshots::owner::{Answer, BEGUN, KEEPS, Next, TAKEN, Verdict};
use snapshots::place::Place;
use snapshots::snapshot::{self, Live, NewSnapshot};
use snapshots::stream;

pub use super::clients::Holder;
pub use terms::{Deadline, Failed, Moved, Options, Progress, Watch};

use course::{Course, Then};
use pieces::{heat, order, stretches};

use super::clients;
use super::feed::feed;
use super::link::Link;
use super::wire::{
    Answered, Hello, Purpose, RUNS_MAX, Said, StreamOut, Type, VERSION, Welcome, Wire,
};
use crate::export::Lives;
use crate::export::disks::{Disks, Door, OpenDisk};
use crate::serve::Connections;

/// Bytes that a bit of the move's tracker stands for: what is written in small is sent in small.
const GRANULE: u64 = 4096;
/// Bytes that are read, and sent in a frame, at once.
const PIECE: u64 = 1 << 20;
/// Bytes of a frame that tells of runs.
const RUNS: usize = 512 << 10;
/// For clients to let go of the disk.
const LET_GO: Duration = Duration::from_secs(30);
/// How long the hand-over may take, beside the downtime that was asked for; clients wait for it.
const HAND_OVER: Duration = Duration::from_secs(10);
/// How long the destination may take to say that it has dropped what it has, or that it knows that we
/// know.
const TAKE_BACK: Duration = Duration::from_secs(3);

/// A container on its way.
pub struct Source<'a> {
    /// Where it is.
    pub disks: &'a Disks,
    /// Its clients.
    pub connections: &'a Connections,
    /// Its disk.
    pub disk: Arc<OpenDisk>,
    /// Its place.
    pub place: Place<'a>,
    /// What is asked.
    pub options: &'a Options,
    /// Who watches.
    pub watch: &'a dyn Watch,
    /// The destination, as it is found again.
    pub peer: String,
    /// Asked by the link's end.
    pub deadline: Arc<Deadline>,
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

/// What is known on the way.
struct Way {
    id: Guid,
    tracker: Id,
    began: Instant,
    progress: Progress,
    moved: Moved,
    /// Regions that were written in the round before, and in how many before that.
    heat: HashMap<u64, u32>,
    /// All that was written since the move began.
    written: Bitmap,
    /// The bits of the container's trackers that were sent.
    bits: BTreeMap<Id, Bitmap>,
    /// Bytes of them that the destination still takes.
    room: usize,
    /// The nodes that the tree had when it was sent.
    nodes: BTreeSet<Guid>,
    /// Of a move whose data follows: the node that what is written until the hand-over becomes.
    last: Guid,
}

impl Source<'_> {
    /// [`Source::run`] over a link.
    pub fn run_over(self, link: Link) -> Result<Moved, Failed> {
        let peer = link.peer().to_owned();
        self.run(Wire::new(Box::new(link), &peer))
    }

    /// Moves the container over `wire`. The caller keeps others from changing its tree, trackers and
    /// metadata. On an error the snapshot of step 1 waits for its merge. Blocks.
    pub(super) fn run(self, mut wire: Wire) -> Result<Moved, Failed> {
        let tracker = Id::random();
        let begun = self.disk.disk().start_tracker(tracker, GRANULE, true);
        let begun = begun.map_err(Failed::Here)?;
        let written = Bitmap::new(begun.bits.size(), GRANULE).map_err(Failed::Here)?;
        let mut way = Way {
            id: Guid::new_v4(),
            tracker,
            began: Instant::now(),
            progress: Progress::default(),
            moved: Moved::default(),
            heat: HashMap::new(),
            written,
            bits: BTreeMap::new(),
            room: RUNS_MAX,
            nodes: BTreeSet::new(),
            last: Guid::new_v4(),
        };
        drop(begun);
        let gone = self.go(&mut wire, &mut way);
        self.disk.gate().brake(0);
        match gone {
            Ok((door, next)) => {
                self.leave(&mut wire, way.id, &door, next);
                Ok(way.moved)
            }
            Err(failed) => {
                if let Failed::Here(_) = &failed
                    && let Err(e) = self.disk.disk().stop_tracker(tracker)
                {
                    tracing::warn!(error = %e, "the tracker of a move stays until the disk is closed");
                }
                Err(failed)
            }
        }
    }

    fn live(&self) -> Live<'_> {
        Live {
            place: &self.place,
            disk: self.disk.disk(),
        }
    }

    /// All steps but the last. Gives the closed door, nobody has the disk open but this; and what becomes
    /// of it here.
    fn go(&self, wire: &mut Wire, way: &mut Way) -> Result<(Door, Next), Failed> {
        self.before(wire, way).map_err(Failed::Here)?;
        // 4. The holder first: who finds the record finds what goes with it. Where it came from, if that
        // was by a move, is remembered before its record is another. From here on the tree stays as it is.
        let (store, dir) = (self.place.store(), self.place.dir());
        let arranging = self.disk.disk().arrange();
        self.refuse_others(way)
            .and_then(|()| past::set_aside(store, dir))
            .map_err(Failed::Here)?;
        let back = match &self.options.holder {
            Some(holder) => {
                let checked = holder.check(self.place.shown(), &self.options.name);
                let entered = checked.and_then(|()| holder.enter(store, dir, way.id));
                Some(entered.map_err(Failed::Here)?)
            }
            None => None,
        };
        let owner = Owner::write(
            store,
            dir,
            Record {
                state: State::Offered,
                id: way.id,
                epoch: BEGUN,
                peer: self.peer.clone(),
            },
        );
        let mut owner = owner.map_err(Failed::Here)?;
        self.deadline.set(Some(HAND_OVER + self.options.downtime));
        let door = self.disks.close_door(self.place.shown());
        let at = Instant::now();
        match self.hand_over(wire, way, &mut owner, back.as_deref()) {
            Ok(()) => {}
            Err(Failed::Here(e)) => {
                drop(door);
                self.deadline.set(Some(TAKE_BACK));
                self.take_back(wire, way.id);
                return Err(Failed::Here(e));
            }
            Err(failed) => {
                self.close();
                return Err(failed);
            }
        }
        drop(arranging);
        let answered = wire
            .say(Type::Says, &Said::from(Verdict::Given))
            .and_then(|()| answer(wire));
        way.moved.gap = at.elapsed().as_secs_f64();
        way.moved.bytes = wire.bytes();
        way.moved.written = way.written.dirty_bytes();
        self.close();
        let mut answer = answered.map_err(Failed::Given)?;
        if let Answer::Needs(_) = answer {
            self.deadline.set(None);
            self.watch.fed();
            let place = Place::container(self.root().map_err(Failed::Given)?, self.place.shown());
            let fed = place.and_then(|place| feed(wire, place));
            fed.map_err(Failed::Fed)?;
            answer = Answer::Taken(TAKEN);
        }
        let next = snapshots::owner::source(Some((State::Given, self.gives())), answer);
        if next != Next::Stay {
            return Ok((door, next));
        }
        let what = format!("{} does not know of the move {}", wire.peer(), way.id);
        Err(Failed::Given(Error::new(Kind::NotFound, what)))
    }

    /// Step 7. What fails of it changes nothing for who has the disk now.
    fn leave(self, wire: &mut Wire, id: Guid, door: &Door, next: Next) {
        let (name, root, disks) = (self.place.shown().to_owned(), self.place.root(), self.disks);
        let deadline = self.deadline.clone();
        drop(self);
        // Whoever else looked at it lets go.
        disks.wait_closed(door, LET_GO);
        if let Some(root) = root
            && let Err(e) = moving::enact(root, &name, (id, State::Given), next)
        {
            tracing::error!(container = name, error = %e, "it has moved, and its files stay here");
            return;
        }
        deadline.set(Some(TAKE_BACK));
        let known = wire
            .send(Type::Confirmed, &[])
            .and_then(|()| wire.flush())
            .and_then(|()| wire.expect(Type::Done));
        if let Err(e) = known {
            tracing::warn!(container = name, error = %e, "the destination was not told that we know");
        }
    }

    /// The epoch of its record when it is given: whether its files stay is known to who comes back, too.
    fn gives(&self) -> u64 {
        match self.options.keep {
            true => KEEPS,
            false => BEGUN,
        }
    }

    fn root(&self) -> Result<&snapshots::Root> {
        let none = || Error::unsupported("only a container of a store moves");
        self.place.root().ok_or_else(none)
    }

    /// Everybody lets go of the disk; it is closed. Its life goes on elsewhere.
    fn close(&self) {
        self.disk.leave_life();
        let ended = self.connections.end_where(|e| self.is_of(e), LET_GO);
        match ended {
            Ok(_) => self.disk.gate().resume(),
            // What they wait for is never answered here.
            Err(e) => tracing::warn!(error = %e, "clients of a disk that has left stay connected"),
        }
    }

    /// The container's own export, and its snapshots'.
    fn is_of(&self, export: &str) -> bool {
        clients::is_of(self.place.shown(), export)
    }

    /// The destination drops what it has; the record goes when it says so, or later.
    fn take_back(&self, wire: &mut Wire, id: Guid) {
        let verdict = Said::from(Verdict::Aborted(BEGUN));
        let told = wire
            .say(Type::Says, &verdict)
            .and_then(|()| answer(wire))
            .and_then(|answer| {
                match snapshots::owner::source(Some((State::Offered, BEGUN)), answer) {
                    Next::Own => {
                        ploop::owner::remove_of(self.place.store(), self.place.dir(), id)?;
                        clients::forget(self.place.store(), self.place.dir());
                        Ok(())
                    }
                    _ => Err(wire.wrong("an answer that nobody asked for")),
                }
            });
        if let Err(e) = told {
            tracing::warn!(container = self.place.shown(), error = %e, "the destination is told later that the move was aborted");
        }
    }

    /// Steps 1 to 3.
    fn before(&self, wire: &mut Wire, way: &mut Way) -> Result<()> {
        let life = self.disk.life()?;
        let luggage = {
            // A change of them that had begun before the move is done.
            let _arranging = self.disk.disk().arrange();
            Luggage::of(self.live(), Some(life))?
        };
        let hello = Hello {
            version: VERSION,
            id: way.id.to_string(),
            name: self.options.name.clone(),
            purpose: Purpose::Move,
            later: self.options.later,
            luggage,
        };
        wire.say(Type::Hello, &hello)?;
        wire.expect(Type::Welcome)?;
        let welcome: Welcome = wire.record()?;
        // 1.
        self.snapshot(None)?;
        way.nodes = self.nodes()?;
        // 2.
        self.tree(wire, way, &welcome)?;
        if self.options.later {
            self.watch.freeze(&mut || sync(wire))?;
            let sealed = self.seal(wire, way).and_then(|()| self.bits(wire, way));
            return sealed.map_err(|e| self.said(wire, e));
        }
        // 3.
        let rounds = self.converge(wire, way).and_then(|()| {
            self.watch.freeze(&mut || sync(wire))?;
            // Most of them: what is left of the gap is for data.
            self.bits(wire, way)?;
            self.round(wire, way).map(drop)
        });
        rounds.map_err(|e| self.said(wire, e))
    }

    /// Step 3 of a move whose data follows: what was written since the snapshot is a second one, and follows,
    /// too. The destination has opened all of it on return; what is written meanwhile goes with the rest.
    fn seal(&self, wire: &mut Wire, way: &mut Way) -> Result<()> {
        if self.options.brake {
            self.disk.gate().brake(course::BRAKE_MIN);
        }
        // Before the barrier: it has less to sync then.
        self.disk.flush()?;
        way.written
            .add(&*self.disk.disk().barrier().clear_tracker(way.tracker)?);
        self.snapshot(Some(way.last))?;
        way.nodes.insert(way.last);
        // What was written before this one is in those that the destination was told of.
        self.refuse_others(way)?;
        self.tell(wire, way.last)?;
        wire.send(Type::Open, &[])?;
        sync(wire)
    }

    /// The nodes that the disk has now.
    fn nodes(&self) -> Result<BTreeSet<Guid>> {
        let path = self.place.dir().join(DESCRIPTOR);
        let descriptor = self.place.opener().read_descriptor(&path)?;
        Ok(descriptor.images.iter().map(|i| i.guid).collect())
    }

    /// Who looked before the move began whether one goes on may still have made a snapshot since. Error:
    /// `InUse`.
    fn refuse_others(&self, way: &Way) -> Result<()> {
        if self.nodes()? == way.nodes {
            return Ok(());
        }
        let what = format!(
            "the tree of {} changed while it moved: a snapshot was made, as it seems",
            self.place.shown()
        );
        Err(Error::new(Kind::InUse, what).fix("It goes on here. Move it again"))
    }

    /// What the disk shows now becomes a node that is merged away wherever the disk ends up.
    fn snapshot(&self, guid: Option<Guid>) -> Result<()> {
        let new = NewSnapshot {
            description: format!("moving to {}", self.peer),
            guid,
            passing: true,
            ..NewSnapshot::default()
        };
        snapshot::take(self.live(), &new).map(drop)
    }

    /// Sends the bits of the trackers that were not sent yet.
    fn bits(&self, wire: &mut Wire, way: &mut Way) -> Result<()> {
        for tracker in self.disk.disk().trackers().iter().filter(|t| !t.passing) {
            let bits = &tracker.bits;
            let sent = match way.bits.entry(tracker.id) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(Bitmap::new(bits.size(), bits.granularity())?),
            };
            pieces::bits(wire, tracker.id, bits, sent, &mut way.room)?;
        }
        Ok(())
    }

    /// Tells where an image has data. Error: `Unsupported` for more than the destination takes.
    fn tell(&self, wire: &mut Wire, image: Guid) -> Result<()> {
        let mut runs: Vec<u8> = Vec::new();
        let mut room = RUNS_MAX;
        later::runs(&self.place, image, &mut |offset, len| {
            room = room.checked_sub(16).ok_or_else(|| {
                let max = RUNS_MAX / 16;
                let what = format!("the data of image {image} is in more than {max} pieces");
                Error::unsupported(what).fix("Move it without --post-copy")
            })?;
            runs.extend(offset.to_le_bytes());
            runs.extend(len.to_le_bytes());
            if runs.len() >= RUNS {
                wire.send(Type::Later, &[image.as_bytes(), &runs])?;
                runs.clear();
            }
            Ok(())
        })?;
        wire.send(Type::Later, &[image.as_bytes(), &runs])
    }

    fn refuse_cancelled(&self) -> Result<()> {
        match self.watch.cancelled() {
            true => Err(cancelled()),
            false => Ok(()),
        }
    }

    /// Step 2.
    fn tree(&self, wire: &mut Wire, way: &mut Way, welcome: &Welcome) -> Result<()> {
        let go_on = |bytes| {
            self.watch.pace(bytes);
            self.refuse_cancelled()
        };
        let progress = |done: u64, total: u64| {
            let seconds = way.began.elapsed().as_secs_f64().max(0.001);
            self.watch.progress(Progress {
                sent: done,
                left: total.saturating_sub(done),
                rate: (done as f64 / seconds) as u64,
                ..Progress::default()
            });
        };
        let mut out = StreamOut {
            wire,
            go_on: &go_on,
        };
        let hollow = self.options.later.then_some(way.last);
        let sent = stream::send_below(self.live(), &welcome.have, hollow, &mut out, &progress);
        // A link that broke may have been broken with a word.
        let sent = sent.map_err(|e| self.said(wire, e))?;
        wire.send(Type::StreamEnd, &[])?;
        wire.flush()?;
        wire.expect(Type::Received)?;
        if self.options.later {
            // The last two are of the hand-over, and the top.
            for &image in sent
                .nodes
                .iter()
                .filter(|n| **n != way.last && **n != Guid::TOP)
            {
                self.refuse_cancelled()?;
                self.tell(wire, image)?;
                sync(wire)?;
            }
        }
        let seconds = way.began.elapsed().as_secs_f64().max(0.001);
        way.moved.data = sent.data;
        way.progress.sent = sent.data;
        way.progress.rate = (sent.bytes as f64 / seconds) as u64;
        Ok(())
    }

    /// What the destination said before the link broke, if it did.
    fn said(&self, wire: &mut Wire, e: Error) -> Error {
        if self.watch.cancelled() {
            return cancelled();
        }
        if !wire.is_broken() {
            return e;
        }
        match wire.expect(Type::Refused) {
            Err(refused) if refused.kind() != Kind::Io => refused,
            _ => e,
        }
    }

    /// Rounds, until what is left fits the downtime.
    fn converge(&self, wire: &mut Wire, way: &mut Way) -> Result<()> {
        let mut course = Course::new(self.options.brake);
        loop {
            let left = self.round(wire, way)?;
            match course.after(left, way.progress.rate, self.options.downtime) {
                Then::Fits => return Ok(()),
                Then::Again => {}
                Then::Brake(rate) => {
                    way.progress.brake = rate;
                    self.disk.gate().brake(rate);
                    tracing::info!(
                        container = self.place.shown(),
                        written = way.progress.dirty_rate,
                        sent = way.progress.rate,
                        brake = rate,
                        "a move does not converge: clients are slowed down"
                    );
                }
                Then::Never => {
                    let what = format!(
                        "it does not converge: {} bytes a second are written, {} sent, and {left} \
                         bytes are left after {} rounds",
                        way.progress.dirty_rate, way.progress.rate, way.moved.rounds
                    );
                    return Err(Error::new(Kind::Io, what).fix(match self.options.brake {
                        true => "Give it a longer --downtime, or a higher --rate; or --post-copy",
                        false => {
                            "Give it a longer --downtime, a higher --rate, or leave out --no-brake"
                        }
                    }));
                }
            }
        }
    }

    /// One round. Gives how much was written meanwhile.
    fn round(&self, wire: &mut Wire, way: &mut Way) -> Result<u64> {
        let began = Instant::now();
        let disk = self.disk.disk();
        let dirty = disk.barrier().clear_tracker(way.tracker)?;
        let again = disk.tracker(way.tracker)?.bits;
        way.moved.rounds += 1;
        way.progress.round = way.moved.rounds;
        let order = order(&dirty, &way.heat);
        way.heat = heat(&dirty, &way.heat);
        way.written.add(&dirty);
        let before = wire.bytes();
        let mut left = dirty.dirty_bytes();
        for (start, len) in order {
            self.refuse_cancelled()?;
            left -= len;
            // What was written again has to be sent again in any case.
            for (range, _) in again.runs(start..start + len).filter(|r| !r.1) {
                let len = range.end - range.start;
                let sent = self.piece(wire, range.start, len)?;
                self.watch.pace(sent);
                way.progress.sent += len;
            }
            way.progress.left = left + again.dirty_bytes();
            self.watch.progress(way.progress);
        }
        sync(wire)?;
        let seconds = began.elapsed().as_secs_f64().max(0.000_1);
        let left = again.dirty_bytes();
        let sent = wire.bytes() - before;
        // A round of nothing says nothing of the link.
        if sent > PIECE || way.progress.rate == 0 {
            way.progress.rate = (sent as f64 / seconds) as u64;
        }
        way.progress.dirty_rate = (left as f64 / seconds) as u64;
        way.progress.left = left;
        self.watch.progress(way.progress);
        Ok(left)
    }

    /// Sends a piece of the disk as it is now. Gives its bytes on the link.
    fn piece(&self, wire: &mut Wire, start: u64, len: u64) -> Result<u64> {
        // The last granule ends behind a disk that was shrunk.
        let len = len.min(self.disk.size().saturating_sub(start));
        let mut buf = vec![0; len as usize];
        self.disk.read(start, &mut buf)?;
        let before = wire.bytes();
        let mut at = 0;
        for (len, zeros) in stretches(&buf) {
            let offset = (start + at as u64).to_le_bytes();
            match zeros {
                true => wire.send(Type::Zeros, &[&offset, &(len as u64).to_le_bytes()])?,
                false => wire.send(Type::Data, &[&offset, &buf[at..at + len]])?,
            }
            at += len;
        }
        Ok(wire.bytes() - before)
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Io, "the move was told to end")
}

/// All that was sent is there, and durable.
fn sync(wire: &mut Wire) -> Result<()> {
    wire.send(Type::Sync, &[])?;
    wire.flush()?;
    wire.expect(Type::Synced)
}

/// The destination's answer.
pub(super) fn answer(wire: &mut Wire) -> Result<Answer> {
    wire.expect(Type::Answer)?;
    Ok(Answer::from(wire.record::<Answered>()?))
}

#[cfg(test)]
mod tests;
