//! Disks as NBD clients see them: by name, listed and opened.

use super::*;

impl Exports for Disks {
    fn list(&self) -> Result<Vec<ExportInfo>> {
        let info = |name, description: &str| ExportInfo {
            name,
            description: description.into(),
        };
        let mut all = Vec::new();
        let (containers, templates) = match &self.catalog {
            Catalog::Store(root) => {
                let names = snapshots::list::names(root)?;
                (names.containers, names.templates)
            }
            Catalog::Container { .. } | Catalog::One(_) => {
                (vec![self.only_name().to_owned()], Vec::new())
            }
        };
        for name in containers {
            let snapshots = self.place(&name).and_then(|p| snapshot_names(&p));
            all.push(info(name.clone(), "container"));
            // Of a damaged one, or one that was just removed, there are none.
            for snapshot in snapshots.unwrap_or_default() {
                all.push(info(format!("{name}@{snapshot}"), "snapshot, read-only"));
            }
        }
        let template = |n| info(format!("{TEMPLATE}{n}"), "template, read-only");
        all.extend(templates.into_iter().map(template));
        Ok(all)
    }

    fn open(&self, name: &str) -> Result<OpenExport> {
        let name = match name {
            "" => self.only_name(),
            name => name,
        };
        let opened = self.hold(name);
        if let Err(e) = &opened
            && e.kind() != Kind::NotFound
        {
            tracing::warn!(export = name, error = %e, "an export could not be opened");
        }
        let disk = opened?;
        Ok(OpenExport {
            gate: Some(disk.gate.clone()),
            space: self.space.get().cloned(),
            lives: disk.lives(),
            device: disk,
            name: name.to_owned(),
            description: String::new(),
        })
    }

    fn tracker_names(&self, export: &OpenExport) -> Result<HashMap<String, String>> {
        // A snapshot, and a template, has none.
        let meta = self.place(&export.name)?.meta()?;
        let named = meta.trackers.into_iter();
        Ok(named.map(|(id, known)| (id, known.name)).collect())
    }
}

/// The snapshots of a disk by the names that open them.
fn snapshot_names(place: &Place<'_>) -> Result<Vec<String>> {
    let d = place.descriptor()?;
    if d.shots.len() == 1 {
        return Ok(Vec::new());
    }
    let meta = place.meta()?;
    let of = |g: Guid| meta.name_of(g).map_or_else(|| g.to_string(), str::to_owned);
    let shots = d.shots.iter();
    Ok(shots
        .filter(|s| s.guid != d.top && s.temporary == Temporary::No)
        // A layer of the store is not this container's snapshot.
        .filter(|s| d.image(s.guid).is_some_and(Place::owns) || meta.snapshot(s.guid).is_some())
        .map(|s| of(s.guid))
        .collect())
}
