//! [`Descriptor`] to bytes, in the one order that OpenVZ's tool reads.

use std::fmt::Display;

use quick_xml::escape::partial_escape;

use super::{Descriptor, ImageKind, Temporary, Volume};

/// The root of a new descriptor.
pub(super) const ROOT: &str = "Virtuozzo_disk_image";

impl Descriptor {
    /// The document: UTF-8, LF line ends, each element on its line.
    ///
    /// For a descriptor that passes [`Descriptor::check`], [`parse`](super::parse) gives back an
    /// equal one. Comments, attributes outside of the root, and unknown elements in places that are
    /// not kept (FORMAT.md, "Writing") are not in it.
    pub fn to_xml(&self) -> Vec<u8> {
        let mut w = Writer {
            out: String::from("<?xml version=\"1.0\"?>\n"),
            depth: 0,
        };
        w.open(&self.root);
        self.write_parameters(&mut w);
        w.open("StorageData");
        if let Some(volume) = &self.volume {
            write_volume(volume, &mut w);
        }
        self.write_storage(&mut w);
        w.close("StorageData");
        self.write_snapshots(&mut w);
        let name = self
            .root
            .split([' ', '\t', '\r', '\n'])
            .next()
            .unwrap_or(ROOT);
        w.close(name);
        w.out.into_bytes()
    }

    fn write_parameters(&self, w: &mut Writer) {
        w.open("Disk_Parameters");
        w.maybe("Disk_size", self.disk_sectors);
        w.maybe("Max_delta_size", self.max_delta_sectors);
        w.maybe("Cylinders", self.chs.cylinders);
        w.maybe("Heads", self.chs.heads);
        w.maybe("Sectors", self.chs.sectors);
        w.leaf("Padding", 0);
        if let Some(encryption) = &self.encryption {
            w.open("Encryption");
            w.maybe("KeyId", encryption.key_id.as_ref());
            w.verbatim(&encryption.foreign);
            w.close("Encryption");
        }
        w.verbatim(&self.foreign.parameters);
        w.close("Disk_Parameters");
    }

    fn write_storage(&self, w: &mut Writer) {
        w.open("Storage");
        w.maybe("Start", self.start);
        w.maybe("End", self.end);
        w.leaf("Blocksize", self.cluster_sectors);
        w.maybe("Preallocated", self.preallocated.then_some(1));
        w.verbatim(&self.foreign.storage);
        // From here on nothing but images.
        for image in &self.images {
            let kind = match image.kind {
                ImageKind::Plain => "Plain",
                ImageKind::Compressed => "Compressed",
            };
            w.open("Image");
            w.leaf("GUID", image.guid);
            w.leaf("Type", kind);
            w.leaf("File", &image.file);
            w.close("Image");
        }
        w.close("Storage");
    }

    fn write_snapshots(&self, w: &mut Writer) {
        w.open("Snapshots");
        w.leaf("TopGUID", self.top);
        w.verbatim(&self.foreign.snapshots);
        // From here on nothing but shots.
        for shot in &self.shots {
            w.open("Shot");
            w.leaf("GUID", shot.guid);
            w.leaf("ParentGUID", shot.parent);
            for (name, mark) in Temporary::ELEMENTS {
                if shot.temporary == mark {
                    w.empty(name);
                }
            }
            w.close("Shot");
        }
        w.close("Snapshots");
    }
}

fn write_volume(volume: &Volume, w: &mut Writer) {
    if *volume == Volume::default() {
        return w.empty("Volume");
    }
    w.open("Volume");
    w.maybe("Parent", volume.parent.as_ref());
    w.maybe("SnapshotGUID", volume.snapshot_guid);
    w.maybe("ReadOnly", volume.read_only.then_some(1));
    w.close("Volume");
}

struct Writer {
    out: String,
    depth: usize,
}

impl Writer {
    fn line(&mut self, parts: &[&str]) {
        for _ in 0..self.depth {
            self.out.push_str("  ");
        }
        self.out.extend(parts.iter().copied());
        self.out.push('\n');
    }

    fn open(&mut self, tag: &str) {
        self.line(&["<", tag, ">"]);
        self.depth += 1;
    }

    fn close(&mut self, name: &str) {
        self.depth -= 1;
        self.line(&["</", name, ">"]);
    }

    fn empty(&mut self, name: &str) {
        self.line(&["<", name, "/>"]);
    }

    fn leaf(&mut self, name: &str, value: impl Display) {
        let value = value.to_string();
        self.line(&["<", name, ">", &partial_escape(&value), "</", name, ">"]);
    }

    fn maybe(&mut self, name: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.leaf(name, value);
        }
    }

    /// Elements that were cut whole out of a well-formed document.
    fn verbatim(&mut self, elements: &[String]) {
        for element in elements {
            self.line(&[element]);
        }
    }
}
