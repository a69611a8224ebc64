//! Every kind of finding: its classes, what it means for the owner, and what a repair does.
//!
//! FINDINGS.md has the same table for people; a test keeps the two together. A kind's name is for
//! ever: programs match on it.

use ploop::verify::Class::{self, Clean, Corrupt, Dirty, Leak};

/// A kind of finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Its stable name.
    pub name: &'static str,
    /// The classes that findings of it can have, the usual one first.
    pub classes: &'static [Class],
    /// What it means for the owner.
    pub means: &'static str,
    /// What a repair does about it, or that it does nothing.
    pub repair: &'static str,
}

const fn kind(
    name: &'static str,
    classes: &'static [Class],
    means: &'static str,
    repair: &'static str,
) -> Kind {
    Kind {
        name,
        classes,
        means,
        repair,
    }
}

/// All of them, by what they are about.
#[rustfmt::skip]
pub const KINDS: &[Kind] = &[
    // An image.
    kind("in-use", &[Dirty], "The image was not closed cleanly: writes that were not flushed may be missing, flushed ones are there.", "Checks the image and clears the mark; nothing is lost."),
    kind("conversion-interrupted", &[Dirty], "A conversion between v1 and v2 was cut off: the entries may be of two units, and no program can read the image until it is finished or taken back.", "Puts header and entries back from the .idx backup; without one, nothing can be done."),
    kind("duplicate-entry", &[Corrupt], "Two guest ranges share one cluster of the file: a write to one of them overwrites the other.", "Gives the later owner a copy of its own: both keep what they read now, and one of them may be wrong."),
    kind("entry-beyond-eof", &[Corrupt], "An entry points behind the end of the file: what the guest had there cannot be read.", "Clears the entry: the guest range reads as zeros, or as the image below; it is named as lost."),
    kind("cluster-truncated", &[Corrupt], "The end of the file cuts a cluster: the guest bytes in the missing rest cannot be read.", "Fills the file up with zeros to a whole cluster: the bytes that are left stay, the rest is named as lost."),
    kind("entry-in-metadata", &[Corrupt], "An entry points into header or table: the guest would read metadata, and a write would destroy the image.", "Clears the entry: the guest range reads as zeros, or as the image below; it is named as lost."),
    kind("misaligned-entry", &[Corrupt], "An entry is off the cluster grid, so its cluster overlaps two others.", "Copies what it names to a whole cluster of its own: the guest range keeps what it reads now."),
    kind("slot-past-end", &[Corrupt], "A table slot behind the last entry is set: another program may take it for data, or grow the disk onto it.", "Clears the slot; no guest byte is behind it."),
    kind("entry-count-mismatch", &[Corrupt], "The number of entries does not fit the disk's size: one of the two is wrong.", "Corrects the one that the table in the file contradicts, when asked to."),
    kind("geometry-inconsistent", &[Corrupt], "Cluster, size and number of entries contradict each other: one of them is wrong.", "Nothing: which of them is right cannot be known."),
    kind("unknown-flags", &[Corrupt], "The header has flags that nobody defined: a program that knows them may have written the image.", "Clears them."),
    kind("data-offset-gap", &[Clean], "The data area begins later than it must: sound, but the kernel driver of OpenVZ refuses such an image.", "Nothing is needed."),
    kind("foreign-geometry", &[Clean], "Cluster, size or data area are as only QEMU writes them: OpenVZ's tools refuse the image or do not see the end of the disk.", "Nothing is needed; `ploop convert` makes an image that every tool takes."),
    kind("leaked-tail", &[Leak], "The file goes on behind the last cluster in use: space is lost, nothing else.", "Cuts the file behind the last cluster in use."),
    kind("unreferenced-clusters", &[Clean], "Clusters inside the file belong to no entry: every writer uses them before the file grows.", "Nothing is needed; compacting gives the space back."),
    kind("length-misaligned", &[Leak], "The file's length is no multiple of the cluster: an extension of the file was cut off.", "Cuts the remainder; no entry names it."),
    kind("bad-signature", &[Corrupt], "The file does not begin as an image of its format does: it is something else, or its first bytes are overwritten.", "Nothing: a header cannot be invented."),
    kind("bad-type", &[Corrupt], "The file says that it is of a kind that nobody defined.", "Nothing: what it is cannot be known."),
    kind("bad-cluster-size", &[Corrupt], "The cluster size is none that the format allows, so no entry can be followed.", "Nothing: the right one cannot be known."),
    kind("bad-data-off", &[Corrupt], "The data area cannot begin where the header says.", "Computes where it begins from the number of entries, where the entries agree with that."),
    kind("bat-truncated", &[Corrupt], "The file ends inside its table: the rest of the entries is gone, and with them the places of the data.", "Nothing: entries cannot be invented."),
    kind("header-truncated", &[Corrupt], "The file ends inside its header.", "Nothing: a header cannot be invented."),
    kind("size-overflow", &[Corrupt], "The disk's size is larger than any file can be.", "Nothing: the right one cannot be known."),
    kind("unreadable", &[Corrupt], "The bytes contradict the format so that no reader can use them.", "Nothing."),
    // The format extension of an image.
    kind("extension-stale", &[Clean], "The header names a format extension that is out of date, as the format allows: readers ignore it, but QEMU may refuse to open the image.", "Clears the offset in the header."),
    kind("extension-dangling", &[Corrupt], "The format extension is not in the file: the change-tracking bitmap is lost, the disk is not.", "Drops the extension from the header; the next backup must be a full one."),
    kind("extension-magic", &[Corrupt], "Something else is where the format extension should be: the change-tracking bitmap is lost, the disk is not.", "Drops the extension from the header; the next backup must be a full one."),
    kind("extension-checksum", &[Corrupt], "The format extension is damaged: the change-tracking bitmap cannot be trusted, the disk can.", "Drops the extension from the header; the next backup must be a full one."),
    kind("extension-section-length", &[Corrupt], "A section of the format extension leaves its cluster, or is too short: the extension cannot be trusted, the disk can.", "Drops the extension from the header; the next backup must be a full one."),
    kind("extension-size-mismatch", &[Corrupt], "The change-tracking bitmap is of a disk of another size.", "Drops the extension from the header; the next backup must be a full one."),
    kind("extension-granularity", &[Corrupt], "A bit of the change-tracking bitmap stands for an impossible number of sectors; QEMU stops with an abort on it.", "Drops the extension from the header; the next backup must be a full one."),
    kind("extension-bitmap-count", &[Corrupt], "The change-tracking bitmap's table has not the length that the disk needs.", "Drops the extension from the header; the next backup must be a full one."),
    kind("extension-bitmap-empty", &[Clean], "The change-tracking bitmap has no table, as OpenVZ's tool writes it for an empty one; QEMU refuses to open the image.", "Nothing is needed."),
    kind("extension-bitmap-out-of-bounds", &[Corrupt], "A part of the change-tracking bitmap is not in the file.", "Drops the extension from the header; the next backup must be a full one."),
    kind("extension-overlaps-data", &[Corrupt], "Guest data and the format extension share a cluster: the bitmap cannot be trusted, and a program that writes the bitmap destroys data.", "Drops the extension from the header and leaves the cluster to the guest, which keeps what it reads now."),
    kind("droppable-feature", &[Clean], "The extension has a feature that is not known here and that the first write drops; QEMU refuses to open the image.", "Nothing is needed."),
    kind("unknown-feature", &[Clean], "The image uses a feature that is not known here and must be kept: it can be read, not written.", "Nothing: only a program that knows the feature may change the image."),
    // The journal of an image.
    kind("journal", &[Dirty], "The last writes are in the journal beside the image; every open reads them from there.", "Nothing: the next open for writing puts the journal of a top into its image; what an image below shows, `ploop convert DISK@SNAPSHOT TARGET --to ploop` copies."),
    kind("journal-damaged", &[Corrupt], "The journal cannot be read: what was flushed last is lost.", "Moves the journal to .ploop/lost+found, when asked to."),
    kind("journal-foreign", &[Corrupt], "The journal does not belong to the image as it is now, so it cannot be replayed.", "Moves the journal to .ploop/lost+found, when asked to; putting the image back as it was loses nothing."),
    kind("journal-holds", &[Corrupt], "These guest bytes are in a journal that cannot be replayed.", "See journal-foreign."),
    // A disk: its directory and its tree.
    kind("missing-file", &[Corrupt], "A file that the disk needs is not there: the snapshots that lie on it cannot be read.", "Nothing: put the file back."),
    kind("path-outside", &[Corrupt], "A name leads out of the disk's directory: following it could show the guest a file of the host.", "Nothing: allow the directory where it is meant, or correct the name."),
    kind("bad-path", &[Corrupt], "A file name cannot be used, or does not name an image.", "Nothing: correct the name."),
    kind("duplicate-file", &[Corrupt], "Two images of the disk are one file: a write to one changes the other.", "Nothing: which of the two it is must be said by the owner."),
    kind("cluster-size-mismatch", &[Corrupt], "An image's cluster is not the disk's: OpenVZ's tools refuse the disk.", "Nothing: which of them is right must be said by the owner."),
    kind("version-mismatch", &[Corrupt], "An image is of another version than the one that it lies on: OpenVZ's tools cannot merge them.", "Nothing: convert the disk."),
    kind("child-smaller-than-parent", &[Corrupt], "An image is smaller than the one that it lies on: the end of the parent is hidden, and OpenVZ's kernel refuses the disk.", "Nothing: grow the image."),
    kind("base-length", &[Clean], "The raw base is no multiple of the cluster long: sound, but the kernel driver of OpenVZ refuses it.", "Nothing is needed."),
    kind("stale-disk-size", &[Clean], "The descriptor gives another size than the top image, which rules: a grow was made on the image alone.", "Writes the image's size into the descriptor."),
    kind("stale-geometry", &[Clean], "The descriptor's cylinders, heads and sectors are not those of its size; every reader ignores them.", "Nothing is needed; a repair of the size writes them, too."),
    kind("too-many-images", &[Clean], "The disk has more images on top of each other than OpenVZ's tools open (127).", "Nothing: merge snapshots before the disk goes back to OpenVZ."),
    kind("interrupted-merge", &[Dirty], "A merge was cut off: the disk reads right, and the merge can go on.", "Nothing: `ploop snapshot merge` goes on where it stopped."),
    kind("temporary-snapshot", &[Clean], "A snapshot is marked for removal; its data is whole.", "Nothing: `ploop snapshot delete` removes it."),
    kind("orphan-file", &[Leak], "A file lies in the directory that nothing names: space is lost, nothing else.", "Moves it to .ploop/lost+found."),
    // The descriptor.
    kind("parent-cycle", &[Corrupt], "The parents form a circle: there is no base to read from.", "Nothing: which link is wrong cannot be known."),
    kind("unknown-parent", &[Corrupt], "A snapshot lies on one that is not there.", "Nothing: put the descriptor or the parent back."),
    kind("duplicate-guid", &[Corrupt], "Two images or snapshots have one name: which is meant cannot be known.", "Nothing: put the descriptor back."),
    kind("top-missing", &[Corrupt], "The top that the descriptor names has no image.", "Nothing: put the descriptor back."),
    kind("temporary-top", &[Corrupt], "The top is marked for removal, which only a snapshot can be.", "Nothing: put the descriptor back."),
    kind("missing-image", &[Corrupt], "A snapshot has no image.", "Nothing: put the descriptor back."),
    kind("missing-shot", &[Corrupt], "An image is not in the tree, so its place is not known.", "Nothing: put the descriptor back."),
    kind("missing-element", &[Corrupt], "The descriptor lacks an element without which a disk cannot be read.", "Nothing: put the descriptor back."),
    kind("unexpected-element", &[Corrupt], "The descriptor has an element where OpenVZ's tool would take it for something else.", "Nothing: move or remove it by hand."),
    kind("bad-blocksize", &[Corrupt], "The descriptor's cluster size is impossible.", "Nothing: put the descriptor back."),
    kind("bad-number", &[Corrupt], "A number of the descriptor cannot be read, or is impossible.", "Nothing: put the descriptor back."),
    kind("bad-guid", &[Corrupt], "A GUID of the descriptor cannot be read.", "Nothing: put the descriptor back."),
    kind("padding", &[Corrupt], "Padding is not 0: OpenVZ's tool refuses the disk.", "Nothing: write 0 by hand."),
    kind("bad-encoding", &[Corrupt], "The descriptor is not in the encoding that it declares.", "Nothing: put the descriptor back."),
    kind("dtd", &[Corrupt], "The descriptor defines entities: such a file can be made to read others, and none is read here.", "Nothing: remove the DOCTYPE by hand."),
    kind("not-well-formed", &[Corrupt], "The descriptor is no XML, or a part of it is gone.", "Nothing: put the descriptor back."),
    kind("xml-too-deep", &[Corrupt], "The descriptor is nested deeper, or longer, than any disk needs.", "Nothing: put the descriptor back."),
    // A qcow2 image (beside the kinds above).
    kind("corrupt-bit", &[Corrupt], "A program found damage in the image before, and said so in its header.", "Nothing here: `qemu-img check -r all` on a copy."),
    kind("format-probing", &[Corrupt], "The image does not say which format the file below it has: guessing would let a guest choose it.", "Nothing: `qemu-img rebase -u -F FORMAT` records it."),
    kind("bitmap-in-use", &[Dirty], "A bitmap was not stored by the last writer: it is incomplete and must not be used.", "Nothing here: remove the bitmap; the next backup must be a full one."),
    kind("bad-refcount-table", &[Corrupt], "The table of reference counts is not usable: no writer knows which clusters are free. Reading needs it not.", "Nothing here: `qemu-img check -r all` on a copy counts them again."),
    kind("refcount-too-low", &[Corrupt, Dirty], "A cluster in use is counted as less than that: a writer may give it away and overwrite it.", "Nothing here: `qemu-img check -r all` on a copy counts them again."),
    kind("refcount-too-high", &[Leak], "A cluster is counted more often than it is used: it is copied or kept where it need not be.", "Nothing here: `qemu-img check -r leaks` gives the space back."),
    kind("leaked-clusters", &[Leak], "Clusters are counted that nothing uses: space is lost, nothing else.", "Nothing here: `qemu-img check -r leaks` gives the space back."),
    kind("copied-flag", &[Corrupt, Dirty], "An entry says wrongly whether its cluster has one owner: a write in place may change a snapshot.", "Nothing here: `qemu-img check -r all` on a copy counts them again."),
    kind("bad-snapshot-table", &[Corrupt], "The table of internal snapshots is damaged: what they hold cannot be counted. The current state can be read.", "Nothing here: `qemu-img check` on a copy."),
    kind("bad-bitmap-table", &[Corrupt], "The directory of bitmaps or a bitmap's table is damaged. The disk can be read.", "Nothing here: remove the bitmap; the next backup must be a full one."),
    // The file system inside.
    kind("fs-errors", &[Corrupt], "The file system inside is damaged: files may be lost or hold wrong bytes.", "Nothing here: serve the disk, and run the file system's own repair on it (e2fsck, xfs_repair)."),
    kind("fs-unclean", &[Dirty], "The file system inside was not unmounted: the next mount replays its journal.", "Nothing here: mounting does it."),
    kind("fs-unknown", &[Clean], "What is inside was not checked: it is no file system of a kind that is checked here, or it cannot be reached.", "Nothing is needed."),
];

/// The kind of that name.
pub fn find(name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|k| k.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kind: &Kind) -> String {
        let classes: Vec<&str> = kind.classes.iter().map(|c| c.name()).collect();
        let (name, means, repair) = (kind.name, kind.means, kind.repair);
        format!("| `{name}` | {} | {means} | {repair} |", classes.join(", "))
    }

    #[test]
    fn findings_md_and_the_table_say_the_same() {
        let text = include_str!("../FINDINGS.md");
        let (_, tables) = text.split_once("## Kinds").unwrap();
        let written: Vec<&str> = tables.lines().filter(|l| l.starts_with("| `")).collect();
        let known: Vec<String> = KINDS.iter().map(row).collect();
        assert_eq!(written, known);
    }

    #[test]
    fn names_are_one_of_a_kind_and_sentences_are_sentences() {
        let names: std::collections::BTreeSet<&str> = KINDS.iter().map(|k| k.name).collect();
        assert_eq!(names.len(), KINDS.len());
        for kind in KINDS {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(kind.name.chars().all(plain), "{}", kind.name);
            assert!(!kind.classes.is_empty(), "{}", kind.name);
            assert!(
                kind.means.ends_with('.') && kind.repair.ends_with('.'),
                "{}",
                kind.name
            );
        }
    }
}
