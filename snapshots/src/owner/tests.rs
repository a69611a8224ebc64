//! Every order of events: two sides, a network that loses, delays and repeats, crashes anywhere, and
//! operators who decide.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::*;

/// A message, as often and as late as the network likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Prepare,
    Ready,
    Says(Verdict),
    Answers(Answer),
    Confirmed,
}

/// What the source's process is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Doing {
    /// Down, or nothing.
    Nothing,
    /// Waits for `Ready`.
    Offers,
    /// Says how the move ends, until it is answered.
    Tells,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Stand,
    /// It has the disk, not given it or taken back; with `source` being `None`.
    source_has: bool,
    doing: Doing,
    destination: Stand,
    destination_has: bool,
    /// The epoch of what the destination took and gave away before it heard that the source knows.
    past: Option<u64>,
    /// Somebody has it whom the destination gave it to.
    went_on: bool,
    /// Ever sent: each may come at any time.
    sent: BTreeSet<Message>,
    /// Decisions that operators may still make.
    decisions: u8,
    decided: bool,
    /// The epoch in which the source gives it: with its files, or without.
    gives: u64,
}

impl World {
    fn begun(decisions: u8, gives: u64) -> World {
        World {
            source: None,
            source_has: true,
            doing: Doing::Nothing,
            destination: Some((State::Arriving, BEGUN)),
            destination_has: false,
            past: None,
            went_on: false,
            sent: BTreeSet::new(),
            decisions,
            decided: false,
            gives,
        }
    }

    fn source_owns(&self) -> bool {
        self.source_has && self.source.is_none_or(|(s, _)| s.owns())
    }

    fn destination_owns(&self) -> bool {
        self.went_on || self.destination_has && self.destination.is_none_or(|(s, _)| s.owns())
    }

    /// The destination asked: what it does, and its answer.
    fn asked(&mut self, verdict: Verdict) -> Answer {
        if let (None, Some(epoch)) = (self.destination, self.past) {
            return gone_on(epoch, verdict);
        }
        let (next, answer) = destination(self.destination, verdict);
        self.destination_next(next);
        answer
    }

    /// The destination hears that the source knows.
    fn confirm(&mut self) {
        let next = confirmed(self.destination);
        self.destination_next(next);
        self.past = None;
    }

    fn send(&mut self, message: Message) {
        self.sent.insert(message);
    }

    fn source_next(&mut self, next: Next) {
        self.source = next.after(self.source);
        self.source_has &= next != Next::Remove;
    }

    fn destination_next(&mut self, next: Next) {
        self.destination = next.after(self.destination);
        match next {
            Next::Become(State::Taken, _) => self.destination_has = true,
            Next::Remove => self.destination_has = false,
            _ => {}
        }
    }

    /// The source begins to end the move: it has a stand, so something to say.
    fn tell(&mut self) {
        if let Some(v) = self.source.and_then(|(s, e)| verdict(s, e)) {
            self.doing = Doing::Tells;
            self.send(Message::Says(v));
        }
    }

    fn hears(&self, message: Message) -> World {
        let mut w = self.clone();
        match message {
            Message::Prepare => {
                if matches!(w.destination, Some((State::Arriving | State::Ready, _))) {
                    w.destination = Some((State::Ready, BEGUN));
                    w.send(Message::Ready);
                }
            }
            Message::Ready => {
                if w.doing == Doing::Offers {
                    w.source = Some((State::Given, w.gives));
                    w.tell();
                }
            }
            Message::Says(verdict) => {
                let answer = w.asked(verdict);
                w.send(Message::Answers(answer));
                if let Answer::Taken(epoch) = answer {
                    // Or so, as long as its data is still coming.
                    w.send(Message::Answers(Answer::Needs(epoch)));
                }
            }
            Message::Answers(answer) => {
                if w.doing == Doing::Tells {
                    let next = source(w.source, answer);
                    w.source_next(next);
                    if next != Next::Stay {
                        w.doing = Doing::Nothing;
                    }
                    if has_left(next) {
                        w.send(Message::Confirmed);
                    }
                }
            }
            Message::Confirmed => w.confirm(),
        }
        w
    }

    /// Every world that may come next.
    fn nexts(&self, all: &mut Vec<World>) {
        let mut add = |change: &dyn Fn(&mut World)| {
            let mut w = self.clone();
            change(&mut w);
            all.push(w);
        };
        if self.source.is_none() && self.sent.is_empty() {
            add(&|w| {
                w.source = Some((State::Offered, BEGUN));
                w.doing = Doing::Offers;
                w.send(Message::Prepare);
            });
        }
        // The source crashes, or its link is lost: it says how the move ends.
        add(&|w| {
            w.doing = Doing::Nothing;
            w.tell();
        });
        // The destination crashes, or its link is lost.
        add(&|w| {
            let next = lost(w.destination);
            w.destination_next(next);
        });
        // What it has moves on.
        if self.destination_has && self.destination_owns() {
            add(&|w| {
                w.past = w.destination.map(|(_, epoch)| epoch);
                (w.destination, w.destination_has, w.went_on) = (None, false, true);
            });
        }
        for decision in [Decision::Take, Decision::Give] {
            if self.decisions == 0 {
                break;
            }
            if let Ok((next, _)) = resolve(self.source, decision) {
                add(&|w| {
                    w.source_next(next);
                    w.doing = Doing::Nothing;
                    w.decisions -= 1;
                    w.decided = true;
                });
            }
            if let Ok((next, _)) = resolve(self.destination, decision) {
                add(&|w| {
                    w.destination_next(next);
                    w.decisions -= 1;
                    w.decided = true;
                });
            }
        }
        all.extend(self.sent.iter().map(|m| self.hears(*m)));
    }

    /// Where both are up and every message comes, once, in order: until nothing changes.
    fn settled(&self) -> World {
        let mut w = self.clone();
        let next = lost(w.destination);
        w.destination_next(next);
        for _ in 0..8 {
            w.doing = Doing::Nothing;
            let Some(v) = w.source.and_then(|(s, e)| verdict(s, e)) else {
                break;
            };
            w.doing = Doing::Tells;
            let answer = w.asked(v);
            let next = source(w.source, answer);
            w.source_next(next);
            if has_left(next) {
                w.confirm();
            }
        }
        w
    }
}

/// The destination hears that the source knows.
fn has_left(next: Next) -> bool {
    matches!(next, Next::Remove | Next::Become(State::Given, KEPT))
}

fn every(decisions: u8) -> HashSet<World> {
    every_of(World::begun(decisions, BEGUN))
}

fn every_of(begun: World) -> HashSet<World> {
    let mut seen = HashSet::from([begun]);
    let mut left: Vec<World> = seen.iter().cloned().collect();
    let mut next = Vec::new();
    while let Some(w) = left.pop() {
        w.nexts(&mut next);
        for n in next.drain(..) {
            if seen.insert(n.clone()) {
                left.push(n);
            }
        }
    }
    seen
}

#[test]
fn never_two_owners_and_in_the_end_exactly_one() {
    let all = every(0);
    let mut ends: HashMap<(bool, bool), usize> = HashMap::new();
    for w in &all {
        let owners = (w.source_owns(), w.destination_owns());
        assert!(owners != (true, true), "two owners: {w:?}");
        let end = w.settled();
        let owners = (end.source_owns(), end.destination_owns());
        assert!(owners.0 != owners.1, "in the end: {end:?}\nfrom: {w:?}");
        assert!(end.source.is_none(), "nothing is left to be said: {end:?}");
        *ends.entry(owners).or_default() += 1;
    }
    assert_eq!(ends.len(), 2, "it stays, and it moves: {ends:?}");
    assert!(all.len() > 20, "{}", all.len());
}

/// Files that are to stay do, whatever is lost and whoever crashes; and nobody opens them.
#[test]
fn what_is_to_be_kept_is_there_in_the_end() {
    for w in every_of(World::begun(0, KEEPS)) {
        assert!(
            !(w.source_owns() && w.destination_owns()),
            "two owners: {w:?}"
        );
        assert!(w.source_has, "{w:?}");
        let end = w.settled();
        assert!(
            end.source_owns() != end.destination_owns(),
            "{end:?}\nfrom: {w:?}"
        );
        let kept = end.source == Some((State::Given, KEPT));
        assert_eq!(kept, end.destination_owns(), "{end:?}\nfrom: {w:?}");
    }
}

/// What a crashed side finds is no worse than what it left: a destination that had the disk has it.
#[test]
fn a_disk_that_was_taken_stays_taken() {
    for w in every(0) {
        let mut nexts = Vec::new();
        w.nexts(&mut nexts);
        for n in nexts {
            assert!(
                !w.destination_owns() || n.destination_owns(),
                "{w:?}\nthen {n:?}"
            );
        }
    }
}

/// Operators may decide wrongly, on both sides; once both are up, there is one owner at most, and one
/// exactly unless it was given away by decision.
#[test]
fn whatever_is_decided_both_up_again_agree() {
    let mut two = 0;
    for w in every(2) {
        let both = (w.source_owns(), w.destination_owns()) == (true, true);
        assert!(!both || w.decided, "{w:?}");
        two += usize::from(both);
        let end = w.settled();
        let both = (end.source_owns(), end.destination_owns()) == (true, true);
        // Who was told to take it twice has no record any more to be told by.
        let forgotten = end.source.is_none() || end.destination.is_none();
        assert!(!both || forgotten, "{end:?}\nfrom {w:?}");
    }
    assert!(two > 0, "a wrong decision is looked at");
}

/// One decision, while the other side is gone: when it comes back, exactly one has the disk.
#[test]
fn one_decision_is_kept_by_both() {
    for w in every(1).iter().filter(|w| w.decided) {
        let end = w.settled();
        let owners = (end.source_owns(), end.destination_owns());
        let dropped = end.source == Some((State::Given, BEGUN)) && end.destination.is_none();
        let forgotten = w.source.is_none() && w.source_has && !w.sent.is_empty();
        // Taken back at the source while it went on from the destination: nobody there can step down.
        let forgotten = forgotten || w.went_on && w.source.is_some_and(|(_, e)| e == DECIDED);
        assert!(
            owners.0 != owners.1 || dropped || forgotten || owners == (false, false),
            "{end:?}\nfrom {w:?}"
        );
    }
}
