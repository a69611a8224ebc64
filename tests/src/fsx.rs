//! Random operations through NBD against a model: the guest's bytes in a vector.
//!
//! ```text
//!  Fsx ── batch of requests ──▶ Link ─┬─ Engine          in this process, bytes in and out
//!   │ ◀──────── replies ──────────────┴─ Client (client.rs) a socket of a real server
//!   └─ model: what every byte must be
//! ```
//!
//! The ranges of one batch do not overlap, so the model holds in whatever order they are executed.
//! A discarded byte reads as it did or as zero: the model keeps it open until it is seen.
//!
//! `PLOOP_SEED` and `PLOOP_OPS` repeat a run; the seed and the last operations are printed when one
//! fails.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use nbd_server::serve::engine::{Engine, Turn};
use nbd_server::session::transmission::Rules;
use nbd_server::wire::chunk::{Extent, state};
use nbd_server::wire::errno;
use nbd_server::wire::reply::Style;
use nbd_server::wire::request::{flag, kind};
use ploop::device::Device;

use crate::client::{Ask, Reply, read_replies};

pub use ploop_fuzz::rng::Rng;

/// A number from the environment, or `default`.
pub fn env(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(v) => v.parse().unwrap_or_else(|e| panic!("{name}={v}: {e}")),
        Err(_) => default,
    }
}

/// Something that executes requests and answers all of them, in any order.
pub trait Link: Debug {
    /// Headers and replies.
    fn style(&self) -> Style;
    /// Sends the requests, returns their answers in the order of the requests.
    fn exchange(&mut self, asks: &[Ask]) -> Vec<Reply>;
}

/// The server's engine, without a socket. Its input arrives in random pieces.
#[derive(Debug)]
pub struct InProcess {
    engine: Engine,
    style: Style,
    cuts: Rng,
}

impl InProcess {
    /// A session on `device`.
    pub fn new(device: Arc<dyn Device>, style: Style, seed: u64) -> InProcess {
        let rules = Rules::over(device.as_ref(), style);
        InProcess {
            engine: Engine::new(device, rules),
            style,
            cuts: Rng(seed),
        }
    }
}

impl Link for InProcess {
    fn style(&self) -> Style {
        self.style
    }

    fn exchange(&mut self, asks: &[Ask]) -> Vec<Reply> {
        let mut input = Vec::new();
        for (cookie, ask) in asks.iter().enumerate() {
            ask.emit(self.style, cookie as u64, &mut input);
        }
        let cut = match self.cuts.once_in(4) {
            true => self.cuts.below(input.len() as u64) as usize,
            false => input.len(),
        };
        let mut output = Vec::new();
        let (used, turn) = self.engine.run(&input[..cut], &mut output).unwrap();
        assert!(matches!(turn, Turn::NeedMore(_)), "{turn:?}");
        if used < input.len() {
            let (rest, turn) = self.engine.run(&input[used..], &mut output).unwrap();
            assert_eq!(
                (used + rest, turn),
                (input.len(), Turn::NeedMore(turn_min(self.style)))
            );
        }
        let mut rest = output.as_slice();
        let replies = read_replies(&mut rest, asks).unwrap();
        assert!(rest.is_empty(), "{} bytes after the answers", rest.len());
        replies
    }
}

/// What an engine wants when it has nothing: a header.
fn turn_min(style: Style) -> usize {
    nbd_server::wire::request::Request::header_len(style)
}

/// The model and the chooser of operations.
#[derive(Debug)]
pub struct Fsx {
    rng: Rng,
    seed: u64,
    cluster: u64,
    /// What every byte is.
    pub model: Vec<u8>,
    /// Bytes that may have become zero.
    open: Vec<bool>,
    /// Operations done.
    pub done: u64,
    last: VecDeque<String>,
}

/// Operations kept for the report of a failure.
const LAST: usize = 24;
/// Requests in a batch, at most, and the bytes of their data: what a socket's buffers hold.
const BATCH: u64 = 8;
const BATCH_BYTES: u64 = 64 << 10;

impl Fsx {
    /// A model of a disk whose bytes are `model`, with clusters of `cluster` bytes.
    pub fn new(seed: u64, model: Vec<u8>, cluster: u64) -> Fsx {
        let open = vec![false; model.len()];
        Fsx {
            rng: Rng(seed),
            seed,
            cluster,
            model,
            open,
            done: 0,
            last: VecDeque::new(),
        }
    }

    /// The source of randomness, for what happens between operations.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// A batch of random operations, all answers checked.
    pub fn step(&mut self, link: &mut dyn Link) {
        let mut asks: Vec<Ask> = Vec::new();
        let (wanted, mut bytes) = (1 + self.rng.below(BATCH), 0);
        while (asks.len() as u64) < wanted {
            let ask = self.choose(link.style());
            bytes += ask.range.end - ask.range.start;
            let clash = asks.iter().any(|a| overlap(&a.range, &ask.range));
            let full = bytes > BATCH_BYTES && !asks.is_empty();
            if clash || full {
                break;
            }
            asks.push(ask);
        }
        self.run(link, &asks);
    }

    /// Executes `asks`, whose ranges do not overlap, and checks the answers.
    pub fn run(&mut self, link: &mut dyn Link, asks: &[Ask]) {
        for ask in asks {
            if self.last.len() == LAST {
                self.last.pop_front();
            }
            self.last.push_back(format!("{} {ask:?}", self.done));
            self.done += 1;
        }
        let replies = link.exchange(asks);
        for (ask, reply) in asks.iter().zip(&replies) {
            self.judge(ask, reply);
        }
    }

    /// Reads the whole disk.
    pub fn check_all(&mut self, link: &mut dyn Link) {
        let size = self.model.len() as u64;
        let mut at = 0;
        while at < size {
            let end = size.min(at + (1 << 20));
            self.run(link, &[Ask::new(kind::READ, 0, at..end)]);
            at = end;
        }
    }

    fn choose(&mut self, style: Style) -> Ask {
        let size = self.model.len() as u64;
        if self.rng.once_in(200) {
            return self.choose_outside();
        }
        let at = self.rng.below(size);
        let len = 1 + match self.rng.below(16) {
            0..=4 => self.rng.below(600),
            5..=12 => self.rng.below(8 << 10),
            13 | 14 => self.rng.below(self.cluster),
            _ => self.rng.below(3 * self.cluster),
        };
        let range = match self.rng.below(8) {
            0..=3 => at..at + len,
            4..=6 => at / 512 * 512..at / 512 * 512 + len.next_multiple_of(512),
            _ => at / self.cluster * self.cluster..(at + len).next_multiple_of(self.cluster),
        };
        let range = range.start..range.end.min(size);
        let fua = if self.rng.once_in(16) { flag::FUA } else { 0 };
        match self.rng.below(20) {
            0..=6 => self.write(range, fua),
            7..=11 => {
                let df = style != Style::Simple && self.rng.once_in(2);
                Ask::new(kind::READ, if df { flag::DF } else { 0 }, range)
            }
            12..=13 => Ask::new(kind::TRIM, fua, range),
            14..=16 => {
                let no_hole = if self.rng.once_in(2) {
                    flag::NO_HOLE
                } else {
                    0
                };
                let fast = if self.rng.once_in(3) {
                    flag::FAST_ZERO
                } else {
                    0
                };
                Ask::new(kind::WRITE_ZEROES, fua | no_hole | fast, range)
            }
            17 if self.rng.once_in(2) => Ask::new(kind::FLUSH, 0, 0..0),
            17 => Ask::new(kind::CACHE, 0, range),
            _ if style == Style::Simple => Ask::new(kind::READ, 0, range),
            _ => {
                let one = if self.rng.once_in(2) {
                    flag::REQ_ONE
                } else {
                    0
                };
                Ask::new(kind::BLOCK_STATUS, one, range)
            }
        }
    }

    fn write(&mut self, range: Range<u64>, flags: u16) -> Ask {
        let mut data = vec![0; (range.end - range.start) as usize];
        self.rng.fill(&mut data);
        Ask {
            data,
            ..Ask::new(kind::WRITE, flags, range)
        }
    }

    /// A request that ends past the end.
    fn choose_outside(&mut self) -> Ask {
        let size = self.model.len() as u64;
        let start = size - self.rng.below(2) * self.rng.below(512);
        let range = start..size + 1 + self.rng.below(4096);
        match self.rng.below(4) {
            0 => self.write(range, 0),
            1 => Ask::new(kind::READ, 0, range),
            2 => Ask::new(kind::TRIM, 0, range),
            _ => Ask::new(kind::WRITE_ZEROES, 0, range),
        }
    }

    fn judge(&mut self, ask: &Ask, reply: &Reply) {
        if ask.range.end > self.model.len() as u64 {
            let extends = matches!(ask.kind, kind::WRITE | kind::WRITE_ZEROES);
            let expect = if extends {
                errno::ENOSPC
            } else {
                errno::EINVAL
            };
            assert_eq!(reply.error, expect, "{ask:?} past the end");
            return;
        }
        if ask.kind == kind::WRITE_ZEROES
            && ask.flags & flag::FAST_ZERO != 0
            && reply.error == errno::ENOTSUP
        {
            return;
        }
        assert_eq!(reply.error, 0, "{ask:?}: {}", reply.text);
        let range = ask.range.start as usize..ask.range.end as usize;
        match ask.kind {
            kind::WRITE => {
                self.model[range.clone()].copy_from_slice(&ask.data);
                self.open[range].fill(false);
            }
            kind::WRITE_ZEROES => {
                self.model[range.clone()].fill(0);
                self.open[range].fill(false);
            }
            kind::TRIM => self.open[range].fill(true),
            kind::READ => self.judge_read(range, &reply.data(&ask.range)),
            kind::BLOCK_STATUS => self.judge_status(ask, &reply.extents),
            _ => {}
        }
    }

    fn judge_read(&mut self, range: Range<usize>, got: &[u8]) {
        if got != &self.model[range.clone()] {
            for (i, &byte) in range.clone().zip(got) {
                let right = byte == self.model[i] || (self.open[i] && byte == 0);
                let want = self.model[i];
                assert!(
                    right,
                    "byte {i} is {byte:#x}, was {want:#x} (open {})",
                    self.open[i]
                );
                self.model[i] = byte;
            }
        }
        self.open[range].fill(false);
    }

    fn judge_status(&mut self, ask: &Ask, extents: &[Extent]) {
        let length = ask.range.end - ask.range.start;
        let total: u64 = extents.iter().map(|e| e.len).sum();
        assert!(!extents.is_empty() && total <= length && extents.iter().all(|e| e.len > 0));
        if ask.flags & flag::REQ_ONE != 0 {
            assert_eq!(extents.len(), 1);
        } else {
            assert_eq!(total, length, "a small range is described whole");
        }
        assert!(
            extents.windows(2).all(|w| w[0].flags != w[1].flags),
            "{extents:?}"
        );
        let mut at = ask.range.start as usize;
        for e in extents {
            let range = at..at + e.len as usize;
            at = range.end;
            if e.flags & (state::ZERO | state::HOLE) != 0 {
                self.judge_read(range.clone(), &vec![0; range.len()]);
            }
        }
    }
}

impl Drop for Fsx {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!(
                "PLOOP_SEED={} repeats this run; its last operations:",
                self.seed
            );
            self.last.iter().for_each(|op| println!("  {op}"));
        }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
