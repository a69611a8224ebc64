//! A store of templates and containers after a power cut.
//!
//! Each operation has one commit point: what it makes is there and whole, or not there at all; and
//! whatever was left, the store works on, and collects all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploop::Result;
use ploop::descriptor::Guid;
use ploop::device::Device;
use ploop::disk::open::{DESCRIPTOR, OpenOptions, Opener, Source};
use ploop::store::memory::MemoryStore;
use ploop::store::recording::{Budget, RecordingStore};
use ploop::store::{Access, Store};
use ploop::verify::{Class, class_of, scan_image};
use snapshots::clone::{CloneSource, Durable, create_containers_by};
use snapshots::meta::Meta;
use snapshots::rootfs::BuildOptions;
use snapshots::template::{self, ImportOptions, ImportSource};
use snapshots::{CreateOptions, Root, create_container, list, remove_container, remove_template};

use super::fixture::words_of;
use super::history::{BASE, payload, word};
use super::sweep::Tally;
use super::{CLUSTER_SECTORS, SECTOR};

/// The store's directory.
pub const DIR: &str = "/store";
/// A raw image on the same host.
pub const RAW: &str = "/source.raw";
/// The only template.
pub const TEMPLATE: &str = "t";
const SOURCE_TEXT: &str = "where it comes from";
const SECTORS: u64 = 3 * CLUSTER_SECTORS;
/// "Operation" that writes to containers.
const PROBE: u64 = 0xFFFF_0005;

/// One operation on a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Makes what is missing of the store.
    Found,
    /// Imports the template.
    Import,
    /// A container of that name.
    Create(&'static str),
    /// The same, made durable as many at once are.
    CreateTogether(&'static str),
    /// Removes it.
    Remove(&'static str),
    /// Removes the template.
    Forget,
}

/// A host with an empty store and a raw image.
pub fn start() -> MemoryStore {
    let store = MemoryStore::new();
    store.create_dir(Path::new(DIR)).unwrap();
    let raw = store.create(Path::new(RAW), 0o600).unwrap();
    raw.set_len(SECTORS * SECTOR).unwrap();
    raw.write_at(&payload(BASE, 8..16), 8 * SECTOR).unwrap();
    let last = 2 * CLUSTER_SECTORS;
    raw.write_at(&payload(BASE, last..last + 2), last * SECTOR)
        .unwrap();
    store
}

fn content() -> Vec<u64> {
    let data = |s: u64| (8..16).contains(&s) || (s / 2) == CLUSTER_SECTORS;
    (0..SECTORS)
        .map(|s| if data(s) { word(BASE, s) } else { 0 })
        .collect()
}

/// The store, as a program that starts now opens it.
pub fn open(store: Arc<dyn Store>) -> Result<Root> {
    Root::on(Opener::on(store), Path::new(DIR), true, false)
}

/// Does one operation.
pub fn perform(root: &Root, operation: Operation) -> Result<()> {
    match operation {
        Operation::Found => Ok(()),
        Operation::Import => {
            let source = Source {
                path: RAW.into(),
                descriptor: false,
                snapshot: None,
            };
            let options = ImportOptions {
                cluster_sectors: CLUSTER_SECTORS as u32,
                build: BuildOptions::default(),
                open: OpenOptions::default(),
                source_text: SOURCE_TEXT.into(),
            };
            let source = ImportSource::Disk(source);
            template::import(root, TEMPLATE, &source, &options, &|_| ()).map(drop)
        }
        Operation::Create(name) => {
            create_container(root, name, TEMPLATE, &CreateOptions::default(), &|_, _| ()).map(drop)
        }
        Operation::CreateTogether(name) => {
            let from = CloneSource::Template(TEMPLATE.into());
            let names = [name.to_owned()];
            let options = CreateOptions::default();
            let durable = Durable::Together;
            create_containers_by(root, &names, &from, &options, durable, &|_, _| ()).map(drop)
        }
        Operation::Remove(name) => remove_container(root, name),
        Operation::Forget => remove_template(root, TEMPLATE),
    }
}

/// Operations one after the other, each marked in the log: 2n when it begins, 2n + 1 when it was
/// answered. The store is opened anew for each.
pub fn run(front: &Arc<dyn Store>, log: &RecordingStore, operations: &[Operation]) {
    for (n, operation) in (0..).zip(operations) {
        log.mark(2 * n);
        let done = open(front.clone()).and_then(|root| perform(&root, *operation));
        done.unwrap_or_else(|e| panic!("{operation:?}: {e}"));
        log.mark(2 * n + 1);
    }
}

/// Which names must be there, and which may: by the marks up to a point.
pub fn expected(
    operations: &[Operation],
    marks: &[u64],
) -> (BTreeSet<&'static str>, BTreeSet<&'static str>) {
    let (mut must, mut may) = (BTreeSet::new(), BTreeSet::new());
    for (n, operation) in (0..).zip(operations) {
        if !marks.contains(&(2 * n)) {
            break;
        }
        let (name, comes) = match operation {
            Operation::Found => continue,
            Operation::Import => (TEMPLATE, true),
            Operation::Create(name) | Operation::CreateTogether(name) => (*name, true),
            Operation::Remove(name) => (*name, false),
            Operation::Forget => (TEMPLATE, false),
        };
        let answered = marks.contains(&(2 * n + 1));
        match (comes, answered) {
            (true, true) => drop((must.insert(name), may.insert(name))),
            (true, false) => drop(may.insert(name)),
            (false, true) => drop((must.remove(name), may.remove(name))),
            (false, false) => drop(must.remove(name)),
        }
    }
    (must, may)
}

/// Judges all states of a run.
pub fn check(store: &RecordingStore, operations: &[Operation], budget: &Budget) -> Outcome {
    let mut tally = Tally::default();
    for point in 0..=store.log().len() {
        let marks = store.marks_before(point);
        let (must, may) = expected(operations, &marks);
        let states = store.states_at(point, budget);
        tally.points += 1;
        tally.exhaustive += u64::from(states.units() <= budget.exhaustive_units);
        for state in states {
            tally.states += 1;
            // The first operation makes the store; once that was answered, it is one.
            let founded = marks.contains(&1);
            judge(&state.build(), founded, &must, &may).map_err(|why| {
                let log = store.log().join("\n  ");
                format!("{why}\n{state}\nlog:\n  {log}")
            })?;
        }
    }
    Ok(tally)
}

/// What [`check`] found.
pub type Outcome = std::result::Result<Tally, String>;

/// Judges one state. `founded`: the store must be whole without being completed; `must` and `may`:
/// which names must and which may be there.
pub fn judge(
    state: &MemoryStore,
    founded: bool,
    must: &BTreeSet<&str>,
    may: &BTreeSet<&str>,
) -> std::result::Result<(), String> {
    let error = |what: &str| {
        let what = what.to_owned();
        move |e: ploop::Error| format!("{what}: {e}")
    };
    if founded {
        let opener = Opener::on(Arc::new(state.clone()));
        Root::on(opener, Path::new(DIR), false, false).map_err(error("the store is lost"))?;
    }
    let root = open(Arc::new(state.clone())).map_err(error("open the store"))?;
    let there = names(&root).map_err(error("list"))?;
    if let Some(lost) = must.iter().find(|name| !there.contains(**name)) {
        return Err(format!(
            "{lost} is lost, though that it is there was answered"
        ));
    }
    if let Some(back) = there.iter().find(|name| !may.contains(name.as_str())) {
        return Err(format!(
            "{back} is there, though nobody made it or it was removed"
        ));
    }
    for name in &there {
        let is_template = name == TEMPLATE;
        let whole = if is_template {
            whole_template(&root)
        } else {
            whole_container(&root, name)
        };
        whole.map_err(|e| format!("{name} is there and not whole: {e}"))?;
        referred(&root, is_template, name).map_err(|e| format!("{name}: {e}"))?;
    }
    works_on(&root, &there)
}

fn names(root: &Root) -> Result<BTreeSet<String>> {
    let containers = list::containers(root)?.into_iter().map(|c| c.name);
    let mut all: BTreeSet<String> = containers.collect();
    all.extend(list::templates(root)?.into_iter().map(|t| t.name));
    Ok(all)
}

fn whole_template(root: &Root) -> std::result::Result<(), String> {
    let entry = list::template(root, TEMPLATE).map_err(|e| e.to_string())?;
    if entry.source != SOURCE_TEXT {
        return Err("its metadata is lost".into());
    }
    let source = template::source(root, TEMPLATE);
    let disk = root
        .opener()
        .open(&source, &root.open_options(false))
        .map_err(|e| e.to_string())?;
    if words_of(&disk)? != content() {
        return Err("it reads other bytes than its source".into());
    }
    drop(disk);
    for (id, image) in layers(root)? {
        let Ok(file) = root.opener().store().open(&image, Access::Read) else {
            continue;
        };
        let scan = scan_image(file.as_ref()).map_err(|e| e.to_string())?;
        let refs = image.with_file_name("refs");
        let used = root
            .opener()
            .store()
            .list(&refs)
            .is_ok_and(|refs| !refs.is_empty());
        if used && class_of(&scan.findings) != Class::Clean {
            return Err(format!("its layer {id} is not clean: {:?}", scan.findings));
        }
    }
    Ok(())
}

fn whole_container(root: &Root, name: &str) -> std::result::Result<(), String> {
    let text = |e: ploop::Error| e.to_string();
    let path = root.container(name).join(DESCRIPTOR);
    let source = Source {
        path,
        descriptor: true,
        snapshot: None,
    };
    let disk = root
        .opener()
        .open(&source, &root.open_options(true))
        .map_err(text)?;
    let before = words_of(&disk)?;
    if before != content() {
        return Err("it reads other bytes than its template".into());
    }
    let meta = Meta::read(root.opener().store().as_ref(), &root.container(name));
    if meta.map_err(text)?.id.is_none() {
        return Err("its id is lost".into());
    }
    disk.write(SECTOR, &payload(PROBE, 1..2)).map_err(text)?;
    disk.flush().and_then(|()| disk.close()).map_err(text)?;
    drop(disk);
    let disk = root
        .opener()
        .open(&source, &root.open_options(false))
        .map_err(text)?;
    let mut after = content();
    after[1] = word(PROBE, 1);
    match words_of(&disk)? == after {
        true => Ok(()),
        false => Err("written and opened again it reads other bytes".into()),
    }
}

/// Each layer's id and image.
fn layers(root: &Root) -> std::result::Result<BTreeMap<String, PathBuf>, String> {
    let dir = root.dir().join("layers");
    let names = root
        .opener()
        .store()
        .list(&dir)
        .map_err(|e| e.to_string())?;
    let entry = |n: PathBuf| {
        (
            n.to_string_lossy().into_owned(),
            dir.join(&n).join("image.hds"),
        )
    };
    Ok(names.into_iter().map(entry).collect())
}

/// The references are a superset: every disk has one on each of its layers.
fn referred(root: &Root, is_template: bool, name: &str) -> std::result::Result<(), String> {
    let text = |e: ploop::Error| e.to_string();
    let dir = if is_template {
        root.template(name)
    } else {
        root.container(name)
    };
    let d = root
        .opener()
        .read_descriptor(&dir.join(DESCRIPTOR))
        .map_err(text)?;
    let id = |guid: Guid| guid.to_string().trim_matches(['{', '}']).to_owned();
    let owner = match is_template {
        true => id(d.images[0].guid),
        false => {
            let own = d.images.iter().find(|i| i.guid == d.top).ok_or("no top")?;
            own.file
                .trim_start_matches("root.hds.")
                .trim_matches(['{', '}'])
                .to_owned()
        }
    };
    for image in d.images.iter().filter(|i| i.file.contains("/layers/")) {
        let layer = dir.join(&image.file);
        let layer = root.opener().store().resolve(&layer).map_err(text)?;
        let reference = layer.with_file_name("refs").join(&owner);
        if root
            .opener()
            .store()
            .kind(&reference)
            .map_err(text)?
            .is_none()
        {
            return Err(format!("its reference on {} is lost", layer.display()));
        }
    }
    Ok(())
}

/// Every name can be made or removed, and then everything is gone.
fn works_on(root: &Root, there: &BTreeSet<String>) -> std::result::Result<(), String> {
    let go = |operation: Operation| {
        perform(root, operation).map_err(|e| format!("afterwards, {operation:?}: {e}"))
    };
    if !there.contains(TEMPLATE) {
        if !there.is_empty() {
            return Err(format!("{there:?} without their template"));
        }
        go(Operation::Import)?;
    }
    for name in ["a", "b"] {
        if there.contains(name) {
            go(Operation::Remove(name))?;
        }
        go(Operation::Create(name))?;
    }
    for name in ["a", "b"] {
        go(Operation::Remove(name))?;
    }
    whole_template(root)?;
    let store = root.opener().store();
    let count = |path: &Path| store.list(path).map_or(usize::MAX, |names| names.len());
    let all = layers(root)?;
    let orphans = count(&root.dir().join("tmp"));
    if all.len() != 1 || orphans != 0 {
        return Err(format!(
            "{orphans} leftovers in tmp, {} layers for one template",
            all.len()
        ));
    }
    for image in all.values() {
        let refs = count(&image.with_file_name("refs"));
        if refs != 1 {
            return Err(format!("{refs} references on the layer of one template"));
        }
    }
    go(Operation::Forget)?;
    let left: Vec<usize> = ["layers", "tmp", "templates", "containers"]
        .map(|d| count(&root.dir().join(d)))
        .into();
    match left.iter().all(|n| *n == 0) {
        true => Ok(()),
        false => Err(format!(
            "of an empty store are left: {left:?} (layers, tmp, …)"
        )),
    }
}
