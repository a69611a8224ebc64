//! What a store must be, read from its files; and templates that are made in an instant.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ploop_tests::server::pattern;
use ploop_tests::store::Rig;
use ploop_tests::tools::{run, tool};
use ploop_tests::treehash::file_digest;
use serde_json::Value;

/// Whether layers that nobody needs may be there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sound {
    /// They may: somebody may have been cut short.
    Superset,
    /// They may not: somebody collected.
    Exact,
}

impl Sound {
    /// Panics unless every disk's files, layers and references are there and, when exact, nothing
    /// else is.
    pub(crate) fn expect(self, rig: &Rig) {
        let mut owners: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (dir, id, files) in disks(rig) {
            for file in files {
                assert!(dir.join(&file).is_file(), "{dir:?} lost {file}");
                if let Some(layer) = file.strip_prefix("../../layers/") {
                    let layer = layer.strip_suffix("/image.hds").unwrap();
                    owners.entry(layer.into()).or_default().insert(id.clone());
                }
            }
        }
        for (layer, ids) in &owners {
            let refs = rig.root().join("layers").join(layer).join("refs");
            let refs = names(&refs);
            let lost: Vec<_> = ids.difference(&refs).collect();
            assert!(lost.is_empty(), "layer {layer} lost references: {lost:?}");
            // A layer may stand on another one.
            let extra = refs.difference(ids).filter(|r| !owners.contains_key(*r));
            let extra: Vec<_> = extra.collect();
            let exact = self == Sound::Superset || extra.is_empty();
            assert!(exact, "layer {layer} has references of nobody: {extra:?}");
        }
        if self == Sound::Exact {
            let wanted: BTreeSet<_> = owners.into_keys().collect();
            assert_eq!(names(&rig.root().join("layers")), wanted, "layers");
            assert_eq!(names(&rig.root().join("tmp")), BTreeSet::new(), "tmp");
        }
    }
}

/// The directory, the id, and the image files of every disk.
fn disks(rig: &Rig) -> Vec<(PathBuf, String, Vec<String>)> {
    let mut disks = Vec::new();
    for room in ["templates", "containers"].map(|r| rig.root().join(r)) {
        for name in names(&room) {
            let dir = room.join(name);
            let xml = fs::read_to_string(dir.join("DiskDescriptor.xml")).unwrap();
            let files = between(&xml, "<File>", "</File>");
            let meta = fs::read(dir.join(".ploop/meta.json")).unwrap();
            let meta: Value = serde_json::from_slice(&meta).unwrap();
            let id = meta["id"].as_str().unwrap().to_owned();
            disks.push((dir, id, files));
        }
    }
    disks
}

fn between(text: &str, open: &str, close: &str) -> Vec<String> {
    let parts = text.split(open).skip(1);
    parts
        .map(|p| p.split(close).next().unwrap().to_owned())
        .collect()
}

pub(crate) fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{dir:?}: {e}"));
    let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    entries.map(name).collect()
}

/// The names in a list, which must be whole: no entry with an error.
pub(crate) fn listed(rig: &Rig, args: &[&str]) -> BTreeSet<String> {
    let list = rig.json(args.iter().chain(&["--json"]));
    let mut names = BTreeSet::new();
    for entry in list.as_array().unwrap() {
        assert!(entry.get("error").is_none(), "{args:?}: {entry}");
        names.insert(entry["name"].as_str().unwrap().to_owned());
    }
    names
}

/// A template's name, its source, and the content of its clones; `None` when clones differ, because
/// they are grown.
pub(crate) struct Kit {
    pub(crate) templates: Vec<(&'static str, String, Option<String>)>,
}

/// Containers of each template.
pub(crate) const CLONES: u64 = 2;

impl Kit {
    /// Two raw disks, and a file system whose clones are larger than it.
    pub(crate) fn new(rig: &Rig) -> Kit {
        let raw = |name: &'static str, seed| {
            let file = format!("{name}.raw");
            // Four clusters, so that nothing is rounded.
            fs::write(rig.path(&file), pattern(256 << 10, seed)).unwrap();
            (name, rig.arg(&file), Some(file_digest(&rig.path(&file))))
        };
        let mut templates = vec![raw("one", 1), raw("two", 2)];
        let disk = rig.path("grows.raw");
        File::create(&disk).unwrap().set_len(2 << 20).unwrap();
        run(tool("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal"])
            .arg(&disk));
        templates.push(("grows", rig.arg("grows.raw"), None));
        Kit { templates }
    }

    pub(crate) fn import(&self, t: usize) -> Vec<String> {
        let (name, source, _) = &self.templates[t];
        words(&["template", "import", name, source, "--from", "raw"])
    }

    pub(crate) fn create(&self, t: usize, container: &str) -> Vec<String> {
        let (name, _, digest) = &self.templates[t];
        let mut args = words(&["create", container, "--template", name]);
        if digest.is_none() {
            args.extend(words(&["--size", "4M"]));
        }
        args
    }

    /// A container's name says what it is cloned from.
    pub(crate) fn container(&self, t: usize, n: u64) -> String {
        format!("{}-{n}", self.templates[t].0)
    }

    /// Panics unless it holds what a clone of its template must.
    pub(crate) fn judge(&self, rig: &Rig, container: &str) {
        let (template, _) = container.split_once('-').unwrap();
        let of = self.templates.iter().find(|t| t.0 == template).unwrap();
        match &of.2 {
            Some(digest) => assert_eq!(&rig.content(container), digest, "{container}"),
            None => {
                let flat = rig.path(&format!("{container}.flat"));
                rig.run(["convert", container, flat.to_str().unwrap(), "--to", "raw"]);
                assert_eq!(fs::metadata(&flat).unwrap().len(), 4 << 20);
                run(tool("e2fsck").args(["-fn"]).arg(&flat));
                fs::remove_file(&flat).unwrap();
            }
        }
    }

    /// Panics unless everything in the store is listed without an error and has its content.
    pub(crate) fn judge_all(&self, rig: &Rig) {
        let containers = listed(rig, &["list"]);
        assert_eq!(containers, names(&rig.root().join("containers")));
        containers.iter().for_each(|c| self.judge(rig, c));
        let templates = listed(rig, &["template", "list"]);
        assert_eq!(templates, names(&rig.root().join("templates")));
        for (name, source, _) in &self.templates {
            if templates.contains(*name) {
                assert_eq!(rig.template_content(name), file_digest(Path::new(source)));
            }
        }
    }

    /// A removal that changes nothing, but collects.
    pub(crate) fn collect(&self, rig: &Rig) {
        let (name, ..) = self.templates[0];
        if !listed(rig, &["template", "list"]).contains(name) {
            rig.run(self.import(0));
        }
        rig.run(["create", "passing", "--template", name]);
        rig.run(["rm", "passing"]);
        Sound::Exact.expect(rig);
    }

    /// Removes everything; nothing may be left.
    pub(crate) fn clear(rig: &Rig) {
        for container in listed(rig, &["list"]) {
            rig.run(["rm", &container]);
        }
        for template in listed(rig, &["template", "list"]) {
            rig.run(["template", "rm", &template]);
        }
        Sound::Exact.expect(rig);
    }
}

pub(crate) fn words(args: &[&str]) -> Vec<String> {
    args.iter().map(|a| (*a).to_owned()).collect()
}
