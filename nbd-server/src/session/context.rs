//! Metadata contexts: what a client can ask about ranges.
//!
//! A context belongs to a namespace, and the namespace defines its queries. A query of a namespace
//! that is not here selects nothing, as the protocol demands. A new context is a new variant.

use ploop::device::Extent;

use crate::wire::chunk::state;

/// A metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: takes space, reads as zeros.
    Allocation,
}

impl Context {
    /// All of them.
    pub const ALL: [Context; 1] = [Context::Allocation];

    /// The full name.
    pub const fn name(self) -> &'static str {
        match self {
            Context::Allocation => "base:allocation",
        }
    }

    /// The namespace with its colon: the query for all its contexts when listing.
    const fn namespace(self) -> &'static str {
        match self {
            Context::Allocation => "base:",
        }
    }

    /// True when `query` selects this context.
    pub fn selected_by(self, query: &str) -> bool {
        query == self.name()
    }

    /// True when `query` lists this context.
    pub fn listed_by(self, query: &str) -> bool {
        query == self.name() || query == self.namespace()
    }

    /// The flags of an extent.
    pub fn flags(self, extent: &Extent) -> u32 {
        match self {
            Context::Allocation => {
                let hole = if extent.hole { state::HOLE } else { 0 };
                let zero = if extent.zero { state::ZERO } else { 0 };
                hole | zero
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_lists_but_never_selects() {
        let c = Context::Allocation;
        assert!(c.selected_by("base:allocation") && c.listed_by("base:allocation"));
        assert!(c.listed_by("base:") && !c.selected_by("base:"));
        for other in ["", "base", "base:allocation2", "qemu:", "x-a:allocation"] {
            assert!(!c.listed_by(other) && !c.selected_by(other), "{other}");
        }
    }
}
