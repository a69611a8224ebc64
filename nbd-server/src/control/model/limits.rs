//! I/O limits on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::export::limits::Known;

/// I/O limits of a container, and what they do. A rate of 0 is no limit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Limits {
    /// The container.
    pub container: String,
    /// Requests per second.
    pub iops: u64,
    /// Reads per second.
    pub read_iops: u64,
    /// Writes per second; TRIM and `WRITE_ZEROES` are some.
    pub write_iops: u64,
    /// Bytes per second.
    pub bps: u64,
    /// Bytes read per second.
    pub read_bps: u64,
    /// Bytes written per second.
    pub write_bps: u64,
    /// Milliseconds of each rate that may be saved up.
    pub burst_ms: u64,
    /// 0 to 7. Each step up is twice the weight in what containers share.
    pub priority: u8,
    /// Requests that had to wait for their turn, since the container was first opened.
    #[serde(default)]
    pub throttled_requests: u64,
    /// How long they waited, together, in seconds.
    #[serde(default)]
    pub throttled_seconds: f64,
    /// Requests that wait now.
    #[serde(default)]
    pub waiting: u64,
}

/// To change I/O limits: what is missing stays, 0 takes a limit away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsChange {
    /// Requests per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Reads per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_iops: Option<u64>,
    /// Writes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_iops: Option<u64>,
    /// Bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps: Option<u64>,
    /// Bytes read per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bps: Option<u64>,
    /// Bytes written per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_bps: Option<u64>,
    /// Milliseconds of each rate that may be saved up, 10 to 3600000; 0 is the default, 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_ms: Option<u64>,
    /// 0 to 7.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
}

impl From<&LimitsChange> for snapshots::limits::Change {
    fn from(c: &LimitsChange) -> snapshots::limits::Change {
        snapshots::limits::Change {
            iops: [c.iops, c.read_iops, c.write_iops],
            bps: [c.bps, c.read_bps, c.write_bps],
            burst_ms: c.burst_ms,
            priority: c.priority,
        }
    }
}

impl From<Known> for Limits {
    fn from(k: Known) -> Limits {
        let Known {
            name,
            limits: l,
            totals,
        } = k;
        Limits {
            container: name,
            burst_ms: l.burst_ms(),
            priority: l.priority(),
            iops: l.iops,
            read_iops: l.read_iops,
            write_iops: l.write_iops,
            bps: l.bps,
            read_bps: l.read_bps,
            write_bps: l.write_bps,
            throttled_requests: totals.waited,
            throttled_seconds: totals.nanos as f64 / 1e9,
            waiting: totals.waiting,
        }
    }
}
