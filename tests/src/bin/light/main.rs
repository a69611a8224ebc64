//! A client that costs almost nothing, so that a measurement shows the server.
//!
//! ```text
//! light ADDRESS EXPORT OP [--block N] [--depth N] [--connections N] [--seconds S] [--ops N]
//!                         [--offset N] [--range N] [--seed N] [--flush]
//! ```
//!
//! ADDRESS is the path of a unix socket, or host:port. OP: `read`, `write`, `mixed` (7 reads to 3
//! writes), `flush-writes` (each write is followed by a flush, and is done when that is answered) or
//! `fua`. Each connection is a thread. All its free slots go out in one vectored write, straight
//! from frames that are filled once; one large receive takes what has come, and the data is counted,
//! not copied. The clock is read once a batch.
//!
//! Blocks of the range are visited in a pseudo-random order, none twice before all were once; the
//! connections share one such walk, so `write` on an empty image is first touches. `--ops` ends the
//! run early; `--flush` ends it with a FLUSH on every connection, timed apart. Prints JSON.

mod args;
mod connection;
mod handshake;
mod latencies;
mod walk;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Barrier;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use serde_json::json;

use args::Args;
use connection::{Connection, Counts};
use handshake::open;
use latencies::Latencies;
use walk::Walk;

type Result<T> = std::result::Result<T, String>;

fn run(args: &Args) -> Result<serde_json::Value> {
    let taken = AtomicU64::new(0);
    let mut connections = Vec::new();
    for number in 0..args.connections {
        let (socket, size) = open(&args.address, &args.export)?;
        let end = match args.range {
            0 => size,
            range => args.offset.saturating_add(range),
        };
        let blocks = end.saturating_sub(args.offset) / args.block as u64;
        if end > size || blocks == 0 {
            return Err(format!("the range does not fit into {size} bytes"));
        }
        let walk = Walk::new(blocks, args.seed);
        connections.push(Connection::new(args, number, socket, walk, &taken));
    }
    let together = &Barrier::new(connections.len());
    let ended: Vec<Result<_>> = std::thread::scope(|scope| {
        let threads: Vec<_> = connections
            .iter_mut()
            .map(|connection| {
                scope.spawn(move || {
                    together.wait();
                    let began = Instant::now();
                    let until = began + Duration::from_secs_f64(args.seconds);
                    let ran = connection
                        .run(until)
                        .map(|()| began.elapsed().as_secs_f64());
                    // All have written before anybody flushes; whoever failed is not waited for.
                    together.wait();
                    Ok((ran?, connection.end(args.flush)?))
                })
            })
            .collect();
        let joined = threads.into_iter().map(|t| t.join());
        joined
            .map(|r| r.unwrap_or_else(|_| Err("a thread died".into())))
            .collect()
    });
    let (mut seconds, mut flush_seconds) = (0.0_f64, 0.0_f64);
    for each in ended {
        let (ran, flushed) = each?;
        seconds = seconds.max(ran);
        flush_seconds = flush_seconds.max(flushed);
    }
    let (mut counts, mut latencies) = (Counts::default(), Latencies::new());
    for c in &connections {
        counts.reads += c.counts.reads;
        counts.writes += c.counts.writes;
        counts.flushes += c.counts.flushes;
        latencies.add(&c.latencies);
    }
    let ops = counts.reads + counts.writes;
    Ok(json!({
        "ops": ops,
        "reads": counts.reads,
        "writes": counts.writes,
        "flushes": counts.flushes,
        "seconds": seconds,
        "flush_seconds": flush_seconds,
        "iops": ops as f64 / seconds,
        "mb_per_second": ops as f64 * args.block as f64 / seconds / 1e6,
        "p50_ns": latencies.quantile(0.5),
        "p99_ns": latencies.quantile(0.99),
        "max_ns": latencies.longest,
    }))
}

fn main() -> ExitCode {
    let result = Args::parse(std::env::args().skip(1)).and_then(|args| run(&args));
    let printed = result.and_then(|value| {
        let text = format!("{value}\n");
        let out = io::stdout().write_all(text.as_bytes());
        out.map_err(|e| format!("standard output: {e}"))
    });
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            drop(writeln!(io::stderr(), "light: {e}"));
            ExitCode::FAILURE
        }
    }
}
