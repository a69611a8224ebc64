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
fn parse_sectors(text: &str) -> Result<u64, String> {
    let bytes = match text.parse::<u64>() {
        Ok(sectors) => sectors.checked_mul(512).ok_or("the size is too large")?,
        Err(_) => parse_size(text)?,
    };
    match bytes % 512 {
        0 => Ok(bytes / 512),
        _ => Err(format!("{bytes} bytes is no whole number of sectors")),
    }
}
