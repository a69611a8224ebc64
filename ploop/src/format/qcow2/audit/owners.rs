//! Who names which clusters.
//!
//! Every L1 table is walked once, the live one and those of internal snapshots; the L2 tables that
//! they name are sorted, and each is walked once with the number of L1 entries that name it: a
//! thousand snapshots of one state cost what one does.

use super::super::vet::{COPIED, Cluster, OFFSET, Tables};
use super::{AuditFinding, AuditKind, Claim, Refs, Taken, words};
use crate::error::Result;
use crate::store::StoreFile;

/// An L1 entry that names an L2 table: of the live table, or of a snapshot's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Named {
    table: u64,
    live: bool,
    /// The first guest byte that the table is for.
    guest: u64,
}

pub(super) struct Owners<'a> {
    pub(super) file: &'a dyn StoreFile,
    pub(super) tables: &'a Tables,
    pub(super) found: &'a mut dyn FnMut(AuditFinding),
    pub(super) refs: Refs,
    pub(super) taken: Taken,
    named: Vec<Named>,
}

impl<'a> Owners<'a> {
    pub(super) fn new(
        file: &'a dyn StoreFile,
        tables: &'a Tables,
        found: &'a mut dyn FnMut(AuditFinding),
    ) -> Owners<'a> {
        Owners {
            file,
            tables,
            found,
            refs: Refs::default(),
            taken: Taken::default(),
            named: Vec::new(),
        }
    }

    /// All but what the refcounts need for themselves.
    pub(super) fn collect(&mut self) -> Result<()> {
        let cluster = self.tables.cluster();
        let l1 = self.tables.header.l1.clone();
        self.refs.add(0, 1, 1, Claim::Nothing);
        self.refs.add_bytes(l1.clone(), cluster);
        self.taken.take(&l1);
        self.l1(l1.start, (l1.end - l1.start) / 8, true)?;
        self.snapshots()?;
        self.bitmaps()?;
        self.l2_tables()
    }

    pub(super) fn finish(self) -> Refs {
        self.refs
    }

    pub(super) fn report(&mut self, kind: AuditKind, offset: u64, what: String) {
        (self.found)(AuditFinding {
            kind,
            offset,
            cluster: None,
            what,
        });
    }

    /// The `count` entries of the L1 table at file byte `at`.
    pub(super) fn l1(&mut self, at: u64, count: u64, live: bool) -> Result<()> {
        let (tables, refs, named) = (self.tables, &mut self.refs, &mut self.named);
        let (cluster, span) = (tables.cluster(), tables.header.span());
        let mut bad = None;
        words(self.file, at, count, &mut |i, entry| {
            let table = match tables.judge_table(entry) {
                Ok(Some(table)) => table,
                Ok(None) => return,
                Err(flaw) => {
                    bad.get_or_insert_with(|| (at + 8 * i, flaw.to_string()));
                    return;
                }
            };
            refs.add(table / cluster, 1, 1, claim(entry, live));
            named.push(Named {
                table,
                live,
                guest: i.saturating_mul(span),
            });
        })?;
        // Those of the live table are a guest's faults, and named as such.
        if let (Some((at, flaw)), false) = (bad, live) {
            let what = format!("an entry of a snapshot's L1 table {flaw}");
            self.report(AuditKind::BadSnapshotTable, at, what);
        }
        Ok(())
    }

    fn l2_tables(&mut self) -> Result<()> {
        let mut named = std::mem::take(&mut self.named);
        named.sort_unstable();
        for group in named.chunk_by(|a, b| a.table == b.table) {
            // Sorted: the live one is the last.
            if let Some(last) = group.last() {
                let times = u32::try_from(group.len()).unwrap_or(u32::MAX);
                self.l2(*last, times)?;
            }
        }
        Ok(())
    }

    fn l2(&mut self, named: Named, times: u32) -> Result<()> {
        let (tables, refs) = (self.tables, &mut self.refs);
        let cluster = tables.cluster();
        let mut bad = None;
        words(self.file, named.table, cluster / 8, &mut |i, entry| {
            let guest = named.guest.saturating_add(i * cluster);
            match tables.judge_cluster(entry, guest) {
                Cluster::Parent => {}
                Cluster::Plain(host) => {
                    refs.add(host / cluster, 1, times, claim(entry, named.live));
                }
                // Space may be kept behind a zero cluster.
                Cluster::Zero => {
                    let host = entry & OFFSET;
                    if host != 0 {
                        refs.add(host / cluster, 1, times, claim(entry, named.live));
                    }
                }
                Cluster::Packed(packed) => {
                    let first = packed.start / cluster;
                    let count = packed.end.div_ceil(cluster) - first;
                    refs.add(first, count as u32, times, Claim::Nothing);
                }
                Cluster::Bad(flaw) => {
                    bad.get_or_insert_with(|| (named.table + 8 * i, flaw.to_string()));
                }
            }
        })?;
        if let (Some((at, flaw)), false) = (bad, named.live) {
            let what = format!("an entry of a snapshot's L2 table {flaw}");
            self.report(AuditKind::BadSnapshotTable, at, what);
        }
        Ok(())
    }
}

/// Only entries of the live tables say who owns their cluster.
fn claim(entry: u64, live: bool) -> Claim {
    match (live, entry & COPIED != 0) {
        (false, _) => Claim::Nothing,
        (true, true) => Claim::One,
        (true, false) => Claim::More,
    }
}
