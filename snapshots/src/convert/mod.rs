//! Any readable source as one new image: raw, ploop or qcow2.
//!
//! ```text
//!  Source ── Opener ── Device ── pieces (what is not zero) ─┬─ raw file, or a stream
//!                                                           ├─ ploop v1, v2  (the core's own Top)
//!                                                           └─ qcow2         (its own writer)
//! ```
//!
//! | step | what | durable before the next step |
//! |---|---|---|
//! | 1 | `TARGET.tmp-UUID`, mode 0600, beside the target | no |
//! | 2 | content, and for ploop and qcow2 the closed header last | yes |
//! | 3 | rename to `TARGET`, which must still be free: **commit** | – |
//! | 4 | the directory | yes |
//!
//! On an error at any step nothing of it is left, step 4 included. After a crash the target is
//! whole or not there; what may be left then is the temporary file, which nothing refers to.
//!
//! The first guest byte that cannot be read ends the whole operation: an image with invented bytes
//! would be believed.

mod copy;
pub(crate) mod qcow2;
mod raw;
mod staged;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use ploop::device::Device;
use ploop::disk::Disk;
use ploop::disk::open::{Format, OpenOptions, Opener, Source};
use ploop::format::ploop::header::{CLUSTER_SECTORS_OPENVZ, has_signature};
use ploop::format::ploop::top::Top;
use ploop::format::ploop::{self as image, Header, Version};
use ploop::store::{Access, SECTOR};
use ploop::{Error, Kind as ErrorKind, Result};

pub use copy::copy;
pub(crate) use copy::{pieces, pieces_in};
pub use raw::copy_to_file;
use staged::Staged;

/// Cluster of a new ploop image, in sectors, where the source has none to go by: 64 KiB.
const CLUSTER_SECTORS: u32 = 128;

/// Permissions of the new image.
const MODE: u32 = 0o600;

/// Called with the guest bytes done and those in all, now and then, from the caller's thread.
pub type Progress<'a> = &'a dyn Fn(u64, u64);

/// The format of the new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest's bytes; a sparse file of exactly the guest's size.
    Raw,
    /// ploop v2.
    Ploop,
    /// ploop v1, below 2 TiB.
    PloopV1,
    /// qcow2 version 3, without backing file or compression.
    Qcow2,
}

/// What the new image is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct To {
    /// Its format.
    pub kind: Kind,
    /// Its cluster in sectors, for ploop only: a power of two from 64 to 131072. `None`: that of
    /// the source if it is a ploop one of such a size, else 128 (64 KiB). qcow2 always has 128.
    pub cluster_sectors: Option<u32>,
}

impl From<Kind> for To {
    fn from(kind: Kind) -> To {
        To {
            kind,
            cluster_sectors: None,
        }
    }
}

/// Where the new image goes.
pub enum Target<'a> {
    /// A file that must not exist.
    File(PathBuf),
    /// A stream, such as standard output; raw only. Gets every byte, holes as zeros.
    Writer(&'a mut dyn Write),
}

impl fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::File(path) => f.debug_tuple("File").field(path).finish(),
            Target::Writer(_) => f.write_str("Writer"),
        }
    }
}

/// What a conversion made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Converted {
    /// The source's size in bytes.
    pub source_bytes: u64,
    /// The new image's virtual size in bytes: the source's, padded with zeros to a whole cluster
    /// for ploop and to a whole sector for qcow2.
    pub virtual_bytes: u64,
    /// Guest bytes written; zeros that were left out are not counted.
    pub bytes_written: u64,
}

/// Writes what `source` shows to a new image. The source is opened read-only, whatever `options`
/// say. Blocks; on return the target and its name are durable (a stream: flushed).
///
/// Errors: `Exists` for a target that is there; `Invalid` for a stream of anything but raw, a
/// cluster size that the format does not have, a size it cannot hold; and what reading the source
/// or writing the target gives. After any of them no file is left behind.
pub fn convert(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    target: Target<'_>,
    to: impl Into<To>,
    progress: Progress<'_>,
) -> Result<Converted> {
    let to = to.into();
    check_cluster(&to)?;
    let options = OpenOptions {
        write: false,
        ..options.clone()
    };
    match target {
        Target::Writer(_) if to.kind != Kind::Raw => Err(Error::invalid(
            "only a raw image can be a stream: the others are written out of order",
        )
        .fix("Name a file")),
        Target::Writer(out) => raw::stream(&opener.open(source, &options)?, out, progress),
        Target::File(path) => {
            let mut staged = Staged::new(opener.store().as_ref(), path)?;
            let disk = opener.open(source, &options)?;
            let done = match to.kind {
                Kind::Raw => raw::file(&disk, &mut staged, progress)?,
                Kind::Qcow2 => qcow2::file(&disk, &mut staged, progress)?,
                Kind::Ploop | Kind::PloopV1 => {
                    let cluster = match to.cluster_sectors {
                        Some(sectors) => sectors,
                        None => default_cluster(opener, source, &options, &disk)?,
                    };
                    to_ploop(&disk, &mut staged, to.kind, cluster, progress)?
                }
            };
            staged.publish()?;
            Ok(done)
        }
    }
}

/// Refuses a cluster size that the format does not have.
fn check_cluster(to: &To) -> Result<()> {
    let Some(sectors) = to.cluster_sectors else {
        return Ok(());
    };
    match to.kind {
        Kind::Raw => Err(Error::invalid("a raw image has no clusters")),
        Kind::Qcow2 if u64::from(sectors) * SECTOR != qcow2::CLUSTER => {
            let what = format!("qcow2 with clusters of {sectors} sectors; only 128 are written");
            Err(Error::unsupported(what))
        }
        // Header::new judges the others.
        _ => Ok(()),
    }
}

/// The source's cluster, if the source is ploop and OpenVZ's tools accept the size.
fn default_cluster(
    opener: &Opener,
    source: &Source,
    options: &OpenOptions,
    disk: &Disk,
) -> Result<u32> {
    let is_ploop = match options.format {
        _ if source.descriptor => true,
        Some(format) => format == Format::Ploop,
        None if source.path.extension().is_some_and(|e| e == "raw") => false,
        None => {
            let store = opener.store();
            let mut head = [0; 16];
            let real = store.resolve(&source.path)?;
            let got = store.open(&real, Access::Read)?.read_at(&mut head, 0)?;
            has_signature(&head[..got])
        }
    };
    let sectors = u32::try_from(disk.cluster_bytes() / SECTOR).unwrap_or(0);
    let fits = sectors.is_power_of_two() && CLUSTER_SECTORS_OPENVZ.contains(&sectors);
    Ok(if is_ploop && fits {
        sectors
    } else {
        CLUSTER_SECTORS
    })
}

fn to_ploop(
    from: &Disk,
    staged: &mut Staged<'_>,
    kind: Kind,
    cluster_sectors: u32,
    progress: Progress<'_>,
) -> Result<Converted> {
    let version = match kind {
        Kind::PloopV1 => Version::V1,
        _ => Version::V2,
    };
    let sectors = from.size().div_ceil(SECTOR);
    // A cluster of 0 is the header's to refuse.
    let padded = sectors.next_multiple_of(u64::from(cluster_sectors.max(1)));
    let header =
        Header::new(version, cluster_sectors, padded).map_err(|e| e.on(staged.target()))?;
    let file = image::create(staged.store(), staged.temp(), &header, MODE)?;
    staged.made();
    let disk = Disk::writable(None, Top::open(file)?, None)?;
    let bytes_written = copy(from, &disk, progress)?;
    disk.close()?;
    Ok(Converted {
        source_bytes: from.size(),
        virtual_bytes: header.size(),
        bytes_written,
    })
}

/// The error for a target that is there.
fn taken(path: &std::path::Path) -> Error {
    Error::new(ErrorKind::Exists, "there is already something of that name")
        .on(path)
        .fix("Choose another name, or remove it first")
}
