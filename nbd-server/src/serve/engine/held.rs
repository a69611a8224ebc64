//! Requests that the engine holds back: until their container's limits let them go, or, when they were
//! tried and the host had no room, until it may have some.

use std::io;
use std::sync::Arc;

use ploop::error::Error;

use super::{Command, Engine, Plane, SEND_AT, Sink, Throttled};
use crate::export::Space;
use crate::export::limits::Gate;

impl Engine {
    /// The engine, holding back what `gate` does not let pass. What is held goes on when somebody
    /// calls [`Engine::reap`] or [`Engine::finish`].
    #[must_use]
    pub fn behind(mut self, gate: Arc<Gate>, plane: &Arc<Plane>) -> Engine {
        self.throttled = Some(Throttled::new(gate, plane.clone()));
        self
    }

    /// The engine of an export whose writes may wait for room on the host; behind a gate.
    #[must_use]
    pub fn waiting_for(mut self, space: Arc<Space>) -> Engine {
        if let Some(throttled) = &mut self.throttled {
            throttled.wait_for_room(space.clone());
            self.site.look_after(space);
        }
        self
    }

    /// Holds back a request that failed with `e`, when that is for want of room on the host and it may
    /// wait for some.
    #[cold]
    pub(super) fn waits_for_room(
        &mut self,
        e: &Error,
        command: &Command,
        payload: &[u8],
    ) -> io::Result<bool> {
        let again = self.again;
        let waits = match &mut self.throttled {
            Some(t) if e.is_host_full() => t.hold_for_room(command, payload, again)?,
            _ => false,
        };
        self.crowded |= waits;
        Ok(waits)
    }

    /// The same for one that another thread tried; one that may not wait is executed, and answered.
    #[cold]
    pub(super) fn try_later(&mut self, command: &Command) -> io::Result<()> {
        let waits = match &mut self.throttled {
            Some(t) => t.hold_for_room(command, &[], false)?,
            None => false,
        };
        self.crowded |= waits;
        if !waits {
            self.site
                .perform(command, false, &mut self.scratch, &mut self.out);
        }
        Ok(())
    }

    /// Outstanding requests that wait for their turn.
    pub fn held(&self) -> usize {
        self.throttled.as_ref().map_or(0, Throttled::count)
    }

    /// True when no more may be held.
    pub(super) fn holds_enough(&self) -> bool {
        self.throttled.as_ref().is_some_and(Throttled::is_full)
    }

    /// True when requests have to be asked for, or some are held.
    pub(super) fn is_limited(&self) -> bool {
        let limited = |t: &Throttled| t.binds() || t.count() > 0;
        self.throttled.as_ref().is_some_and(limited)
    }

    /// Holds a request back when its turn has not come.
    pub(super) fn holds(&mut self, command: &Command, payload: &[u8]) -> io::Result<bool> {
        match &mut self.throttled {
            Some(throttled) if throttled.binds() => throttled.hold(command, payload),
            _ => Ok(false),
        }
    }

    /// Gives all that is held back its turn at once.
    pub(in crate::serve) fn release(&mut self) {
        self.throttled.as_mut().map(Throttled::release);
    }

    /// Forgets all that is held back.
    pub(in crate::serve) fn forget(&mut self) {
        self.throttled.as_mut().map(Throttled::forget);
    }

    /// Executes what was held back and whose turn has come, as far as there is room for it.
    pub(super) fn go_on(&mut self, sink: &mut dyn Sink) -> io::Result<()> {
        self.throttled.as_mut().map(Throttled::look);
        while !self.waits_enough()
            && let Some(held) = self.throttled.as_mut().and_then(Throttled::next)
        {
            if sink.ended() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            self.again = true;
            let done = self.execute(&held.command, &held.payload, false, sink);
            self.again = false;
            done?;
            if self.out.len() >= SEND_AT {
                self.send(sink)?;
            }
        }
        Ok(())
    }
}
