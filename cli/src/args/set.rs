//! What can be typed about a container's limits: `set`.

use clap::Args;
use snapshots::limits::{PRIORITY_MAX, parse_burst, parse_rate};

use super::Json;

#[derive(Args, Debug)]
pub(crate) struct Set {
    /// The container, or the disk directory.
    pub disk: String,
    /// What its files may take of the host, snapshots included: SIZE, or `none`.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub quota: Option<u64>,
    #[command(flatten)]
    pub limits: Limits,
    #[command(flatten)]
    pub json: Json,
}

/// I/O limits. A rate is a number with B, K, M, G or T (powers of 1024), or `none`.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "I/O limits (`none` takes one away)")]
pub(crate) struct Limits {
    /// Requests per second.
    #[arg(long, alias = "iopslimit", value_name = "N", value_parser = parse_rate)]
    pub iops: Option<u64>,
    /// Reads per second.
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub read_iops: Option<u64>,
    /// Writes per second.
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub write_iops: Option<u64>,
    /// Bytes per second.
    #[arg(long, alias = "iolimit", value_name = "SIZE", value_parser = parse_rate)]
    pub bps: Option<u64>,
    /// Bytes read per second.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub read_bps: Option<u64>,
    /// Bytes written per second.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub write_bps: Option<u64>,
    /// How much of each rate may be saved up: 500ms, 2s; `none` is the default, 100ms.
    #[arg(long, value_name = "TIME", value_parser = parse_burst)]
    pub burst: Option<u64>,
    /// Priority, 0 to 7; each step up is twice the weight in what containers share. 4 is the default.
    #[arg(long, value_name = "0..7", value_parser = clap::value_parser!(u8).range(0..=i64::from(PRIORITY_MAX)))]
    pub ioprio: Option<u8>,
}
