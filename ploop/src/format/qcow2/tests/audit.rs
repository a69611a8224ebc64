//! Refcounts: QEMU's own images of every width are sound, and whatever QEMU finds in a damaged one
//! is found here.

use super::*;

fn audit(path: &Path) -> Vec<AuditFinding> {
    let delta = Qcow2Delta::open(RealStore.open(path, Access::Read).unwrap()).unwrap();
    let mut found = Vec::new();
    delta.audit(&mut |f| found.push(f)).unwrap();
    found
}

fn kinds(found: &[AuditFinding]) -> Vec<AuditKind> {
    found.iter().map(|f| f.kind).collect()
}

/// An image with data, compressed clusters, preallocated zeros, a hole and, where a refcount of two
/// fits, snapshots and a bitmap.
fn by_qemu(dir: &Path, bits: u32) {
    let options = format!("cluster_size=4k,refcount_bits={bits}");
    run(
        "qemu-img",
        &["create", "-qf", "qcow2", "-o", &options, "d", "24M"],
        dir,
    );
    let io = |command: &str| run("qemu-io", &["-f", "qcow2", "-c", command, "d"], dir);
    io("write -P 1 0 300k");
    io("write -z 64k 32k");
    if bits > 1 {
        // Several compressed clusters share one of the file.
        io("write -c -P 2 8M 4k");
        io("write -c -P 3 8196k 4k");
        run("qemu-img", &["snapshot", "-c", "one", "d"], dir);
        io("write -P 4 128k 4k");
        run("qemu-img", &["snapshot", "-c", "two", "d"], dir);
        run("qemu-img", &["bitmap", "--add", "-g", "4k", "d", "b"], dir);
    }
    io("write -P 5 20M 64k");
}

fn qemu_is_content(dir: &Path) -> bool {
    let out = Command::new("qemu-img")
        .args(["check", "-q", "-f", "qcow2", "d"])
        .current_dir(dir)
        .output();
    out.unwrap().status.success()
}

#[test]
fn images_of_every_refcount_width_are_sound_and_what_qemu_finds_is_found() {
    let mut seed = 1u64;
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize % below
    };
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let dir = tempfile::tempdir().unwrap();
        by_qemu(dir.path(), bits);
        let path = dir.path().join("d");
        assert_eq!(audit(&path), [], "{bits} bits");
        let good = std::fs::read(&path).unwrap();
        let be64 = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
        let block = be64(be64(48));
        // So many bytes of the block are about clusters that are there.
        let counted = good.len() / 4096 * bits as usize / 8;
        for _ in 0..8 {
            let mut bytes = good.clone();
            let at = block + random(counted);
            bytes[at] ^= 1 << random(8);
            std::fs::write(&path, &bytes).unwrap();
            if !qemu_is_content(dir.path()) {
                assert_ne!(audit(&path), [], "{bits} bits, byte {at}");
            }
        }
    }
}

#[test]
fn a_wrong_flag_a_lost_block_and_a_leak_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    by_qemu(dir.path(), 16);
    let path = dir.path().join("d");
    let good = std::fs::read(&path).unwrap();
    let be64 = |b: &[u8], at: usize| u64::from_be_bytes(b[at..at + 8].try_into().unwrap());
    let try_out = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        assert!(!qemu_is_content(dir.path()));
        audit(&path)
    };
    // The L2 entry of 20 MiB: one owner, and says so.
    let l1 = be64(&good, 40) as usize + 10 * 8;
    let l2 = (be64(&good, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let host = be64(&good, l2) & 0x00ff_ffff_ffff_fe00;
    let found = try_out(&|b| b[l2] &= 0x7f);
    assert_eq!(kinds(&found), [AuditKind::CopiedFlag]);
    assert_eq!(
        (found[0].offset, found[0].cluster),
        (host, Some(host / 4096))
    );

    let found = try_out(&|b| b[l2..l2 + 8].fill(0));
    assert_eq!(kinds(&found), [AuditKind::LeakedClusters]);
    assert_eq!(found[0].offset, host);

    let block = be64(&good, be64(&good, 48) as usize) as usize;
    let found = try_out(&|b| b[block..block + 4096].fill(0));
    assert!(kinds(&found).contains(&AuditKind::RefcountTooLow));

    let count = block + 2 * (host as usize / 4096);
    let found = try_out(&|b| b[count + 1] = 9);
    assert_eq!(kinds(&found), [AuditKind::RefcountTooHigh]);

    // A tail that nobody counts is free space, to QEMU too.
    let mut longer = good.clone();
    longer.extend([0; 8192]);
    std::fs::write(&path, &longer).unwrap();
    assert!(qemu_is_content(dir.path()));
    assert_eq!(audit(&path), []);
}

#[test]
fn damaged_tables_of_snapshots_and_bitmaps_are_named() {
    let dir = tempfile::tempdir().unwrap();
    by_qemu(dir.path(), 16);
    let path = dir.path().join("d");
    let good = std::fs::read(&path).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let row = be64(64) as usize;
    let after = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        std::fs::write(&path, &bytes).unwrap();
        kinds(&audit(&path))
    };
    let bad = AuditKind::BadSnapshotTable;
    assert!(after(60, &u32::MAX.to_be_bytes()).contains(&bad));
    assert!(after(row, &u64::MAX.to_be_bytes()).contains(&bad));
    assert!(after(row + 8, &u32::MAX.to_be_bytes()).contains(&bad));
    assert!(after(row + 36, &u32::MAX.to_be_bytes()).contains(&bad));
    // Two snapshots with one table.
    let second = row
        + (40
            + usize::from(good[row + 13])
            + usize::from(good[row + 15])
            + u32::from_be_bytes(good[row + 36..row + 40].try_into().unwrap()) as usize)
            .next_multiple_of(8);
    assert!(after(second, &good[row..row + 8]).contains(&bad));
    // A row of the bitmap directory: its table, then its name's length.
    let ext = good
        .windows(4)
        .position(|w| w == [0x23, 0x85, 0x28, 0x75])
        .unwrap();
    let directory = be64(ext + 24) as usize;
    let bad = AuditKind::BadBitmapTable;
    assert!(after(directory, &u64::MAX.to_be_bytes()).contains(&bad));
    assert!(after(directory + 18, &[255, 255]).contains(&bad));
    assert!(after(directory + 12, &[0, 0, 0, 3]).contains(&AuditKind::BitmapInUse));
    assert!(after(48, &[0xff; 8]).contains(&AuditKind::BadRefcountTable));
}
