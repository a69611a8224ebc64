//! What can be typed about a disk's size: `resize`.

use clap::Args;

use super::Json;
use super::openvz::parse_sectors;
use crate::output::parse_size;

#[derive(Args, Debug)]
pub(crate) struct Resize {
    /// The container, or the disk directory.
    pub disk: String,
    /// What it is to have; rounded up to a whole cluster.
    #[arg(value_parser = parse_size, required_unless_present = "sectors")]
    pub size: Option<u64>,
    /// OpenVZ: the same; without a letter, in sectors.
    #[arg(short = 's', value_name = "SIZE", value_parser = parse_sectors, conflicts_with = "size")]
    pub sectors: Option<u64>,
    /// It is to be smaller: the filesystem (ext4) and its partition are made smaller, the rest is cut
    /// off. Refused where something else is on the disk, or the files do not fit.
    #[arg(long)]
    pub shrink: bool,
    /// Make the disk one image of that size, which stands on nothing: for other tools, which do not
    /// know that a disk was shrunk. Not with snapshots.
    #[arg(long)]
    pub flatten: bool,
    /// Leave what is on the disk as it is; it is cut only where it reads as zeros.
    #[arg(long)]
    pub no_filesystem: bool,
    #[command(flatten)]
    pub json: Json,
}
