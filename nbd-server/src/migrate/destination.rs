//! The side that a container comes to.
//!
//! 1. the stream of its tree, received as ever, into a container that nobody may open (`arriving`);
//! 2. the container is opened, for its mover alone; what was written at the source comes in rounds;
//! 3. all of it came: flushed, then `ready`, durable; the source hears of it;
//! 4. the source has given it: `taken`, durable; it is published: COMMIT.
//!
//! Post-copy: in 1 the images come empty, then where they have data; they are laid out, with a record of
//! what is missing ([`ploop::store::arriving`]), and opened like that. The link of 4 goes on as the
//! container's [`Feed`]; it is complete when nothing is missing and the source knows.
//!
//! A link that breaks before 3, and a crash, leave nothing of it. Between 3 and 4 the source says how
//! the move ends, on another link; nobody may open the container before that.

mod came;
mod coming;
mod feeding;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ploop::descriptor::Guid;
use ploop::device::{Device, ZeroMode};
use ploop::error::{Error, Kind, Result};
use ploop::owner::{Owner, Record, State};
use ploop::store::arriving::ArrivingStore;
use ploop::tracker::Id;
use snapshots::moving::{self, Luggage, enact, later, stand};
use snapshots::owner::{self as rules, Answer, BEGUN, Next, Verdict};
use snapshots::place::Place;
use snapshots::stream::{self, ReceiveOptions};
use snapshots::{Root, name};

use came::{Runs, lay_out, take_bits, trackers};
use coming::{Coming, short};

use super::feed::{self, End, Feed};
use super::link::{Link, Stop};
use super::settle::step_down;
use super::wire::{
    Answered, Hello, Purpose, Refusal, Said, StreamIn, Type, VERSION, Welcome, Wire,
};
use crate::export::Disks;
use crate::export::disks::{Arriving, OpenDisk};
use crate::serve::Connections;

/// A source that says nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a container is kept open that was taken and that nobody has opened yet.
const KEPT: Duration = Duration::from_secs(5);
/// How long a link is read from that was refused, so that the refusal is read before it breaks.
const HEAR: Duration = Duration::from_secs(2);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// See the module text. One for a service.
pub struct Destination {
    disks: Arc<Disks>,
    connections: Connections,
    /// Moves that a link works on.
    active: Mutex<HashMap<Guid, Arc<End>>>,
    changed: Condvar,
    /// Of containers that were taken, or are ready, and lack something.
    feeds: Mutex<HashMap<Guid, Arc<Feed>>>,
    fillers: Mutex<Vec<JoinHandle<()>>>,
    stopping: Arc<AtomicBool>,
}

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destination").finish_non_exhaustive()
    }
}

/// A move that a link works on; others may from its drop on.
struct Active<'a> {
    of: &'a Destination,
    id: Guid,
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.of.moves().remove(&self.id);
        self.of.changed.notify_all();
    }
}

impl Destination {
    /// For a service of `disks`, whose clients are `connections`.
    pub fn new(disks: Arc<Disks>, connections: Connections) -> Destination {
        Destination {
            disks,
            connections,
            active: Mutex::default(),
            changed: Condvar::new(),
            feeds: Mutex::default(),
            fillers: Mutex::default(),
            stopping: Arc::default(),
        }
    }

    /// Ends all links, those of later too; but not what containers still lack: that comes on as long as
    /// clients may ask for it ([`Destination::end`]).
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Nothing comes any more. Blocks until nobody waits for it.
    pub fn end(&self) {
        self.stop();
        self.fed().values().for_each(|f| f.end());
        let fillers =
            std::mem::take(&mut *self.fillers.lock().unwrap_or_else(PoisonError::into_inner));
        for filler in fillers {
            drop(filler.join());
        }
    }

    /// Removes what is left of moves that were cut before all of it came, and that somebody had open
    /// when it was to go.
    pub(super) fn clear(&self) {
        let Some(root) = self.disks.root().filter(|_| !self.disks.read_only()) else {
            return;
        };
        // What cannot be listed is looked at again.
        for (name, record) in moving::unsettled(root).unwrap_or_default() {
            let left = record.state == State::Arriving && !self.moves().contains_key(&record.id);
            let at = (record.id, record.state);
            if left && let Err(e) = enact(root, &name, at, Next::Remove) {
                tracing::debug!(container = name, error = %e, "half of a move stays");
            }
        }
    }

    fn moves(&self) -> MutexGuard<'_, HashMap<Guid, Arc<End>>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the move for this link; one that another link works on is ended first, where `instead`
    /// says so. Error: `InUse`.
    fn activate(&self, id: Guid, instead: bool, end: &Arc<End>) -> Result<Active<'_>> {
        let mut moves = self.moves();
        while let Some(other) = moves.get(&id) {
            if !instead || self.stopping.load(Ordering::Acquire) {
                let what = format!("another link works on the move {id}");
                return Err(Error::new(Kind::InUse, what));
            }
            other.say();
            let waited = self.changed.wait(moves);
            moves = waited.unwrap_or_else(PoisonError::into_inner);
        }
        if self.stopping.load(Ordering::Acquire) {
            return Err(Error::new(Kind::InUse, "the service stops"));
        }
        moves.insert(id, end.clone());
        Ok(Active { of: self, id })
    }

    /// Serves a link to its end. Blocks. What goes wrong is logged, and said to the other side.
    pub fn attend(self: &Arc<Self>, link: Link) {
        let end = Arc::new(End::default());
        if let Some(mut wire) = self.let_in(link, &end)
            && let Err(e) = self.serve(&mut wire, &end)
        {
            tracing::warn!(peer = wire.peer(), error = %e, "a move ended early");
            self.refuse(&mut wire, &e, &end);
        }
    }

    /// Tells who comes that `most` links are served already. Blocks.
    pub(super) fn turn_away(&self, link: Link, most: usize) {
        let end = Arc::new(End::default());
        if let Some(mut wire) = self.let_in(link, &end) {
            let what = format!("{most} moves are under way here already");
            let e = Error::new(Kind::InUse, what).fix("Try again when one of them has ended");
            self.refuse(&mut wire, &e, &end);
        }
    }

    fn let_in(&self, mut link: Link, end: &Arc<End>) -> Option<Wire> {
        if let Err(e) = link.handshake() {
            tracing::warn!(peer = link.peer(), error = %e, "a move was not let in");
            return None;
        }
        let peer = link.peer().to_owned();
        let (said, stopping) = (end.clone(), self.stopping.clone());
        let stop: Stop = Arc::new(move || said.is_said(&stopping));
        link.set_stop(stop);
        link.set_patience(Some(SILENCE));
        Some(Wire::new(Box::new(link), &peer))
    }

    fn refuse(&self, wire: &mut Wire, e: &Error, end: &Arc<End>) {
        if wire.say(Type::Refused, &Refusal::of(e)).is_err() {
            return;
        }
        // Closed with bytes of the other side unread, the refusal might be lost with them.
        let until = Instant::now() + HEAR;
        let late = end.clone();
        let timer = std::thread::Builder::new().spawn(move || {
            while Instant::now() < until && !late.now.load(Ordering::Acquire) {
                std::thread::sleep(LOOK);
            }
            late.say();
        });
        while wire.skip().is_ok() {}
        end.say();
        if let Ok(timer) = timer {
            drop(timer.join());
        }
    }

    pub(super) fn serve(self: &Arc<Self>, wire: &mut Wire, end: &Arc<End>) -> Result<()> {
        wire.expect(Type::Hello)?;
        let hello: Hello = wire.record()?;
        if hello.version != VERSION {
            let what = format!("version {} of moves; {VERSION} is known", hello.version);
            return Err(Error::unsupported(what));
        }
        name::check(&hello.name)?;
        let id = Guid::parse(&hello.id)?;
        let root = self.root()?;
        self.disks.refuse_read_only(&hello.name)?;
        let active = self.activate(id, hello.purpose == Purpose::Settle, end)?;
        let taken = match hello.purpose {
            Purpose::Move => self.receive(wire, root, &hello, id, end)?,
            Purpose::Settle => return self.settle(wire, root, &hello.name, id, end),
        };
        // The move needs this link no more.
        drop(active);
        if let Some((_open, told)) = taken {
            // Whoever comes next need not open it again.
            let until = Instant::now() + KEPT;
            let leaves = || self.disks.leaving().refuse(&hello.name).is_err();
            while Instant::now() < until && !self.stopping.load(Ordering::Acquire) && !leaves() {
                std::thread::sleep(LOOK);
            }
            return told;
        }
        Ok(())
    }

    fn root(&self) -> Result<&Root> {
        self.disks.root().ok_or_else(|| {
            Error::unsupported("a single disk is served here, and no container can come to it")
        })
    }

    /// A container comes. Gives its open disk where it was taken, and whether the source was told.
    fn receive(
        self: &Arc<Self>,
        wire: &mut Wire,
        root: &Root,
        hello: &Hello,
        id: Guid,
        end: &Arc<End>,
    ) -> Result<Option<(Arc<OpenDisk>, Result<()>)>> {
        let name = &hello.name;
        hello.luggage.check()?;
        if root.existing_container(name).is_ok() {
            let what = format!("there is a container {name} already");
            return Err(Error::new(Kind::Exists, what).fix(
                "Choose another name with --as; or remove that one; or, if it is of a move that was \
                 cut, wait for its end, or decide it with ploop migrate --resolve",
            ));
        }
        let have = stream::have(root)?;
        wire.say(Type::Welcome, &Welcome { have })?;
        let mut coming = Coming {
            root,
            name,
            id,
            arriving: None,
            stays: false,
            of: self,
        };
        // 1.
        let options = ReceiveOptions {
            resumable: false,
            arriving: Some(Record {
                state: State::Arriving,
                id,
                epoch: BEGUN,
                peer: short(wire.peer()),
            }),
        };
        let received = {
            let mut input = StreamIn::new(wire);
            stream::receive(root, name, options, &mut input, &|_, _| ())?
        };
        // 2.
        let place = Place::container(root, name)?;
        let mut owner = Owner::open(root.store(), place.dir())?
            .ok_or_else(|| Error::corrupt("its record is gone").on(place.dir()))?;
        if hello.later {
            moving::forget_hashes(&place)?;
            wire.send(Type::Received, &[])?;
            wire.flush()?;
            lay_out(wire, &place)?;
            self.feed_of(root, name, id)?;
        }
        let arriving = coming.arriving.insert(self.disks.arriving(name)?);
        if let Some(life) = &hello.luggage.life {
            arriving.disk().carry_on(life.parse()?)?;
        }
        // Behind the opening: until their bits come nobody asks for them.
        hello.luggage.unpack(&place)?;
        if !hello.later {
            wire.send(Type::Received, &[])?;
            wire.flush()?;
        }
        tracing::info!(container = %name, id = %id, peer = wire.peer(), bytes = received.data, "arriving");
        let bits = self.rounds(wire, arriving, &hello.luggage)?;
        // 3.
        let disk = arriving.disk();
        disk.flush()?;
        let trackers = trackers(&hello.luggage, bits, disk.disk().top()?.header().size())?;
        if !trackers.is_empty() {
            disk.disk().adopt_trackers(trackers)?;
        }
        owner.set(State::Ready, BEGUN)?;
        coming.stays = true;
        wire.send(Type::Ready, &[])?;
        wire.flush()?;
        // 4.
        let verdict = hear(wire)?;
        let (next, answer) = rules::destination(stand(Some(owner.record())), verdict);
        let Next::Become(State::Taken, epoch) = next else {
            // Durable before it is said. One that cannot go yet is told again.
            coming.remove()?;
            tracing::info!(container = %name, id = %id, "the move was aborted");
            return self.answer(wire, root, name, id, answer).map(|()| None);
        };
        owner.set(State::Taken, epoch)?;
        let Some(arriving) = coming.arriving.take() else {
            return Err(Error::corrupt("it is not open any more"));
        };
        // COMMIT
        let (disk, armed) = arriving.publish();
        tracing::info!(container = %name, id = %id, peer = wire.peer(), "taken");
        if let Err(e) = armed {
            tracing::error!(container = %name, error = %e, "its quota does not hold before it is opened again");
        }
        Ok(Some((disk, self.has_it(wire, root, name, id, epoch, end))))
    }

    /// Answers, and hears whether the source knows.
    fn answer(
        &self,
        wire: &mut Wire,
        root: &Root,
        name: &str,
        id: Guid,
        answer: Answer,
    ) -> Result<()> {
        wire.say(Type::Answer, &Answered::from(answer))?;
        if !matches!(answer, Answer::Taken(_)) {
            return Ok(());
        }
        match wire.expect(Type::Confirmed) {
            // Whatever it does not say: the record stays.
            Err(e) => {
                tracing::debug!(container = name, error = %e, "the source did not confirm");
                Ok(())
            }
            Ok(()) => {
                moving::confirmed(root, name, id)?;
                wire.send(Type::Done, &[])?;
                wire.flush()
            }
        }
    }

    /// Step 2: takes what comes, up to the last of it. Gives the bits of the trackers.
    fn rounds(
        &self,
        wire: &mut Wire,
        arriving: &Arriving,
        luggage: &Luggage,
    ) -> Result<BTreeMap<Id, Runs>> {
        let disk = arriving.disk();
        let whole = disk.disk().top()?.header().size();
        let known = luggage.trackers.keys().map(|id| Id::parse(id));
        let known: BTreeSet<Id> = known.collect::<Result<_>>()?;
        let mut bits: BTreeMap<Id, Runs> = BTreeMap::new();
        loop {
            match wire.read()? {
                Type::Data => {
                    let (offset, bytes) = (wire.number(0)?, &wire.payload()[8..]);
                    let end = offset.checked_add(bytes.len() as u64);
                    if end.is_none_or(|end| end > disk.size()) {
                        return Err(wire.wrong("data behind the end of the disk"));
                    }
                    disk.write(offset, bytes)?;
                }
                Type::Zeros => {
                    let (offset, len) = (wire.number(0)?, wire.number(8)?);
                    let end = offset.checked_add(len).filter(|e| *e <= disk.size());
                    let end = end.ok_or_else(|| wire.wrong("zeros behind the end of the disk"))?;
                    disk.zero(offset..end, ZeroMode::default())?;
                }
                Type::Sync => {
                    disk.flush()?;
                    wire.send(Type::Synced, &[])?;
                    wire.flush()?;
                }
                Type::Bits => take_bits(wire, whole, &known, &mut bits)?,
                Type::Prepare => return Ok(bits),
                other => {
                    let what = format!("a frame {other:?} among the data");
                    return Err(wire.wrong(&what));
                }
            }
        }
    }

    /// A move that was cut ends.
    fn settle(
        self: &Arc<Self>,
        wire: &mut Wire,
        root: &Root,
        name: &str,
        id: Guid,
        end: &Arc<End>,
    ) -> Result<()> {
        wire.say(Type::Welcome, &Welcome::default())?;
        let verdict = hear(wire)?;
        let mut record = moving::record(root, name, id)?;
        if record.is_none() {
            let past = moving::past(root, name, id)?;
            // The move that it went on by may have ended between the two.
            record = moving::record(root, name, id)?;
            if let Some((past, here)) = past.filter(|_| record.is_none()) {
                let answer = rules::gone_on(past.epoch, verdict);
                tracing::info!(container = name, id = %id, ?verdict, ?answer, "asked of one that moved on");
                if here && answer == Answer::Unknown {
                    let what =
                        format!("{name} is moving on from here: whether it stays is not known yet");
                    return Err(Error::new(Kind::InUse, what).fix("Ask again"));
                }
                return self.answer(wire, root, name, id, answer);
            }
        }
        let (next, answer) = rules::destination(stand(record.as_ref()), verdict);
        match next {
            // Asked again and again, of a move that somebody has to decide.
            Next::Stay => tracing::debug!(container = name, id = %id, ?verdict, ?answer, "asked"),
            _ => {
                tracing::info!(container = name, id = %id, ?verdict, ?answer, "a move that was cut ends");
            }
        }
        let _door = match next {
            Next::Become(State::Given, _) => Some(step_down(&self.disks, &self.connections, name)?),
            _ => None,
        };
        if let Some(record) = record {
            enact(root, name, (id, record.state), next)?;
        }
        match answer {
            Answer::Taken(epoch) => self.has_it(wire, root, name, id, epoch, end),
            _ => self.answer(wire, root, name, id, answer),
        }
    }
}

fn hear(wire: &mut Wire) -> Result<Verdict> {
    wire.expect(Type::Says)?;
    Ok(Verdict::from(wire.record::<Said>()?))
}
