//! OpenVZ's verbs, with its options.

use std::path::PathBuf;

use clap::Args;

use super::Json;
use crate::output::parse_size;

#[derive(Args, Debug)]
pub(crate) struct OpenvzSnapshot {
    /// OpenVZ: the new snapshot's GUID.
    #[arg(short = 'u')]
    pub guid: Option<String>,
    /// OpenVZ: nobody has the disk open.
    #[arg(short = 'o')]
    pub offline: bool,
    /// OpenVZ: the DiskDescriptor.xml.
    pub descriptor: Option<String>,
}

/// What OpenVZ's `ploop check` takes. It writes unless it is told not to; this one only where -d, -F
/// or --repair says so.
#[derive(Args, Debug)]
#[command(next_help_heading = "OpenVZ's options: nothing is written without -d or -F")]
pub(crate) struct OpenvzCheck {
    /// Check also what is marked clean: always done here. Changes no length and no entry, unlike
    /// there.
    #[arg(short = 'f')]
    pub force: bool,
    /// Repair all, also what loses something, which is named; clears the mark, too. As --repair
    /// --yes, with its undo file.
    #[arg(short = 'F', conflicts_with_all = ["repair", "undo"])]
    pub hard_force: bool,
    /// Look for entries that share a cluster: always done here.
    #[arg(short = 'c')]
    pub detailed: bool,
    /// Write nothing, whatever else is said; there, -r with -d, and any check of a descriptor,
    /// clears marks.
    #[arg(short = 'r', conflicts_with_all = ["repair", "undo"])]
    pub read_only: bool,
    /// Print no findings; errors still go to standard error.
    #[arg(short = 's', conflicts_with = "json")]
    pub silent: bool,
    /// Drop the in-use mark of what proves sound, and repair what loses nothing. As --repair, and
    /// never asks.
    #[arg(short = 'd', conflicts_with_all = ["repair", "undo"])]
    pub drop_in_use: bool,
    /// The source is a raw image: nothing in it can be wrong. Needs -b.
    #[arg(short = 'R')]
    pub raw: bool,
    /// The cluster of a raw image, in sectors: a power of two from 64 to 131072.
    #[arg(short = 'b', value_name = "SECTORS")]
    pub blocksize: Option<u32>,
    /// Does nothing, here as there.
    #[arg(short = 'S')]
    pub sparse: bool,
    /// Check only the delta of this GUID of a DiskDescriptor.xml; a repair is one of the whole disk.
    #[arg(short = 'u', value_name = "UUID", conflicts_with_all = ["repair", "undo", "fs"])]
    pub guid: Option<String>,
    /// Does nothing, here as there.
    #[arg(short = 'D')]
    pub defragment: bool,
    /// Exit as OpenVZ's tool: 0 sound (or only space is lost), 37 not closed cleanly, 11 damaged,
    /// 17 a conversion was cut off, 4 cannot be opened, 23 in use by another program or no readable
    /// descriptor, 38 usage or a delta of another cluster size, 6 and 7 reading and writing failed, 41 the file
    /// system inside is damaged (--fs).
    #[arg(long)]
    pub openvz_exit_codes: bool,
}

#[derive(Args, Debug)]
pub(crate) struct OpenvzNode {
    /// The snapshot's GUID.
    #[arg(short = 'u', required = true)]
    pub guid: String,
    /// The DiskDescriptor.xml.
    pub descriptor: String,
}

#[derive(Args, Debug)]
pub(crate) struct OpenvzMerge {
    /// The node's GUID [default: the top].
    #[arg(short = 'u', conflicts_with = "all")]
    pub guid: Option<String>,
    /// The whole chain.
    #[arg(short = 'A')]
    pub all: bool,
    /// The DiskDescriptor.xml.
    pub descriptor: String,
}

#[derive(Args, Debug)]
pub(crate) struct Init {
    /// The image to create; its DiskDescriptor.xml goes beside it.
    pub delta: PathBuf,
    /// Size of the disk; without a letter, in sectors.
    #[arg(short = 's', value_parser = parse_sectors)]
    pub size: u64,
    /// raw, expanded (v2), ploop1 (v1).
    #[arg(short = 'f', default_value = "expanded")]
    pub format: String,
    /// Version of the format: 1 or 2.
    #[arg(
        id = "format_version",
        short = 'v',
        default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=2),
    )]
    pub version: u32,
    /// Cluster size in sectors.
    #[arg(short = 'b', default_value_t = 2048)]
    pub blocksize: u32,
    /// Filesystem: only `none`; `ploop template import` makes filesystems.
    #[arg(short = 't', default_value = "none")]
    pub fstype: String,
}

#[derive(Args, Debug)]
pub(crate) struct SnapshotList {
    /// The DiskDescriptor.xml, or its directory.
    pub descriptor: String,
    /// No header.
    #[arg(short = 'H')]
    pub no_header: bool,
    /// Leave the top out.
    #[arg(short = 's')]
    pub snapshots_only: bool,
    /// Only this snapshot.
    #[arg(short = 'u', long = "id")]
    pub id: Option<String>,
    /// Columns, of uuid, parent_uuid, current, fname.
    #[arg(short = 'o', default_value = "parent_uuid,current,uuid,fname")]
    pub columns: String,
    #[command(flatten)]
    pub json: Json,
}

/// OpenVZ's sizes: a bare number counts sectors.
pub(super) fn parse_sectors(text: &str) -> Result<u64, String> {
    let bytes = match text.parse::<u64>() {
        Ok(sectors) => sectors.checked_mul(512).ok_or("the size is too large")?,
        Err(_) => parse_size(text)?,
    };
    match bytes % 512 {
        0 => Ok(bytes / 512),
        _ => Err(format!("{bytes} bytes is no whole number of sectors")),
    }
}
