//! Which way a merge goes.

use ploop::descriptor::{Descriptor, Guid};
use ploop::error::{Error, Result};
use ploop::format::{Delta, Place as At, Run};

use super::is_own;
use crate::place::Place;

/// Guest bytes looked at in one step.
const WINDOW: u64 = 1 << 30;

/// Which file stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What only the parent has goes into the child's file.
    Up,
    /// All that the child has goes into the parent's file.
    Down,
}

/// Clusters that each direction moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Costs {
    /// Those that the parent has and the child has not.
    pub up: u64,
    /// Those that the child has.
    pub down: u64,
}

impl Costs {
    /// Counts, by the tables of both. Reads no data. `cluster` in bytes.
    pub fn of(parent: &dyn Delta, child: &dyn Delta, cluster: u64) -> Result<Costs> {
        let mut costs = Costs::default();
        let end = parent.mapped_end().max(child.mapped_end());
        let mut at = 0;
        while at < end {
            let to = at.saturating_add(WINDOW).min(end);
            let has = |d: &dyn Delta| clusters(d, at..to, cluster);
            let (below, above) = (has(parent)?, has(child)?);
            costs.down += above.len() as u64;
            let mut above = above.iter().peekable();
            for k in below {
                while above.next_if(|a| **a < k).is_some() {}
                costs.up += u64::from(above.peek() != Some(&&k));
            }
            at = to;
        }
        Ok(costs)
    }
}

/// The clusters of `range` that a delta has, ascending.
pub(super) fn clusters(
    delta: &dyn Delta,
    range: std::ops::Range<u64>,
    cluster: u64,
) -> Result<Vec<u64>> {
    let end = range.end.min(delta.mapped_end());
    let mut runs: Vec<Run> = Vec::new();
    if range.start < end {
        delta.map(range.start..end, &mut runs)?;
    }
    let mut found = Vec::new();
    for run in runs.iter().filter(|r| r.place != At::Parent) {
        if run.place == At::Fault {
            return Err(delta.fault(run.offset));
        }
        for k in run.offset / cluster..(run.offset + run.len).div_ceil(cluster) {
            if found.last() != Some(&k) {
                found.push(k);
            }
        }
    }
    Ok(found)
}

/// What stands in the way of a direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walls {
    /// The parent's file may not be written (other disks use it, or it is raw).
    pub parent_fixed: bool,
    /// The child's file may not be written (other disks use it).
    pub child_fixed: bool,
    /// Clients write the child, or it is larger than its parent.
    pub only_up: bool,
}

/// The cheaper direction of those that are possible; `None` when none is. Equal costs: up, which
/// copies over nothing.
pub fn choose(costs: Costs, walls: Walls) -> Option<Direction> {
    let up = !walls.child_fixed;
    // Down, the child's file gives its clusters away.
    let down = !walls.parent_fixed && !walls.child_fixed && !walls.only_up;
    match (up, down) {
        (true, true) if costs.down < costs.up => Some(Direction::Down),
        (true, _) => Some(Direction::Up),
        (false, _) => None,
    }
}

/// Whether `parent` can be merged with `child` at all.
pub(super) fn possible(
    _place: &Place<'_>,
    d: &Descriptor,
    _parent: Guid,
    child: Guid,
) -> Result<bool> {
    Ok(is_own(d, child))
}

/// The only child of `node`. Error: `Invalid` for none or several.
pub(super) fn only_child(place: &Place<'_>, d: &Descriptor, node: Guid) -> Result<Guid> {
    match d.children(node)[..] {
        [child] => Ok(child),
        ref all => {
            let what = format!(
                "snapshot {node} has {} children; one can be merged",
                all.len()
            );
            Err(Error::invalid(what).on(place.dir()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheaper_way_is_taken_and_a_wall_is_never_crossed() {
        let free = Walls::default();
        for up in 0..4 {
            for down in 0..4 {
                let costs = Costs { up, down };
                let cheapest = match choose(costs, free) {
                    Some(Direction::Up) => up,
                    Some(Direction::Down) => down,
                    None => panic!("nothing stands in the way"),
                };
                assert_eq!(cheapest, up.min(down));
                for bits in 0..8 {
                    let walls = Walls {
                        parent_fixed: bits & 1 != 0,
                        child_fixed: bits & 2 != 0,
                        only_up: bits & 4 != 0,
                    };
                    match choose(costs, walls) {
                        Some(Direction::Up) => assert!(!walls.child_fixed),
                        Some(Direction::Down) => assert_eq!(walls, free),
                        None => assert!(walls.child_fixed),
                    }
                }
            }
        }
    }
}
