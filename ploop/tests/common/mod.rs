//! A disk in memory, on a base or not, whose bytes are charged to an account.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::Path;
use std::sync::Arc;

use ploop::account::{Account, GRANULE};
use ploop::chain::Chain;
use ploop::disk::Disk;
use ploop::format::ploop::held::granules_in;
use ploop::format::ploop::journal::Home;
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{self as fmt, Header, PloopDelta};
use ploop::store::memory::MemoryStore;
use ploop::store::{Access, Store};

pub(crate) const TOP: &str = "/disk/top";
pub(crate) const BASE: &str = "/disk/base";

/// Makes the empty image of a disk, and a base under it where there is somebody to write it.
pub(crate) fn make(store: &dyn Store, header: &Header, base: Option<&dyn Fn(&Disk)>) {
    store.create_dir(Path::new("/disk")).unwrap();
    store.create_dir(Path::new("/disk/.ploop")).unwrap();
    fmt::create(store, Path::new(TOP), header, 0o600).unwrap();
    if let Some(write) = base {
        let file = fmt::create(store, Path::new(BASE), header, 0o600).unwrap();
        let base = Disk::writable(None, Top::open(file).unwrap(), None).unwrap();
        write(&base);
        base.close().unwrap();
    }
}

/// The same in a store of its own.
pub(crate) fn made(header: &Header, base: Option<&dyn Fn(&Disk)>) -> Arc<dyn Store> {
    let store = Arc::new(MemoryStore::new());
    make(store.as_ref(), header, base);
    store
}

/// The disk, with its base if it has one.
pub(crate) fn open(store: &Arc<dyn Store>, account: &Arc<Account>) -> Disk {
    let home = Home::of(store, Path::new(TOP));
    let top = Top::open_at(store.open(Path::new(TOP), Access::Write).unwrap(), home);
    let top = top.unwrap().charged_to(account.clone()).unwrap();
    let base = store.kind(Path::new(BASE)).unwrap();
    Disk::writable(base.map(|_| sealed(store)), top, None).unwrap()
}

/// The base alone.
pub(crate) fn sealed(store: &Arc<dyn Store>) -> Arc<Chain> {
    let file = store.open(Path::new(BASE), Access::Read).unwrap();
    Arc::new(Chain::new(vec![Arc::new(PloopDelta::open(file).unwrap())]).unwrap())
}

/// Bytes that the top's file holds, past the code that counts.
pub(crate) fn held(store: &Arc<dyn Store>) -> u64 {
    let file = store.open(Path::new(TOP), Access::Read).unwrap();
    granules_in(file.as_ref(), 0..file.len().unwrap()).unwrap() * GRANULE
}
