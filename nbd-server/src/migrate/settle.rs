//! The end of a move that was cut behind its last data: the source says how it ended, until the
//! destination has heard.

use std::sync::Arc;
use std::time::Duration;

use ploop::descriptor::Guid;
use ploop::error::{Error, Kind, Result};
use ploop::owner::{self, Owner, Record, State};
use snapshots::Root;
use snapshots::moving::{Luggage, enact, stand};
use snapshots::owner::{self as rules, Answer, Next, Verdict};
use snapshots::place::Place;

use super::clients;
use super::feed::feed;
use super::link::{Address, Link, Stop, Tls};
use super::source::answer;
use super::wire::{Hello, Purpose, Said, Type, VERSION, Wire};
use crate::export::Disks;
use crate::export::disks::Door;
use crate::serve::Connections;

/// How long the other side may be silent.
pub(super) const SILENCE: Duration = Duration::from_secs(20);

/// For clients to let go of a disk that goes.
const LET_GO: Duration = Duration::from_secs(30);

/// What became of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The disk is this service's.
    Here,
    /// It is the destination's; nothing is left of it here, but files that are to stay.
    There,
    /// It is the destination's, and what is left here is for somebody to decide.
    InDoubt,
}

/// Where a source's record says that the destination is, and what the container is called there. A
/// destination's has only who came: that is no place to be asked at.
fn peer(record: &Record) -> Option<(&str, &str)> {
    let (name, address) = record.peer.split_once(' ')?;
    snapshots::name::check(name).ok()?;
    Some((name, address))
}

/// What this side says of the move; `None` where it is not, or does not know, who is to be told. A
/// destination that stepped down says nothing.
pub(super) fn verdict(record: &Record) -> Option<Verdict> {
    peer(record)?;
    rules::verdict(record.state, record.epoch)
}

/// A destination as a source's record has it.
pub(crate) fn peer_text(address: &Address, name: &str) -> String {
    format!("{name} {address}")
}

/// Ends the move of `container`, which this service is or was the source of, and which nobody moves now.
/// Durable on return. Errors: `NotFound` where it has no record of a source; those of reaching the
/// destination: then it is as before. Blocks.
pub fn settle(
    (disks, connections): (&Disks, &Connections),
    container: &str,
    tls: Option<&Tls>,
    stop: Stop,
) -> Result<Settled> {
    settle_by((disks, connections), container, |address| {
        let mut link = Link::dial(address, address.tls(tls), stop)?;
        link.set_patience(Some(SILENCE));
        let peer = link.peer().to_owned();
        Ok(Wire::new(Box::new(link), &peer))
    })
}

/// [`settle`] over what `dial` gives.
pub(super) fn settle_by(
    (disks, connections): (&Disks, &Connections),
    container: &str,
    dial: impl FnOnce(&Address) -> Result<Wire>,
) -> Result<Settled> {
    let root = disks.root().ok_or_else(|| {
        Error::unsupported("a single disk is served here, and no container moves from it")
    })?;
    let dir = root.existing_container(container)?;
    let record = owner::read(root.store(), &dir)?;
    let none = || {
        let what = format!("{container} is no source of a move");
        Error::new(Kind::NotFound, what).on(&dir)
    };
    let record = record.ok_or_else(none)?;
    let verdict = verdict(&record).ok_or_else(none)?;
    clients::follow(root.store(), &dir, record.id, verdict);
    let (name, address) = peer(&record).ok_or_else(none)?;
    let address = Address::parse(address)?;
    if verdict == Verdict::Given {
        // Said only when it is durable, which it was not if the sync of that time failed.
        let mut owner = Owner::open(root.store(), &dir)?
            .filter(|o| *o.record() == record)
            .ok_or_else(|| changed(container))?;
        owner.set(record.state, record.epoch)?;
    }
    let mut wire = dial(&address)?;
    let hello = Hello {
        version: VERSION,
        id: record.id.to_string(),
        name: name.to_owned(),
        purpose: Purpose::Settle,
        later: false,
        luggage: Luggage::default(),
    };
    wire.say(Type::Hello, &hello)?;
    wire.expect(Type::Welcome)?;
    wire.say(Type::Says, &Said::from(verdict))?;
    let answer = answer(&mut wire)?;
    if let (State::Given, Answer::Needs(_)) = (record.state, answer) {
        tracing::info!(container, id = %record.id, "its data goes on to follow");
        feed(&mut wire, Place::container(root, container)?)?;
        let next = rules::source(stand(Some(&record)), Answer::Taken(rules::TAKEN));
        return left(root, container, &record, next, &mut wire);
    }
    let next = rules::source(stand(Some(&record)), answer);
    match next {
        // Somebody has to decide; until then it is asked again and again.
        Next::Stay => tracing::debug!(container, id = %record.id, ?verdict, ?answer, "asked"),
        _ => {
            tracing::info!(container, id = %record.id, ?verdict, ?answer, "a move that was cut has ended");
        }
    }
    match (record.state, next) {
        // Clients may use it: a record that goes changes nothing for them.
        (State::Offered, Next::Own) => {
            forget(root, container, record.id)?;
            clients::forget(root.store(), &dir);
            Ok(Settled::Here)
        }
        (_, Next::Stay) => Ok(Settled::InDoubt),
        (State::Offered, next @ Next::Become(..)) => {
            let _door = step_down(disks, connections, container)?;
            enact(root, container, (record.id, record.state), next)?;
            Ok(Settled::InDoubt)
        }
        (_, next) => left(root, container, &record, next, &mut wire),
    }
}

/// It is the destination's, and complete there; `next` is what becomes of it here.
fn left(
    root: &Root,
    container: &str,
    record: &Record,
    next: Next,
    wire: &mut Wire,
) -> Result<Settled> {
    enact(root, container, (record.id, record.state), next)?;
    let known = wire.send(Type::Confirmed, &[]).and_then(|()| wire.flush());
    if let Err(e) = known.and_then(|()| wire.expect(Type::Done)) {
        tracing::warn!(container, error = %e, "the destination was not told that we know");
    }
    Ok(Settled::There)
}

/// Everybody lets go of a container that is not this service's any more; nobody opens it before the
/// result is dropped. Error: `InUse`.
pub(super) fn step_down(disks: &Disks, connections: &Connections, name: &str) -> Result<Door> {
    let door = disks.close_door(name);
    connections.end_where(|export| export == name, LET_GO)?;
    if !disks.wait_closed(&door, LET_GO) {
        let what = format!("{name} is still being closed");
        return Err(Error::new(Kind::InUse, what));
    }
    Ok(door)
}

fn changed(container: &str) -> Error {
    let what = format!("somebody else ends the move of {container}");
    Error::new(Kind::InUse, what)
}

/// Removes the record of the move, whoever has the disk open.
fn forget(root: &Root, container: &str, id: Guid) -> Result<()> {
    match owner::remove_of(root.store(), &root.existing_container(container)?, id)? {
        true => Ok(()),
        false => Err(changed(container)),
    }
}

/// A stop that nobody says.
pub fn never() -> Stop {
    Arc::new(|| false)
}
