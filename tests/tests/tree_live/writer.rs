//! Clients that know what they wrote, and when they were told that it is there.
//!
//! A writer has a region and a connection to itself. It sends batches of requests, numbered from
//! 1, the next when the last is answered; every sector says which batch it is of. So an instant of
//! its region is one number: everything up to batch N, and of batch N + 1 any part.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nbd_server::wire::request::{flag, kind};
use ploop_tests::client::{Ask, Client};
use ploop_tests::fsx::{Link, Rng};

/// Bytes of the unit that is written.
pub(crate) const BLOCK: u64 = 4096;

/// Blocks of a region.
pub(crate) const BLOCKS: u64 = 512;

const SECTOR: usize = 512;
const MAGIC: u64 = 0x7072_6f6f_6620_6f66;

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// What it held before anybody wrote.
    Base,
    Zero,
    /// What this batch wrote.
    Batch(u64),
}

/// Writes `count` blocks from `first`, or makes them zero.
#[derive(Clone, Copy, Debug)]
struct Op {
    first: u64,
    count: u64,
    zero: bool,
}

impl Op {
    fn blocks(self) -> std::ops::Range<usize> {
        self.first as usize..(self.first + self.count) as usize
    }
}

/// What a writer did.
#[derive(Debug)]
pub(crate) struct Log {
    /// Its number, and the first byte of its region.
    pub(crate) writer: u64,
    pub(crate) at: u64,
    base: Vec<u8>,
    batches: Mutex<Vec<Vec<Op>>>,
    /// The last batch that was sent, and the last that was answered.
    sent: AtomicU64,
    answered: AtomicU64,
    /// When each batch was sent, and how long its answers took.
    pub(crate) waits: Mutex<Vec<(Instant, Duration)>>,
    /// The same for flushes.
    pub(crate) flushes: Mutex<Vec<(Instant, Duration)>>,
}

impl Log {
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(SeqCst)
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(SeqCst)
    }

    /// Panics unless `region` is the region at one instant that is not before batch `least` and
    /// not after batch `most`.
    pub(crate) fn check(&self, what: &str, region: &[u8], least: u64, most: u64) {
        let found: Vec<Value> = (0..BLOCKS).map(|b| self.value(what, region, b)).collect();
        let batches = self.batches.lock().unwrap();
        let mut state = vec![Value::Base; BLOCKS as usize];
        let mut closest = (usize::MAX, String::new());
        for n in 0..=most {
            let before = (n > least).then(|| state.clone());
            if n > 0 {
                for op in &batches[n as usize - 1] {
                    let value = if op.zero {
                        Value::Zero
                    } else {
                        Value::Batch(n)
                    };
                    state[op.blocks()].fill(value);
                }
            }
            if n < least {
                continue;
            }
            // Of a batch that is not answered yet any part may be there.
            let wrong = |b: &usize| {
                let old = before.as_ref().map(|s| s[*b]);
                !self.same(found[*b], state[*b], *b)
                    && !old.is_some_and(|o| self.same(found[*b], o, *b))
            };
            let wrong: Vec<usize> = (0..BLOCKS as usize).filter(wrong).collect();
            if wrong.is_empty() {
                return;
            }
            if wrong.len() < closest.0 {
                let show =
                    |b: &usize| format!("\n  block {b}: {:?}, not {:?}", found[*b], state[*b]);
                let shown: String = wrong.iter().take(8).map(show).collect();
                closest = (
                    wrong.len(),
                    format!("batch {n}: {} wrong:{shown}", wrong.len()),
                );
            }
        }
        panic!(
            "{what}, writer {}: no instant from batch {least} to {most}. Closest is {}",
            self.writer, closest.1
        );
    }

    fn same(&self, found: Value, want: Value, block: usize) -> bool {
        let start = block * BLOCK as usize;
        let base_is_zero = || {
            self.base[start..start + BLOCK as usize]
                .iter()
                .all(|b| *b == 0)
        };
        found == want || (want == Value::Base && found == Value::Zero && base_is_zero())
    }

    fn value(&self, what: &str, region: &[u8], block: u64) -> Value {
        let start = (block * BLOCK) as usize;
        let bytes = &region[start..start + BLOCK as usize];
        if bytes.iter().all(|b| *b == 0) {
            return Value::Zero;
        }
        if bytes == &self.base[start..start + BLOCK as usize] {
            return Value::Base;
        }
        let batch = u64::from_le_bytes(*bytes[8..].first_chunk().unwrap());
        assert!(
            bytes == stamp(self.writer, batch, block),
            "{what}: block {block} of writer {} is nothing that it wrote; {batch:#x}?",
            self.writer
        );
        Value::Batch(batch)
    }
}

/// What a batch writes to a block.
fn stamp(writer: u64, batch: u64, block: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK as usize];
    for (i, sector) in bytes.chunks_mut(SECTOR).enumerate() {
        let mut rng = Rng(MAGIC ^ (writer << 56) ^ (batch << 20) ^ (block << 4) ^ i as u64);
        rng.fill(sector);
        for (at, word) in [MAGIC, batch, writer, block, i as u64].iter().enumerate() {
            sector[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

/// A writer at work.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) log: Arc<Log>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Client>,
}

impl Writer {
    /// Starts one on its own connection. Whatever is no success ends it with a panic.
    pub(crate) fn start(mut client: Client, writer: u64, at: u64) -> Writer {
        let log = Arc::new(Log {
            writer,
            at,
            base: client.read(at, BLOCK * BLOCKS),
            batches: Mutex::default(),
            sent: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            waits: Mutex::default(),
            flushes: Mutex::default(),
        });
        let stop = Arc::new(AtomicBool::new(false));
        let (its_log, its_stop) = (log.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut rng = Rng(writer + 1);
            while !its_stop.load(SeqCst) {
                turn(&mut client, &its_log, &mut rng);
            }
            client
        });
        Writer { log, stop, thread }
    }

    /// False when it has met an error.
    pub(crate) fn is_well(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Ends it; its connection.
    pub(crate) fn stop(self) -> (Arc<Log>, Client) {
        self.stop.store(true, SeqCst);
        (self.log, self.thread.join().unwrap())
    }
}

/// One batch, and now and then a flush.
fn turn(client: &mut Client, log: &Log, rng: &mut Rng) {
    if rng.once_in(50) {
        let start = Instant::now();
        client.flush();
        log.flushes.lock().unwrap().push((start, start.elapsed()));
    }
    let ops = choose(rng);
    let batch = log.sent() + 1;
    let asks: Vec<Ask> = ops.iter().map(|op| ask(log, batch, *op, rng)).collect();
    log.batches.lock().unwrap().push(ops);
    log.sent.store(batch, SeqCst);
    let start = Instant::now();
    for (reply, ask) in client.exchange(&asks).iter().zip(&asks) {
        assert_eq!(reply.error, 0, "{ask:?}: {}", reply.text);
    }
    log.waits.lock().unwrap().push((start, start.elapsed()));
    log.answered.store(batch, SeqCst);
    // A disk that is never idle says nothing about who waits for whom.
    std::thread::sleep(Duration::from_micros(rng.below(3000)));
}

fn ask(log: &Log, batch: u64, op: Op, rng: &mut Rng) -> Ask {
    let at = log.at + op.first * BLOCK;
    let flags = if rng.once_in(200) { flag::FUA } else { 0 };
    if op.zero {
        let no_hole = if rng.once_in(2) { flag::NO_HOLE } else { 0 };
        return Ask::new(
            kind::WRITE_ZEROES,
            flags | no_hole,
            at..at + op.count * BLOCK,
        );
    }
    let blocks = op.first..op.first + op.count;
    let data: Vec<u8> = blocks.flat_map(|b| stamp(log.writer, batch, b)).collect();
    Ask::write(flags, at, &data)
}

/// One to four requests that do not touch each other: most small, some over several clusters.
fn choose(rng: &mut Rng) -> Vec<Op> {
    let mut ops: Vec<Op> = Vec::new();
    for _ in 0..=rng.below(4) {
        let count = match rng.below(16) {
            0 => 1 + rng.below(40),
            1..4 => 1 + rng.below(4),
            _ => 1,
        };
        let first = rng.below(BLOCKS - count);
        let zero = rng.once_in(12);
        let apart = |o: &Op| o.first + o.count <= first || first + count <= o.first;
        if ops.iter().all(apart) {
            ops.push(Op { first, count, zero });
        }
    }
    ops
}
