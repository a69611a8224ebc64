//! Merges, and all that can happen in the middle of one.

use ploop::descriptor::Guid;
use ploop::error::Kind;
use snapshots::delete;
use snapshots::merge::{Direction, Merge, Step};

use super::CLUSTER;
use super::op::Op;
use super::oracle::{Child, Ct};
use super::world::{Done, Failure, Rest, World, ensure};

impl World {
    /// Merges a chain down, or one node with its parent.
    pub(super) fn merge_down(&mut self, ct: u8, node: u16, all: bool) -> Done {
        let name = self.name(ct);
        let busy = self.merging.as_ref().is_some_and(|(ct, ..)| *ct == name);
        let from = self
            .pick(&name, node)
            .filter(|g| node.is_multiple_of(2) && self.cts[&name].has(*g));
        if busy || from.is_some_and(|g| self.cts[&name].node(g).marked) {
            return Ok(());
        }
        let root = self.root.clone();
        let place = World::place(&root, &name)?;
        let d = place.descriptor()?;
        let found = delete::below(&place, &d, from.unwrap_or(d.top), all);
        let right = can_go(&self.cts[&name], from, all);
        let found = match found {
            Err(e) if right.is_empty() && e.kind() == Kind::Invalid => return Ok(()),
            found => found?,
        };
        ensure!(
            found == right,
            "{found:?} can be merged, right is {right:?}"
        );
        for guid in found {
            self.delete_node(&name, guid)?;
        }
        self.tally.add("merged down");
        self.go_on(&name, None)
    }

    /// A merge step by step, and all that happens in the middle of it.
    pub(super) fn merge(&mut self, ct: u8, node: u16, budget: u8, rest: &mut Rest<'_>) -> Done {
        let name = self.name(ct);
        let Some(guid) = self.pick(&name, node).filter(|_| self.merging.is_none()) else {
            return Ok(());
        };
        let root = self.root.clone();
        let place = World::place(&root, &name)?;
        let disk = self.open(&name)?;
        let (begun, _) = self.watched(&name, None, || Merge::begin(&place, &disk, guid))?;
        let ct = self.ct(&name);
        let wrong = match ct.children(guid).len() {
            1 if ct.mergeable(guid) => None,
            1 => Some(Kind::Unsupported),
            _ => Some(Kind::Invalid),
        };
        let merge = match begun {
            Err(e) if Some(e.kind()) == wrong || self.is_held(&name, &e) => {
                return self.shape(&name);
            }
            begun => begun?,
        };
        ensure!(wrong.is_none(), "a merge has begun, right is {wrong:?}");
        let ct = self.ct(&name);
        ct.node_mut(guid).marked = true;
        let child = match ct.children(guid)[..] {
            [Child::Node(child)] => Some(child),
            _ => None,
        };
        let in_chain = child.is_some_and(|c| ct.chain(ct.parent).contains(&c));
        self.tally.add(match (merge.direction(), child) {
            (Some(Direction::Up), None) => "merges into the top",
            (Some(Direction::Up), _) if in_chain => "merges up, in the chain",
            (Some(Direction::Up), _) => "merges up, aside",
            (_, None) => return Err(Failure("the top is merged down".into())),
            (_, _) if in_chain => "merges down, in the chain",
            (_, _) => "merges down, aside",
        });
        self.merging = Some((name.clone(), guid, child));
        self.touch_around(&name, child);
        self.shape(&name)?;
        let budget = u64::from(budget) * CLUSTER as u64 * 512;
        let last = self.under_way(merge, budget, rest);
        self.merging = None;
        drop(disk);
        match last? {
            Some(op) => self.one(&op, rest),
            None => Ok(()),
        }
    }

    /// The next operations, as long as the merge is under way; the one that it did not survive.
    fn under_way(
        &mut self,
        mut merge: Merge<'_>,
        budget: u64,
        rest: &mut Rest<'_>,
    ) -> Done<Option<Op>> {
        let (name, guid, _) = self.merging.clone().unwrap();
        while let Some(op) = rest.next() {
            match *op {
                Op::Step { steps } => {
                    for _ in 0..steps {
                        let (step, _) = self.watched(&name, None, || merge.step(budget))?;
                        let child = self.merging.as_ref().and_then(|(.., child)| *child);
                        match step {
                            Ok(Step::More) => {}
                            Ok(Step::Done) => {
                                self.ct(&name).remove(guid);
                                self.touch_around(&name, child);
                                self.tally.add("merges done step by step");
                                self.shape(&name)?;
                                return Ok(None);
                            }
                            Err(e)
                                if self.held.iter().any(|h| h.ct == name)
                                    && e.kind() == Kind::InUse => {}
                            Err(e) => return Err(e.into()),
                        }
                        self.touch_around(&name, child);
                    }
                    self.one(&Op::Step { steps }, rest)?;
                }
                Op::Pause | Op::Merge { .. } => {
                    merge.pause()?;
                    self.tally.add("merges paused");
                    return Ok(None);
                }
                Op::Abandon => {
                    self.tally.add("merges abandoned");
                    let nth = self.cts.keys().position(|n| *n == name).unwrap();
                    return Ok(Some(Op::Close { ct: nth as u8 }));
                }
                ref op @ (Op::Close { ct } | Op::Switch { ct, .. }) if self.name(ct) == name => {
                    merge.pause()?;
                    return Ok(Some(op.clone()));
                }
                ref op @ Op::Kill { ct } if self.name(ct) == name => {
                    self.tally.add("merges killed");
                    return Ok(Some(op.clone()));
                }
                ref op => self.one(op, rest)?,
            }
        }
        merge.pause()?;
        Ok(None)
    }
}

/// What merging the chain of `from` (none: the top) down takes away, base first.
fn can_go(ct: &Ct, from: Option<Guid>, all: bool) -> Vec<Guid> {
    let mut chain: Vec<Option<Guid>> = match from {
        Some(guid) => ct.chain(Some(guid)).into_iter().map(Some).collect(),
        None => std::iter::once(None)
            .chain(ct.chain(ct.parent).into_iter().map(Some))
            .collect(),
    };
    if !all {
        chain.truncate(2);
    }
    let shared = |g: Option<Guid>| g.is_some_and(|g| ct.node(g).shared);
    let pairs = chain.windows(2).filter_map(|pair| {
        let parent = pair[1]?;
        let goes = ct.children(parent).len() == 1 && !shared(pair[0]) && !shared(pair[1]);
        goes.then_some(parent)
    });
    let mut found: Vec<Guid> = pairs.collect();
    found.reverse();
    found
}
