//! What is asked of the client.

use crate::Result;

/// Answers that any socket holds while this side is still sending. Beyond it, a server that waits
/// for its answers to be taken and a client that waits for its requests to be would wait for ever.
const SOCKET_HOLDS: usize = 128 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
    Mixed,
    FlushWrites,
    Fua,
}

pub(crate) struct Args {
    pub(crate) address: String,
    pub(crate) export: String,
    pub(crate) op: Op,
    pub(crate) block: usize,
    pub(crate) depth: usize,
    pub(crate) connections: u64,
    pub(crate) seconds: f64,
    pub(crate) ops: u64,
    pub(crate) offset: u64,
    pub(crate) range: u64,
    pub(crate) seed: u64,
    pub(crate) flush: bool,
}

impl Args {
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Args> {
        let mut place = |what: &str| words.next().ok_or(format!("{what} is missing"));
        let (address, export) = (place("ADDRESS")?, place("EXPORT")?);
        let op = match place("OP")?.as_str() {
            "read" => Op::Read,
            "write" => Op::Write,
            "mixed" => Op::Mixed,
            "flush-writes" => Op::FlushWrites,
            "fua" => Op::Fua,
            other => return Err(format!("{other}: no such operation")),
        };
        let mut args = Args {
            address,
            export,
            op,
            block: 4096,
            depth: 16,
            connections: 1,
            seconds: 1.0,
            ops: u64::MAX,
            offset: 0,
            range: 0,
            seed: 1,
            flush: false,
        };
        while let Some(name) = words.next() {
            if name == "--flush" {
                args.flush = true;
                continue;
            }
            let value = words.next().ok_or(format!("{name}: a value is missing"))?;
            match name.as_str() {
                "--block" => args.block = number(&name, &value)?,
                "--depth" => args.depth = number(&name, &value)?,
                "--connections" => args.connections = number(&name, &value)?,
                "--seconds" => args.seconds = number(&name, &value)?,
                "--ops" => args.ops = number(&name, &value)?,
                "--offset" => args.offset = number(&name, &value)?,
                "--range" => args.range = number(&name, &value)?,
                "--seed" => args.seed = number(&name, &value)?,
                _ => return Err(format!("{name}: no such option")),
            }
        }
        if args.block == 0 || args.depth == 0 || args.connections == 0 {
            return Err("--block, --depth and --connections are at least 1".into());
        }
        let length = u32::try_from(args.block).is_ok_and(|b| b <= 32 << 20);
        if !length || args.depth > 1024 {
            return Err("--block is at most 32 MiB, --depth at most 1024".into());
        }
        if !(args.seconds > 0.0 && args.seconds <= 86_400.0) {
            return Err("--seconds is more than nothing and at most a day".into());
        }
        if args.op == Op::Mixed && args.depth * args.block > SOCKET_HOLDS {
            return Err(format!(
                "mixed: --block times --depth is at most {SOCKET_HOLDS}"
            ));
        }
        Ok(args)
    }
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
    let parsed = value.parse().ok();
    parsed.ok_or(format!("{name}: {value} is not a number it takes"))
}
