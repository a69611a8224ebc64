//! Something between two services that knows where a frame ends, and does with it what the test says.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ploop_tests::holder::unix;
use tempfile::TempDir;

/// Frames, by their types.
pub(crate) const PREPARE: u8 = 8;
pub(crate) const SAYS: u8 = 9;
pub(crate) const HAVE: u8 = 13;
pub(crate) const READY: u8 = 35;
pub(crate) const ANSWER: u8 = 36;
pub(crate) const REFUSED: u8 = 37;
pub(crate) const WANT: u8 = 39;

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToDestination,
    ToSource,
}

/// What becomes of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The frame goes on.
    Pass,
    /// It goes on, and is the last.
    Last,
    /// It does not go on, and nothing does.
    Cut,
    /// It does not go on, and neither side learns of that.
    Hold,
}

/// A frame on its way: the link's number, its direction, its bytes.
pub(crate) struct Frame<'a> {
    pub(crate) link: u64,
    pub(crate) way: Way,
    pub(crate) bytes: &'a mut Vec<u8>,
}

impl Frame<'_> {
    pub(crate) fn kind(&self) -> u8 {
        self.bytes[0]
    }
}

type Judge = Box<dyn FnMut(Frame<'_>) -> Flow + Send>;

struct Inner {
    to: PathBuf,
    open: AtomicBool,
    ended: AtomicBool,
    links: AtomicU64,
    sockets: Mutex<Vec<UnixStream>>,
    judge: Mutex<Judge>,
}

/// It ends with its drop.
pub(crate) struct Proxy {
    inner: Arc<Inner>,
    dir: TempDir,
}

impl Proxy {
    /// In front of the socket `to`; all goes through as it is.
    pub(crate) fn new(to: &Path) -> Proxy {
        let dir = tempfile::Builder::new().prefix("ploop-p-").tempdir();
        let dir = dir.unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let inner = Arc::new(Inner {
            to: to.to_owned(),
            open: AtomicBool::new(true),
            ended: AtomicBool::new(false),
            links: AtomicU64::new(0),
            sockets: Mutex::default(),
            judge: Mutex::new(Box::new(|_| Flow::Pass)),
        });
        let proxy = Proxy { inner, dir };
        let inner = proxy.inner.clone();
        std::thread::spawn(move || {
            while let Ok((from, _)) = listener.accept() {
                if inner.ended.load(Ordering::Acquire) {
                    return;
                }
                let to = match inner.open.load(Ordering::Acquire) {
                    true => UnixStream::connect(&inner.to),
                    false => continue,
                };
                // One that is not there: closed, as the real one would be.
                let Ok(to) = to else { continue };
                let link = inner.links.fetch_add(1, Ordering::AcqRel);
                let mut sockets = inner.sockets.lock().unwrap();
                sockets.extend([from.try_clone().unwrap(), to.try_clone().unwrap()]);
                for (way, from, to) in [
                    (Way::ToDestination, &from, &to),
                    (Way::ToSource, &to, &from),
                ] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let inner = inner.clone();
                    std::thread::spawn(move || carry(&inner, link, way, from, to));
                }
            }
        });
        proxy
    }

    /// Its address.
    pub(crate) fn address(&self) -> String {
        unix(&self.dir.path().join("s"))
    }

    /// Asks `judge` of every frame from now on.
    pub(crate) fn judge(&self, judge: impl FnMut(Frame<'_>) -> Flow + Send + 'static) {
        *self.inner.judge.lock().unwrap() = Box::new(judge);
    }

    /// What goes through the way of the source's frame `kind` is cut, or held, there; from then on
    /// nothing gets through before [`Proxy::open`].
    pub(crate) fn stop_at(&self, kind: u8, flow: Flow) {
        let inner = Arc::downgrade(&self.inner);
        self.judge(move |frame| match frame.kind() == kind {
            true => {
                if let Some(inner) = inner.upgrade() {
                    inner.open.store(false, Ordering::Release);
                }
                flow
            }
            false => Flow::Pass,
        });
    }

    /// Lets all through.
    pub(crate) fn open(&self) {
        self.judge(|_| Flow::Pass);
        self.inner.open.store(true, Ordering::Release);
    }

    /// Links go through the judge again.
    pub(crate) fn let_in(&self) {
        self.inner.open.store(true, Ordering::Release);
    }

    /// How many links came through.
    pub(crate) fn links(&self) -> u64 {
        self.inner.links.load(Ordering::Acquire)
    }

    /// Cuts all links.
    pub(crate) fn cut(&self) {
        for socket in self.inner.sockets.lock().unwrap().drain(..) {
            socket.shutdown(Shutdown::Both).ok();
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.inner.ended.store(true, Ordering::Release);
        UnixStream::connect(self.dir.path().join("s")).ok();
        self.cut();
    }
}

fn carry(inner: &Inner, link: u64, way: Way, mut from: UnixStream, mut to: UnixStream) {
    while let Some(mut bytes) = frame(&mut from) {
        let flow = (inner.judge.lock().unwrap())(Frame {
            link,
            way,
            bytes: &mut bytes,
        });
        match flow {
            Flow::Pass if to.write_all(&bytes).is_ok() => continue,
            // Until its sockets are cut.
            Flow::Hold => while frame(&mut from).is_some() {},
            Flow::Last => drop(to.write_all(&bytes)),
            _ => {}
        }
        break;
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}

/// The next one; `None` at the end. What is no frame is whatever comes.
fn frame(from: &mut UnixStream) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 12];
    from.read_exact(&mut bytes).ok()?;
    let len = u32::from_le_bytes(*bytes[4..].first_chunk().unwrap());
    bytes.resize(12 + len as usize, 0);
    from.read_exact(&mut bytes[12..]).ok()?;
    Some(bytes)
}
