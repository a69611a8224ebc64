//! Power cuts and failing calls while disks come to share layers: clones of many at once, clones and
//! templates of another container's snapshot, flattening. Promise 3: one commit point for each disk,
//! and nobody else's disk is touched.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::open::{DESCRIPTOR, Source};
use ploop::store::Store;
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, Calls, Fault, RecordingStore};
use ploop::{Kind, Result};
use ploop_tests::crash::fixture::words_of;
use ploop_tests::crash::history::payload;
use ploop_tests::crash::proof::{Proof, Scenario, Verdict};
use ploop_tests::crash::tree::{self, Operation};
use ploop_tests::crash::{SECTOR, Tally};
use snapshots::clone::{CloneSource, CreateOptions, Durable, create_containers_by};
use snapshots::meta::Meta;
use snapshots::place::Place;
use snapshots::snapshot::{NewSnapshot, take_offline};
use snapshots::{Root, list, remove_containers, remove_template, template};

/// What is done, in this order. Names of containers are small letters, those of templates capitals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Clones of the imported template, in this way.
    OfTemplate(&'static [&'static str], Durable),
    /// Clones of the snapshot of `src`.
    OfSnapshot(&'static [&'static str], Durable),
    /// A template of that snapshot.
    Template(&'static str),
    /// A clone of such a template.
    Of(&'static str, &'static str),
    /// Makes that template one layer.
    Flatten(&'static str),
}

use Step::{Flatten, Of, OfSnapshot, OfTemplate, Template};

const LIFE: [Step; 6] = [
    OfTemplate(&["a", "b"], Durable::Together),
    OfTemplate(&["c", "d"], Durable::OneByOne),
    OfSnapshot(&["e", "f"], Durable::OneByOne),
    Template("U"),
    Of("U", "g"),
    Flatten("U"),
];

/// The image of `src` that the first step of this finds to share.
const FROM_SNAPSHOT: [Step; 3] = [Template("U"), Of("U", "g"), Flatten("U")];

/// What each name reads as.
type Contents = BTreeMap<String, Vec<u64>>;

/// A template, a container of it with a snapshot and writes before and after, and what they read as;
/// under `@` what the snapshot does.
fn start() -> (MemoryStore, Contents) {
    let store = tree::start();
    let root = tree::open(Arc::new(store.clone())).unwrap();
    tree::perform(&root, Operation::Import).unwrap();
    tree::perform(&root, Operation::Create("src")).unwrap();
    let mut contents = Contents::new();
    let place = Place::container(&root, "src").unwrap();
    let write = |id, sector: u64| {
        let disk = place.open().unwrap();
        disk.write(sector * SECTOR, &payload(id, sector..sector + 1))
            .unwrap();
        disk.close().unwrap();
    };
    contents.insert(tree::TEMPLATE.into(), read(&root, tree::TEMPLATE).unwrap());
    write(0xFFFF_0011, 1);
    contents.insert("@".into(), read(&root, "src").unwrap());
    let new = NewSnapshot {
        name: Some("s".into()),
        ..NewSnapshot::default()
    };
    take_offline(&place, &new).unwrap();
    write(0xFFFF_0012, 2);
    contents.insert("src".into(), read(&root, "src").unwrap());
    (store, contents)
}

fn is_template(name: &str) -> bool {
    name == tree::TEMPLATE || name.starts_with(char::is_uppercase)
}

fn dir(root: &Root, name: &str) -> std::path::PathBuf {
    match is_template(name) {
        true => root.template(name),
        false => root.container(name),
    }
}

fn read(root: &Root, name: &str) -> std::result::Result<Vec<u64>, String> {
    read_node(root, name, None)
}

fn read_node(root: &Root, name: &str, node: Option<Guid>) -> std::result::Result<Vec<u64>, String> {
    let source = Source {
        path: dir(root, name).join(DESCRIPTOR),
        descriptor: true,
        snapshot: node.map(|g| g.to_string()),
    };
    let disk = root.opener().open(&source, &root.open_options(false));
    words_of(&disk.map_err(|e| e.to_string())?)
}

fn perform(root: &Root, step: Step) -> Result<()> {
    let snapshot = || CloneSource::Snapshot {
        container: "src".into(),
        snapshot: "s".into(),
    };
    let create = |names: &[&str], from: CloneSource, durable| {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let options = CreateOptions::default();
        create_containers_by(root, &names, &from, &options, durable, &|_, _| ()).map(drop)
    };
    let of = |name: &str| CloneSource::Template(name.to_owned());
    match step {
        OfTemplate(names, durable) => create(names, of(tree::TEMPLATE), durable),
        OfSnapshot(names, durable) => create(names, snapshot(), durable),
        Template(name) => template::from_snapshot(root, name, "src", "s").map(drop),
        Of(name, clone) => create(&[clone], of(name), Durable::OneByOne),
        Flatten(name) => template::flatten(root, name, &|_, _| (), &|| false).map(drop),
    }
}

/// The names that a step makes, and whose content they have.
fn made_by(step: Step) -> (&'static [&'static str], &'static str) {
    match step {
        OfTemplate(names, _) => (names, tree::TEMPLATE),
        OfSnapshot(names, _) => (names, "@"),
        Template("U") => (&["U"], "@"),
        Of("U", "g") => (&["g"], "@"),
        Flatten(_) => (&[], "@"),
        other => panic!("{other:?}"),
    }
}

/// Steps one after the other: mark 2n when one begins, 2n + 1 when it was answered. The store is
/// opened anew for each. Ends with the first that fails.
fn run(front: &Arc<dyn Store>, log: &RecordingStore, steps: &[Step]) -> Option<ploop::Error> {
    for (n, step) in (0..).zip(steps) {
        log.mark(2 * n);
        if let Err(e) = tree::open(front.clone()).and_then(|root| perform(&root, *step)) {
            return Some(e);
        }
        log.mark(2 * n + 1);
    }
    None
}

/// Who must and who may be there.
struct Expected<'a> {
    steps: &'a [Step],
    contents: &'a Contents,
    must: BTreeSet<&'a str>,
    may: BTreeMap<&'a str, &'a Vec<u64>>,
}

impl<'a> Expected<'a> {
    fn at(steps: &'a [Step], contents: &'a Contents, marks: &[u64]) -> Expected<'a> {
        let mut must = BTreeSet::from(["src", tree::TEMPLATE]);
        let mut may: BTreeMap<_, _> = must.iter().map(|n| (*n, &contents[*n])).collect();
        for (n, step) in (0..).zip(steps) {
            let (names, of) = made_by(*step);
            if marks.contains(&(2 * n)) {
                may.extend(names.iter().map(|name| (*name, &contents[of])));
            }
            if marks.contains(&(2 * n + 1)) {
                must.extend(names);
            }
        }
        Expected {
            steps,
            contents,
            must,
            may,
        }
    }

    /// Judges one state; with `work`, also everything that can be done with it.
    fn judge(&self, state: &MemoryStore, work: bool) -> std::result::Result<(), String> {
        let root = tree::open(Arc::new(state.clone())).map_err(|e| e.to_string())?;
        let there = names(&root)?;
        if let Some(lost) = self.must.iter().find(|n| !there.contains(**n)) {
            return Err(format!("{lost} is lost"));
        }
        for name in &there {
            let Some(content) = self.may.get(name.as_str()) else {
                return Err(format!("{name} is there, though nobody made it"));
            };
            if read(&root, name).map_err(|e| format!("{name}: {e}"))? != **content {
                return Err(format!("{name} reads other bytes"));
            }
            referred(&root, name)?;
        }
        self.source_is_whole(&root)?;
        match work {
            true => self.works_on(&root, &there),
            false => Ok(()),
        }
    }

    /// The source's snapshot is what it was.
    fn source_is_whole(&self, root: &Root) -> std::result::Result<(), String> {
        let text = |e: ploop::Error| format!("src: {e}");
        let place = Place::container(root, "src").map_err(text)?;
        let (d, meta) = (
            place.descriptor().map_err(text)?,
            place.meta().map_err(text)?,
        );
        let node = place.find(&d, &meta, "s").map_err(text)?;
        match read_node(root, "src", Some(node))? == self.contents["@"] {
            true => Ok(()),
            false => Err("src@s reads other bytes".into()),
        }
    }

    /// What is missing can be made; nobody sees another's writes; in the end everything can be
    /// removed, and is gone.
    fn works_on(&self, root: &Root, there: &BTreeSet<String>) -> std::result::Result<(), String> {
        let text = |e: ploop::Error| format!("afterwards: {e}");
        let place = Place::container(root, "src").map_err(text)?;
        place.sweep().map_err(text)?;
        let d = place.descriptor().map_err(text)?;
        for file in root.opener().store().list(place.dir()).map_err(text)? {
            let file = file.to_str().unwrap();
            let known = [".ploop", DESCRIPTOR].contains(&file);
            if !known && !d.images.iter().any(|i| i.file == file) {
                return Err(format!("{file} stays in src for good"));
            }
        }
        for step in self.steps {
            let (names, _) = made_by(*step);
            if names.iter().any(|n| !there.contains(*n)) || names.is_empty() {
                let have: Vec<String> = names
                    .iter()
                    .filter(|n| there.contains(**n))
                    .map(|n| (*n).to_owned())
                    .collect();
                remove_containers(root, &have).map_err(text)?;
                perform(root, *step).map_err(text)?;
            }
        }
        let containers: Vec<String> = names(root)?
            .into_iter()
            .filter(|n| !is_template(n))
            .collect();
        let first = &containers[0];
        let disk = Place::container(root, first).and_then(|p| p.open());
        let disk = disk.map_err(text)?;
        disk.write(3 * SECTOR, &payload(0xFFFF_0013, 3..4))
            .and_then(|()| disk.close())
            .map_err(text)?;
        drop(disk);
        let mut all = Expected::at(self.steps, self.contents, &(0..100).collect::<Vec<_>>());
        all.may.remove(first.as_str());
        for (name, content) in &all.may {
            if read(root, name)? != **content {
                return Err(format!("afterwards {name} reads other bytes"));
            }
        }
        remove_containers(root, &containers).map_err(text)?;
        for name in names(root)? {
            remove_template(root, &name).map_err(text)?;
        }
        let store = root.opener().store();
        for room in ["layers", "tmp", "templates", "containers"] {
            let left = store.list(&root.dir().join(room)).map_err(text)?;
            if !left.is_empty() {
                return Err(format!("of an empty store are left: {left:?} in {room}"));
            }
        }
        Ok(())
    }
}

fn names(root: &Root) -> std::result::Result<BTreeSet<String>, String> {
    let text = |e: ploop::Error| format!("list: {e}");
    let containers = list::containers(root).map_err(text)?;
    if let Some(c) = containers.iter().find(|c| c.error.is_some()) {
        return Err(format!("{c:?}"));
    }
    let templates = list::templates(root).map_err(text)?;
    let names = containers.into_iter().map(|c| c.name);
    Ok(names.chain(templates.into_iter().map(|t| t.name)).collect())
}

/// The references are a superset: the disk has one on each layer that its descriptor names.
fn referred(root: &Root, name: &str) -> std::result::Result<(), String> {
    let text = |e: ploop::Error| format!("{name}: {e}");
    let dir = dir(root, name);
    let store = root.opener().store();
    let d = root
        .opener()
        .read_descriptor(&dir.join(DESCRIPTOR))
        .map_err(text)?;
    let meta = Meta::read(store.as_ref(), &dir).map_err(text)?;
    let id = meta.id.ok_or_else(|| format!("{name} has lost its id"))?;
    for image in d.images.iter().filter(|i| i.file.contains("/layers/")) {
        let image = store.resolve(&dir.join(&image.file)).map_err(text)?;
        let reference = image.with_file_name("refs").join(&id);
        if store.kind(&reference).map_err(text)?.is_none() {
            return Err(format!("{name}: its reference on {image:?} is lost"));
        }
    }
    Ok(())
}

/// Judges all states of a run; every `work_every`th also by working with it.
fn check(
    store: &RecordingStore,
    steps: &[Step],
    contents: &Contents,
    budget: &Budget,
    work_every: u64,
) -> std::result::Result<Tally, String> {
    let mut tally = Tally::default();
    for point in 0..=store.log().len() {
        let expected = Expected::at(steps, contents, &store.marks_before(point));
        let states = store.states_at(point, budget);
        tally.points += 1;
        tally.exhaustive += u64::from(states.units() <= budget.exhaustive_units);
        for state in states {
            tally.states += 1;
            let work = tally.states.is_multiple_of(work_every);
            expected.judge(&state.build(), work).map_err(|why| {
                let log = store.log().join("\n  ");
                format!("{why}\n{state}\nlog:\n  {log}")
            })?;
        }
    }
    Ok(tally)
}

fn sweep(steps: &[Step], budget: &Budget) {
    let (base, contents) = start();
    let store = RecordingStore::on(&base);
    assert!(run(&store.store(), &store, steps).is_none());
    let tally = check(&store, steps, &contents, budget, 23);
    println!("{}", tally.unwrap_or_else(|e| panic!("{e}")));
}

/// Goal: promise 3 for many clones at once, from a template and from a snapshot, for templates from
/// snapshots and for flattening. Method: one after the other, all states after every change and
/// sync: each disk is there and whole or not there; the source and all others read as before; what
/// is missing can be made; everything can be removed, and then nothing is left.
#[test]
fn each_disk_is_there_and_whole_or_absent_and_no_other_is_touched() {
    let budget = Budget {
        exhaustive_units: 7,
        seeded: 20,
        seed: 0,
    };
    sweep(&LIFE, &budget);
}

/// Goal: the same where a template is what makes the snapshot shared.
#[test]
fn a_template_from_a_snapshot_is_made_at_one_instant() {
    let budget = Budget {
        exhaustive_units: 8,
        seeded: 30,
        seed: 1,
    };
    sweep(&FROM_SNAPSHOT, &budget);
}

/// Goal: promises 3 and 5 when a call fails. Method: EIO and ENOSPC at every change and sync; the
/// step that meets it says so, and then all disks are whole, after kill -9 and after a power cut,
/// and everything can be done.
#[test]
fn a_failing_call_at_any_point_leaves_every_disk_whole() {
    let (base, contents) = start();
    for (fault, kind) in [(Fault::Eio, Kind::Io), (Fault::Enospc, Kind::NoSpace)] {
        for n in 0.. {
            let store = RecordingStore::on(&base);
            store.count(Calls::Changes);
            store.fail_at(n, fault);
            let met = run(&store.store(), &store, &LIFE);
            if let Some(e) = &met {
                assert_eq!(e.kind(), kind, "call {n}: {e}");
            }
            let reached = store.calls() > n;
            store.clear_faults();
            let end = store.log().len();
            let expected = Expected::at(&LIFE, &contents, &store.marks_before(end));
            let context = || format!("call {n}, {met:?}\n  {}", store.log().join("\n  "));
            let killed = expected.judge(&store.snapshot(), true);
            killed.unwrap_or_else(|e| panic!("kill -9: {e}: {}", context()));
            let budget = Budget {
                exhaustive_units: 3,
                seeded: 4,
                seed: n,
            };
            for (k, state) in store.states_at(end, &budget).enumerate() {
                let judged = expected.judge(&state.build(), k % 8 == 0);
                judged.unwrap_or_else(|e| panic!("{e}\n{state}\n{}", context()));
            }
            if !reached {
                assert!(n > 100, "{n} calls only");
                break;
            }
        }
    }
}

/// Goal: no sync of sharing can be taken out or moved. Method: each dropped, hastened and delayed.
#[test]
fn every_sync_of_sharing_is_needed_where_it_is() {
    const FILES: &[&str] = &["snapshots/src/share.rs", "snapshots/src/flatten.rs"];
    let (base, contents) = start();
    let sharing = Scenario {
        name: "a template from a snapshot".into(),
        start: base,
        run: Box::new(|front, store| {
            let failed = run(&front, store, &FROM_SNAPSHOT[..1]);
            let (store, contents) = (store.clone(), contents.clone());
            let budget = Budget {
                exhaustive_units: 7,
                seeded: 10,
                seed: 0,
            };
            Box::new(move || {
                if let Some(e) = failed {
                    return Err(e.to_string());
                }
                check(&store, &FROM_SNAPSHOT[..1], &contents, &budget, 1).map(drop)
            }) as Verdict<'_>
        }),
    };
    let proof = Proof::default();
    proof.add(&sharing, FILES);
    proof.verdict(FILES);
}

/// Goal: the start of these tests is what they say. The store's directory is where `tree` has it.
#[test]
fn the_start_has_a_snapshot_that_differs_from_what_follows_it() {
    let (store, contents) = start();
    assert!(store.kind(Path::new(tree::DIR)).unwrap().is_some());
    let distinct: BTreeSet<_> = contents.values().collect();
    assert_eq!(distinct.len(), 3, "{:?}", contents.keys());
}
