//! The oracle: what was asked of a disk, and so which values each sector may have after a crash.
//!
//! The history puts marks into the recording store's log: an operation was begun, answered, failed.
//! A *durable* operation is one that was answered before a flush was begun that was answered too
//! (or, with FUA, was answered itself), by the same process. A sector may hold
//!
//! * the value of any operation on it that was begun, answered or not, and the initial one;
//! * but none that ended before a durable operation on that sector was begun.
//!
//! That is promises 1 and 2, for any number of threads.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use ploop::store::recording::RecordingStore;

/// Values of all sectors of a disk.
pub type Words = Arc<Vec<u64>>;

/// The number that operation `id` writes to `sector`. Never 0, and no two are equal.
pub fn word(id: u64, sector: u64) -> u64 {
    id << 32 | (sector + 1) << 8 | 0xA5
}

/// The bytes of a write of operation `id` to `sectors`.
pub fn payload(id: u64, sectors: Range<u64>) -> Vec<u8> {
    sectors
        .flat_map(|s| word(id, s).to_le_bytes().repeat(64))
        .collect()
}

/// "Operation" that wrote the base of a fixture.
pub const BASE: u64 = 0xFFFF_0001;
/// "Operation" that wrote the start image of a fixture.
pub const START: u64 = 0xFFFF_0002;
/// "Operation" that wrote what no table entry of a fixture names.
pub const JUNK: u64 = 0xFFFF_0003;

/// For people: who wrote a value.
pub fn name_of(value: u64) -> String {
    if value == 0 {
        return "zeros".into();
    }
    let sector = (value >> 8 & 0xFF_FFFF).wrapping_sub(1);
    match value >> 32 {
        _ if value & 0xFF != 0xA5 => format!("{value:#x}, which nobody wrote"),
        BASE => format!("the base's sector {sector}"),
        START => format!("the start image's sector {sector}"),
        JUNK => format!("a leftover that nothing names ({sector})"),
        id => format!("what operation {id} wrote to sector {sector}"),
    }
}

/// One thing that was asked.
#[derive(Clone, Debug)]
pub enum Asked {
    /// Its own word in each sector.
    Write(Range<u64>),
    /// Zeros in each sector.
    Zero(Range<u64>),
    /// Each sector as it was, or zeros. Which of them became zeros is known only to who looks
    /// ([`History::saw_discard`]); then they count as written.
    Discard(Range<u64>),
    /// Everything answered before becomes durable.
    Flush,
    /// The same; then the image is closed with this content, where it is known.
    Close(Option<Words>),
    /// The process ended without closing: its later flushes never come.
    Death,
    /// A new process read all of the disk: what it saw is as good as written.
    Seen(Words),
}

#[derive(Clone, Debug)]
struct Op {
    asked: Asked,
    fua: bool,
    zeroed: Option<Vec<u64>>,
}

const BEGIN: u64 = 0;
const OK: u64 = 1;
const FAILED: u64 = 2;
const KINDS: u64 = 4;

/// See the module text. Shared by the threads of a run.
#[derive(Debug)]
pub struct History {
    store: RecordingStore,
    initial: Words,
    closed_at_start: bool,
    ops: Mutex<Vec<Op>>,
}

/// What is allowed at one point.
#[derive(Clone, Debug)]
pub struct View {
    /// For each sector the allowed values.
    pub allowed: Vec<Vec<u64>>,
    /// An image that says that it is closed has one of these contents. `None`: not known.
    pub closed_contents: Option<Vec<Words>>,
    /// The image was closed, and that was answered, and nothing was changed since.
    pub must_be_closed: bool,
}

/// When an operation began and ended, in the order of marks.
#[derive(Clone, Copy, Debug)]
struct Span {
    begin: usize,
    end: usize,
    ok: bool,
}

impl History {
    /// A history of the disk in `store`, which now reads `initial`.
    pub fn new(store: &RecordingStore, initial: Words, closed_at_start: bool) -> History {
        // Operation 0 is the start image's own content.
        let first = Op {
            asked: Asked::Flush,
            fua: false,
            zeroed: None,
        };
        let ops = Mutex::new(vec![first]);
        History {
            store: store.clone(),
            initial,
            closed_at_start,
            ops,
        }
    }

    /// An operation is begun; returns its number.
    pub fn begin(&self, asked: Asked, fua: bool) -> u64 {
        let mut ops = self.ops.lock().unwrap();
        let id = ops.len() as u64;
        ops.push(Op {
            asked,
            fua,
            zeroed: None,
        });
        self.store.mark(id * KINDS + BEGIN);
        id
    }

    /// It was answered: success.
    pub fn ok(&self, id: u64) {
        self.store.mark(id * KINDS + OK);
    }

    /// It was answered: failure.
    pub fn failed(&self, id: u64) {
        self.store.mark(id * KINDS + FAILED);
    }

    /// An answered discard made exactly these sectors zeros.
    pub fn saw_discard(&self, id: u64, zeroed: Vec<u64>) {
        self.ops.lock().unwrap()[id as usize].zeroed = Some(zeroed);
    }

    /// The points at which the most is promised: those of the store, and between marks wherever
    /// something was just answered and the next thing is not yet begun. Every other point has the
    /// same states as one of these, and allows no less.
    pub fn points(&self) -> Vec<usize> {
        let kind = |line: &String| {
            let mark: u64 = line.strip_prefix("mark ")?.parse().ok()?;
            Some(mark % KINDS)
        };
        let marks: Vec<Option<u64>> = self.store.log().iter().map(kind).collect();
        let strict = |&point: &usize| {
            let before = point.checked_sub(1).and_then(|p| marks[p]);
            let after = marks.get(point).copied().flatten();
            before != Some(BEGIN) && after.is_none_or(|kind| kind == BEGIN)
        };
        (0..=marks.len()).filter(strict).collect()
    }

    /// The process ends without closing.
    pub fn death(&self) {
        let id = self.begin(Asked::Death, false);
        self.ok(id);
    }

    /// What was asked, a line each, for the report of a violation.
    pub fn lines(&self) -> Vec<String> {
        let ops = self.ops.lock().unwrap();
        let line = |(id, op): (usize, &Op)| {
            let fua = if op.fua { " FUA" } else { "" };
            match &op.asked {
                Asked::Close(_) => format!("operation {id}: close"),
                Asked::Death => format!("operation {id}: the process ends"),
                Asked::Seen(_) => format!("operation {id}: read by a new process"),
                asked => format!("operation {id}: {asked:?}{fua}"),
            }
        };
        ops.iter().enumerate().skip(1).map(line).collect()
    }

    fn spans(&self, point: usize, count: usize) -> Vec<Option<Span>> {
        let mut spans = vec![None; count];
        for (at, mark) in self.store.marks_before(point).into_iter().enumerate() {
            let slot: &mut Option<Span> = &mut spans[(mark / KINDS) as usize];
            match (mark % KINDS, slot) {
                (BEGIN, slot) => {
                    *slot = Some(Span {
                        begin: at,
                        end: usize::MAX,
                        ok: false,
                    })
                }
                (kind, Some(span)) => (span.end, span.ok) = (at, kind == OK),
                (_, None) => panic!("mark {mark} ends what never began"),
            }
        }
        spans
    }

    /// What is allowed when the power is cut at `point`.
    pub fn view(&self, point: usize) -> View {
        let ops = self.ops.lock().unwrap();
        let spans = self.spans(point, ops.len());
        let begun = || {
            ops.iter()
                .enumerate()
                .filter_map(|(id, op)| Some((id, op, spans[id]?)))
        };
        let flush = |op: &Op, s: &Span| s.ok && matches!(op.asked, Asked::Flush | Asked::Close(_));
        let flushes: Vec<usize> = begun()
            .filter(|(_, op, s)| flush(op, s))
            .map(|(_, _, s)| s.begin)
            .collect();
        let deaths: Vec<usize> = begun()
            .filter(|(_, op, _)| matches!(op.asked, Asked::Death))
            .map(|(.., s)| s.begin)
            .collect();
        let flushed = |s: &Span| {
            let death = deaths
                .iter()
                .find(|&&d| d > s.end)
                .copied()
                .unwrap_or(usize::MAX);
            flushes.iter().any(|&f| s.end < f && f < death)
        };
        let durable = |op: &Op, s: &Span| {
            s.ok && (op.fua && !matches!(op.asked, Asked::Discard(_)) || flushed(s))
        };

        // Per sector: the begin of the last durable operation, then what did not end before it.
        let mut since: Vec<Option<usize>> = vec![None; self.initial.len()];
        for (id, op, span) in begun().filter(|(_, op, s)| durable(op, s)) {
            for (sector, _) in self.effect(id, op, &span, true) {
                let since = &mut since[sector as usize];
                *since = (*since).max(Some(span.begin));
            }
        }
        let mut allowed: Vec<Vec<u64>> = (self.initial.iter().zip(&since))
            .map(|(word, since)| if since.is_none() { vec![*word] } else { vec![] })
            .collect();
        for (id, op, span) in begun() {
            for (sector, word) in self.effect(id, op, &span, false) {
                let list = &mut allowed[sector as usize];
                if since[sector as usize].is_none_or(|since| span.end >= since)
                    && !list.contains(&word)
                {
                    list.push(word);
                }
            }
        }
        let (closed_contents, must_be_closed) = self.closes(&ops, &spans);
        View {
            allowed,
            closed_contents,
            must_be_closed,
        }
    }

    /// What each sector has had or may have got up to `point`, flushed or not.
    pub fn ever(&self, point: usize) -> Vec<Vec<u64>> {
        let ops = self.ops.lock().unwrap();
        let spans = self.spans(point, ops.len());
        let mut ever: Vec<Vec<u64>> = self.initial.iter().map(|word| vec![*word]).collect();
        for (id, (op, span)) in ops.iter().zip(spans).enumerate() {
            for (sector, word) in span.map_or_else(Vec::new, |s| self.effect(id, op, &s, false)) {
                ever[sector as usize].push(word);
            }
        }
        ever
    }

    /// The sectors that an operation changes and their values: all possible ones, or only those
    /// that it changed for certain.
    fn effect(&self, id: usize, op: &Op, span: &Span, certain: bool) -> Vec<(u64, u64)> {
        match &op.asked {
            Asked::Write(sectors) => sectors.clone().map(|s| (s, word(id as u64, s))).collect(),
            Asked::Zero(sectors) => sectors.clone().map(|s| (s, 0)).collect(),
            Asked::Discard(sectors) => match &op.zeroed {
                Some(zeroed) if span.ok => zeroed.iter().map(|&s| (s, 0)).collect(),
                _ if certain => Vec::new(),
                _ => sectors.clone().map(|s| (s, 0)).collect(),
            },
            Asked::Seen(words) => (0..).zip(words.iter().copied()).collect(),
            Asked::Flush | Asked::Close(_) | Asked::Death => Vec::new(),
        }
    }

    fn closes(&self, ops: &[Op], spans: &[Option<Span>]) -> (Option<Vec<Words>>, bool) {
        let mut contents = Some(vec![self.initial.clone()]);
        // A close that failed may have closed all the same, as far as the next process can see;
        // that one then has nothing to do, and after a crash the mark may be back: no harm.
        let (mut closed, mut changed) = (self.closed_at_start, !self.closed_at_start);
        for (op, span) in ops.iter().zip(spans) {
            let Some(span) = span else { continue };
            match &op.asked {
                Asked::Close(words) => {
                    closed = span.ok && (closed || changed);
                    changed = false;
                    if span.ok {
                        contents = Some(Vec::new());
                    }
                    contents = contents.zip(words.clone()).map(|(mut contents, words)| {
                        contents.push(words);
                        contents
                    });
                }
                Asked::Write(_) | Asked::Zero(_) | Asked::Discard(_) => {
                    (closed, changed) = (false, true);
                }
                Asked::Flush | Asked::Seen(_) | Asked::Death => {}
            }
        }
        (contents, closed)
    }
}

impl View {
    /// The first sector of `words` that is not allowed.
    pub fn check(&self, words: &[u64]) -> Result<(), String> {
        for (sector, (word, allowed)) in words.iter().zip(&self.allowed).enumerate() {
            if !allowed.contains(word) {
                let names: Vec<_> = allowed.iter().map(|w| name_of(*w)).collect();
                return Err(format!(
                    "sector {sector} (cluster {}) holds {}, allowed: {}",
                    sector as u64 / super::CLUSTER_SECTORS,
                    name_of(*word),
                    names.join("; ")
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> (RecordingStore, History) {
        let store = RecordingStore::new();
        let history = History::new(&store, Arc::new(vec![0; 4]), true);
        (store, history)
    }

    #[test]
    fn only_a_flush_that_began_after_the_answer_makes_a_write_durable() {
        let (_, h) = history();
        let a = h.begin(Asked::Write(0..2), false);
        let early = h.begin(Asked::Flush, false);
        h.ok(a);
        h.ok(early);
        assert_eq!(h.view(usize::MAX).allowed[0], [0, word(a, 0)]);
        let late = h.begin(Asked::Flush, false);
        assert_eq!(h.view(usize::MAX).allowed[0].len(), 2, "not answered yet");
        h.ok(late);
        assert_eq!(h.view(usize::MAX).allowed[1], [word(a, 1)]);
        assert_eq!(h.view(usize::MAX).allowed[2], [0]);
    }

    #[test]
    fn the_flush_of_another_process_covers_only_what_that_one_saw() {
        let (_, h) = history();
        h.ok(h.begin(Asked::Write(0..1), false));
        h.death();
        h.ok(h.begin(Asked::Flush, false));
        assert_eq!(h.view(usize::MAX).allowed[0].len(), 2);
        h.ok(h.begin(Asked::Seen(Arc::new(vec![0; 4])), false));
        h.ok(h.begin(Asked::Flush, false));
        assert_eq!(h.view(usize::MAX).allowed[0], [0]);
    }

    #[test]
    fn what_overlaps_a_durable_write_in_time_stays_possible() {
        let (_, h) = history();
        let a = h.begin(Asked::Write(0..1), false);
        let b = h.begin(Asked::Write(0..1), true);
        h.ok(b);
        h.ok(a);
        let mut got = h.view(usize::MAX).allowed[0].clone();
        got.sort_unstable();
        assert_eq!(got, [word(a, 0), word(b, 0)]);
        let c = h.begin(Asked::Zero(0..1), true);
        h.ok(c);
        assert_eq!(h.view(usize::MAX).allowed[0], [0]);
    }

    #[test]
    fn a_discard_is_a_maybe_until_somebody_looks() {
        let (_, h) = history();
        let a = h.begin(Asked::Write(0..2), true);
        h.ok(a);
        let d = h.begin(Asked::Discard(0..2), true);
        h.ok(d);
        assert_eq!(h.view(usize::MAX).allowed[0], [word(a, 0), 0]);
        h.saw_discard(d, vec![1]);
        assert_eq!(h.view(usize::MAX).allowed[0], [word(a, 0)]);
        let f = h.begin(Asked::Flush, false);
        h.ok(f);
        assert_eq!(h.view(usize::MAX).allowed[1], [0]);
    }

    #[test]
    fn a_closed_image_vouches_for_the_content_of_its_close() {
        let (_, h) = history();
        assert!(h.view(usize::MAX).must_be_closed);
        let a = h.begin(Asked::Write(0..1), false);
        h.failed(a);
        assert!(!h.view(usize::MAX).must_be_closed);
        let content = Arc::new(vec![word(a, 0), 0, 0, 0]);
        let c = h.begin(Asked::Close(Some(content.clone())), false);
        assert_eq!(h.view(usize::MAX).closed_contents.unwrap().len(), 2);
        h.ok(c);
        let view = h.view(usize::MAX);
        assert!(view.must_be_closed && view.closed_contents == Some(vec![content]));
    }
}
