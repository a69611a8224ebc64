//! Descriptors and archives that somebody made to do harm.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::process::Command;

use ploop_tests::mount::MountedExport;
use ploop_tests::store::Rig;
use ploop_tests::tools::{run, tool};

use crate::{no_use, refused};

#[test]
fn descriptors_that_are_hostile() {
    let rig = Rig::new();
    rig.run(["init", "-s", "1M", "disk.hds"]);
    let good = fs::read_to_string(rig.path("DiskDescriptor.xml")).unwrap();
    assert_eq!(good.matches("disk.hds").count(), 1, "{good}");
    rig.small_template("mini", &[]);
    let xml = rig.path("bad/DiskDescriptor.xml");
    fs::create_dir(rig.path("bad")).unwrap();
    let case = |text: &[u8], code, says: &[&str]| {
        fs::write(&xml, text).unwrap();
        no_use(&rig, code, "bad", says);
        refused(&rig, code, &["info", "bad"], says);
        refused(
            &rig,
            code,
            &["snapshot-list", "bad"],
            &["DiskDescriptor.xml"],
        );
    };
    let body = &good[good.find("<Virtuozzo").unwrap()..];
    let laughs: String = (1..20)
        .map(|i| format!("<!ENTITY l{i} \"&l{};&l{};\">", i - 1, i - 1))
        .collect();
    for entity in ["<!ENTITY x SYSTEM \"file:///etc/passwd\">", &laughs, ""] {
        let text = format!("<?xml version=\"1.0\"?>\n<!DOCTYPE a [{entity}]>\n{body}");
        case(
            text.as_bytes(),
            6,
            &["bad/DiskDescriptor.xml", "DOCTYPE", "Remove the DOCTYPE"],
        );
    }
    case(b"", 6, &["bad/DiskDescriptor.xml"]);
    case(b"\0\xFFgarbage<<<", 6, &["bad/DiskDescriptor.xml"]);
    case(
        &good.as_bytes()[..good.len() / 2],
        6,
        &["bad/DiskDescriptor.xml"],
    );
    let deep = "<a>".repeat(200_000);
    case(deep.as_bytes(), 6, &["bad/DiskDescriptor.xml"]);
    // Larger than any descriptor, and nothing in it.
    fs::write(&xml, "").unwrap();
    File::options()
        .write(true)
        .open(&xml)
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    rig.refused(
        6,
        ["info", "bad"],
        &["bad/DiskDescriptor.xml", "is the limit"],
    );
    // Files that are not the disk's.
    for file in [
        "/etc/passwd",
        "../disk.hds",
        "../../../../../etc/passwd",
        "link",
    ] {
        fs::write(&xml, good.replace("disk.hds", file)).unwrap();
        if file == "link" {
            symlink("/etc/passwd", rig.path("bad/link")).unwrap();
        }
        no_use(
            &rig,
            9,
            "bad",
            &["outside of the disk's directory", "--allow-dir"],
        );
    }
}

#[test]
fn archives_that_are_hostile() {
    let rig = Rig::new();
    rig.small_template("mini", &[]);
    fs::create_dir(rig.path("in")).unwrap();
    fs::write(rig.path("in/evil"), "x").unwrap();
    fs::create_dir(rig.path("out")).unwrap();
    let tar = |args: &[&str]| run(tool("tar").args(args).current_dir(rig.path("in")));
    let archive = rig.arg("evil.tar");
    for (transform, member) in [
        (format!("s,^,{}/,", rig.arg("out")), "evil"),
        ("s,^,../out/,".into(), "../out/evil"),
        ("s,^,a/../../out/,".into(), "a/../../out/evil"),
    ] {
        tar(&["-P", "-cf", &archive, "--transform", &transform, "evil"]);
        refused(
            &rig,
            2,
            &["template", "import", "new", "evil.tar"],
            &["evil.tar", member],
        );
    }
    symlink(rig.path("out"), rig.path("in/link")).unwrap();
    tar(&["-P", "-cf", &archive, "link"]);
    tar(&["-P", "-rf", &archive, "--transform", "s,^,link/,", "evil"]);
    refused(
        &rig,
        2,
        &["template", "import", "new", "evil.tar"],
        &["evil.tar", "link/evil"],
    );
    // Ends too early, or is nothing of the kind.
    let whole = fs::read(&archive).unwrap();
    fs::write(&archive, &whole[..700]).unwrap();
    refused(
        &rig,
        6,
        &["template", "import", "new", "evil.tar"],
        &["evil.tar"],
    );
    fs::write(&archive, vec![0x41; 5000]).unwrap();
    refused(
        &rig,
        6,
        &["template", "import", "new", "evil.tar"],
        &["evil.tar"],
    );
    fs::write(
        rig.path("cut.tar.gz"),
        [0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 3, 1],
    )
    .unwrap();
    refused(
        &rig,
        6,
        &["template", "import", "new", "cut.tar.gz"],
        &["cut.tar.gz"],
    );
    fs::write(rig.path("later.tar.xz"), b"\xFD7zXZ\0").unwrap();
    let says = ["later.tar.xz", "xz"];
    refused(
        &rig,
        7,
        &["template", "import", "new", "later.tar.xz"],
        &says,
    );

    // Device nodes are a root filesystem's right: they get into the image, whoever imports them,
    // and onto nobody's own tree.
    let nobody = Rig::of_nobody();
    run(Command::new("mknod")
        .arg(rig.path("in/null"))
        .args(["c", "1", "3"]));
    run(Command::new("mknod")
        .arg(rig.path("in/disk"))
        .args(["b", "8", "0"]));
    let nodes = nobody.arg("nodes.tar");
    tar(&["-cf", &nodes, "null", "disk"]);
    nobody.run(["template", "import", "nodes", &nodes]);
    nobody.run(["create", "a", "--template", "nodes"]);
    let is_node = |text: &String| text.starts_with("02") || text.starts_with("06");
    assert!(!nobody.everything().0.values().any(is_node));
    let server = nobody.serve(["a"]);
    let mounted = MountedExport::new(&server.uri("a"));
    let said = mounted.path().to_str().unwrap().to_owned();
    let said = run(tool("stat")
        .args(["-c", "%F %t:%T"])
        .args(["null", "disk"])
        .current_dir(said));
    let said = String::from_utf8(said.stdout).unwrap();
    assert_eq!(said, "character special file 1:3\nblock special file 8:0\n");
    drop(mounted);
    server.stop();
}
