//! The hand-over: what happens while clients wait.

use super::*;

impl Source<'_> {
    /// Steps 5 and 6.
    pub(super) fn hand_over(
        &self,
        wire: &mut Wire,
        way: &mut Way,
        owner: &mut Owner,
    ) -> Result<(), Failed> {
        let back = match &self.options.holder {
            Some(holder) => Some(holder.now().map_err(Failed::Here)?),
            None => None,
        };
        self.disk.gate().halt();
        let barrier = self.disk.disk().barrier();
        let done = self.rest(wire, way, &barrier).and_then(|()| {
            if let Some(holder) = &self.options.holder {
                holder.send(&holder.to)?;
            }
            Ok(())
        });
        if let Err(e) = done {
            drop(barrier);
            self.disk.gate().resume();
            self.holder_back(back.as_deref());
            return Err(Failed::Here(self.said(wire, e)));
        }
        // 6. COMMIT
        let given = owner.set(State::Given, BEGUN);
        // Whoever is in front of the gate gets no answer here any more.
        self.connections
            .end_where(|e| self.is_of(e), Duration::ZERO)
            .ok();
        drop(barrier);
        given.map_err(|e| {
            self.holder_back(back.as_deref());
            // Nothing was said to the destination, so whichever state it is holds.
            Failed::Given(e.while_doing(format_args!("give {} away", self.place.shown())))
        })
    }

    fn holder_back(&self, to: Option<&str>) {
        if let (Some(holder), Some(to)) = (&self.options.holder, to)
            && let Err(e) = holder.send(to)
        {
            tracing::error!(error = %e, "the holder of the clients was not sent back here");
        }
    }

    /// Step 5, behind the closed gate: what is left, and the trackers' bits.
    fn rest(&self, wire: &mut Wire, way: &mut Way, barrier: &Barrier<'_>) -> Result<()> {
        let before = wire.bytes();
        let dirty = barrier.clear_tracker(way.tracker)?;
        way.written.add(&dirty);
        for (start, len) in order(&dirty, &HashMap::new()) {
            self.piece(wire, start, len)?;
        }
        for tracker in self.disk.disk().trackers().iter().filter(|t| !t.passing) {
            bits(wire, tracker.id, &tracker.bits)?;
        }
        way.moved.last = wire.bytes() - before;
        wire.send(Type::Prepare, &[])?;
        wire.flush()?;
        wire.expect(Type::Ready)
    }
}
