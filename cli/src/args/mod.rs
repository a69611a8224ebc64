//! What can be typed.

mod backup;
mod hold;
mod migrate;
mod openvz;
mod resize;
mod set;
mod stream;
mod tree;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use nbd_server::EngineKind;
use snapshots::limits::parse_rate;

use crate::output::parse_size;

pub(crate) use backup::{Backup, BackupArgs, BackupTo, NewBackup, Restore};
pub(crate) use hold::{Hold, HoldTo};
pub(crate) use migrate::{Migrate, MigrateReceive, Resolve};
pub(crate) use openvz::{Init, OpenvzCheck, OpenvzMerge, OpenvzNode, OpenvzSnapshot, SnapshotList};
pub(crate) use resize::Resize;
pub(crate) use set::Set;
pub(crate) use stream::{Receive, Send};
pub(crate) use tree::{
    Compact, Df, Diff, Export, ExportTo, JobsArgs, Snapshot, SnapshotArgs, Tracker, Tree,
};

const AFTER: &str = "\
Sizes: a number and B, K, M, G or T (powers of 1024); without a letter, bytes (OpenVZ verbs: sectors).
SOURCE: an image file, a disk directory or a DiskDescriptor.xml, each optionally followed by
@SNAPSHOT; where a store is used, the name of a container.
Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 exists, 5 in use, 6 damaged, 7 unsupported,
8 no space, 9 not permitted.";

/// Disks for containers: templates, instant clones, and a server for them.
#[derive(Debug, Parser)]
#[command(name = "ploop", version, after_help = AFTER, propagate_version = true)]
pub(crate) struct Cli {
    /// The store's directory.
    #[arg(long, global = true, env = "PLOOP_ROOT", default_value = snapshots::DEFAULT_ROOT)]
    pub root: PathBuf,
    /// Say more on standard error; twice: still more.
    #[arg(long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// The same, before the command only: behind `init` it is OpenVZ's version of the format.
    #[arg(short, action = clap::ArgAction::Count)]
    pub v: u8,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Templates: sealed disks that containers are cloned from.
    #[command(subcommand)]
    Template(Template),
    /// Make containers from a template, or from another container.
    Create(Create),
    /// List the containers of the store.
    List(List),
    /// Describe a container, a disk or an image.
    Info(Info),
    /// Change what a container may take, also while it runs.
    Set(Set),
    /// Say where the bytes are that disks and the store take of the host.
    Df(Df),
    /// Give back the space that a disk does not need, also while it runs.
    Compact(Compact),
    /// Make a disk that nobody uses larger or smaller, with the filesystem on it.
    Resize(Resize),
    /// Remove containers and their data.
    Rm(Rm),
    /// Snapshots: make, list, go back to, delete.
    Snapshot(SnapshotArgs),
    /// Trackers, which say what of a disk was written: begin, list, clear, merge, end.
    #[command(subcommand)]
    Tracker(Tracker),
    /// Back a disk up as it is at one instant, in full or since the last time: files for qemu-img.
    Backup(BackupArgs),
    /// Make a container of backups.
    Restore(Restore),
    /// Draw the tree of a disk, with what each node takes and would give back.
    Tree(Tree),
    /// Say where two snapshots may differ, without reading their data.
    Diff(Diff),
    /// Copy a container, or one of its snapshots, out of the store.
    Export(Export),
    /// Write a container, or one of its snapshots, to standard output: for another store.
    Send(Send),
    /// Make a container of what `ploop send` wrote, from standard input.
    Receive(Receive),
    /// Move a container to another service, under its clients.
    Migrate(Migrate),
    /// Take a container that comes on standard input, and answer on standard output: for the service of
    /// this store, at the other end of `exec:ssh`.
    MigrateReceive(MigrateReceive),
    /// Work that a service does: list it, cancel it.
    Jobs(JobsArgs),
    /// Serve a disk, an image or a whole store over NBD.
    Serve(Serve),
    /// Hold clients' connections while the server behind them is restarted, upgraded or moved.
    Hold(Hold),
    /// Give a holder's clients another server, or show what it holds.
    HoldTo(HoldTo),
    /// Copy a disk or an image into another format.
    Convert(Convert),
    /// Check a disk or an image; writes nothing unless asked to repair.
    #[command(visible_alias = "fsck")]
    Check(Check),
    /// Show the whole of it on a store in a temporary directory.
    Demo(Demo),
    /// OpenVZ: make a new image with its DiskDescriptor.xml.
    Init(Init),
    /// OpenVZ: list the snapshots of a DiskDescriptor.xml.
    SnapshotList(SnapshotList),
    /// OpenVZ: delete a snapshot of a DiskDescriptor.xml.
    SnapshotDelete(OpenvzNode),
    /// OpenVZ: go back to a snapshot; what was written since is lost.
    SnapshotSwitch(OpenvzNode),
    /// OpenVZ: merge a node with its parent, which goes.
    SnapshotMerge(OpenvzMerge),
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Any other verb of OpenVZ's.
    #[command(external_subcommand)]
    Other(Vec<String>),
}

impl Command {
    /// True when errors are to be printed as JSON, too.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            Command::Template(Template::Import(i)) => i.json.json,
            Command::Template(Template::List(j) | Template::Info { json: j, .. }) => j.json,
            Command::Create(c) => c.json.json,
            Command::Snapshot(s) => s.command.as_ref().is_some_and(Snapshot::wants_json),
            Command::Backup(b) => b.wants_json(),
            Command::Restore(r) => r.json.json,
            Command::Tree(t) => t.json.json,
            Command::Diff(d) => d.json.json,
            Command::Tracker(t) => t.wants_json(),
            Command::Export(e) => e.json.json,
            Command::Send(s) => s.json.json,
            Command::Receive(r) => r.json.json,
            Command::Migrate(m) => m.json.json,
            Command::Jobs(j) => j.json.json,
            Command::List(l) => l.json.json,
            Command::Info(i) => i.json.json,
            Command::Set(s) => s.json.json,
            Command::Compact(c) => c.json.json,
            Command::Df(d) => d.json.json,
            Command::Resize(r) => r.json.json,
            Command::Convert(c) => c.json.json,
            Command::Check(c) => c.json.json,
            Command::HoldTo(h) => h.json.json,
            _ => false,
        }
    }
}

#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Json {
    /// Print JSON, for programs.
    #[arg(long)]
    pub json: bool,
}

/// What is run around an instant.
#[derive(Args, Clone, Debug)]
pub(crate) struct Hooks {
    /// Run this, by `sh -c`, before the instant that counts: that of a backup, or the last rounds of a
    /// move; such as `fsfreeze -f /mnt`.
    #[arg(long, value_name = "CMD", requires = "thaw")]
    pub freeze: Option<String>,
    /// Run this after it, whatever happened, and when this command is killed.
    #[arg(long, value_name = "CMD", requires = "freeze")]
    pub thaw: Option<String>,
    /// Seconds that each of the two may take, and what is between them.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub hook_timeout: u32,
}

#[derive(Args, Debug)]
pub(crate) struct OfDisk {
    /// The container, or the disk directory.
    pub disk: String,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub(crate) struct List {
    /// Count what each container is charged for, too: reads where the files of each have data. Without
    /// it that is shown of those that ploopd has open under a quota.
    #[arg(long)]
    pub charge: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Template {
    /// Make a template from a directory, a tar archive, an image or a disk.
    Import(Import),
    /// List the templates of the store.
    List(Json),
    /// Describe a template.
    Info {
        /// The template.
        name: String,
        #[command(flatten)]
        json: Json,
    },
    /// Remove a template that no container is cloned from.
    Rm {
        /// The template.
        name: String,
    },
    /// Make a template of a snapshot, at once: it shares the snapshot's data.
    Create {
        /// The new template's name.
        name: String,
        /// The snapshot.
        #[arg(long, value_name = "CONTAINER@SNAPSHOT")]
        from: String,
    },
    /// Read a template and compare it with the hash that was recorded when it was made.
    Verify {
        /// The template.
        name: String,
    },
    /// Make a template of several layers one of one layer. Its clones keep theirs.
    Flatten {
        /// The template.
        name: String,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Import {
    /// The new template's name.
    pub name: String,
    /// A directory, a .tar[.gz|.zst], an image (raw, ploop, qcow2) or a disk directory.
    pub source: String,
    /// Size of the disk [default: the content and a quarter more; an image: its own size].
    #[arg(long, value_parser = parse_size)]
    pub size: Option<u64>,
    /// Put the filesystem on the whole disk, without a partition table.
    #[arg(long)]
    pub no_partition: bool,
    /// Label of the filesystem, 16 bytes at most.
    #[arg(long)]
    pub label: Option<String>,
    /// User and group quota in the filesystem (ext4), which containers cloned from it have, too. A
    /// kernel without quota mounts them read-only, if it is asked to.
    #[arg(long)]
    pub user_quota: bool,
    /// Cluster size: a power of two from 32K to 64M.
    #[arg(long, value_parser = parse_size, default_value = "64K")]
    pub cluster: u64,
    #[command(flatten)]
    pub from: From,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct From {
    /// Take the source for this format instead of looking at its first bytes.
    #[arg(long, value_enum)]
    pub from: Option<Format>,
    /// A further directory that files named by the source may lie in.
    #[arg(long, value_name = "DIR")]
    pub allow_dir: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Format {
    Raw,
    Ploop,
    Qcow2,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("origin").required(true).args(["template", "from"]))]
pub(crate) struct Create {
    /// Names of the new containers; with --count, what their numbers are put behind.
    #[arg(required = true)]
    pub names: Vec<String>,
    /// The template.
    #[arg(long)]
    pub template: Option<String>,
    /// Another container, or a snapshot of it; of a container itself, a snapshot is made first.
    #[arg(long, value_name = "CONTAINER[@SNAPSHOT]")]
    pub from: Option<String>,
    /// Make so many: NAME-0001, NAME-0002, …
    #[arg(long, value_name = "N")]
    pub count: Option<u32>,
    /// Size of the disk; not below the template's. Partition and filesystem are grown with it.
    #[arg(long, value_parser = parse_size)]
    pub size: Option<u64>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub(crate) struct Info {
    /// What to describe.
    pub source: String,
    /// OpenVZ: print size, blocksize and fmt_version.
    #[arg(short = 's')]
    pub sizes: bool,
    #[command(flatten)]
    pub from: From,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub(crate) struct Rm {
    /// The containers.
    #[arg(required = true)]
    pub names: Vec<String>,
    /// End the connections of the clients that use them.
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["source", "store"]))]
#[command(group = clap::ArgGroup::new("where").required(true).args(["socket", "listen", "activation"]).multiple(true))]
pub(crate) struct Serve {
    /// What to serve.
    pub source: Option<String>,
    /// Serve every container (NAME), every snapshot (NAME@GUID, read-only) and every template
    /// (template:NAME, read-only) of the store.
    #[arg(long)]
    pub store: bool,
    /// Listen on a unix socket, created with mode 0600.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Listen on TCP: 127.0.0.1:10809, [::1]:10809.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<String>,
    /// Take the listening sockets from systemd (LISTEN_FDS).
    #[arg(long)]
    pub activation: bool,
    /// Allow TCP beyond loopback, without encryption.
    #[arg(long)]
    pub insecure_listen: bool,
    /// Name of the export [default: the container's name, or the file's].
    #[arg(long, value_name = "EXPORT", conflicts_with = "store")]
    pub name: Option<String>,
    /// Serve read-only.
    #[arg(long)]
    pub read_only: bool,
    /// Requests per second of all containers together, shared by their priority.
    #[arg(long, value_name = "N", value_parser = parse_rate, requires = "store")]
    pub iops: Option<u64>,
    /// Bytes per second of all containers together, shared by their priority.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate, requires = "store")]
    pub bps: Option<u64>,
    #[command(flatten)]
    pub space: nbd_server::export::space::Options,
    /// How requests are executed: inline, uring or portable [default: uring where the kernel
    /// permits it, else portable].
    #[arg(long, env = "PLOOP_ENGINE", value_name = "ENGINE")]
    pub engine: Option<EngineKind>,
    /// The control API's socket [default: control.sock of the store; .ploop/control.sock of a disk].
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    #[command(flatten)]
    pub from: From,
}

#[derive(Args, Debug)]
pub(crate) struct Convert {
    /// What to copy.
    pub source: String,
    /// The new file; must not exist. `-` is standard output (raw only).
    pub target: String,
    /// The new file's format.
    #[arg(long, value_enum)]
    pub to: To,
    /// Cluster size of the new file [default: the source's, or 64K].
    #[arg(long, value_parser = parse_size)]
    pub cluster: Option<u64>,
    #[command(flatten)]
    pub from: From,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum To {
    Raw,
    Ploop,
    PloopV1,
    Qcow2,
}

#[derive(Args, Debug)]
pub(crate) struct Check {
    /// What to check.
    #[arg(required_unless_present = "undo")]
    pub source: Option<String>,
    /// Repair what was found: at once what loses nothing; what loses something is asked for at a
    /// terminal, and else left. An undo file is written before the first change.
    #[arg(long)]
    pub repair: bool,
    /// Repair what loses something, too, and name what is lost.
    #[arg(long, short, requires = "repair")]
    pub yes: bool,
    /// The undo file [default: a new one beside the image, or in .ploop of the disk].
    #[arg(long, value_name = "FILE", requires = "repair")]
    pub undo_file: Option<PathBuf>,
    /// Take a repair back: every byte and length as it was.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["source", "repair"])]
    pub undo: Option<PathBuf>,
    /// Have the file system inside checked, too (ext2–4, XFS), on a copy of its data in TMPDIR or
    /// /var/tmp; a repair names the files that it loses bytes of.
    #[arg(long, conflicts_with = "undo")]
    pub fs: bool,
    /// Show how far it is, on a terminal.
    #[arg(long, short = 'C')]
    pub progress: bool,
    #[command(flatten)]
    pub openvz: OpenvzCheck,
    #[command(flatten)]
    pub from: From,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub(crate) struct Demo {
    /// Clone this many containers.
    #[arg(long, default_value_t = 100)]
    pub clones: u32,
    /// Keep the store and say where it is.
    #[arg(long)]
    pub keep: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn no_two_arguments_of_a_command_clash() {
        Cli::command().debug_assert();
        // Clap checks a command's own arguments together with the global ones when it is used.
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            drop(Cli::try_parse_from(["ploop", name, "--help"]));
            for inner in command.get_subcommands() {
                drop(Cli::try_parse_from([
                    "ploop",
                    name,
                    inner.get_name(),
                    "--help",
                ]));
            }
        }
    }
}
