//! How full the host is: plenty, low, full. With hysteresis, so that a host at a mark is said to be
//! at it once, and not at every look. Pure.

/// Beyond a mark by this, or by this part of the file system, and it is left behind.
const BACK_MIN: u64 = 1 << 20;
const BACK_PART: u64 = 200;

/// How full the host is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Above the soft mark.
    #[default]
    Plenty,
    /// Below it.
    Low,
    /// Containers get nothing more.
    Full,
}

impl Level {
    /// All of them.
    pub const ALL: [Level; 3] = [Level::Plenty, Level::Low, Level::Full];

    /// Its name in the API and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Plenty => "plenty",
            Level::Low => "low",
            Level::Full => "full",
        }
    }
}

/// The file system of a store, as it was at a look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// All that it has, in bytes.
    pub total: u64,
    /// What is left beside the reserve: what that lacks is taken off.
    pub free: u64,
    /// Below this it is low.
    pub soft: u64,
    /// Below this containers get nothing more.
    pub hard: u64,
    /// What the reserve holds.
    pub reserve: u64,
    /// What it is to hold.
    pub reserve_wanted: u64,
}

impl Seen {
    /// What containers may still take.
    pub fn allowed(&self) -> u64 {
        self.free.saturating_sub(self.hard)
    }

    /// What the reserve lacks.
    pub(super) fn missing(&self) -> u64 {
        self.reserve_wanted.saturating_sub(self.reserve)
    }

    fn back(&self) -> u64 {
        (self.total / BACK_PART).max(BACK_MIN)
    }

    /// The level, when it was `before`; `refused`: somebody was refused room.
    pub(super) fn level(&self, before: Level, refused: bool) -> Level {
        let near = self.allowed() < self.back();
        if self.allowed() == 0 || near && (refused || before == Level::Full) {
            return Level::Full;
        }
        let stays = match before {
            Level::Plenty => 0,
            Level::Low | Level::Full if self.soft == 0 => 0,
            Level::Low | Level::Full => self.back(),
        };
        match self.free < self.soft.saturating_add(stays) {
            true => Level::Low,
            false => Level::Plenty,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn each_mark_is_crossed_once_however_often_one_looks_near_it() {
        let mut level = Level::default();
        let mut crossed = Vec::new();
        let frees = [
            20, 10, 9, 10, 9, 11, 3, 2, 0, 0, 1, 2, 2, 3, 9, 10, 11, 20, 1, 20,
        ];
        for free in frees {
            let seen = Seen {
                total: 100 * MIB,
                free: free * MIB,
                soft: 10 * MIB,
                hard: MIB,
                ..Seen::default()
            };
            let now = seen.level(level, false);
            if now != level {
                crossed.push((free, now));
            }
            level = now;
        }
        use Level::{Full, Low, Plenty};
        let want = [
            (9, Low),
            (11, Plenty),
            (3, Low),
            (0, Full),
            (2, Low),
            (11, Plenty),
            (1, Full),
            (20, Plenty),
        ];
        assert_eq!(crossed, want);
    }

    #[test]
    fn who_asks_for_very_much_does_not_make_the_host_full() {
        let mut seen = Seen {
            total: 1 << 30,
            free: 20 * MIB,
            ..Seen::default()
        };
        assert_eq!(seen.level(Level::Plenty, true), Level::Plenty);
        seen.free = MIB;
        assert_eq!(seen.level(Level::Plenty, false), Level::Plenty);
        assert_eq!(seen.level(Level::Plenty, true), Level::Full);
    }
}
