//! How a container is had: in turn with other jobs, alone behind its door, or live; and how a job
//! on it is paced.

use super::turns::{Work, Working};
use super::*;

impl Steward {
    pub(super) fn disks(&self) -> &Disks {
        &self.parts.disks
    }

    pub(super) fn root(&self) -> Result<&Root> {
        self.disks().root().ok_or_else(|| {
            Error::unsupported("a single disk is served here, not a store")
                .fix("Ask the service of the store, or run the command without one")
        })
    }

    /// Keeps jobs from a container; what the service does of itself gives way. Error: `InUse` while
    /// a job works on it.
    pub(super) fn turn_free(&self, container: &str) -> Result<Working> {
        self.turns.ask(container, LET_GO).ok_or_else(|| {
            Error::new(Kind::InUse, format!("a job works on {container}"))
                .fix("Wait for it, or cancel it: `ploop jobs` shows it")
        })
    }

    /// Waits for the job before; `None` when this one is cancelled meanwhile.
    pub(super) fn turn(&self, container: &str, job: &JobHandle) -> Option<Working> {
        self.turn_for(container, job, Work::Asked)
    }

    fn turn_for(&self, container: &str, job: &JobHandle, work: Work) -> Option<Working> {
        while !job.cancelled() {
            if let Some(working) = self.turns.take(container, work) {
                return Some(working);
            }
            job.sleep(LOOK_AGAIN);
        }
        None
    }

    /// Does a job's work on a container that may be changed, in its turn.
    pub(super) fn in_turn(
        &self,
        container: &str,
        job: &JobHandle,
        work: impl FnOnce(Place<'_>) -> Result<Ended>,
    ) -> Result<Ended> {
        self.disks().refuse_read_only(container)?;
        match self.turn(container, job) {
            Some(_working) => work(self.disks().place(container)?),
            None => Ok(Ended::Cancelled),
        }
    }

    /// Has a container's live disk for itself: nobody opens it until the result is dropped. `force`:
    /// whether connections are ended for it; `None` where nobody can ask for that. Returns how many
    /// were. Error: `InUse`, with who uses it.
    pub(super) fn alone(
        &self,
        container: &str,
        force: Option<bool>,
    ) -> Result<(Door, Working, usize)> {
        if self.disks().is_kept_open() {
            let what = format!("{container} is open here as long as it is served");
            return Err(Error::new(Kind::InUse, what)
                .on(self.disks().place(container)?.dir())
                .fix("Stop the service that has it, and run the command again"));
        }
        // What gives way may be about to open it: the door must let it.
        let working = self.turn_free(container)?;
        let door = self.disks().close_door(container);
        let using = |export: &str| export == container;
        let connected = self.parts.connections.staying(using, LET_GO);
        let peers: Vec<_> = connected.into_iter().map(|c| c.peer).collect();
        let mut ended = 0;
        if !peers.is_empty() {
            if force != Some(true) {
                let what = format!("{container} is in use by {}", peers.join(", "));
                let fix = match force {
                    Some(_) => "Disconnect it there, or end these connections with --force",
                    None => "Disconnect it there first: this is done while nobody uses it",
                };
                return Err(Error::new(Kind::InUse, what)
                    .on(self.disks().place(container)?.dir())
                    .fix(fix));
            }
            ended = self.parts.connections.end(container, LET_GO)?;
        }
        // A client that has just gone: its disk is being closed.
        if !self.disks().wait_closed(&door, LET_GO) {
            let what = format!("{container} is still being closed");
            return Err(Error::new(Kind::InUse, what).fix("Try again"));
        }
        Ok((door, working, ended))
    }

    /// Changes what is stored beside a container's disk, with the disk where it is open for writing
    /// here, else under its lock; nobody opens or closes it meanwhile.
    pub(super) fn as_it_is<T>(
        &self,
        container: &str,
        change: impl FnOnce(&Place<'_>, Option<&OpenDisk>) -> Result<T>,
    ) -> Result<T> {
        self.disks().leaving().refuse(container)?;
        let place = self.disks().place(container)?;
        let open = || {
            let disk = self.disks().open_disk(container);
            disk.filter(|_| !self.disks().read_only())
        };
        let door = self.disks().close_door(container);
        match open() {
            // Whoever has the disk open changes its metadata too.
            Some(disk) => {
                drop(door);
                let _arranging = disk.disk().arrange();
                change(&place, Some(&disk))
            }
            None => {
                let _held = place.lock()?;
                change(&place, None)
            }
        }
    }

    /// Refuses what would take the ground from under a client of a snapshot's export: the removal
    /// of that snapshot, and of any that it stands on and that would be rewritten.
    pub(super) fn refuse_exported(
        &self,
        container: &str,
        place: &Place<'_>,
        node: Guid,
    ) -> Result<()> {
        let (d, meta) = (place.descriptor()?, place.meta()?);
        // With several children it is only hidden.
        let rewritten = d.children(node).len() == 1;
        for open in self.disks().open_snapshots(place) {
            let stands = || {
                d.chain(open)
                    .is_ok_and(|c| c.iter().any(|i| i.guid == node))
            };
            if open != node && !(rewritten && stands()) {
                continue;
            }
            let shown = meta
                .name_of(open)
                .map_or_else(|| open.to_string(), str::to_owned);
            // A client may have come by a name that the snapshot had then.
            let is_it = |export: &str| {
                let text = export
                    .strip_prefix(container)
                    .and_then(|e| e.strip_prefix('@'));
                text.is_some_and(|t| place.find(&d, &meta, t).map_or(true, |g| g == open))
            };
            let connected = self.parts.connections.staying(is_it, LET_GO);
            let peers: Vec<_> = connected.into_iter().map(|c| c.peer).collect();
            if peers.is_empty() && self.closes(place, open) {
                continue;
            }
            let to = match peers.is_empty() {
                true => "a client that is just leaving".to_owned(),
                false => peers.join(", "),
            };
            let what = format!("{container}@{shown} is exported, to {to}");
            return Err(Error::new(Kind::InUse, what).fix("Disconnect it there first"));
        }
        Ok(())
    }

    /// Waits for a snapshot's disk that nobody uses any more to be closed; whether it was in time.
    fn closes(&self, place: &Place<'_>, snapshot: Guid) -> bool {
        let deadline = Instant::now() + LET_GO;
        while self.disks().open_snapshots(place).contains(&snapshot) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        true
    }

    /// Whether every member of a group has its snapshot.
    pub(super) fn is_whole(&self, id: &str, members: &[String]) -> bool {
        let has = |member: &String| {
            let of = |s: &tree::Snapshot| s.group.as_ref().is_some_and(|g| g.id == id);
            let listed = self.disks().place(member).and_then(|p| tree::list(&p));
            listed.is_ok_and(|all| all.iter().any(of))
        };
        members.iter().all(has)
    }

    pub(super) fn node(&self, container: &str, text: &str) -> Result<(Place<'_>, Guid)> {
        let place = self.disks().place(container)?;
        let node = place.find(&place.descriptor()?, &place.meta()?, text)?;
        Ok((place, node))
    }

    pub(super) fn taken(&self, taken: Taken) -> SnapshotTaken {
        self.parts
            .meter
            .snapshot_pause(Duration::from_secs_f64(taken.pause));
        tracing::info!(
            container = taken.disk,
            snapshot = taken.guid,
            name = taken.name,
            pause = taken.pause,
            depth = taken.depth,
            "snapshot made"
        );
        SnapshotTaken {
            container: taken.disk,
            guid: taken.guid,
            name: taken.name,
            pause: taken.pause,
            depth: taken.depth as u64,
            note: taken.note,
        }
    }

    /// Runs what waits on an open container.
    pub(super) fn run(&self, container: &str, job: &JobHandle, rate: Option<u64>) -> Result<Ended> {
        let disk = self.disks().live(container)?;
        let place = self.disks().place(container)?;
        self.run_on(&place, &disk, job, rate)
    }

    /// Runs what waits on a container, and gives way to whoever asks for it meanwhile.
    pub(super) fn run_left(&self, container: &str, job: &JobHandle) -> Result<Ended> {
        while let Some(working) = self.turn_for(container, job, Work::GivesWay) {
            let place = match self.disks().place(container) {
                // With the container went what was to be done.
                Err(e) if e.kind() == Kind::NotFound => break,
                place => place?,
            };
            let disk = self.disks().live(container)?;
            let watch = Throttle {
                working: Some(&working),
                ..Throttle::new(job, None)
            };
            let ended = Self::run_watched(&place, &disk, &watch)?;
            let gave_way = !matches!(ended, Ended::Done(_)) && working.is_asked_for();
            if !gave_way || job.cancelled() {
                return Ok(ended);
            }
        }
        Ok(Ended::Cancelled)
    }

    pub(super) fn run_on(
        &self,
        place: &Place<'_>,
        disk: &OpenDisk,
        job: &JobHandle,
        rate: Option<u64>,
    ) -> Result<Ended> {
        Self::run_watched(place, disk, &Throttle::new(job, rate))
    }

    fn run_watched(place: &Place<'_>, disk: &OpenDisk, watch: &Throttle<'_>) -> Result<Ended> {
        let live = Live {
            place,
            disk: disk.disk(),
        };
        let ran = delete::run(live, watch)?;
        let text = format!(
            "{} removed, {} bytes freed{}",
            match ran.removed {
                1 => "1 snapshot".to_owned(),
                n => format!("{n} snapshots"),
            },
            ran.freed,
            match ran.hidden {
                0 => String::new(),
                n => format!(", {n} hidden while others need them"),
            }
        );
        Ok(match ran.paused {
            true => Ended::Paused(format!(
                "{text}; the rest goes on with `ploop snapshot merge {} --continue`, or when the \
                 disk is served again",
                place.shown()
            )),
            false => Ended::Done(text),
        })
    }

    /// Clones from a snapshot of a container that is open here: its images become layers first.
    pub(super) fn share_live(&self, container: &str, snapshot: &str) -> Result<()> {
        if self.disks().read_only() || !self.disks().is_open(container) {
            return Ok(());
        }
        self.disks().leaving().refuse(container)?;
        let disk = self.disks().live(container)?;
        let place = self.disks().place(container)?;
        let _arranging = disk.disk().arrange();
        disk.disk().settle(place.opener())?;
        let node = place.find(&place.descriptor()?, &place.meta()?, snapshot)?;
        share::share(&place, node)
    }
}

/// Holds a rate, and stops where the job is told to.
pub(super) struct Throttle<'a> {
    job: &'a JobHandle,
    rate: Option<u64>,
    start: Instant,
    moved: Mutex<u64>,
    /// Set where the work gives way.
    working: Option<&'a Working>,
}

impl<'a> Throttle<'a> {
    /// For `job`, at `rate` bytes per second; 0 is none.
    pub(super) fn new(job: &'a JobHandle, rate: Option<u64>) -> Throttle<'a> {
        Throttle {
            job,
            rate,
            start: Instant::now(),
            moved: Mutex::default(),
            working: None,
        }
    }
}

impl Watch for Throttle<'_> {
    fn go_on(&self, moved: u64) -> bool {
        let mut all = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        *all += moved;
        if let Some(rate) = self.rate.filter(|r| *r > 0) {
            let due = Duration::from_secs_f64(*all as f64 / rate as f64);
            self.job.sleep(due.saturating_sub(self.start.elapsed()));
        }
        !self.job.cancelled() && !self.working.is_some_and(Working::is_asked_for)
    }

    fn progress(&self, progress: Progress) {
        self.job.progress(progress.done, progress.total);
    }
}
