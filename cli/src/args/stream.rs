//! What can be typed about streams: `send`, `receive`.

use std::path::PathBuf;

use clap::Args;

use super::Json;
use crate::output::parse_size;

#[derive(Args, Debug)]
pub(crate) struct Send {
    /// The container, or the disk directory: its whole tree and its state; with @SNAPSHOT, what that
    /// shows, also while the disk is in use.
    pub disk: String,
    /// Only what came after this snapshot, which the receiver has.
    #[arg(long, value_name = "SNAPSHOT")]
    pub from: Option<String>,
    /// What `ploop receive --list-have` printed where the stream goes: templates that are there are
    /// not sent. `-` is standard input.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "reference"])]
    pub have: Option<PathBuf>,
    /// A template of this store that is there, too.
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "from")]
    pub reference: Option<String>,
    /// Go on where a stream was cut: what `ploop receive --resume-token` printed.
    #[arg(long, value_name = "TOKEN")]
    pub resume: Option<String>,
    /// As OpenVZ's `ploop copy` sends, to a node that has that tool: what the disk shows, without its
    /// snapshots. Answers are read from standard output if that is a socket, else from standard input.
    #[arg(long, conflicts_with_all = ["from", "have", "reference", "resume"])]
    pub openvz: bool,
    /// Bytes per second, at most.
    #[arg(long, value_parser = parse_size)]
    pub rate: Option<u64>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("what").required(true)
    .args(["name", "list_have", "list_cut", "resume_token", "forget"]))]
pub(crate) struct Receive {
    /// The new container; of a stream of `send --from`, the one that has that snapshot.
    pub name: Option<String>,
    /// Keep what came when the stream is cut, so that it can go on.
    #[arg(long, requires = "name")]
    pub resumable: bool,
    /// A stream of OpenVZ's `ploop copy`. Answers are written to standard input if that is a socket,
    /// else to standard output; messages go to standard error.
    #[arg(long, requires = "name", conflicts_with = "resumable")]
    pub openvz: bool,
    /// Print, as JSON, the templates that need not be sent here: for `ploop send --have`.
    #[arg(long)]
    pub list_have: bool,
    /// List the streams that were cut and may go on.
    #[arg(long)]
    pub list_cut: bool,
    /// Print where the stream of this name goes on: for `ploop send --resume`.
    #[arg(long, value_name = "NAME")]
    pub resume_token: Option<String>,
    /// Give the stream of this name up, and remove what came of it.
    #[arg(long, value_name = "NAME")]
    pub forget: Option<String>,
    #[command(flatten)]
    pub json: Json,
}
