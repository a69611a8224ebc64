//! A qcow2 image: header, refcounts, L1, L2, snapshots, bitmaps. Input: u16 sectors that the file
//! has beyond the bytes that follow, those bytes.

use std::path::Path;
use std::sync::Arc;

use fsck::Class;
use ploop::Kind;
use ploop::disk::open::{OpenOptions, Opener};
use ploop::store::memory::MemoryStore;
use ploop::store::{SECTOR, Store};

use super::{LOOK, image_at, store, u16_at};
use crate::files::files;
use crate::guest::read_to;

const IMAGE: &str = "/d/image.qcow2";

fn opener(store: &MemoryStore) -> Opener {
    Opener::on(Arc::new(store.clone()))
}

/// Checks, opens, reads. What is clean can be read.
pub fn run(input: &[u8]) {
    let Some((_, bytes)) = input.split_at_checked(2) else {
        return;
    };
    let store = store();
    let file = store.create(Path::new(IMAGE), 0o600).unwrap();
    file.write_at(bytes, 0).unwrap();
    let more = (u16_at(input, 0) & 0xfff) * SECTOR;
    file.set_len(bytes.len() as u64 + more).unwrap();
    let before = files(&store);
    let source = image_at(IMAGE);
    let options = OpenOptions::default();
    let shown = read_to(&store, &source, None, LOOK);
    match fsck::check(&opener(&store), &source, &options) {
        Ok(report) if report.class == Class::Clean => {
            let shown = shown.unwrap_or_else(|| {
                let e = opener(&store).open(&source, &options);
                panic!("clean, and does not open: {:?}", e.err())
            });
            drop(shown);
        }
        Ok(_) => {}
        // A file below that is not there, or a feature.
        Err(e) => assert!(
            matches!(e.kind(), Kind::Unsupported | Kind::NotFound),
            "check: {e}"
        ),
    }
    assert!(files(&store) == before, "a check wrote");
}
