//! The holder.

use std::path::PathBuf;

use clap::Args;
use nbd_server::hold::Address;

use super::Json;
use crate::output::parse_size;

fn address(text: &str) -> Result<Address, String> {
    Address::parse(text).map_err(|e| e.to_string())
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["socket", "listen"]).multiple(true))]
pub(crate) struct Hold {
    /// Listen for clients on a unix socket, created with mode 0600.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Listen for clients on TCP: 127.0.0.1:10809, [::1]:10809.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<String>,
    /// Allow TCP beyond loopback, without encryption.
    #[arg(long)]
    pub insecure_listen: bool,
    /// The server: unix:/PATH or tcp:HOST:PORT. It need not be there yet.
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub to: Address,
    /// What requests, and changes that were answered and not flushed, may take of memory, of all
    /// exports together. When half of an export's share is taken, the holder flushes by itself.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64M")]
    pub buffer: u64,
    /// How long a client waits for a server before its requests fail; 0: for ever.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub patience: u64,
    /// The holder's control socket, for `ploop hold-to`.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Connections at once.
    #[arg(long, value_name = "N", default_value_t = 1024,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,
}

#[derive(Args, Debug)]
pub(crate) struct HoldTo {
    /// The holder's control socket.
    pub control: PathBuf,
    /// The server from now on: unix:/PATH or tcp:HOST:PORT. Without it, what the holder holds is
    /// shown.
    #[arg(value_name = "ADDRESS", value_parser = address)]
    pub to: Option<Address>,
    #[command(flatten)]
    pub json: Json,
}
