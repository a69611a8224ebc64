//! Work that takes long: each job on a thread of its own, with progress, until it ends or is told
//! to. Jobs that are over are remembered, the last [`REMEMBERED`] of them.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use ploop::error::{Error, Kind, Result};
use tokio::sync::watch;

use super::failure::Failure;
use super::model::{Job, JobState, Migration, Resized};
use super::service::seconds;

/// Jobs that are over and still listed.
pub const REMEMBERED: usize = 256;

/// Jobs at work at once.
pub const AT_WORK: usize = 64;

/// The rate is that of the last so many samples, so far apart at least.
const SAMPLES: usize = 20;
const SAMPLE_EVERY: Duration = Duration::from_millis(250);

/// How a job came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It is done; what came out, for people.
    Done(String),
    /// It was told to stop, at a point from which it can only go on; says how.
    Paused(String),
    /// It was told to stop, and nothing is changed.
    Cancelled,
}

/// All jobs of a service; a cheap clone.
#[derive(Clone, Debug, Default)]
pub struct Jobs(Arc<Mutex<Book>>);

#[derive(Debug, Default)]
struct Book {
    last: u64,
    jobs: BTreeMap<u64, Arc<Entry>>,
    threads: BTreeMap<u64, JoinHandle<()>>,
    closed: bool,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    kind: String,
    container: String,
    what: String,
    started: u64,
    state: Mutex<State>,
    changed: Condvar,
    over: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    state: JobState,
    done: u64,
    total: u64,
    began: Instant,
    samples: VecDeque<(Instant, u64)>,
    /// When, by both clocks.
    ended: Option<(Instant, u64)>,
    message: Option<String>,
    resized: Option<Resized>,
    migration: Option<Migration>,
    error: Option<Failure>,
}

/// A job as its own work sees it.
#[derive(Clone, Debug)]
pub struct JobHandle(Arc<Entry>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these protect is whole between two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Jobs {
    /// Starts `work` on a thread of its own; returns the job's number. `kind`, `container`, `what`:
    /// as in [`Job`]. Error: `InUse` when the service is stopping, or too many are at work.
    pub fn start(
        &self,
        kind: &str,
        container: &str,
        what: &str,
        work: impl FnOnce(&JobHandle) -> Result<Ended> + Send + 'static,
    ) -> Result<u64> {
        let mut book = lock(&self.0);
        if book.closed {
            let what = "the service is stopping and starts no job";
            return Err(Error::new(Kind::InUse, what).fix("Try again when it is up again"));
        }
        if book.threads.len() >= AT_WORK {
            let what = format!("{AT_WORK} jobs are at work already");
            return Err(Error::new(Kind::InUse, what).fix("Wait for one, or cancel one"));
        }
        book.last += 1;
        let entry = Arc::new(Entry::new(book.last, kind, container, what));
        let (handle, jobs) = (JobHandle(entry.clone()), self.clone());
        let thread = std::thread::Builder::new().name(format!("job-{}", entry.id));
        let thread = thread.spawn(move || {
            tracing::info!(
                job = handle.0.id,
                kind = handle.0.kind,
                container = handle.0.container,
                what = handle.0.what,
                "job started"
            );
            // An entry is changed in steps that cannot panic, so it is whole after one.
            let came_to = catch_unwind(AssertUnwindSafe(|| work(&handle)));
            let came_to = came_to.unwrap_or_else(|_| {
                Err(Error::new(Kind::Io, "the job panicked").fix("Please report it"))
            });
            jobs.finish(&handle, came_to);
        });
        let thread =
            thread.map_err(|e| Error::new(Kind::Io, "start a thread for a job").caused_by(e))?;
        book.threads.insert(entry.id, thread);
        let id = entry.id;
        book.jobs.insert(id, entry);
        Ok(id)
    }

    fn finish(&self, handle: &JobHandle, came_to: Result<Ended>) {
        // The book is locked while the job ends: it is over, and its place is free, at one time.
        let mut book = lock(&self.0);
        handle.0.end(came_to);
        // Dropped, not joined: it is this thread, at its end.
        book.threads.remove(&handle.0.id);
        let over = book.jobs.values().filter(|e| *e.over.borrow());
        let over: Vec<u64> = over.map(|e| e.id).collect();
        let many = over.len().saturating_sub(REMEMBERED);
        for id in &over[..many] {
            book.jobs.remove(id);
        }
    }

    /// All jobs, the oldest first.
    pub fn list(&self) -> Vec<Job> {
        let entries: Vec<_> = lock(&self.0).jobs.values().cloned().collect();
        entries.iter().map(|e| e.job()).collect()
    }

    /// One job. Error: `NotFound`.
    pub fn get(&self, id: u64) -> Result<Job> {
        Ok(self.entry(id)?.job())
    }

    /// Tells a job to stop; one that is over stays as it is. Does not wait. Error: `NotFound`.
    pub fn cancel(&self, id: u64) -> Result<Job> {
        let entry = self.entry(id)?;
        entry.cancel();
        Ok(entry.job())
    }

    /// Waits until a job is over, `patience` at most. Error: `NotFound`. Blocks.
    pub fn wait(&self, id: u64, patience: Duration) -> Result<Job> {
        let entry = self.entry(id)?;
        let state = lock(&entry.state);
        let at_work = |s: &mut State| !s.state.is_over();
        let waited = entry.changed.wait_timeout_while(state, patience, at_work);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        Ok(entry.job())
    }

    /// The same without blocking.
    pub(super) async fn wait_async(&self, id: u64, patience: Duration) -> Result<Job> {
        let entry = self.entry(id)?;
        let mut over = entry.over.subscribe();
        // The time may run out before the job does; the sender is in the entry, so it is there.
        drop(tokio::time::timeout(patience, over.wait_for(|over| *over)).await);
        Ok(entry.job())
    }

    /// Starts no more jobs, tells all to stop, and waits for them. Blocks.
    pub fn shutdown(&self) {
        let mut book = lock(&self.0);
        book.closed = true;
        book.jobs.values().for_each(|e| e.cancel());
        let (threads, entries) = (
            std::mem::take(&mut book.threads),
            book.jobs.values().cloned().collect::<Vec<_>>(),
        );
        drop(book);
        for entry in entries.iter().filter(|e| !*e.over.borrow()) {
            tracing::info!(job = entry.id, "waiting for the job to stop");
        }
        for thread in threads.into_values() {
            // A panic in a job was caught; one outside of it has been printed.
            drop(thread.join());
        }
    }

    fn entry(&self, id: u64) -> Result<Arc<Entry>> {
        lock(&self.0).jobs.get(&id).cloned().ok_or_else(|| {
            Error::new(Kind::NotFound, format!("there is no job {id}"))
                .fix(format!("The last {REMEMBERED} that ended are listed"))
        })
    }
}

impl Entry {
    fn new(id: u64, kind: &str, container: &str, what: &str) -> Entry {
        let began = Instant::now();
        Entry {
            id,
            kind: kind.into(),
            container: container.into(),
            what: what.into(),
            started: seconds(SystemTime::now()),
            state: Mutex::new(State {
                state: JobState::Running,
                done: 0,
                total: 0,
                began,
                samples: VecDeque::from([(began, 0)]),
                ended: None,
                message: None,
                resized: None,
                migration: None,
                error: None,
            }),
            changed: Condvar::new(),
            over: watch::Sender::new(false),
        }
    }

    fn cancel(&self) {
        let mut state = lock(&self.state);
        if state.state == JobState::Running {
            state.state = JobState::Cancelling;
            tracing::info!(job = self.id, "job told to stop");
            self.changed.notify_all();
        }
    }

    fn end(&self, came_to: Result<Ended>) {
        let mut state = lock(&self.state);
        let (end, message, error) = match came_to {
            Ok(Ended::Done(text)) => (JobState::Done, Some(text), None),
            Ok(Ended::Paused(text)) => (JobState::Paused, Some(text), None),
            Ok(Ended::Cancelled) => (JobState::Cancelled, None, None),
            Err(e) => (JobState::Failed, None, Some(e)),
        };
        let name = end.name();
        match &error {
            None => tracing::info!(job = self.id, state = name, message, "job ended"),
            Some(e) => tracing::warn!(job = self.id, state = name, error = %e, "job ended"),
        }
        state.state = end;
        state.message = message;
        state.error = error.as_ref().map(Failure::from);
        state.ended = Some((Instant::now(), seconds(SystemTime::now())));
        state.samples = VecDeque::new();
        drop(state);
        self.changed.notify_all();
        self.over.send_replace(true);
    }

    fn job(&self) -> Job {
        let s = lock(&self.state);
        Job {
            id: self.id,
            kind: self.kind.clone(),
            container: self.container.clone(),
            what: self.what.clone(),
            state: s.state,
            done: s.done,
            total: s.total,
            rate: s.rate(Instant::now()),
            started: self.started,
            ended: s.ended.map(|(_, clock)| clock),
            message: s.message.clone(),
            resized: s.resized.clone(),
            migration: s.migration.clone(),
            error: s.error.clone(),
        }
    }
}

impl State {
    fn progress(&mut self, done: u64, total: u64, now: Instant) {
        (self.done, self.total) = (done, total);
        let due = self.samples.back();
        if due.is_none_or(|(at, _)| now.saturating_duration_since(*at) >= SAMPLE_EVERY) {
            if self.samples.len() == SAMPLES {
                self.samples.pop_front();
            }
            self.samples.push_back((now, done));
        }
    }

    /// Bytes per second since the oldest sample; on the whole, when it is over.
    fn rate(&self, now: Instant) -> u64 {
        let oldest = self.samples.front().copied();
        let (from, before) = oldest.unwrap_or((self.began, 0));
        let to = self.ended.map_or(now, |(at, _)| at);
        let time = to.saturating_duration_since(from).as_secs_f64();
        let bytes = self.done.saturating_sub(before) as f64;
        // A float becomes an integer by saturation; 0 bytes in no time are 0.
        if bytes > 0.0 {
            (bytes / time) as u64
        } else {
            0
        }
    }
}

impl JobHandle {
    /// The job's number.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Reports bytes done, and in all.
    pub fn progress(&self, done: u64, total: u64) {
        lock(&self.0.state).progress(done, total, Instant::now());
    }

    /// Says what came out, for programs.
    pub fn resized(&self, resized: Resized) {
        lock(&self.0.state).resized = Some(resized);
    }

    /// Says where a move is.
    pub fn migration(&self, migration: Migration) {
        lock(&self.0.state).migration = Some(migration);
    }

    /// True when the job was told to stop.
    pub fn cancelled(&self) -> bool {
        lock(&self.0.state).state == JobState::Cancelling
    }

    /// Sleeps; returns early when the job is told to stop.
    pub fn sleep(&self, time: Duration) {
        let state = lock(&self.0.state);
        let at_work = |s: &mut State| s.state == JobState::Running;
        drop(self.0.changed.wait_timeout_while(state, time, at_work));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(60);

    fn until_cancelled(job: &JobHandle) -> Result<Ended> {
        while !job.cancelled() {
            job.sleep(LONG);
        }
        Ok(Ended::Paused("in the middle".into()))
    }

    #[test]
    fn a_job_ends_in_what_its_work_came_to() {
        let jobs = Jobs::default();
        let done = |text: &str| Ok(Ended::Done(text.into()));
        let a = jobs
            .start("merge", "ct", "a", move |_| done("freed"))
            .unwrap();
        let b = jobs.start("merge", "ct", "b", |_| Ok(Ended::Cancelled));
        let c = jobs.start("merge", "ct", "c", |_| Err(Error::corrupt("bad").at(7)));
        let d = jobs.start("merge", "ct", "d", |_| panic!("on purpose"));
        let wait = |id| jobs.wait(id, LONG).unwrap();
        let a = wait(a);
        assert_eq!(
            (a.state, a.message.as_deref()),
            (JobState::Done, Some("freed"))
        );
        assert!(a.ended.is_some_and(|ended| ended >= a.started));
        assert_eq!(wait(b.unwrap()).state, JobState::Cancelled);
        let c = wait(c.unwrap());
        assert_eq!(
            (c.state, c.error.unwrap().offset),
            (JobState::Failed, Some(7))
        );
        assert_eq!(wait(d.unwrap()).state, JobState::Failed);
        assert_eq!(jobs.list().len(), 4);
        assert_eq!(jobs.get(99).unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn a_sleeping_job_wakes_to_be_cancelled() {
        let jobs = Jobs::default();
        let id = jobs.start("merge", "ct", "", until_cancelled).unwrap();
        assert_eq!(
            jobs.wait(id, Duration::ZERO).unwrap().state,
            JobState::Running
        );
        let told = jobs.cancel(id).unwrap().state;
        assert!(matches!(told, JobState::Cancelling | JobState::Paused));
        let job = jobs.wait(id, LONG).unwrap();
        assert_eq!(
            (job.state, job.message.as_deref()),
            (JobState::Paused, Some("in the middle"))
        );
        assert_eq!(jobs.cancel(id).unwrap().state, JobState::Paused);
    }

    #[test]
    fn shutting_down_stops_all_and_starts_none() {
        let jobs = Jobs::default();
        for _ in 0..8 {
            jobs.start("merge", "ct", "", until_cancelled).unwrap();
        }
        jobs.shutdown();
        assert!(jobs.list().iter().all(|j| j.state == JobState::Paused));
        let refused = jobs.start("merge", "ct", "", until_cancelled).unwrap_err();
        assert_eq!(refused.kind(), Kind::InUse);
        jobs.shutdown();
    }

    #[test]
    fn the_number_at_work_and_the_number_remembered_are_bounded() {
        let jobs = Jobs::default();
        for _ in 0..REMEMBERED + 10 {
            let id = jobs
                .start("merge", "ct", "", |_| Ok(Ended::Cancelled))
                .unwrap();
            jobs.wait(id, LONG).unwrap();
        }
        let first = jobs.start("merge", "ct", "", until_cancelled).unwrap();
        for _ in 1..AT_WORK {
            jobs.start("merge", "ct", "", until_cancelled).unwrap();
        }
        let refused = jobs.start("merge", "ct", "", until_cancelled).unwrap_err();
        assert_eq!(refused.kind(), Kind::InUse);
        let over = |jobs: &Jobs| jobs.list().iter().filter(|j| j.state.is_over()).count();
        assert_eq!(over(&jobs), REMEMBERED);
        assert!(jobs.get(1).is_err(), "the oldest is forgotten");
        assert_eq!(jobs.get(first).unwrap().state, JobState::Running);
        jobs.cancel(first).unwrap();
        jobs.wait(first, LONG).unwrap();
        jobs.start("merge", "ct", "", until_cancelled).unwrap();
        jobs.shutdown();
    }

    #[test]
    fn progress_is_seen_while_it_is_made() {
        let jobs = Jobs::default();
        let (step, steps) = mpsc::channel::<()>();
        let (seen, reported) = mpsc::channel();
        let id = jobs.start("merge", "ct", "", move |job| {
            for i in 1..=4 {
                job.progress(i << 20, 4 << 20);
                seen.send(()).unwrap();
                steps.recv().unwrap();
            }
            Ok(Ended::Done(String::new()))
        });
        let id = id.unwrap();
        for i in 1..=4 {
            reported.recv().unwrap();
            let job = jobs.get(id).unwrap();
            assert_eq!((job.done, job.total), (i << 20, 4 << 20));
            step.send(()).unwrap();
        }
        let job = jobs.wait(id, LONG).unwrap();
        assert_eq!((job.done, job.state), (4 << 20, JobState::Done));
        assert!(job.rate > 0);
    }

    #[test]
    fn the_rate_is_that_of_late() {
        let entry = Entry::new(1, "merge", "ct", "");
        let mut s = lock(&entry.state);
        let start = s.began;
        let at = |ms: u64| start + Duration::from_millis(ms);
        for i in 1..=10 {
            s.progress(i * 1_000_000, 0, at(i * 1000));
        }
        assert_eq!(s.rate(at(10_000)), 1_000_000);
        for i in 1..=40 {
            s.progress(10_000_000 + i * 50_000, 0, at(10_000 + i * 1000));
        }
        assert_eq!(s.rate(at(50_000)), 50_000);
        assert_eq!(s.rate(at(69_000)), 25_000, "it falls when nothing comes");
        s.ended = Some((at(12_000), 0));
        s.samples.clear();
        assert_eq!(s.rate(at(99_000)), 1_000_000);
    }
}
