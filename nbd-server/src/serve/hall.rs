//! All connections: who is connected to what, what passed, and an end to them on request.
//!
//! Every connection has a [`Seat`] from its acceptance to its last instant, and the seat goes after
//! the device: a connection that is no longer in the book holds no export. While a handshake has an
//! export open, or is opening it, the seat has that name, so that ending the clients of an export
//! misses nobody.

use std::collections::HashMap;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use ploop::error::{Error, Kind, Result};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc as channel};

use super::connection::{self, Socket};
use super::greet::{Greeted, Later};
use super::plane::Plane;
use super::server::Config;
use super::traffic::{Past, Totals};
use crate::export::{Counters, ExportInfo, Exports, OpenExport};
use crate::session::Negotiated;

/// Stack of a connection's thread. The engine's buffers are on the heap.
const STACK: usize = 512 << 10;

/// The connections of a [`super::Server`]; a cheap clone, good before, while and after it runs.
#[derive(Clone, Debug)]
pub struct Connections(Arc<Hall>);

/// A client that uses an export.
#[derive(Clone, Debug)]
pub struct Connected {
    /// Its number; never given twice by one server.
    pub id: u64,
    /// The export's own name.
    pub export: String,
    /// Who it is, as far as the socket tells.
    pub peer: String,
    /// When its handshake was complete.
    pub since: SystemTime,
    /// What it did; goes on counting.
    pub counters: Arc<Counters>,
}

impl Connections {
    pub(super) fn new(hall: Arc<Hall>) -> Connections {
        Connections(hall)
    }

    /// The clients that use an export, in the order in which they came. Those that are still in
    /// the handshake are not among them.
    pub fn list(&self) -> Vec<Connected> {
        let book = self.0.book();
        let connected = book.seated.iter().filter(|(_, e)| e.socket.is_some());
        let mut all: Vec<_> = connected
            .map(|(&id, e)| Connected {
                id,
                export: e.export().to_owned(),
                peer: e.peer.clone(),
                since: e.since,
                counters: e.counters.clone(),
            })
            .collect();
        drop(book);
        all.sort_by_key(|c| c.id);
        all
    }

    /// Who uses the exports that `which` says, without those whose client has hung up already: for
    /// these it waits, at most `patience` in all. Blocks.
    pub fn staying(&self, which: impl Fn(&str) -> bool, patience: Duration) -> Vec<Connected> {
        self.0.wait_for_leaving(&which, patience);
        let mut all = self.list();
        all.retain(|c| which(&c.export));
        all
    }

    /// How many clients each export has; those without any are not in it.
    pub fn clients(&self) -> HashMap<String, usize> {
        let mut clients = HashMap::new();
        for c in self.list() {
            *clients.entry(c.export).or_default() += 1;
        }
        clients
    }

    /// What passed through each export since the server was made, by name; those of long ago
    /// together under [`super::traffic::OTHERS`].
    pub fn totals(&self) -> Vec<(String, Totals)> {
        let book = self.0.book();
        let live = book.seated.values().filter(|e| e.socket.is_some());
        book.past
            .with(live.map(|e| (e.export(), Totals::of(&e.counters))))
    }

    /// Ends the connections to the export of that name: cuts their sockets, and waits at most
    /// `patience` until they have let go of it. Returns how many there were. What they had been
    /// answered is done; other requests may be done or not. Whoever connects meanwhile is not
    /// touched: close the export's door first. Error: `InUse` when some are still there. Blocks.
    pub fn end(&self, export: &str, patience: Duration) -> Result<usize> {
        self.end_where(|name| name == export, patience)
    }

    /// The same for every export that `which` says.
    pub fn end_where(&self, which: impl Fn(&str) -> bool, patience: Duration) -> Result<usize> {
        self.0
            .end(|_, e| e.names.iter().any(|name| which(name)), patience)
    }

    /// Ends one connection. Error: `NotFound`, and as for [`Connections::end`].
    pub fn end_id(&self, id: u64, patience: Duration) -> Result<()> {
        match self.0.end(|other, _| other == id, patience)? {
            0 => {
                let what = format!("there is no connection {id}");
                Err(Error::new(Kind::NotFound, what))
            }
            _ => Ok(()),
        }
    }
}

/// What all connections share.
#[derive(Debug)]
pub(super) struct Hall {
    pub(super) exports: Arc<dyn Exports>,
    pub(super) config: Config,
    pub(super) plane: Arc<Plane>,
    /// Places for connections; their number.
    pub(super) slots: Arc<Semaphore>,
    pub(super) max: u32,
    pub(super) stopping: AtomicBool,
    book: Mutex<Book>,
    /// Somebody left.
    left: Condvar,
    ended: channel::UnboundedSender<()>,
}

#[derive(Debug, Default)]
struct Book {
    next: u64,
    seated: HashMap<u64, Entry>,
    past: Past,
    /// Threads at their last instruction.
    finished: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Entry {
    /// The export that is being opened or is open; its own name last.
    names: Vec<String>,
    peer: String,
    since: SystemTime,
    counters: Arc<Counters>,
    cut: Arc<Cut>,
    /// From the end of the handshake on.
    socket: Option<Arc<Socket>>,
    thread: Option<JoinHandle<()>>,
}

impl Entry {
    fn export(&self) -> &str {
        self.names.last().map_or("", String::as_str)
    }

    fn cut(&self) {
        self.cut.set();
        if let Some(socket) = &self.socket {
            socket.shutdown(Shutdown::Both);
        }
    }
}

/// The word that a connection is to end now.
#[derive(Debug, Default)]
pub(super) struct Cut {
    said: AtomicBool,
    notify: Notify,
}

impl Cut {
    fn set(&self) {
        self.said.store(true, Ordering::Release);
        self.notify.notify_one();
    }

    pub(super) fn is_set(&self) -> bool {
        self.said.load(Ordering::Acquire)
    }

    /// Waits for it. For one waiter.
    pub(super) async fn wait(&self) {
        while !self.is_set() {
            self.notify.notified().await;
        }
    }
}

impl Hall {
    /// A hall, and where the end of each connection is told.
    pub(super) fn new(
        exports: Arc<dyn Exports>,
        config: Config,
    ) -> (Arc<Hall>, channel::UnboundedReceiver<()>) {
        let (ended, ends) = channel::unbounded_channel();
        let max = config
            .max_connections
            .clamp(1, Semaphore::MAX_PERMITS as u32);
        let hall = Hall {
            exports,
            plane: Plane::new(config.engine),
            config,
            slots: Arc::new(Semaphore::new(max as usize)),
            max,
            stopping: AtomicBool::new(false),
            book: Mutex::default(),
            left: Condvar::new(),
            ended,
        };
        (Arc::new(hall), ends)
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // The book is whole between two statements, whatever panicked.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A seat for a connection that was accepted.
    pub(super) fn seat(self: &Arc<Self>, slot: OwnedSemaphorePermit, peer: &str) -> Seat {
        let cut = Arc::new(Cut::default());
        let entry = Entry {
            names: Vec::new(),
            peer: peer.to_owned(),
            since: SystemTime::now(),
            counters: Arc::default(),
            cut: cut.clone(),
            socket: None,
            thread: None,
        };
        let mut book = self.book();
        let id = book.next;
        book.next += 1;
        book.seated.insert(id, entry);
        drop(book);
        Seat {
            id,
            cut,
            hall: self.clone(),
            _slot: slot,
        }
    }

    /// Gives a negotiated connection its thread.
    pub(super) fn start(&self, socket: Socket, guest: Later<(Box<Negotiated>, Greeted)>) {
        let id = guest.get().1.seat.id;
        let socket = Arc::new(socket);
        let shared = socket.clone();
        let (hand, taken) = mpsc::sync_channel::<Later<(Box<Negotiated>, Greeted)>>(1);
        let thread = std::thread::Builder::new()
            .name(format!("nbd-{id}"))
            .stack_size(STACK);
        // The lock is held until the socket and the thread are entered: whoever stops the server,
        // or ends this connection, sees both. The guest is handed over behind it.
        let mut book = self.book();
        if self.stopping.load(Ordering::Acquire) {
            return drop(book);
        }
        let spawned = thread.spawn(move || {
            let Ok(guest) = taken.recv() else { return };
            let (negotiated, greeted) = guest.take();
            let Greeted { input, seat, .. } = greeted.without_handshake();
            seat.serve(&shared, *negotiated, input);
            drop(shared);
            drop(seat);
        });
        match (spawned, book.seated.get_mut(&id)) {
            (Ok(thread), Some(entry)) if !entry.cut.is_set() => {
                entry.thread = Some(thread);
                entry.socket = Some(socket);
                entry.since = SystemTime::now();
                drop(book);
                // The thread waits for it; there is room for one.
                drop(hand.send(guest));
            }
            (Ok(_), _) => drop(book),
            (Err(e), _) => {
                drop(book);
                tracing::error!(error = %e, "no thread for a connection; it is closed");
            }
        }
    }

    /// Waits for the threads that are at their end.
    pub(super) fn join(&self) {
        let finished = std::mem::take(&mut self.book().finished);
        for thread in finished {
            if thread.join().is_err() {
                tracing::error!("a connection ended in a panic; please report it");
            }
        }
    }

    /// No more of what the clients send is taken.
    pub(super) fn close_inputs(&self) {
        for entry in self.book().seated.values() {
            if let Some(socket) = &entry.socket {
                socket.shutdown(Shutdown::Read);
            }
        }
    }

    /// Cuts all connections.
    pub(super) fn cut_all(&self) {
        self.book().seated.values().for_each(Entry::cut);
    }

    fn wait_for_leaving(&self, which: impl Fn(&str) -> bool, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut book = self.book();
        let leaving = |e: &Entry| {
            let gone = || e.socket.as_ref().is_some_and(|s| s.hung_up());
            which(e.export()) && gone()
        };
        while book.seated.values().any(leaving) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.left.wait_timeout(book, left);
            book = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn end(&self, which: impl Fn(u64, &Entry) -> bool, patience: Duration) -> Result<usize> {
        let deadline = Instant::now() + patience;
        let mut book = self.book();
        let chosen = book.seated.iter().filter(|&(&id, e)| which(id, e));
        let chosen = chosen.inspect(|(_, e)| e.cut());
        let ids: Vec<u64> = chosen.map(|(&id, _)| id).collect();
        loop {
            let there = |id: &&u64| book.seated.contains_key(*id);
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(first) = ids.iter().find(there) else {
                return Ok(ids.len());
            };
            if left.is_zero() {
                let count = ids.iter().filter(there).count();
                let peer = &book.seated[first].peer;
                let what = format!(
                    "{count} connections did not end within {} s; the first is {first} of {peer}",
                    patience.as_secs_f64()
                );
                return Err(Error::new(Kind::InUse, what).fix("Try again in a moment"));
            }
            let waited = self.left.wait_timeout(book, left);
            book = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A connection's place among all of them; free again when dropped.
#[derive(Debug)]
pub(super) struct Seat {
    id: u64,
    pub(super) cut: Arc<Cut>,
    hall: Arc<Hall>,
    /// Goes last, behind the entry in the book.
    _slot: OwnedSemaphorePermit,
}

impl Seat {
    fn set_names(&self, names: Vec<String>) {
        if let Some(entry) = self.hall.book().seated.get_mut(&self.id) {
            entry.names = names;
        }
    }

    /// Serves on the calling thread, to the end of the connection.
    fn serve(&self, socket: &Socket, negotiated: Negotiated, input: Vec<u8>) {
        let book = self.hall.book();
        let Some(entry) = book.seated.get(&self.id) else {
            return;
        };
        let (peer, counters) = (entry.peer.clone(), entry.counters.clone());
        drop(book);
        let session = connection::Session {
            socket,
            peer: &peer,
            counters,
            plane: &self.hall.plane,
            stopping: &self.hall.stopping,
            cut: &self.cut,
        };
        session.run(negotiated, input);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut book = self.hall.book();
        if let Some(entry) = book.seated.remove(&self.id) {
            if entry.socket.is_some() {
                book.past.add(entry.export(), &Totals::of(&entry.counters));
            }
            book.finished.extend(entry.thread);
        }
        drop(book);
        self.hall.left.notify_all();
        // Nobody listens any more when the server has already joined all threads.
        self.hall.ended.send(()).ok();
    }
}

/// The exports as one handshake sees them: its seat has the name of what it opens, from before.
#[derive(Debug)]
pub(super) struct Watched<'a> {
    pub(super) exports: &'a dyn Exports,
    pub(super) seat: &'a Seat,
}

impl Exports for Watched<'_> {
    fn list(&self) -> Result<Vec<ExportInfo>> {
        self.exports.list()
    }

    fn open(&self, name: &str) -> Result<OpenExport> {
        self.seat.set_names(vec![name.to_owned()]);
        let opened = self.exports.open(name);
        let names = match &opened {
            Ok(export) if export.name != name => vec![name.to_owned(), export.name.clone()],
            Ok(_) => vec![name.to_owned()],
            Err(_) => Vec::new(),
        };
        self.seat.set_names(names);
        opened
    }

    fn tracker_names(&self, export: &OpenExport) -> Result<HashMap<String, String>> {
        self.exports.tracker_names(export)
    }
}
