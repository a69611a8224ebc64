//! One client's connection: its sockets, and the waiting for a server.
//!
//! What may be done at once is done, under the volume's lock, without waiting; then the task waits
//! for whichever socket, server, neighbour or time comes first.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::hold::agree::{self, Agreed};
use crate::hold::dial::{Dialer, PAUSE_MAX};
use crate::hold::hall::{Hall, Shared};
use crate::hold::line::Line;
use crate::hold::outbox::Outbox;
use crate::hold::relay::{self, Met};
use crate::hold::terms::Terms;
use crate::hold::volume::{SeatId, Volume};

/// Buffers of one write.
const SLICES: usize = 32;
/// Turns without waiting, after which others are let in.
const TURNS: u32 = 32;
/// What a server that is left may take to answer what it was asked. Longer than that, nobody waits: it
/// may be frozen, or gone without a word.
const LEAVING: Duration = Duration::from_secs(1);
/// What a client that is let go may still take for its answers.
const LAST: Duration = Duration::from_secs(10);

/// The server of a connection, or the wait for one.
enum Far {
    There(Line),
    Dialing(Pin<Box<dyn Future<Output = Result<Agreed, String>>>>),
}

struct Attended<'h> {
    hall: &'h Hall,
    shared: &'h Shared,
    id: SeatId,
    terms: Terms,
    dialer: Dialer,
    client: Line,
    /// The client sends nothing more.
    ended: bool,
    far: Far,
    /// When patience is over.
    until: Option<Instant>,
    /// The server takes nothing more.
    deaf: bool,
    /// When a server that is left is waited for no longer.
    left: Option<Instant>,
    /// Bytes that the next request and the next answer need.
    need: (usize, usize),
}

/// Serves one client until its end.
pub(super) async fn attend(client: Line, hall: Arc<Hall>) {
    let (dialer, mut stop) = (hall.dialer(), hall.stopped());
    let met = tokio::select! {
        met = relay::receive(client, &dialer) => met,
        _ = stop.wait_for(|s| *s) => Err("the holder stops".into()),
    };
    match met {
        Ok(None) => {}
        Ok(Some(met)) => {
            let export = met.terms.export.clone();
            let shared = hall.enter(&export);
            let ended = transmit(met, dialer, (&hall, &shared), stop).await;
            hall.leave(&export);
            match ended {
                Ok(()) => tracing::debug!(export, "a client ended its session"),
                Err(why) => tracing::error!(export, why, "a client's connection is ended"),
            }
        }
        Err(why) => tracing::warn!(why, "a client's handshake is over"),
    }
}

async fn transmit(
    met: Met,
    dialer: Dialer,
    (hall, shared): (&Hall, &Shared),
    mut stop: watch::Receiver<bool>,
) -> Result<(), String> {
    let Met {
        client,
        terms,
        first,
    } = met;
    let notify = Arc::new(Notify::new());
    let id = shared.sit(&terms, notify.clone());
    let seated = Seated { shared, id };
    // A move since the handshake began is one, too.
    let mut to = dialer.to.clone();
    let mut a = Attended {
        hall,
        shared,
        id,
        terms,
        dialer,
        client,
        ended: false,
        far: Far::There(first.line),
        until: None,
        deaf: false,
        left: None,
        need: (0, 0),
    };
    // A server that was left during the handshake is sent nothing.
    match to.has_changed() {
        Ok(true) => a.hang_up(),
        _ => a.up(first.life, first.ids)?,
    }
    let mut last = None;
    let mut turns = 0u32;
    loop {
        turns += 1;
        // Also when each wait was over at once: what a socket has to say is learnt only then.
        if turns.is_multiple_of(TURNS) {
            tokio::task::yield_now().await;
        }
        if a.turn()? {
            continue;
        }
        if shared.with(|v| v.finished(id)) {
            a.say_good_bye();
            break;
        }
        if shared.with(|v| v.wants_close(id)) {
            a.hang_up();
            continue;
        }
        let (takes, to_client, to_server) = shared.with(|v| v.wants(id));
        let client_waits = interest(takes && !a.ended, to_client);
        let server_waits = interest(true, to_server && !a.deaf);
        if a.until.is_some() && shared.with(|v| v.is_up(id)) {
            a.until = None;
        }
        let until = [a.until, a.left, last].into_iter().flatten().min();
        tokio::select! {
            r = ready(&a.client, client_waits) => if r.is_err() { a.client_ended() },
            r = a.far.ready(server_waits) => match r {
                Reached::Readable => {}
                Reached::Found(found) => a.found(found)?,
            },
            () = notify.notified() => {}
            changed = to.changed() => if changed.is_ok() { a.move_on() },
            () = tokio::time::sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                let over = |at: Option<Instant>| at.is_some_and(|at| at <= Instant::now());
                if over(last) {
                    return Err("it was not over in time after the holder was stopped".into());
                }
                if over(a.left) {
                    a.hang_up();
                }
                if over(a.until) {
                    a.lose_patience();
                }
            }
            _ = stop.wait_for(|s| *s), if last.is_none() => {
                last = Some(Instant::now() + LAST);
                shared.with(|v| v.close(id));
            }
        }
    }
    drop(seated);
    Ok(())
}

/// Leaves the volume when dropped.
struct Seated<'s> {
    shared: &'s Shared,
    id: SeatId,
}

impl Drop for Seated<'_> {
    fn drop(&mut self) {
        self.shared.leave(self.id);
    }
}

fn interest(read: bool, write: bool) -> Option<Interest> {
    match (read, write) {
        (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
        (true, false) => Some(Interest::READABLE),
        (false, true) => Some(Interest::WRITABLE),
        (false, false) => None,
    }
}

async fn ready(line: &Line, interest: Option<Interest>) -> io::Result<()> {
    match interest {
        Some(interest) => line.ready(interest).await.map(drop),
        None => std::future::pending().await,
    }
}

enum Reached {
    Readable,
    Found(Result<Agreed, String>),
}

impl Far {
    async fn ready(&mut self, interest: Option<Interest>) -> Reached {
        match self {
            Far::There(line) => {
                // An error is seen by the read that follows.
                drop(ready(line, interest).await);
                Reached::Readable
            }
            Far::Dialing(found) => Reached::Found(found.await),
        }
    }
}

/// Writes what the socket takes; true when that was something.
fn drain(line: &Line, out: &mut Outbox) -> io::Result<bool> {
    let mut any = false;
    while out.len() > 0 {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let filled = out.slices(&mut slices);
        let Some(n) = line.try_write(&slices[..filled])? else {
            break;
        };
        out.advance(n);
        any = true;
    }
    Ok(any)
}

impl Attended<'_> {
    /// Does what can be done without waiting; true when that was something.
    fn turn(&mut self) -> Result<bool, String> {
        let mut any = self.hear_client()?;
        any |= self.hear_server()?;
        let id = self.id;
        let shared = self.shared;
        shared.with(|v| v.pump(id));
        if let (Far::There(line), false) = (&self.far, self.deaf) {
            match shared.with(|v| v.write_server(id, |out| drain(line, out))) {
                Ok(wrote) => any |= wrote,
                // What it had to say before it went away is read first, and then its end. Its socket
                // is always ready for being written to, and would never be waited for.
                Err(_) => self.deaf = true,
            }
        }
        let client = &self.client;
        match shared.with(|v| v.write_client(id, |out| drain(client, out))) {
            Ok(wrote) => any |= wrote,
            Err(_) => self.client_ended(),
        }
        Ok(any)
    }

    fn hear_client(&mut self) -> Result<bool, String> {
        let id = self.id;
        if self.ended || !self.shared.with(|v| v.takes(id)) {
            return Ok(false);
        }
        let had = self.client.input.len();
        let read = match self.client.try_read(self.need.0) {
            Ok(Some(0)) | Err(_) => {
                self.client_ended();
                return Ok(true);
            }
            Ok(read) => read,
        };
        if read.is_none() && had == 0 {
            return Ok(false);
        }
        let client = &mut self.client.input;
        match self.shared.with(|v| v.take_requests(id, client)) {
            Ok(need) => self.need.0 = need,
            Err(why) => {
                let what = "the client broke the protocol: its connection is ended";
                tracing::error!(export = self.terms.export, why, "{}", what);
                self.client.shut();
                // What it was answered is flushed all the same.
                self.client_ended();
                return Ok(true);
            }
        }
        // Requests that were held back for want of room count as something done, too.
        Ok(read.is_some() || self.client.input.len() < had)
    }

    fn hear_server(&mut self) -> Result<bool, String> {
        let id = self.id;
        let Far::There(line) = &mut self.far else {
            return Ok(false);
        };
        match line.try_read(self.need.1) {
            Ok(None) => Ok(false),
            Ok(Some(0)) | Err(_) => {
                self.hang_up();
                Ok(true)
            }
            Ok(Some(_)) => {
                let input = &mut line.input;
                let need = self.shared.with(|v| v.take_answers(id, input));
                self.need.1 =
                    need.map_err(|why| format!("the server broke the protocol: {why}"))?;
                Ok(true)
            }
        }
    }

    fn client_ended(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.shared.with(|v| v.client_gone(self.id));
        }
    }

    /// The server is gone, or let go: another is looked for.
    fn hang_up(&mut self) {
        let played = self.shared.with(|v| v.play_error(self.id));
        if let Some(error) = played {
            let what = "a change that was answered before cannot be made again; trying again";
            tracing::error!(export = self.terms.export, error, "{}", what);
        }
        let (dialer, terms) = (self.dialer.clone(), self.terms.clone());
        // Patience is the driver's: what waits is answered when it is over, and the dialing goes on.
        let dialer = Dialer {
            patience: None,
            ..dialer
        };
        let pause = if played.is_some() {
            PAUSE_MAX
        } else {
            Duration::ZERO
        };
        self.far = Far::Dialing(Box::pin(async move {
            tokio::time::sleep(pause).await;
            let again = async |line| agree::again(line, &terms).await;
            dialer.until_there(again).await
        }));
        self.need.1 = 0;
        self.left = None;
        self.deaf = false;
        if let (None, Some(patience)) = (self.until, self.dialer.patience) {
            // Later than any clock is never.
            self.until = Instant::now().checked_add(patience);
        }
        self.shared.with(|v| v.down(self.id));
        tracing::info!(
            export = self.terms.export,
            "the server is away; its client waits"
        );
    }

    fn found(&mut self, found: Result<Agreed, String>) -> Result<(), String> {
        let Agreed { line, life, ids } = found?;
        self.need.1 = line.input.len();
        self.far = Far::There(line);
        self.up(life, ids)?;
        tracing::info!(export = self.terms.export, "a server is there again");
        Ok(())
    }

    fn up(&mut self, life: Option<String>, ids: Vec<(u32, u32)>) -> Result<(), String> {
        self.shared.with(|v| v.up(self.id, life, ids))?;
        self.hall.refuse_second_name(&self.terms.export)
    }

    /// The holder has another server now. What this one was asked, it answers first if it can: a
    /// request that it did after the next one had been asked the same would undo what came later.
    fn move_on(&mut self) {
        if matches!(self.far, Far::There(_)) {
            self.left = Some(Instant::now() + LEAVING);
            self.shared.with(|v| v.drain(self.id));
        }
    }

    fn lose_patience(&mut self) {
        self.until = None;
        self.shared.with(|v| v.fail(self.id));
        tracing::error!(export = self.terms.export, "no server came: requests fail");
    }

    /// Ends the session with the server in order.
    fn say_good_bye(&mut self) {
        use crate::wire::request::{Request, kind};
        if let Far::There(line) = &self.far {
            let mut out = Vec::new();
            let bye = Request {
                flags: 0,
                kind: kind::DISC,
                cookie: 0,
                offset: 0,
                length: 0,
            };
            bye.emit(self.terms.style, &mut out);
            // It sees the end of the connection, too.
            drop(line.try_write(&[IoSlice::new(&out)]));
        }
    }
}

impl Volume {
    /// Whether the client is listened to, and whether bytes wait for it and for the server.
    pub(super) fn wants(&self, id: SeatId) -> (bool, bool, bool) {
        let seat = self.seats.get(&id);
        let waits = |out: fn(&crate::hold::volume::Seat) -> &Outbox| {
            seat.is_some_and(|seat| out(seat).len() > 0)
        };
        (
            self.takes(id),
            waits(|s| &s.to_client),
            waits(|s| &s.to_server),
        )
    }

    fn write_server(
        &mut self,
        id: SeatId,
        f: impl FnOnce(&mut Outbox) -> io::Result<bool>,
    ) -> io::Result<bool> {
        self.seats
            .get_mut(&id)
            .map_or(Ok(false), |s| f(&mut s.to_server))
    }

    fn write_client(
        &mut self,
        id: SeatId,
        f: impl FnOnce(&mut Outbox) -> io::Result<bool>,
    ) -> io::Result<bool> {
        let done = self.seats.get_mut(&id);
        let done = done.map_or(Ok(false), |s| f(&mut s.to_client));
        self.charge_untaken(id);
        done
    }
}
