//! What is told of memory and disk, and what is counted.

use super::*;

/// A file of `len` bytes, durable, and out of memory where the file system allows that.
fn cold(dir: &Path, len: usize) -> (Arc<dyn StoreFile>, Vec<u8>) {
    let path = dir.join("a");
    let file = RealStore.create(&path, 0o600).unwrap();
    let bytes: Vec<u8> = (0..len).map(|i| (i * 11 + i / 241) as u8).collect();
    file.write_at(&bytes, 0).unwrap();
    file.sync().unwrap();
    let advised = File::open(&path).unwrap();
    rustix::fs::fadvise(&advised, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    (file, bytes)
}

#[test]
fn what_is_read_now_is_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (file, bytes) = cold(dir.path(), 300_000);
    for (at, len) in [
        (0, 4096),
        (123_457, 100_000),
        (290_000, 20_000),
        (400_000, 512),
    ] {
        let mut buf = vec![0xee; len];
        let now = file.read_now(&mut buf, at as u64).unwrap();
        let had = bytes.get(at..).unwrap_or_default();
        let had = &had[..had.len().min(len)];
        // Where it is not in memory nothing is promised of the buffer.
        if let Some(got) = now {
            assert!(got == had.len() && buf[..got] == *had);
        }
        assert_eq!(file.read_at(&mut buf, at as u64).unwrap(), had.len());
        let again = file.read_now(&mut buf, at as u64).unwrap();
        if let Some(got) = again {
            assert!(got == had.len() && buf[..got] == *had);
        }
    }
    assert_eq!(file.read_now(&mut [], 0).unwrap(), Some(0));
}

#[test]
fn a_sync_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (file, _) = cold(dir.path(), 512);
    let before = syncs();
    file.sync().unwrap();
    assert!(syncs() > before);
}
