//! Several processes at work on one store.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::process::{Child, Stdio};
use std::sync::Mutex;

use ploop_tests::fsx::Rng;
use ploop_tests::mount::wait_for;
use ploop_tests::store::Rig;
use ploop_tests::tools::{run, tool};
use ploop_tests::treehash::reader_digest;

use super::kit::{CLONES, Kit, Sound, names, words};

/// How each kind of operation may fail: exit code and words of the message. Anything else is a
/// process that fell over another one's feet.
const MAY_FAIL: &[(&str, &[(i32, &str)])] = &[
    ("import", &[(4, "there is a template")]),
    (
        "create",
        &[(4, "there is a container"), (3, "there is no template")],
    ),
    (
        "rm",
        &[(3, "there is no container"), (5, "has the image open")],
    ),
    (
        "template rm",
        &[(3, "there is no template"), (5, "are cloned from template")],
    ),
    ("list", &[]),
    ("read", &[(3, ""), (5, "has the image open for writing")]),
];

/// Operation and exit code → how often.
type Tally = BTreeMap<(&'static str, i32), u32>;

/// One operation of the random kind.
fn step(rig: &Rig, kit: &Kit, rng: &mut Rng, tally: &Mutex<Tally>) {
    let t = rng.below(kit.templates.len() as u64) as usize;
    let template = kit.templates[t].0;
    let n = rng.below(CLONES);
    let container = kit.container(t, n);
    let (kind, mut args) = match rng.below(100) {
        0..20 => ("import", kit.import(t)),
        20..44 => ("create", kit.create(t, &container)),
        44..64 => ("rm", words(&["rm", &container])),
        64..82 => ("template rm", words(&["template", "rm", template])),
        82..87 => ("list", words(&["list", "--json"])),
        87..92 => ("list", words(&["template", "list", "--json"])),
        _ => ("read", words(&["convert", &container, "-", "--to", "raw"])),
    };
    if ["create", "rm"].contains(&kind) && rng.once_in(4) {
        args.insert(1, kit.container(t, (n + 1) % CLONES));
    }
    let out = rig
        .ploop()
        .args(&args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    let code = out.status.code();
    match code {
        Some(0) if kind == "list" => {
            let list = String::from_utf8_lossy(&out.stdout);
            assert!(!list.contains("\"error\""), "{args:?}: {list}");
        }
        Some(0) if kind == "read" => {
            if let Some(digest) = &kit.templates[t].2 {
                assert_eq!(&reader_digest(&mut &out.stdout[..]), digest, "{args:?}");
            }
        }
        _ => {}
    }
    let may = MAY_FAIL.iter().find(|m| m.0 == kind).unwrap().1;
    // A warning is a process that fell, too.
    let fine = match code {
        Some(0) => said.is_empty(),
        Some(code) => may.iter().any(|m| m.0 == code && said.contains(m.1)),
        None => false,
    };
    assert!(fine, "{args:?}: {}\n{said}", out.status);
    *tally
        .lock()
        .unwrap()
        .entry((kind, code.unwrap()))
        .or_default() += 1;
}

/// Goal: whoever works on a store beside others gets what he was promised, or an answer that makes
/// sense to him. Method: processes at random on few names, so that they meet; then everything that
/// is listed is opened and compared, and removing it all leaves nothing.
#[test]
fn processes_on_one_store_leave_it_whole_and_clean() {
    const PROCESSES: u64 = 6;
    const STEPS: u64 = 500;
    const ROUNDS: u64 = 4;
    let rig = Rig::new();
    let kit = Kit::new(&rig);
    rig.run(kit.import(0));
    let tally = Mutex::default();
    for round in 0..ROUNDS {
        std::thread::scope(|scope| {
            for n in 0..PROCESSES {
                let mut rng = Rng(round * PROCESSES + n);
                let (rig, kit, tally) = (&rig, &kit, &tally);
                scope.spawn(move || {
                    (0..STEPS / ROUNDS).for_each(|_| step(rig, kit, &mut rng, tally));
                });
            }
        });
        Sound::Superset.expect(&rig);
        kit.judge_all(&rig);
        kit.collect(&rig);
        kit.judge_all(&rig);
    }
    let tally = tally.into_inner().unwrap();
    for kind in ["import", "create", "rm", "template rm", "list", "read"] {
        let done = tally.get(&(kind, 0)).copied().unwrap_or_default();
        assert!(done >= 20, "{kind} succeeded {done} times only: {tally:?}");
    }
    Kit::clear(&rig);
}

/// A `ploop` at work; killed when dropped.
struct Started(Child);

impl Started {
    fn new(rig: &Rig, args: &[String]) -> Started {
        let mut command = rig.ploop();
        command.args(args).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        Started(command.spawn().unwrap())
    }

    /// Waits until it waits for a lock; panics when it ends instead.
    fn waits(&mut self, what: &str) {
        let pid = self.0.id().to_string();
        wait_for("a process to wait for the store's lock", || {
            assert_eq!(self.0.try_wait().unwrap(), None, "{what} waits for nobody");
            let locks = fs::read_to_string("/proc/locks").unwrap();
            let waits = |l: &str| {
                let words: Vec<_> = l.split_whitespace().collect();
                words.contains(&"->") && words.contains(&pid.as_str())
            };
            locks.lines().any(waits)
        });
    }

    fn succeeds(mut self, what: &str) {
        let status = self.0.wait().unwrap();
        let said = std::io::read_to_string(self.0.stderr.take().unwrap()).unwrap();
        assert!(status.success(), "{what}: {status}\n{said}");
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It has ended, unless the test failed.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Goal: nobody collects while somebody makes a disk, or the other way round. Method: this test has
/// the store's lock as one who makes a disk (shared) or who collects (alone); whoever must wait for
/// him waits, has changed nothing yet, and then succeeds.
#[test]
fn who_makes_disks_and_who_collects_wait_for_each_other() {
    let rig = Rig::new();
    let kit = Kit::new(&rig);
    rig.run(kit.import(0));
    rig.run(kit.create(0, "one-0"));
    rig.run(kit.import(1));
    let lock = File::open(rig.root().join("lock")).unwrap();
    let cases = [
        (false, words(&["rm", "one-0"])),
        (false, words(&["template", "rm", "one"])),
        (false, kit.import(2)),
        (true, kit.create(1, "two-0")),
    ];
    for (alone, args) in cases {
        match alone {
            true => lock.lock().unwrap(),
            false => lock.lock_shared().unwrap(),
        }
        let what = args.join(" ");
        let before = rig.listing();
        let mut ploop = Started::new(&rig, &args);
        ploop.waits(&what);
        assert_eq!(rig.listing(), before, "{what}");
        lock.unlock().unwrap();
        ploop.succeeds(&what);
        Sound::Superset.expect(&rig);
    }
    kit.judge_all(&rig);
    publishing_waits(&rig, &lock);
    Kit::clear(&rig);
}

/// An import holds no lock while it builds. Its layer is in the store before its template is, so it
/// must wait before that for who collects. Its source is a pipe, which keeps it building.
fn publishing_waits(rig: &Rig, lock: &File) {
    let (tar, pipe) = (rig.path("real.tar"), rig.path("pipe.tar"));
    run(tool("tar")
        .arg("-cf")
        .arg(&tar)
        .arg("-C")
        .arg(rig.small_rootfs())
        .arg("."));
    run(tool("mkfifo").arg(&pipe));
    let args = [
        "template",
        "import",
        "piped",
        &rig.arg("pipe.tar"),
        "--size",
        "64M",
    ];
    let mut import = Started::new(rig, &words(&args));
    // Blocks until the import reads.
    let mut to = File::options().write(true).open(&pipe).unwrap();
    lock.lock().unwrap();
    let layers = names(&rig.root().join("layers"));
    to.write_all(&fs::read(&tar).unwrap()).unwrap();
    drop(to);
    import.waits("an import that publishes");
    assert_eq!(names(&rig.root().join("layers")), layers);
    assert!(!rig.root().join("templates/piped").exists());
    lock.unlock().unwrap();
    import.succeeds("the import");
    rig.run(["create", "ct", "--template", "piped"]);
    assert_eq!(rig.content("ct"), rig.template_content("piped"));
}
