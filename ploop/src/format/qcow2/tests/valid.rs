//! What is valid reads exactly.

use super::*;

#[test]
fn every_kind_of_cluster_reads_as_written() {
    let delta = Image::new().open().unwrap();
    let c = CLUSTER as u64;
    let run = |first: u64, clusters: u64, place| Run {
        offset: first * c,
        len: clusters * c,
        place,
    };
    let want = [
        run(0, 1, Place::File(DATA as u64)),
        run(1, 1, Place::Through),
        run(2, 1, Place::Zero),
        run(3, 61, Place::Parent),
        run(64, 1, Place::File((DATA + CLUSTER) as u64)),
        run(65, 5, Place::Parent),
    ];
    assert_eq!(map(&delta), want);
    let mut buf = [0; CLUSTER];
    delta.read(c, &mut buf).unwrap();
    assert_eq!(buf, [0xc3; CLUSTER]);
    let mut part = [0; 7];
    delta.read(c + 500, &mut part).unwrap();
    assert_eq!(part, [0xc3; 7]);
    assert_eq!(
        (delta.version(), delta.cluster_bytes(), delta.size()),
        (3, c, SIZE)
    );
}

#[test]
fn a_part_of_a_map_is_the_whole_map_cut() {
    let delta = Image::new().open().unwrap();
    let mut runs = Vec::new();
    delta.map(100..CLUSTER as u64 + 100, &mut runs).unwrap();
    let file = Place::File(DATA as u64 + 100);
    let head = Run {
        offset: 100,
        len: CLUSTER as u64 - 100,
        place: file,
    };
    let tail = Run {
        offset: CLUSTER as u64,
        len: 100,
        place: Place::Through,
    };
    assert_eq!(runs, [head, tail]);
    runs.clear();
    delta.map(7..7, &mut runs).unwrap();
    assert!(runs.is_empty());
}

#[test]
fn a_closed_and_an_unclosed_image_read_the_same() {
    let mut image = Image::new();
    assert!(!image.open().unwrap().is_dirty());
    image.be64(72, 1);
    let delta = image.open().unwrap();
    assert!(delta.is_dirty());
    assert_eq!(map(&delta).len(), 6);
}

#[test]
fn qcow2_is_known_by_its_first_bytes_in_every_version() {
    assert!(is_qcow2(b"QFI\xfb\0\0\0\x09"));
    assert!(!is_qcow2(b"QFI") && !is_qcow2(b"") && !is_qcow2(b"WithoutFreeSpace"));
}

/// Tables longer than what is read at a time: L1 entries at 512 bytes, L2 entries at 2 MiB.
#[test]
fn far_ends_of_long_tables_are_found() {
    let dir = tempfile::tempdir().unwrap();
    for (cluster, size, far) in [("512", "300M", "299M"), ("2M", "8T", "8191G")] {
        let option = format!("cluster_size={cluster}");
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", &option, "a", size],
            dir.path(),
        );
        let write = format!("write -P 5 {far} 512");
        run(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 4 512 512", "-c", &write, "a"],
            dir.path(),
        );
        let file = RealStore.open(&dir.path().join("a"), Access::Read).unwrap();
        let delta = Qcow2Delta::open(file.clone()).unwrap();
        let gib = 1 << 30;
        let far = if cluster == "512" {
            299 << 20
        } else {
            8191 * gib
        };
        for (guest, want) in [(512, 4), (far, 5)] {
            let mut runs = map(&delta);
            assert!(runs.len() <= 5, "{runs:?}");
            runs.retain(|r| r.offset <= guest && guest < r.offset + r.len);
            let [
                Run {
                    offset,
                    place: Place::File(at),
                    ..
                },
            ] = runs[..]
            else {
                panic!("{runs:?}")
            };
            let mut byte = [0];
            file.read_at(&mut byte, at + (guest - offset)).unwrap();
            assert_eq!(byte, [want]);
        }
    }
}

#[test]
fn a_disk_of_no_bytes_opens() {
    let mut image = Image::new();
    image.be64(24, 0).be32(36, 0).be64(40, 0);
    assert!(map(&image.open().unwrap()).is_empty());
}

/// The disk ends inside its last cluster; so may the file, but not before the disk does.
#[test]
fn the_last_cluster_needs_only_the_bytes_of_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let args = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
        "a",
        "66048",
    ];
    run("qemu-img", &args, dir.path());
    let path = dir.path().join("a");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let open = || Qcow2Delta::open(RealStore.open(&path, Access::Read).unwrap()).unwrap();
    let Place::File(first) = map(&open())[0].place else {
        panic!("not preallocated")
    };
    file.set_len(first + 66048).unwrap();
    assert_eq!(map(&open()).len(), 1);
    file.set_len(first + 66047).unwrap();
    assert_eq!(map(&open())[1].place, Place::Fault);
}

/// Bytes that compress to a varying degree, with runs of zeros among them.
fn content(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let n = (state >> 52) as usize + 1;
        match state >> 33 & 3 {
            0 => out.resize(out.len() + n, 0),
            1 => out.resize(out.len() + n, (state >> 40) as u8),
            2 => (0..n).for_each(|i| out.extend(format!("line {i}\n").bytes())),
            _ => (0..n as u64).for_each(|i| {
                out.push((state.wrapping_mul(i | 1) >> 29) as u8);
            }),
        }
    }
    out.truncate(len);
    out
}

#[test]
fn images_by_qemu_img_read_the_same_for_every_cluster_size() {
    let dir = tempfile::tempdir().unwrap();
    // No multiple of any cluster, several clusters of the largest.
    let raw = content((5 << 20) + 512);
    std::fs::write(dir.path().join("raw"), &raw).unwrap();
    for bits in 9..=21u32 {
        for compat in ["0.10", "1.1"] {
            for packed in [false, true] {
                let options = format!("cluster_size={},compat={compat}", 1 << bits);
                let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
                args.extend(packed.then_some("-c"));
                args.extend(["raw", "out"]);
                run("qemu-img", &args, dir.path());
                let chain = open_chain(&RealStore, &dir.path().join("out"), &[]).unwrap();
                let through = map(chain[0].as_ref())
                    .iter()
                    .any(|r| r.place == Place::Through);
                assert_eq!(through, packed, "{options}");
                assert!(
                    read_all(&chain).unwrap() == raw,
                    "{options} packed {packed}"
                );
            }
        }
    }
}

#[test]
fn small_reads_of_a_compressed_cluster_see_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let raw = content(300_032);
    std::fs::write(dir.path().join("raw"), &raw).unwrap();
    run(
        "qemu-img",
        &["convert", "-c", "-f", "raw", "-O", "qcow2", "raw", "out"],
        dir.path(),
    );
    let file = RealStore
        .open(&dir.path().join("out"), Access::Read)
        .unwrap();
    let delta = Qcow2Delta::open(file).unwrap();
    for at in (0..raw.len()).step_by(4099) {
        let mut buf = vec![0; 10_000.min(raw.len() - at)];
        // Skip ranges that are not compressed as a whole.
        let mut runs = Vec::new();
        delta
            .map(at as u64..(at + buf.len()) as u64, &mut runs)
            .unwrap();
        if runs.iter().all(|run| run.place == Place::Through) {
            delta.read(at as u64, &mut buf).unwrap();
            assert!(buf == raw[at..at + buf.len()], "at {at}");
        }
    }
}
