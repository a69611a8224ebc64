//! What is deferred, and what becomes of it.

use std::ops::Range;

use ploop::device::{ReadLease, Segment};

use super::read::{Ask, Planned, Stop, Waiting};
use super::work::{Scratch, Site};
use crate::session::Output;
use crate::session::transmission::Command;

/// Something for the pool.
#[derive(Debug)]
pub(super) enum Job {
    Read(ReadJob),
    Command(Command),
}

/// One piece of a READ.
#[derive(Debug)]
pub(super) struct ReadJob {
    pub(super) ask: Ask,
    pub(super) piece: Range<u64>,
    /// None when the ring has it.
    pub(super) lease: Option<ReadLease>,
    pub(super) segments: Vec<Segment>,
}

/// What became of a request.
#[derive(Debug)]
pub(super) struct Answer {
    /// What is to be sent.
    pub(super) out: Output,
    /// A READ that goes on from there.
    pub(super) more: Option<(Ask, u64)>,
    /// The bytes that it was counted with.
    pub(super) bytes: u64,
    /// A command that the host had no room for: not answered, to be tried again.
    pub(super) again: Option<Command>,
}

impl ReadJob {
    fn bytes(&self) -> u64 {
        self.piece.end - self.piece.start
    }

    /// The answer when `out` holds all of the piece.
    pub(super) fn answer(self, out: Output) -> Answer {
        let (bytes, at) = (self.bytes(), self.piece.end);
        Answer {
            out,
            more: (at < self.ask.range.end).then_some((self.ask, at)),
            bytes,
            again: None,
        }
    }

    /// Reads the piece on this thread.
    fn read(mut self) -> Answer {
        let (mut out, mut hole) = (Output::new(), 0..0);
        let Some(lease) = self.lease.take() else {
            return self.answer(out);
        };
        let ask = &self.ask;
        let put = ask.put(&lease, &self.segments, &mut Waiting, &mut hole, &mut out);
        drop(lease);
        ask.end_hole(&mut hole, &mut out);
        match put {
            Ok(()) | Err(Stop::NotNow) => self.answer(out),
            Err(Stop::Failed(e, at)) => {
                ask.fail(&e, at, &mut out);
                Answer {
                    bytes: self.bytes(),
                    more: None,
                    again: None,
                    out,
                }
            }
        }
    }

    /// The answer as it will be, with the bytes missing that are to be read; `None` when it is not
    /// that simple.
    pub(super) fn plan(&self, lease: &ReadLease) -> Option<(Output, Planned)> {
        let (mut out, mut hole, mut plan) = (Output::new(), 0..0, Planned::default());
        let put = self
            .ask
            .put(lease, &self.segments, &mut plan, &mut hole, &mut out);
        put.is_ok().then(|| {
            self.ask.end_hole(&mut hole, &mut out);
            (out, plan)
        })
    }
}

impl Job {
    pub(super) fn execute(self, site: &Site) -> Answer {
        match self {
            Job::Read(job) => job.read(),
            Job::Command(command) => {
                let mut out = Output::new();
                let waits = site.waits();
                let refused = site.perform(&command, waits, &mut Scratch::default(), &mut out);
                Answer {
                    out,
                    more: None,
                    bytes: 0,
                    again: refused.map(|_| command),
                }
            }
        }
    }
}
