//! What one connection has at the pool. Its work queues up for a thread once for each job, behind
//! that of others; the pool goes on with it while the connection waits for its client.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::jobs::{Answer, Job};
use super::mailbox::Mailbox;
use super::pool::Hands;
use super::work::Site;

/// Those of one connection that are at the pool at once; a quarter of its threads.
pub(super) const AT_POOL: usize = 16;

/// What the pool says: `None` for work that panicked.
pub(super) type Word = Option<Answer>;

/// See the module text.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) mailbox: Mailbox<Word>,
    jobs: Mutex<Jobs>,
    /// No more work is at the pool.
    idle: Condvar,
}

#[derive(Debug, Default)]
struct Jobs {
    queue: VecDeque<Job>,
    /// Places at the pool that are taken; at most [`AT_POOL`].
    places: usize,
}

impl Line {
    pub(super) fn new() -> io::Result<Line> {
        Ok(Line {
            mailbox: Mailbox::new()?,
            jobs: Mutex::default(),
            idle: Condvar::new(),
        })
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        // Nothing panics while it is held.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a job behind the others of this connection.
    pub(super) fn add(self: &Arc<Line>, job: Job, site: &Arc<Site>, hands: &Hands) {
        let mut jobs = self.jobs();
        jobs.queue.push_back(job);
        if jobs.places == AT_POOL {
            return;
        }
        jobs.places += 1;
        drop(jobs);
        let place = Place {
            line: self.clone(),
            site: Some(site.clone()),
            hands: hands.clone(),
            left: false,
        };
        // Without a thread it is done here, and holds up what could have gone ahead.
        if let Err(work) = hands.run(Box::new(move || place.work())) {
            work();
        }
    }

    /// Forgets what has not begun, and waits until the pool has nothing of this connection.
    pub(super) fn end(&self) {
        let forgotten = std::mem::take(&mut self.jobs().queue);
        drop(forgotten);
        let mut jobs = self.jobs();
        while jobs.places > 0 {
            jobs = self.idle.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One place at the pool. Given back when dropped; what it holds of the device goes before.
struct Place {
    line: Arc<Line>,
    site: Option<Arc<Site>>,
    hands: Hands,
    /// It was given back.
    left: bool,
}

impl Place {
    /// Does one job, then queues up for the next.
    fn work(mut self) {
        let Some(job) = self.next() else { return };
        let Some(site) = self.site.clone() else {
            return;
        };
        let mut ticket = Ticket(self.line.clone(), None);
        ticket.1 = Some(job.execute(&site));
        drop(site);
        drop(ticket);
        let hands = self.hands.clone();
        if !self.is_over()
            && let Err(work) = hands.run(Box::new(move || self.work()))
        {
            work();
        }
    }

    /// The next job. Without one the place is given back in the same instant: a job that comes then
    /// finds it free.
    fn next(&mut self) -> Option<Job> {
        let mut jobs = self.line.jobs();
        let job = jobs.queue.pop_front();
        if job.is_none() {
            (self.site, self.left) = (None, true);
            jobs.places -= 1;
            self.line.idle.notify_all();
        }
        job
    }

    /// True, and the place given back, when there is no further job.
    fn is_over(&mut self) -> bool {
        let mut jobs = self.line.jobs();
        if jobs.queue.is_empty() {
            (self.site, self.left) = (None, true);
            jobs.places -= 1;
            self.line.idle.notify_all();
        }
        self.left
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.left {
            self.site = None;
            self.line.jobs().places -= 1;
            self.line.idle.notify_all();
        }
    }
}

/// Tells the connection, whatever becomes of the work.
struct Ticket(Arc<Line>, Word);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.mailbox.post(self.1.take());
    }
}
