//! What the clients of a model were told of each byte, and what a cut may leave of it.

/// What a byte may hold.
#[derive(Clone, Debug)]
pub(super) struct Byte {
    /// Before any change that is under way.
    pub(super) base: Vec<u8>,
    /// What changes give it that began since the last time that none was under way.
    added: Vec<u8>,
    open: usize,
    /// Whose change was the last, if that is one's.
    pub(super) last: Option<usize>,
    /// What it has durably, or had.
    promised: Vec<u8>,
    /// What changes since that give it.
    later: Vec<u8>,
}

impl Byte {
    pub(super) fn zero() -> Byte {
        Byte {
            base: vec![0],
            added: Vec::new(),
            open: 0,
            last: None,
            promised: vec![0],
            later: Vec::new(),
        }
    }

    pub(super) fn may(&self) -> Vec<u8> {
        [&self.base[..], &self.added].concat()
    }

    pub(super) fn is_alone(&self) -> bool {
        self.open == 0
    }

    /// A client asks for a change.
    pub(super) fn asked(&mut self, fill: u8) {
        self.added.push(fill);
        self.later.push(fill);
        self.open += 1;
    }

    /// A change of client `who` is answered.
    pub(super) fn answered(&mut self, who: usize, durable: bool) {
        self.open -= 1;
        if self.open > 0 {
            return;
        }
        let one = self.added.len() == 1;
        self.base = std::mem::take(&mut self.added);
        self.last = one.then_some(who);
        if durable && one {
            self.flushed();
        }
    }

    /// What it holds is durable.
    pub(super) fn flushed(&mut self) {
        self.promised.clone_from(&self.base);
        self.later.clear();
    }

    /// True when a cut may leave this of it.
    pub(super) fn may_be_left(&self, left: u8) -> bool {
        self.promised.contains(&left) || self.later.contains(&left)
    }
}
