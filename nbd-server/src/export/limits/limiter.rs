//! Whose request goes next, and when: containers under the budget of their store.
//!
//! ```text
//!  store      iops, bps                        shared by weight
//!    └─ container   iops, bps × (all, read, write)
//!         └─ reads, writes                     in the order in which they came
//! ```
//!
//! A request passes when every bucket above it admits it. Reads do not wait for writes that only a
//! limit on writes holds up, nor the other way round; where both wait for the same bucket, the one
//! that came first goes first.
//!
//! Weights are start-time fair queueing: each request moves its container's clock by what it costs
//! of the store's budget, divided by the container's weight; the container whose clock is behind
//! goes next. A clock never stays behind the one that was served last, so who was idle, or held up
//! by its own limits, saves nothing, and what it did not use is the others'. The head of the
//! container that is next waits for the store's tokens, however large it is: small requests do
//! not overtake it for ever.
//!
//! There is no clock here, no lock and no thread. Time is nanoseconds since any instant.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};

use snapshots::limits::{BURST_MS, Limits};

use super::bucket::Bucket;

/// Of a container, as long as it is known.
pub(super) type Id = u64;

const MILLISECOND: u64 = 1_000_000;

/// When to look again at what goes only when somebody says so.
const NEVER: u64 = u64::MAX;

/// Fractions of a nanosecond in a container's clock, so that division by a weight loses nothing
/// that counts.
const CLOCK_BITS: u32 = 16;

/// Twice for each step: two steps are 4:1.
fn weight(priority: u8) -> u128 {
    1 << priority.min(snapshots::limits::PRIORITY_MAX)
}

/// What a request costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// It changes something.
    pub write: bool,
    /// Bytes that it moves.
    pub bytes: u64,
}

/// Rates on requests and bytes of one kind.
#[derive(Clone, Debug, Default)]
struct Pair {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Pair {
    fn change(&mut self, iops: u64, bps: u64, burst: u64, now: u64) {
        self.requests = Bucket::changed(self.requests.take(), iops, burst, now);
        self.bytes = Bucket::changed(self.bytes.take(), bps, burst, now);
    }

    fn is_none(&self) -> bool {
        self.requests.is_none() && self.bytes.is_none()
    }

    fn both(&self, c: Cost) -> impl Iterator<Item = (&Bucket, u64)> {
        let requests = self.requests.iter().map(|b| (b, 1));
        requests.chain(self.bytes.iter().map(move |b| (b, c.bytes)))
    }

    fn both_mut(&mut self, c: Cost) -> impl Iterator<Item = (&mut Bucket, u64)> {
        let requests = self.requests.iter_mut().map(|b| (b, 1));
        requests.chain(self.bytes.iter_mut().map(move |b| (b, c.bytes)))
    }

    fn fill(&mut self, now: u64) {
        let none = Cost {
            write: false,
            bytes: 0,
        };
        self.both_mut(none).for_each(|(b, _)| b.fill(now));
    }

    fn admits(&self, c: Cost) -> bool {
        self.both(c).all(|(b, cost)| b.admits(cost))
    }

    fn take(&mut self, c: Cost) {
        self.both_mut(c).for_each(|(b, cost)| b.take(cost));
    }

    fn due(&self, c: Cost) -> u64 {
        self.both(c).map(|(b, cost)| b.due(cost)).max().unwrap_or(0)
    }
}

#[derive(Debug)]
struct Waiting<T> {
    ticket: u64,
    cost: Cost,
    since: u64,
    who: T,
}

/// A container.
#[derive(Debug)]
struct Flow<T> {
    all: Pair,
    /// Of reads, of writes.
    kinds: [Pair; 2],
    /// Reads and writes that wait.
    queues: [VecDeque<Waiting<T>>; 2],
    weight: u128,
    /// Where its next request begins on the store's clock, at the earliest.
    finish: u128,
    /// When it is to be looked at again, if something waits.
    due: u64,
    /// Nothing of it goes, whatever its limits.
    halted: bool,
    /// Of the bytes that it writes, beside its limits: for a time.
    brake: Option<Bucket>,
    totals: Totals,
}

/// What became of a container's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests that had to wait, and went.
    pub waited: u64,
    /// How long, together, in nanoseconds.
    pub nanos: u64,
    /// Requests that wait now.
    pub waiting: u64,
}

impl<T> Flow<T> {
    fn fill(&mut self, now: u64) {
        self.all.fill(now);
        self.kinds.iter_mut().for_each(|p| p.fill(now));
        self.brake.iter_mut().for_each(|b| b.fill(now));
    }

    fn admits(&self, c: Cost) -> bool {
        self.kind_admits(c) && self.all.admits(c)
    }

    fn take(&mut self, c: Cost) {
        self.all.take(c);
        self.kinds[usize::from(c.write)].take(c);
        if let Some(brake) = self.brake.as_mut().filter(|_| c.write) {
            brake.take(c.bytes);
        }
    }

    /// Whether what holds for requests of its kind alone admits it.
    fn kind_admits(&self, c: Cost) -> bool {
        let braked = self.brake.as_ref().filter(|_| c.write);
        self.kinds[usize::from(c.write)].admits(c) && braked.is_none_or(|b| b.admits(c.bytes))
    }

    fn kind_due(&self, c: Cost) -> u64 {
        let braked = self.brake.as_ref().filter(|_| c.write);
        let braked = braked.map_or(0, |b| b.due(c.bytes));
        self.kinds[usize::from(c.write)].due(c).max(braked)
    }

    fn is_idle(&self) -> bool {
        self.queues.iter().all(VecDeque::is_empty)
    }

    /// The head that may go as far as this container is asked; or when one may. Filled.
    ///
    /// A head that waits only for the bucket of all holds up the later one of the other kind.
    fn next(&self) -> Result<usize, u64> {
        let mut due = NEVER;
        if self.halted {
            return Err(NEVER);
        }
        let mut kinds = [0, 1];
        kinds.sort_by_key(|&k| self.queues[k].front().map_or(u64::MAX, |w| w.ticket));
        for k in kinds {
            let Some(head) = self.queues[k].front() else {
                continue;
            };
            if !self.kind_admits(head.cost) {
                due = due.min(self.kind_due(head.cost).max(self.all.due(head.cost)));
                continue;
            }
            if self.all.admits(head.cost) {
                return Ok(k);
            }
            return Err(due.min(self.all.due(head.cost)));
        }
        Err(due)
    }

    /// What it costs that may go as far as this container is asked.
    fn head(&self) -> Option<Cost> {
        let kind = self.next().ok()?;
        self.queues[kind].front().map(|w| w.cost)
    }

    /// Where its next request begins on the store's clock, if one may go; else notes when.
    fn look(&mut self, clock: u128) -> Option<u128> {
        match self.next() {
            Ok(_) => Some(self.finish.max(clock)),
            Err(due) => {
                self.due = due;
                None
            }
        }
    }
}

/// What may go: its ticket, and who waits for it.
pub(super) type Grant<T> = (u64, T);

/// See the module text.
#[derive(Debug)]
pub(super) struct Limiter<T> {
    store: Pair,
    iops: u64,
    bps: u64,
    flows: BTreeMap<Id, Flow<T>>,
    /// Containers of which something waits.
    backlog: BTreeSet<Id>,
    /// Where the request that was served last began.
    clock: u128,
    /// Before this nobody goes: the store's budget is used up. 0 when that is not known.
    blocked: u64,
    tickets: u64,
}

impl<T> Limiter<T> {
    /// Nothing limited.
    pub(super) fn new() -> Limiter<T> {
        Limiter {
            store: Pair::default(),
            iops: 0,
            bps: 0,
            flows: BTreeMap::new(),
            backlog: BTreeSet::new(),
            clock: 0,
            blocked: 0,
            tickets: 0,
        }
    }

    /// Sets the store's budget; 0 is none.
    pub(super) fn set_store(&mut self, iops: u64, bps: u64, now: u64) {
        (self.iops, self.bps, self.blocked) = (iops, bps, 0);
        self.store.change(iops, bps, BURST_MS * MILLISECOND, now);
    }

    /// The store's budget: requests, bytes.
    pub(super) fn store(&self) -> (u64, u64) {
        (self.iops, self.bps)
    }

    /// Sets the limits of a container, which need not be known yet.
    pub(super) fn set(&mut self, id: Id, limits: &Limits, now: u64) {
        let flow = self.flows.entry(id).or_insert_with(|| Flow {
            all: Pair::default(),
            kinds: [Pair::default(), Pair::default()],
            queues: [VecDeque::new(), VecDeque::new()],
            weight: 1,
            finish: 0,
            due: 0,
            halted: false,
            brake: None,
            totals: Totals::default(),
        });
        self.blocked = 0;
        let (iops, bps) = (limits.iops(), limits.bps());
        let burst = limits.burst_ms().saturating_mul(MILLISECOND);
        flow.all.change(iops[0], bps[0], burst, now);
        for (k, pair) in flow.kinds.iter_mut().enumerate() {
            pair.change(iops[k + 1], bps[k + 1], burst, now);
        }
        flow.weight = weight(limits.priority());
    }

    /// Holds all requests of a container back, or lets them go on.
    pub(super) fn halt(&mut self, id: Id, halted: bool) {
        self.blocked = 0;
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.halted = halted;
        }
    }

    /// Lets a container write so many bytes per second at most, beside its limits; 0: as its limits
    /// say.
    pub(super) fn brake(&mut self, id: Id, rate: u64, now: u64) {
        self.blocked = 0;
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.brake = Bucket::changed(flow.brake.take(), rate, BURST_MS * MILLISECOND, now);
        }
    }

    /// Forgets a container of which nothing waits.
    pub(super) fn forget(&mut self, id: Id) {
        if !self.backlog.contains(&id) {
            self.flows.remove(&id);
        }
    }

    /// True when its requests have to be asked for.
    pub(super) fn binds(&self, id: Id) -> bool {
        let limited = |f: &Flow<T>| !f.all.is_none() || f.kinds.iter().any(|p| !p.is_none());
        let own = |f: &Flow<T>| f.halted || f.brake.is_some() || limited(f);
        !self.store.is_none() || self.flows.get(&id).is_some_and(own)
    }

    pub(super) fn totals(&self, id: Id) -> Totals {
        let flow = self.flows.get(&id);
        flow.map_or(Totals::default(), |f| Totals {
            waiting: f.queues.iter().map(|q| q.len() as u64).sum(),
            ..f.totals
        })
    }

    /// Lets a request pass at once, when nobody who would have to go before it waits and all
    /// buckets admit it.
    pub(super) fn pass(&mut self, id: Id, cost: Cost, now: u64) -> bool {
        let alone = match self.store.is_none() {
            true => true,
            false => self.backlog.is_empty(),
        };
        let Some(flow) = self.flows.get_mut(&id) else {
            return true;
        };
        flow.fill(now);
        self.store.fill(now);
        if flow.halted
            || !alone
            || !flow.is_idle()
            || !flow.admits(cost)
            || !self.store.admits(cost)
        {
            return false;
        }
        self.charge(id, cost);
        true
    }

    /// Has a request wait; its ticket.
    pub(super) fn wait(&mut self, id: Id, cost: Cost, who: T, now: u64) -> u64 {
        self.tickets += 1;
        let waiting = Waiting {
            ticket: self.tickets,
            cost,
            since: now,
            who,
        };
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.queues[usize::from(cost.write)].push_back(waiting);
            self.backlog.insert(id);
        }
        self.tickets
    }

    /// Forgets requests that wait.
    pub(super) fn cancel(&mut self, id: Id, tickets: impl Fn(u64) -> bool) {
        self.blocked = 0;
        if let Some(flow) = self.flows.get_mut(&id) {
            for queue in &mut flow.queues {
                queue.retain(|w| !tickets(w.ticket));
            }
            if flow.is_idle() {
                self.backlog.remove(&id);
            }
        }
    }

    /// Takes out all that may go now, in order. Returns when to look again, if anything waits.
    pub(super) fn grant(&mut self, now: u64, granted: &mut Vec<Grant<T>>) -> Option<u64> {
        let all = self.backlog.iter().copied().collect();
        self.grant_of(all, now, granted);
        self.due()
    }

    /// The same after a request of `id` has come; looks at nothing that this cannot have changed.
    pub(super) fn grant_new(
        &mut self,
        id: Id,
        now: u64,
        granted: &mut Vec<Grant<T>>,
    ) -> Option<u64> {
        if self.store.is_none() {
            self.grant_of(vec![id], now, granted);
            return self
                .flows
                .get(&id)
                .map(|f| f.due)
                .filter(|due| *due != NEVER && self.backlog.contains(&id));
        }
        match now < self.blocked {
            true => Some(self.blocked),
            false => self.grant(now, granted),
        }
    }

    /// When to look again.
    fn due(&self) -> Option<u64> {
        let own = self.backlog.iter().filter_map(|id| self.flows.get(id));
        own.map(|f| f.due).min().filter(|due| *due != NEVER)
    }

    fn grant_of(&mut self, ids: Vec<Id>, now: u64, granted: &mut Vec<Grant<T>>) {
        self.store.fill(now);
        let mut ready = BinaryHeap::new();
        for id in ids {
            if let Some(flow) = self.flows.get_mut(&id) {
                flow.fill(now);
                ready.extend(flow.look(self.clock).map(|tag| Reverse((tag, id))));
            }
        }
        self.blocked = 0;
        while let Some(Reverse((_, id))) = ready.pop() {
            let Some(flow) = self.flows.get_mut(&id) else {
                continue;
            };
            let Some(cost) = flow.head() else { continue };
            if !self.store.admits(cost) {
                self.blocked = self.store.due(cost);
                // Nobody overtakes it; all that could go look again together.
                let left = ready.into_iter().map(|Reverse((_, id))| id);
                for id in left.chain([id]) {
                    if let Some(flow) = self.flows.get_mut(&id) {
                        flow.due = self.blocked;
                    }
                }
                return;
            }
            if let Some(head) = flow.queues[usize::from(cost.write)].pop_front() {
                let nanos = now.saturating_sub(head.since);
                flow.totals.waited += u64::from(nanos > 0);
                flow.totals.nanos = flow.totals.nanos.saturating_add(nanos);
                granted.push((head.ticket, head.who));
            }
            self.charge(id, cost);
            if let Some(flow) = self.flows.get_mut(&id) {
                ready.extend(flow.look(self.clock).map(|tag| Reverse((tag, id))));
                if flow.is_idle() {
                    self.backlog.remove(&id);
                }
            }
        }
    }

    /// Takes what a request costs, and moves the clocks.
    fn charge(&mut self, id: Id, cost: Cost) {
        self.store.take(cost);
        let time = |amount: u64, rate: u64| match rate {
            0 => 0,
            rate => (u128::from(amount) * 1_000_000_000) / u128::from(rate),
        };
        let time = time(1, self.iops).max(time(cost.bytes, self.bps));
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.take(cost);
            let start = flow.finish.max(self.clock);
            // Below 2¹¹⁰, and the sum of all that a machine serves in its life below 2¹²⁷.
            flow.finish = start + (time << CLOCK_BITS) / flow.weight;
            self.clock = start;
        }
    }
}
