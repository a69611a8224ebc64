//! The hand-over: what happens while clients wait.

use super::*;

impl Source<'_> {
    /// Steps 5 and 6. The holder of the clients goes before the commit: one that cannot ends the move.
    /// It is sent `back` where that fails, or when this service comes back that was killed in between.
    pub(super) fn hand_over(
        &self,
        wire: &mut Wire,
        way: &mut Way,
        owner: &mut Owner,
        back: Option<&str>,
    ) -> Result<(), Failed> {
        self.disk.gate().halt();
        let barrier = self.disk.disk().barrier();
        let done = self.rest(wire, way, &barrier).and_then(|()| {
            if let Some(holder) = &self.options.holder {
                let left = self.deadline.left(HAND_OVER);
                holder.send(&holder.to, left)?;
            }
            Ok(())
        });
        if let Err(e) = done {
            drop(barrier);
            self.disk.gate().resume();
            self.holder_back(back);
            return Err(Failed::Here(self.said(wire, e)));
        }
        // 6. COMMIT
        let given = owner.set(State::Given, self.gives());
        // Whoever is in front of the gate gets no answer here any more.
        self.connections
            .end_where(|e| self.is_of(e), Duration::ZERO)
            .ok();
        drop(barrier);
        given.map_err(|e| {
            self.holder_back(back);
            // Nothing was said to the destination, so whichever state it is holds.
            Failed::Given(e.while_doing(format_args!("give {} away", self.place.shown())))
        })
    }

    fn holder_back(&self, to: Option<&str>) {
        if let (Some(holder), Some(to)) = (&self.options.holder, to) {
            holder.back(to);
        }
    }

    /// Step 5, behind the closed gate: what is left, and the trackers' bits.
    fn rest(&self, wire: &mut Wire, way: &mut Way, barrier: &Barrier<'_>) -> Result<()> {
        let before = wire.bytes();
        let dirty = barrier.clear_tracker(way.tracker)?;
        way.written.add(&dirty);
        for (start, len) in order(&dirty, &HashMap::new()) {
            if self.deadline.is_over(false) {
                let what = "the rest of it takes too long, and clients wait";
                return Err(Error::new(Kind::Io, what).fix("Give it a longer --downtime"));
            }
            self.piece(wire, start, len)?;
        }
        self.bits(wire, way)?;
        way.moved.last = wire.bytes() - before;
        wire.send(Type::Prepare, &[])?;
        wire.flush()?;
        wire.expect(Type::Ready)
    }
}
