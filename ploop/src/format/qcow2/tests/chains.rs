//! Backing files: what is followed, and what never is.

use super::*;
use crate::error::Kind;

fn create(dir: &Path, args: &[&str]) {
    let mut all = vec!["create", "-q", "-f", "qcow2"];
    all.extend(args);
    run("qemu-img", &all, dir);
}

fn open(dir: &Path, name: &str, allowed: &[&Path]) -> Result<Vec<Arc<dyn Delta>>> {
    open_chain(&RealStore, &dir.join(name), allowed)
}

#[test]
fn a_chain_over_a_raw_file_reads_as_qemu_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    // Shorter than the overlays and no multiple of the cluster.
    std::fs::write(d.join("base"), vec![0x11; 100_352]).unwrap();
    create(d, &["-b", "base", "-F", "raw", "mid", "300k"]);
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 0x22 150k 100k", "mid"],
        d,
    );
    create(d, &["-b", "mid", "-F", "qcow2", "top", "1M"]);
    run(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -z 0 64k",
            "-c",
            "write -P 3 900k 1k",
            "top",
        ],
        d,
    );
    run("qemu-img", &["convert", "-O", "raw", "top", "want"], d);
    let chain = open(d, "top", &[d]).unwrap();
    assert_eq!(chain.len(), 3);
    assert!(read_all(&chain).unwrap() == std::fs::read(d.join("want")).unwrap());
}

#[test]
fn a_file_outside_needs_permission_however_it_is_named() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (d, o) = (dir.path(), other.path());
    std::fs::write(o.join("secret"), [7; 512]).unwrap();
    std::os::unix::fs::symlink(o.join("secret"), d.join("link")).unwrap();
    let absolute = o.join("secret").display().to_string();
    let up = format!("../{}/secret", o.file_name().unwrap().to_str().unwrap());
    for name in [absolute.as_str(), up.as_str(), "link"] {
        create(d, &["-u", "-b", name, "-F", "raw", "top", "64k"]);
        let e = open(d, "top", &[d]).unwrap_err();
        assert_eq!(e.kind(), Kind::Permission, "{name}: {e}");
        assert!(e.to_string().contains("--allow-dir"), "{e}");
        assert_eq!(open(d, "top", &[d, o]).unwrap().len(), 2, "{name}");
    }
    assert_eq!(open(d, "top", &[]).unwrap_err().kind(), Kind::Permission);
}

/// `/a/bc` is not inside `/a/b`.
#[test]
fn a_directory_is_not_its_namesakes() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::create_dir(d.join("vm")).unwrap();
    std::fs::create_dir(d.join("vm2")).unwrap();
    std::fs::write(d.join("vm2/base"), [7; 512]).unwrap();
    create(
        &d.join("vm"),
        &["-u", "-b", "../vm2/base", "-F", "raw", "top", "64k"],
    );
    let e = open(&d.join("vm"), "top", &[&d.join("vm")]).unwrap_err();
    assert_eq!(e.kind(), Kind::Permission);
}

#[test]
fn loops_missing_files_and_other_formats_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("raw"), [7; 512]).unwrap();
    let cases = [
        ("a", Some("qcow2"), Kind::Corrupt, "parent cycle"),
        ("absent", Some("qcow2"), Kind::NotFound, "backing file of"),
        ("raw", Some("vmdk"), Kind::Unsupported, "\"vmdk\""),
        ("raw", Some("parallels"), Kind::Unsupported, "Parallels"),
        ("raw", Some("qcow2"), Kind::Corrupt, "not a qcow2 image"),
        ("json:{}", Some("raw"), Kind::Unsupported, "not a path"),
        (
            "nbd://localhost/x",
            Some("raw"),
            Kind::Unsupported,
            "not a path",
        ),
    ];
    for (name, format, kind, word) in cases {
        create(d, &["a", "64k"]);
        let mut args = vec!["rebase", "-u", "-f", "qcow2", "-b", name];
        args.extend(format.iter().flat_map(|f| ["-F", f]));
        args.push("a");
        run("qemu-img", &args, d);
        let e = open(d, "a", &[d]).unwrap_err();
        assert_eq!(e.kind(), kind, "{name}: {e}");
        assert!(e.to_string().contains(word), "{e}");
    }
}

/// A raw file whose guest wrote a qcow2 header into it is not opened by guess.
#[test]
fn a_backing_format_is_never_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    create(d, &["base", "64k"]);
    let mut image = Image::new();
    image.be64(8, 200).be32(16, 4).bytes[200..204].copy_from_slice(b"base");
    std::fs::write(d.join("top"), &image.bytes).unwrap();
    let e = open(d, "top", &[d]).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(e.to_string().contains("not recorded"), "{e}");
}

#[test]
fn a_chain_ends_at_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut image = Image::new();
    for i in 0..65 {
        if i > 0 {
            image
                .be64(8, 200)
                .be32(16, 4)
                .be32(104, 0xe279_2aca)
                .be32(108, 5);
            image.bytes[112..117].copy_from_slice(b"qcow2");
            image.bytes[200..204].copy_from_slice(format!("f{:03}", i - 1).as_bytes());
        }
        std::fs::write(d.join(format!("f{i:03}")), &image.bytes).unwrap();
    }
    let chain = open(d, "f063", &[d]).unwrap();
    assert_eq!(chain.len(), 64);
    assert_eq!(read_all(&chain).unwrap()[0], 0xa1);
    let e = open(d, "f064", &[d]).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
}
