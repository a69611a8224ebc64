//! A store that tells when a descriptor is put in force: what a client reads and writes in the
//! middle of an operation, without a second thread.

use std::path::Path;
use std::sync::{Arc, Mutex};

use ploop::disk::open::DESCRIPTOR;
use ploop::error::Result;
use ploop::store::Store;

type Call = Box<dyn FnMut() + Send>;

/// See the module text.
#[derive(Debug)]
pub struct Hooked {
    inner: Arc<dyn Store>,
    hook: Hook,
}

/// What is called, when somebody wants to be called.
#[derive(Clone, Default)]
pub struct Hook(Arc<Mutex<Option<Call>>>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

impl Hook {
    /// Calls `call` before each rename of a descriptor in `work`.
    pub fn during<T>(&self, call: Call, work: impl FnOnce() -> T) -> T {
        *self.0.lock().unwrap() = Some(call);
        let done = work();
        *self.0.lock().unwrap() = None;
        done
    }

    fn call(&self) {
        // Not called in the middle of itself.
        let taken = self.0.lock().unwrap().take();
        if let Some(mut call) = taken {
            call();
            *self.0.lock().unwrap() = Some(call);
        }
    }
}

impl Hooked {
    /// Files of `inner`, and who is called.
    pub fn on(inner: Arc<dyn Store>) -> (Arc<dyn Store>, Hook) {
        let hook = Hook::default();
        let hooked = Hooked {
            inner,
            hook: hook.clone(),
        };
        (Arc::new(hooked), hook)
    }
}

impl Store for Hooked {
    ploop::delegate! {
        open, create, rename_new, hard_link, remove_file, create_dir, remove_dir, sync_dir,
        file_system, list, kind, resolve,
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        if to.file_name().is_some_and(|n| n == DESCRIPTOR) {
            self.hook.call();
        }
        self.inner.rename(from, to)
    }
}
