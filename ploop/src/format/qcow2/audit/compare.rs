//! The comparison: one sweep over the clusters of the file, in order.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::super::vet::Tables;
use super::counts::Counts;
use super::{AuditFinding, AuditKind, Claim, Ref};
use crate::error::Result;

/// Clusters in a row with one defect.
struct Open {
    kind: AuditKind,
    clusters: Range<u64>,
    /// What is counted, and what is named.
    counted: u64,
    named: u64,
}

/// Joins defects that go on, and reports them.
struct Reporter<'a> {
    cluster: u64,
    open: Option<Open>,
    found: &'a mut dyn FnMut(AuditFinding),
}

impl Reporter<'_> {
    fn add(&mut self, kind: AuditKind, clusters: Range<u64>, counted: u64, named: u64) {
        if let Some(open) = &mut self.open
            && open.kind == kind
            && open.clusters.end == clusters.start
            && (open.counted, open.named) == (counted, named)
        {
            open.clusters.end = clusters.end;
            return;
        }
        self.close();
        self.open = Some(Open {
            kind,
            clusters,
            counted,
            named,
        });
    }

    fn close(&mut self) {
        let Some(open) = self.open.take() else {
            return;
        };
        let n = open.clusters.end - open.clusters.start;
        let (counted, named) = (open.counted, open.named);
        let what = match open.kind {
            AuditKind::CopiedFlag if counted == 1 => {
                format!("{n} clusters with one owner, whose entries do not say so")
            }
            AuditKind::CopiedFlag => {
                format!("{n} clusters counted {counted} times, whose entries say one owner")
            }
            _ => format!("{n} clusters are counted {counted} times, and named {named} times"),
        };
        (self.found)(AuditFinding {
            kind: open.kind,
            offset: open.clusters.start.saturating_mul(self.cluster),
            cluster: Some(open.clusters.start),
            what,
        });
    }
}

/// What is named, over clusters where that does not change.
#[derive(Default)]
struct Now {
    named: u64,
    one: u64,
    more: u64,
}

impl Now {
    fn enter(&mut self, r: Ref) {
        self.named += r.times();
        self.one += u64::from(r.claim() == Claim::One);
        self.more += u64::from(r.claim() == Claim::More);
    }

    fn leave(&mut self, r: Ref) {
        self.named -= r.times();
        self.one -= u64::from(r.claim() == Claim::One);
        self.more -= u64::from(r.claim() == Claim::More);
    }
}

/// Compares `refs`, sorted by their first cluster, with `counts`.
pub(super) fn compare(
    refs: Vec<Ref>,
    counts: &mut Counts<'_>,
    tables: &Tables,
    found: &mut dyn FnMut(AuditFinding),
) -> Result<()> {
    let end_of = |r: Ref| r.first + u64::from(r.count);
    let reach = refs.iter().map(|&r| end_of(r)).max().unwrap_or(0);
    let mut out = Reporter {
        cluster: tables.cluster(),
        open: None,
        found,
    };
    let mut now = Now::default();
    let mut inside: BinaryHeap<(Reverse<u64>, Ref)> = BinaryHeap::new();
    let mut next = refs.into_iter().peekable();
    let mut at = 0;
    loop {
        let starts = next.peek().map(|r| r.first);
        let ends = inside.peek().map(|(Reverse(end), _)| *end);
        let to = match (starts, ends) {
            (Some(s), Some(e)) => s.min(e),
            (Some(to), None) | (None, Some(to)) => to,
            (None, None) => break,
        };
        segment(at..to, &now, counts, &mut out)?;
        at = to;
        while let Some(&(Reverse(end), r)) = inside.peek()
            && end <= at
        {
            inside.pop();
            now.leave(r);
        }
        while let Some(r) = next.next_if(|r| r.first <= at) {
            now.enter(r);
            inside.push((Reverse(end_of(r)), r));
        }
    }
    out.close();
    let end = counts.end().max(reach);
    counts.runs(reach..end, &mut |run, counted| {
        out.add(AuditKind::LeakedTail, run, counted, 0);
    })?;
    out.close();
    Ok(())
}

fn segment(
    range: Range<u64>,
    now: &Now,
    counts: &mut Counts<'_>,
    out: &mut Reporter<'_>,
) -> Result<()> {
    let named = now.named;
    let mut judge = |run: Range<u64>, counted: u64| {
        let kind = match counted {
            _ if counted < named => AuditKind::RefcountTooLow,
            _ if counted > named && named == 0 => AuditKind::LeakedClusters,
            _ if counted > named => AuditKind::RefcountTooHigh,
            1 if now.more > 0 => AuditKind::CopiedFlag,
            2.. if now.one > 0 => AuditKind::CopiedFlag,
            _ => return,
        };
        out.add(kind, run, counted, named);
    };
    let mut at = range.start;
    counts.runs(range.clone(), &mut |run, counted| {
        if at < run.start {
            judge(at..run.start, 0);
        }
        at = run.end;
        judge(run, counted);
    })?;
    if at < range.end {
        judge(at..range.end, 0);
    }
    Ok(())
}
