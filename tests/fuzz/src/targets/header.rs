//! The 64 bytes of a ploop image. Input: length of the file (8), header.

use std::path::Path;

use ploop::format::ploop::header::{HEADER_BYTES, IN_USE_DIRTY, Unchecked};
use ploop::store::{SECTOR, Store};
use ploop::verify::explain_header;

use super::store;

/// Parses; what is accepted has numbers that can be computed with, and the same bytes again.
pub fn run(input: &[u8]) {
    let Some((len, head)) = input.split_first_chunk() else {
        return;
    };
    let len = u64::from_le_bytes(*len) & i64::MAX as u64;
    let store = store();
    let file = store.create(Path::new("/d/image.hds"), 0o600).unwrap();
    file.set_len(len).unwrap();
    let kept = (head.len() as u64).min(len) as usize;
    file.write_at(&head[..kept], 0).unwrap();
    let explained = explain_header(file.as_ref()).unwrap();
    let Ok(unchecked) = Unchecked::parse(&head[..kept]) else {
        return;
    };
    let header = match unchecked.check(len) {
        Ok(header) => header,
        Err(e) => {
            assert!(e.offset().is_some_and(|at| at < HEADER_BYTES), "{e}");
            return;
        }
    };
    drop(explained);
    assert_eq!(header.bytes(), &head[..HEADER_BYTES as usize]);
    let again = Unchecked::parse(header.bytes())
        .unwrap()
        .check(len)
        .unwrap();
    assert_eq!(again, header);
    let marked = header.marked(IN_USE_DIRTY);
    assert!(marked.dirty());
    assert_eq!(
        Unchecked::parse(marked.bytes())
            .unwrap()
            .check(len)
            .unwrap(),
        marked
    );
    assert!(header.size() <= i64::MAX as u64);
    assert!(header.clusters() <= header.size() / SECTOR);
    assert!(header.data_start >= HEADER_BYTES + 4 * u64::from(header.entries));
    for entry in [1, header.entries, u32::MAX] {
        let offset = header.entry_offset(entry);
        assert_eq!(header.entry_for(offset), Some(entry));
    }
}
