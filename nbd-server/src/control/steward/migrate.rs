//! Moving a container to another service, under its clients.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::control::model::{Migrate, Migration, MigrationPhase, Resolve, Resolved};
use crate::migrate::link::{Address, Link, Stop};
use crate::migrate::settle::{self, Settled, settle};
use crate::migrate::source::{self, Deadline, Failed, Holder, Options, Progress as At, Source};
use snapshots::{backup, moving};

/// How long clients may wait at the hand-over, where nobody says.
const DOWNTIME: Duration = Duration::from_millis(20);
/// How long the destination may be silent: it makes durable what it has, which may be all that its
/// memory holds. In the hand-over there is another end to it.
const SILENCE: Duration = Duration::from_secs(600);
/// Bytes per second. With fewer the destination would take the source for gone between two frames.
const RATE_MIN: u64 = 64 << 10;
/// How long it is waited until what is inside is frozen, where nobody says.
const FREEZE: Duration = Duration::from_secs(60);
/// Between two signs of life meanwhile.
const PING: Duration = Duration::from_secs(10);
/// Between two looks whether what is inside is frozen.
const LOOK: Duration = Duration::from_millis(5);

impl Steward {
    pub(super) fn move_away(
        &self,
        container: &str,
        request: &Migrate,
        job: &JobHandle,
    ) -> Result<Ended> {
        let root = self.root()?;
        let to = Address::parse(&request.to)?;
        let name = request.name.clone().unwrap_or_else(|| container.to_owned());
        snapshots::name::check(&name)?;
        let peer = settle::peer_text(&to, &name);
        if peer.len() > ploop::owner::PEER_MAX {
            let what = format!(
                "name and address of the destination have {} bytes; {} are possible",
                peer.len(),
                ploop::owner::PEER_MAX
            );
            return Err(Error::invalid(what));
        }
        if let Some(rate) = request.rate.filter(|r| (1..RATE_MIN).contains(r)) {
            let what = format!("{rate} bytes a second; a move takes {RATE_MIN} at least");
            return Err(Error::invalid(what));
        }
        self.disks().refuse_read_only(container)?;
        Place::container(root, container)?;
        let Some(_working) = self.turn(container, job) else {
            return Ok(Ended::Cancelled);
        };
        let _leaving = self.disks().leaving().enter(container)?;
        {
            let place = self.disks().place(container)?;
            moving::refuse_missing(place.store(), place.dir(), container)?;
        }
        self.end_last(container, job)?;
        for done in backup::pending(&self.disks().place(container)?)? {
            if done.done {
                self.drop_snapshot(container, &done.id)?;
            }
        }
        // What waits for a merge would be sent for nothing.
        match self.run(container, job, None)? {
            Ended::Done(_) => {}
            _ => return Ok(Ended::Cancelled),
        }
        let holder = request.holder.as_ref().map(|h| Holder {
            control: h.control.clone().into(),
            to: h.to.clone(),
        });
        holder.iter().try_for_each(|h| h.check(container, &name))?;
        let deadline = Arc::new(Deadline::default());
        let (asked, until) = (job.clone(), deadline.clone());
        let stop: Stop = Arc::new(move || until.is_over(asked.cancelled()));
        let mut link = Link::dial(&to, to.tls(self.parts.tls.as_ref()), stop)?;
        link.set_patience(Some(SILENCE));
        let options = Options {
            name,
            downtime: request.downtime_ms.map_or(DOWNTIME, Duration::from_millis),
            holder,
            keep: request.keep,
            later: request.post_copy,
            brake: !request.no_brake,
        };
        let watch = Watching {
            steward: self,
            container,
            job,
            rate: request.rate,
            freeze: request.freeze.then(|| {
                let seconds = request.freeze_seconds;
                seconds.map_or(FREEZE, Duration::from_secs)
            }),
            start: Instant::now(),
            moved: AtomicU64::new(0),
            last: Mutex::default(),
        };
        let source = Source {
            disks: self.disks(),
            connections: &self.parts.connections,
            disk: self.disks().live(container)?,
            place: self.disks().place(container)?,
            options: &options,
            watch: &watch,
            peer,
            deadline,
        };
        match source.run_over(link) {
            Ok(moved) => {
                self.disks().throttle().forget(container);
                watch.over(moved);
                tracing::info!(container, to = %to, ?moved, "moved");
                Ok(Ended::Done(format!(
                    "{} bytes in {} rounds; clients waited {:.1} ms",
                    moved.bytes,
                    moved.rounds,
                    moved.gap * 1000.0
                )))
            }
            Err(Failed::Here(e)) => {
                self.disks().go_on_merging(container);
                match job.cancelled() {
                    true => Ok(Ended::Cancelled),
                    false => Err(e),
                }
            }
            Err(Failed::Fed(e)) => {
                let what = format!(
                    "{container} was given to {to}, which has it; some of its data is still here ({e})"
                );
                Err(Error::new(Kind::Io, what).fix(
                    "It follows by itself as long as a service runs here. Keep its files until then",
                ))
            }
            Err(Failed::Given(e)) => {
                let what = format!(
                    "{container} was given to {to}, which has not said that it has it ({e})"
                );
                Err(Error::new(Kind::Io, what).fix(format!(
                    "It is told again as long as a service runs here. If it is gone for good: ploop \
                     migrate {container} --resolve take"
                )))
            }
        }
    }

    /// The last move of the container that was cut has ended, if there was one. Error: why it has not.
    fn end_last(&self, container: &str, job: &JobHandle) -> Result<()> {
        let place = self.disks().place(container)?;
        let record = ploop::owner::read(place.store(), place.dir())?;
        let verdict = record.filter(|r| snapshots::owner::verdict(r.state, r.epoch).is_some());
        let Some(record) = verdict else {
            return Ok(());
        };
        let asked = job.clone();
        let stop: Stop = Arc::new(move || asked.cancelled());
        let with = (self.disks(), &self.parts.connections);
        let settled = settle(with, container, self.parts.tls.as_ref(), stop);
        let left = match settled {
            Ok(Settled::Here) => return Ok(()),
            Ok(_) => Error::new(Kind::InUse, "it is not this service's"),
            Err(e) => e,
        };
        let what = format!(
            "the last move of {container}, to {}, has not ended ({left})",
            ploop::owner::shown(&record.peer)
        );
        Err(Error::new(Kind::InUse, what).fix(format!(
            "It ends as soon as that service is there; if it is gone for good: ploop migrate \
             {container} --resolve take"
        )))
    }

    pub(super) fn frozen(&self, container: &str) -> Result<()> {
        let mut waits = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        match waits.get_mut(container) {
            Some(said) => {
                *said = true;
                Ok(())
            }
            None => {
                let what = format!("no move of {container} waits for that");
                Err(Error::new(Kind::NotFound, what))
            }
        }
    }

    pub(super) fn resolve(&self, container: &str, request: &Resolve) -> Result<Resolved> {
        let root = self.root()?;
        let _leaving = self.disks().leaving().enter(container)?;
        let decided = moving::decide(root, container, request.decision.into())?;
        tracing::warn!(container, ?request, was = decided.was, "a move was decided");
        Ok(decided.into())
    }
}

/// What a job sees of its move, and says to it.
struct Watching<'a> {
    steward: &'a Steward,
    container: &'a str,
    job: &'a JobHandle,
    rate: Option<u64>,
    /// How long it is waited for that, if at all.
    freeze: Option<Duration>,
    start: Instant,
    moved: AtomicU64,
    last: Mutex<Migration>,
}

impl Watching<'_> {
    fn show(&self, change: impl FnOnce(&mut Migration)) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut last);
        self.job
            .progress(last.sent, last.sent.saturating_add(last.left));
        self.job.migration(last.clone());
    }

    fn wait_frozen(
        &self,
        limit: Duration,
        ping: &mut dyn FnMut() -> Result<()>,
        frozen: &dyn Fn() -> bool,
    ) -> Result<()> {
        let (began, mut pinged) = (Instant::now(), Instant::now());
        while !frozen() {
            if self.job.cancelled() {
                return Err(Error::new(Kind::Io, "the move was told to end"));
            }
            if began.elapsed() >= limit {
                let what = format!(
                    "nobody said within {} s that what is inside {} is frozen",
                    limit.as_secs(),
                    self.container
                );
                return Err(Error::new(Kind::Io, what)
                    .fix("It goes on here. Give the freeze more time with --hook-timeout"));
            }
            if pinged.elapsed() >= PING {
                ping()?;
                pinged = Instant::now();
            }
            self.job.sleep(LOOK);
        }
        Ok(())
    }

    fn over(&self, moved: source::Moved) {
        self.show(|m| {
            (m.left, m.expected) = (0, None);
            m.moved = Some(moved.into());
        });
    }
}

impl source::Watch for Watching<'_> {
    fn cancelled(&self) -> bool {
        self.job.cancelled()
    }

    fn pace(&self, bytes: u64) {
        let all = self.moved.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(rate) = self.rate.filter(|r| *r > 0) {
            let due = Duration::from_secs_f64(all as f64 / rate as f64);
            self.job.sleep(due.saturating_sub(self.start.elapsed()));
        }
    }

    fn progress(&self, at: At) {
        self.show(|m| {
            *m = Migration {
                phase: match at.round {
                    0 => MigrationPhase::Tree,
                    _ => MigrationPhase::Rounds,
                },
                round: at.round,
                sent: at.sent,
                left: at.left,
                rate: at.rate,
                dirty_rate: at.dirty_rate,
                brake: at.brake,
                // Each round leaves what is written while it is sent.
                expected: (at.rate > at.dirty_rate)
                    .then(|| at.left as f64 / (at.rate - at.dirty_rate) as f64),
                moved: None,
            };
        });
    }

    fn freeze(&self, ping: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if let Some(limit) = self.freeze {
            let waits = &self.steward.frozen;
            let lock = || waits.lock().unwrap_or_else(PoisonError::into_inner);
            lock().insert(self.container.to_owned(), false);
            self.show(|m| m.phase = MigrationPhase::Freeze);
            let frozen =
                self.wait_frozen(limit, ping, &|| lock().get(self.container) == Some(&true));
            lock().remove(self.container);
            frozen?;
        }
        self.show(|m| m.phase = MigrationPhase::HandOver);
        Ok(())
    }

    fn fed(&self) {
        self.show(|m| m.phase = MigrationPhase::PostCopy);
    }
}
