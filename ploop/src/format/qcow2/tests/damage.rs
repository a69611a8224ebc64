//! What is damaged is refused or a fault, never invented, never a panic.

use super::*;
use crate::error::Kind;

/// Opens, maps and reads everything that a damaged image still offers; what it maps to must lie
/// in the file and on no table.
fn exercise(file: Arc<dyn StoreFile>) {
    let len = file.len().unwrap();
    let Ok(delta) = Qcow2Delta::open(file) else {
        return;
    };
    assert!(delta.size() <= 1 << 20, "a size that no table covers");
    let mut runs = Vec::new();
    if delta.map(0..delta.size(), &mut runs).is_err() {
        return;
    }
    let mut next = 0;
    for run in runs {
        assert_eq!(run.offset, next, "a gap in the map");
        next += run.len;
        let mut buf = vec![0; run.len as usize];
        match run.place {
            Place::File(at) => {
                assert!(at >= delta.cluster_bytes(), "guest bytes from the header");
                assert!(
                    at + run.len <= len,
                    "guest bytes from past the end of the file"
                );
            }
            Place::Through => drop(delta.read(run.offset, &mut buf)),
            Place::Fault => {
                let e = delta.fault(run.offset);
                assert_eq!(e.kind(), Kind::Corrupt, "{e}");
                assert!(e.path().is_some() && e.offset().is_some(), "{e}");
            }
            Place::Parent | Place::Zero => {}
        }
    }
    assert_eq!(next, delta.size());
}

#[test]
fn every_prefix_of_an_image_is_refused_or_reads_what_it_has() {
    let image = Image::new();
    image.write();
    let writable = std::fs::OpenOptions::new()
        .write(true)
        .open(image.path())
        .unwrap();
    for len in (0..=image.bytes.len() as u64).rev() {
        writable.set_len(len).unwrap();
        let file = RealStore.open(&image.path(), Access::Read).unwrap();
        if len < (L1 + 16) as u64 {
            assert!(
                Qcow2Delta::open(file.clone()).is_err(),
                "{len} bytes hold no L1 table"
            );
        }
        exercise(file);
    }
}

#[test]
fn every_changed_bit_of_header_and_tables_is_contained() {
    let image = Image::new();
    let file = image.write();
    let writable = RealStore.open(&image.path(), Access::Write).unwrap();
    let tables = (0..112)
        .chain(L1..L1 + 16)
        .chain(L2[0]..L2[0] + 40)
        .chain(L2[1]..L2[1] + 64);
    for at in tables {
        let was = image.bytes[at];
        for byte in (0..8).map(|bit| was ^ 1 << bit).chain([0, 0xff, 0x7f]) {
            writable.write_at(&[byte], at as u64).unwrap();
            exercise(file.clone());
        }
        writable.write_at(&[was], at as u64).unwrap();
    }
}

/// A deflate stream has no checksum; the length of a stored block is written twice, though.
#[test]
fn a_compressed_stream_that_contradicts_itself_is_an_error() {
    let mut image = Image::new();
    for at in PACKED + 1..PACKED + 5 {
        let was = image.bytes[at];
        for bit in 0..8 {
            image.bytes[at] = was ^ 1 << bit;
            let mut buf = [0; CLUSTER];
            let e = image
                .open()
                .unwrap()
                .read(CLUSTER as u64, &mut buf)
                .unwrap_err();
            assert_eq!(
                (e.kind(), e.offset()),
                (Kind::Corrupt, Some(PACKED as u64)),
                "{e}"
            );
            assert!(e.to_string().contains("does not inflate"), "{e}");
        }
        image.bytes[at] = was;
    }
}

#[test]
fn a_stream_that_ends_early_is_an_error() {
    let mut image = Image::new();
    image.packed(&stored(true, &[0xc3; 100]));
    let mut buf = [0; CLUSTER];
    let e = image
        .open()
        .unwrap()
        .read(CLUSTER as u64, &mut buf)
        .unwrap_err();
    assert_eq!((e.kind(), e.offset()), (Kind::Corrupt, Some(PACKED as u64)));
    assert!(
        e.to_string().contains("ends before the cluster is full"),
        "{e}"
    );
}

/// The stream first copies three bytes from before its own beginning, then fills the cluster.
#[test]
fn a_stream_that_copies_what_it_never_wrote_is_an_error() {
    let mut image = Image::new();
    // Fixed codes: block header 0 01, length 3, distance 1, end of block; then a stored block's
    // own header (1 00) and padding.
    let bits = "010" /* not last, type 1, low bit first */
        .chars()
        .chain("0000001".chars())
        .chain("00000".chars())
        .chain("0000000".chars())
        .chain("100".chars());
    let mut stream = vec![0u8; 4];
    for (i, bit) in bits.enumerate() {
        stream[i / 8] |= u8::from(bit == '1') << (i % 8);
    }
    stream.extend(&stored(true, &[0xc3; CLUSTER - 3])[1..]);
    image.packed(&stream);
    let mut buf = [0; CLUSTER];
    let e = image
        .open()
        .unwrap()
        .read(CLUSTER as u64, &mut buf)
        .unwrap_err();
    assert!(
        e.to_string().contains("ends before the cluster is full"),
        "{e}"
    );
}

/// Each: what is written where, and a word of the refusal.
#[test]
fn headers_that_cannot_be_right_are_refused_by_name() {
    type Poke = fn(&mut Image) -> &mut Image;
    let cases: [(Poke, Kind, &str); 22] = [
        (|i| i.be32(0, 0), Kind::Corrupt, "not a qcow2 image"),
        (|i| i.be32(4, 4), Kind::Unsupported, "version 4"),
        (|i| i.be32(20, 8), Kind::Corrupt, "cluster_bits is 8"),
        (|i| i.be32(20, 22), Kind::Corrupt, "cluster_bits is 22"),
        (|i| i.be64(24, SIZE + 1), Kind::Corrupt, "not a multiple"),
        (
            |i| i.be64(24, 1 << 62),
            Kind::Corrupt,
            "L1 table has 2 entries",
        ),
        (|i| i.be32(32, 1), Kind::Unsupported, "AES"),
        (|i| i.be32(32, 2), Kind::Unsupported, "LUKS"),
        (
            |i| i.be32(36, 0x7fff_ffff),
            Kind::Corrupt,
            "more than any valid image",
        ),
        (|i| i.be32(36, 1), Kind::Corrupt, "needs 2"),
        (
            |i| i.be64(40, L1 as u64 + 8),
            Kind::Corrupt,
            "cluster boundary",
        ),
        (
            |i| i.be64(40, 1 << 40),
            Kind::Corrupt,
            "not inside the file",
        ),
        (
            |i| i.be64(40, CLUSTER as u64),
            Kind::Corrupt,
            "on the refcount table",
        ),
        (|i| i.be64(72, 1 << 1), Kind::Corrupt, "marked corrupt"),
        (
            |i| i.be64(72, 1 << 2),
            Kind::Unsupported,
            "external data file",
        ),
        (|i| i.be64(72, 1 << 3), Kind::Corrupt, "contradicts"),
        (|i| i.be64(72, 1 << 4), Kind::Unsupported, "extended L2"),
        (
            |i| i.be64(72, 1 << 40),
            Kind::Unsupported,
            "unknown feature, incompatible bit 40",
        ),
        (|i| i.be32(96, 7), Kind::Corrupt, "refcount order"),
        (|i| i.be32(100, 100), Kind::Corrupt, "100 bytes long"),
        (
            |i| i.be64(8, 1 << 40).be32(16, 5),
            Kind::Corrupt,
            "backing file name",
        ),
        (
            |i| i.be64(8, 200).be32(16, 1024),
            Kind::Corrupt,
            "backing file name",
        ),
    ];
    for (poke, kind, word) in cases {
        let mut image = Image::new();
        let e = poke(&mut image).open().unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(word), "{word}: {e}");
        assert_eq!(e.path(), Some(image.path().as_path()));
    }
}

#[test]
fn zstd_and_named_features_are_refused_by_their_names() {
    let mut image = Image::new();
    image.be64(72, 1 << 3).be32(100, 112).bytes[104] = 1;
    assert!(image.open().unwrap_err().to_string().contains("zstd"));

    let mut image = Image::new();
    image
        .be64(72, 1 << 9)
        .be32(104, 0x6803_f857)
        .be32(108, 48)
        .bytes[113] = 9;
    image.bytes[114..119].copy_from_slice(b"no\nse");
    let e = image.open().unwrap_err().to_string();
    assert!(e.contains(r#""no\nse""#), "the name, made harmless: {e}");
}

#[test]
fn an_extension_that_leaves_its_place_is_refused() {
    let mut image = Image::new();
    image.be32(104, 0x1234_5678).be32(108, 1000);
    assert!(
        image
            .open()
            .unwrap_err()
            .to_string()
            .contains("leaves its place")
    );
    image.be32(108, u32::MAX);
    assert!(image.open().is_err());
}

/// Each: an L2 entry, the version, and a word of the fault. The clusters around stay readable.
#[test]
fn bad_l2_entries_cost_their_own_cluster() {
    let past = 10 * CLUSTER as u64;
    let cases: [(u64, u32, &str); 13] = [
        (COPIED | past, 3, "past the end"),
        (COPIED | 1 << 50, 3, "past the end"),
        (COPIED | DATA as u64 | 2, 3, "reserves"),
        (COPIED | DATA as u64 | 1 << 60, 3, "reserves"),
        (1, 2, "version 2"),
        (L1 as u64, 3, "the L1 table"),
        (CLUSTER as u64, 3, "the refcount table"),
        (L2[0] as u64, 3, "an L2 table"),
        (L2[1] as u64, 3, "an L2 table"),
        (1 << 62 | COPIED | PACKED as u64, 3, "at once"),
        (1 << 62 | past, 3, "past the end"),
        (1 << 62 | 1 << 61 | (past - 512), 3, "past the end"),
        (1 << 62 | 1 << 61 | (L1 as u64 - 1), 3, "the L1 table"),
    ];
    for (entry, version, word) in cases {
        let mut image = Image::new();
        image.be32(4, version).be64(L2[0], entry);
        if version == 2 {
            image.be64(L2[0] + 16, 0);
        }
        let delta = image.open().unwrap();
        let runs = map(&delta);
        assert_eq!(
            (runs[0].len, runs[0].place),
            (CLUSTER as u64, Place::Fault),
            "{entry:#x}"
        );
        assert_eq!(runs[1].place, Place::Through);
        let e = delta.fault(17);
        assert!(e.to_string().contains(word), "{word}: {e}");
        assert_eq!(e.offset(), Some(L2[0] as u64));
        let mut buf = [0; 8];
        assert!(delta.read(0, &mut buf).is_err());
    }
}

/// With clusters larger than a sector an entry can be off the grid.
#[test]
fn an_entry_off_the_grid_is_a_fault() {
    let dir = tempfile::tempdir().unwrap();
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "a", "1M"],
        dir.path(),
    );
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write 0 128k", "a"],
        dir.path(),
    );
    let file = RealStore
        .open(&dir.path().join("a"), Access::Write)
        .unwrap();
    let mut raw = [0; 8];
    file.read_at(&mut raw, 0x4_0000).unwrap();
    let entry = u64::from_be_bytes(raw);
    for zero in [0, 1] {
        file.write_at(&((entry + 512) | zero).to_be_bytes(), 0x4_0000)
            .unwrap();
        let delta = Qcow2Delta::open(file.clone()).unwrap();
        assert_eq!(map(&delta)[0].place, Place::Fault);
        assert!(delta.fault(0).to_string().contains("off the cluster grid"));
    }
}

#[test]
fn bad_l1_entries_cost_their_own_range() {
    for entry in [
        1,
        1 << 60,
        COPIED | 1 << 50,
        CLUSTER as u64,
        L1 as u64,
        10 * CLUSTER as u64,
    ] {
        let mut image = Image::new();
        let delta = image.be64(L1 + 8, entry).open().unwrap();
        let last = *map(&delta).last().unwrap();
        let range = (last.offset, last.len, last.place);
        assert_eq!(
            range,
            (64 * CLUSTER as u64, 6 * CLUSTER as u64, Place::Fault),
            "{entry:#x}"
        );
        assert_eq!(delta.fault(SIZE - 1).offset(), Some(L1 as u64 + 8));
    }
}

#[test]
fn an_l2_table_named_twice_refuses_the_image() {
    let mut image = Image::new();
    let e = image.be64(L1 + 8, L2[0] as u64).open().unwrap_err();
    assert!(e.to_string().contains("two L1 entries"), "{e}");
}

/// The claims of 2^22 L1 entries and their tables fit no file of this length.
#[test]
fn work_and_memory_follow_the_file_not_its_claims() {
    let mut image = Image::new();
    let entries = (32 << 20) / 8;
    image.be64(24, entries * 64 * 512).be32(36, entries as u32);
    assert!(
        image
            .open()
            .unwrap_err()
            .to_string()
            .contains("not inside the file")
    );
}

#[test]
fn an_image_that_changes_while_open_is_still_contained() {
    let image = Image::new();
    let delta = image.open().unwrap();
    let writable = RealStore.open(&image.path(), Access::Write).unwrap();
    writable
        .write_at(&(COPIED | 1 << 40).to_be_bytes(), L2[0] as u64)
        .unwrap();
    assert_eq!(map(&delta)[0].place, Place::Fault);
    writable.write_at(&[0; 8], L2[0] as u64 + 8).unwrap();
    let mut buf = [0; CLUSTER];
    let e = delta.read(CLUSTER as u64, &mut buf).unwrap_err();
    assert!(e.to_string().contains("changed while in use"), "{e}");
    writable.set_len(100).unwrap();
    let mut runs = Vec::new();
    assert!(delta.map(0..SIZE, &mut runs).is_err());
}
