//! What is done how often.

use super::op::{Op, Rng};

/// A mix of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// A bit of everything.
    Mixed,
    /// Chains of more than a hundred images.
    Deep,
    /// Many branches.
    Bushy,
    /// Merges with all that can happen in the middle of one.
    Merges,
    /// Clones, clones of clones, removals.
    Clones,
}

impl Profile {
    /// All of them.
    pub const ALL: [Profile; 5] = [
        Profile::Mixed,
        Profile::Deep,
        Profile::Bushy,
        Profile::Merges,
        Profile::Clones,
    ];

    /// Weights, in the order of [`one`].
    const fn weights(self) -> [u64; 25] {
        //        write      zero disc flush close kill  snap grp ren swp  swi
        //        del fore run down  merge step pause aband  clone rm new hold rel abort
        match self {
            Profile::Mixed => [
                24, 4, 4, 4, 4, 4, 14, 1, 2, 1, 5, //
                4, 4, 2, 1, 4, 8, 1, 1, 2, 1, 1, 1, 2, 3,
            ],
            Profile::Deep => [
                24, 2, 3, 3, 3, 2, 24, 1, 1, 1, 1, //
                2, 3, 1, 0, 3, 6, 1, 1, 1, 1, 0, 1, 2, 3,
            ],
            Profile::Bushy => [
                20, 2, 2, 2, 2, 2, 12, 0, 2, 1, 16, //
                9, 7, 3, 1, 2, 4, 1, 1, 1, 1, 0, 1, 2, 3,
            ],
            Profile::Merges => [
                30, 4, 5, 4, 2, 4, 14, 1, 1, 1, 2, //
                4, 1, 2, 1, 14, 30, 3, 3, 1, 1, 1, 1, 2, 3,
            ],
            Profile::Clones => [
                20, 2, 2, 2, 2, 3, 12, 2, 1, 3, 5, //
                5, 5, 3, 1, 4, 8, 1, 1, 8, 7, 2, 1, 2, 3,
            ],
        }
    }
}

/// `count` operations.
pub fn draw(profile: Profile, seed: u64, count: usize) -> Vec<Op> {
    let mut rng = Rng::new(seed);
    let mut ops = Vec::with_capacity(count);
    if profile == Profile::Deep {
        // Up into the depth first.
        while ops.len() < count / 3 {
            let (at, len) = rng.range();
            ops.push(Op::Write { ct: 0, at, len });
            let (named, offline) = (rng.one_in(4), rng.one_in(16));
            ops.push(Op::Snapshot {
                ct: 0,
                named,
                offline,
            });
        }
    }
    let weights = profile.weights();
    let sum: u64 = weights.iter().sum();
    while ops.len() < count {
        let mut left = rng.below(sum);
        let mut nth = 0;
        while left >= weights[nth] {
            left -= weights[nth];
            nth += 1;
        }
        ops.push(one(&mut rng, nth));
    }
    ops
}

fn one(rng: &mut Rng, nth: usize) -> Op {
    // The first container is the busiest.
    let ct = match rng.one_in(3) {
        true => rng.byte(),
        false => 0,
    };
    let node = rng.word();
    let (at, len) = rng.range();
    let keep = rng.one_in(3);
    match nth {
        0 => Op::Write { ct, at, len },
        1 => Op::Zero { ct, at, len, keep },
        2 => Op::Discard { ct, at, len },
        3 => Op::Flush { ct },
        4 => Op::Close { ct },
        5 => Op::Kill { ct },
        6 => {
            let (named, offline) = (rng.one_in(3), rng.one_in(6));
            Op::Snapshot { ct, named, offline }
        }
        7 => {
            let more = 1 + rng.below(3) as u8;
            Op::Group { ct, more }
        }
        8 => Op::Rename {
            ct,
            node,
            named: !keep,
        },
        9 => Op::Sweep { ct, store: keep },
        10 => {
            let (discard, named, open) = (rng.one_in(4), rng.one_in(4), rng.one_in(6));
            Op::Switch {
                ct,
                node,
                discard,
                named,
                open,
            }
        }
        11 => Op::Delete {
            ct,
            node,
            run: !keep,
        },
        12 => Op::DeleteForetold { ct, node },
        13 => Op::Run {
            ct,
            steps: rng.below(5) as u8,
        },
        14 => Op::MergeDown {
            ct,
            node,
            all: keep,
        },
        15 => {
            let budget = 1 + rng.below(4) as u8;
            Op::Merge { ct, node, budget }
        }
        16 => Op::Step {
            steps: 1 + rng.below(3) as u8,
        },
        17 => Op::Pause,
        18 => Op::Abandon,
        19 => Op::Clone {
            ct,
            node,
            count: 1 + rng.below(2) as u8,
        },
        20 => Op::Remove { ct: rng.byte() },
        21 => Op::New {
            raw: keep,
            v1: rng.one_in(2),
        },
        22 => Op::Hold { ct, node },
        23 => Op::Release,
        _ => Op::Abort { ct, at, len },
    }
}
