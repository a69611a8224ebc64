//! What can be typed about moving a container.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{Hooks, Json};
use crate::output::parse_size;

/// `20ms`, `1.5s`.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: write 20ms, or 1.5s");
    let (number, unit) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 0.001),
        (None, Some(number)) => (number, 1.0),
        (None, None) => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * unit).map_err(|_| wrong())
}

#[derive(Args, Debug)]
pub(crate) struct Migrate {
    /// The container.
    pub container: String,
    /// Where to: the socket of that service (unix:/PATH, for ploopd ROOT/migrate.sock), a port
    /// (tcp:HOST:PORT; beyond loopback with the certificates of the services), or a command (exec:ssh
    /// HOST ploop migrate-receive).
    #[arg(required_unless_present = "resolve", conflicts_with = "resolve")]
    pub dest: Option<String>,
    /// What it is to be called there.
    #[arg(long = "as", value_name = "NAME")]
    pub name: Option<String>,
    /// How long its clients may wait at the hand-over.
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "20ms")]
    pub downtime: Duration,
    /// Bytes per second, at most, before the hand-over; 64K at least.
    #[arg(long, value_parser = parse_size)]
    pub rate: Option<u64>,
    /// The control socket of the holder (ploop hold) that has its clients: it goes to the
    /// destination at the hand-over.
    #[arg(long, value_name = "PATH", requires = "holder_to")]
    pub holder: Option<PathBuf>,
    /// Where the holder finds it there: unix:/PATH or tcp:HOST:PORT, of that service's NBD.
    #[arg(long, value_name = "ADDRESS", requires = "holder")]
    pub holder_to: Option<String>,
    /// Leave its files here; nobody opens them.
    #[arg(long)]
    pub keep: bool,
    /// The destination serves it at once; its data follows, what is read first. Until all of it is
    /// there, it needs this service.
    #[arg(long)]
    pub post_copy: bool,
    /// Never slow its clients down: where they write faster than can be sent, the move fails then.
    #[arg(long)]
    pub no_brake: bool,
    #[command(flatten)]
    pub hooks: Hooks,
    /// Decide a move that was cut at its end and whose other side is gone for good: take, this service
    /// has the container; give, the other one has. Says what may be lost.
    #[arg(long, value_enum)]
    pub resolve: Option<Resolve>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Resolve {
    Take,
    Give,
}

#[derive(Args, Debug)]
pub(crate) struct MigrateReceive {
    /// The service's socket for containers that come [default: ROOT/migrate.sock].
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}
