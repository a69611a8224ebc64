//! `ploopd`: serves every container, snapshot and template of a store over NBD, and the control
//! API beside it.
//!
//! Stopping, on SIGINT or SIGTERM: jobs are paused or cancelled, the control API ends, NBD clients
//! get their last answers, the disks are closed. Killed, it loses nothing that was flushed.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use nbd_server::control::model::Info;
use nbd_server::control::{Control, Service, go_on_with_merges};
use nbd_server::export::{Disks, space};
use nbd_server::migrate::link::{Tls, TlsFiles};
use nbd_server::migrate::{Arrivals, Destination};
use nbd_server::{Config, EngineKind, Server, raise_file_limit};
use ploop::disk::open::Opener;
use ploop::{Error, Result};
use snapshots::Root;
use snapshots::limits::parse_rate;
use tracing_subscriber::EnvFilter;

/// One service for a store: NBD for its containers, snapshots and templates, and the control API.
#[derive(Debug, Parser)]
#[command(name = "ploopd", version)]
struct Args {
    /// The store's directory; made if it is not there.
    #[arg(long, env = "PLOOP_ROOT", default_value = snapshots::DEFAULT_ROOT)]
    root: PathBuf,
    /// The unix socket for NBD [default: ROOT/nbd.sock].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Listen for NBD on TCP, too.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Let other machines connect: there is no encryption, and nobody is asked for a password.
    #[arg(long)]
    insecure_listen: bool,
    /// Take the sockets for NBD that systemd passes; then there is no default one.
    #[arg(long)]
    activation: bool,
    /// The control API's unix socket [default: ROOT/control.sock].
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// The unix socket for containers that come from other services [default: ROOT/migrate.sock].
    #[arg(long, value_name = "PATH")]
    migrate_socket: Option<PathBuf>,
    /// Let containers come over TCP, too: with --tls-cert, --tls-key and --tls-ca, or on loopback.
    #[arg(long, value_name = "ADDR:PORT")]
    migrate_listen: Option<String>,
    /// The certificate (PEM) that this service shows other ones.
    #[arg(long, value_name = "PATH", requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, value_name = "PATH", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The certificate (PEM) of who has signed those of all services.
    #[arg(long, value_name = "PATH", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
    /// Serve containers read-only too.
    #[arg(long)]
    read_only: bool,
    /// NBD connections at once.
    #[arg(long, value_name = "N", default_value_t = Config::default().max_connections,
          value_parser = clap::value_parser!(u32).range(1..))]
    max_connections: u32,
    /// Requests per second of all containers together, shared by their priority.
    #[arg(long, value_name = "N", value_parser = parse_rate, default_value = "none")]
    iops: u64,
    /// Bytes per second of all containers together, shared by their priority.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate, default_value = "none")]
    bps: u64,
    #[command(flatten)]
    space: space::Options,
    /// How requests are executed: inline, uring or portable [default: uring where the kernel
    /// permits it, else portable].
    #[arg(long, env = "PLOOP_ENGINE", value_name = "ENGINE")]
    engine: Option<EngineKind>,
    /// How the log, on standard error, is written. `RUST_LOG` says how much.
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            drop(writeln!(io::stderr(), "ploopd: {e}"));
            ExitCode::from(e.kind().exit_code())
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let engine = EngineKind::choose(args.engine)?;
    let open_files_limit = open_files(args.max_connections);
    // Made first, so that its sockets can be in it; then opened with its resolved name.
    let root = Root::open(&args.root, !args.read_only)?;
    let dir = root.dir().to_owned();
    let control_path = match &args.control {
        Some(path) => std::path::absolute(path).map_err(|e| Error::io("resolve", path, e))?,
        None => dir.join("control.sock"),
    };
    // The locks of disks that this process opens say where it answers.
    let (opener, _) = Opener::host().arriving();
    let opener = opener.with_control(control_path.clone());
    let root = Root::on(opener, &dir, false, true)?;
    snapshots::list::names(&root)?;
    let disks = Arc::new(Disks::new(root, args.read_only));
    disks.throttle().set_store(args.iops, args.bps);
    disks.watch_space(&args.space)?;
    let config = Config {
        max_connections: args.max_connections,
        engine,
        ..Config::default()
    };
    let mut server = Server::new(disks.clone(), config);
    let info = Info {
        program: "ploopd".into(),
        root: Some(dir.display().to_string()),
        read_only: args.read_only,
        open_files_limit,
        ..Info::of_this_process(&config)
    };
    let tls = tls(args)?;
    let service = Service::of(info, disks.clone(), server.connections(), tls.clone());
    let (jobs, operations) = (service.jobs.clone(), service.operations.clone());
    // The control socket is the store's: who has it serves the store. So it is first.
    let control = Control::start(&control_path, service)?;
    if let Some(space) = disks.space() {
        space.begin()?;
    }
    let mut places = listen(&mut server, args, &dir)?;
    go_on_with_merges(&disks, jobs, &operations);
    let mut arrivals = arrivals(&disks, &server, tls, args)?;
    places.append(&mut arrivals.1);
    places.push(format!("control API at {}", control_path.display()));
    let coming = arrivals.0.coming();
    let end = move || {
        drop(arrivals);
        control.stop();
    };
    let served = server.run_until_signal(|| announce(&places), end);
    // Now that nobody asks for it any more.
    drop(coming);
    let closed = disks.wait_all_closed();
    served.and(closed)
}

fn tls(args: &Args) -> Result<Option<Tls>> {
    let (Some(cert), Some(key), Some(ca)) = (&args.tls_cert, &args.tls_key, &args.tls_ca) else {
        return Ok(None);
    };
    let files = TlsFiles {
        cert: cert.clone(),
        key: key.clone(),
        ca: ca.clone(),
    };
    Tls::load(&files).map(Some)
}

/// Opens the places for containers that come, and ends moves that were cut; says which places.
fn arrivals(
    disks: &Arc<Disks>,
    server: &Server,
    tls: Option<Tls>,
    args: &Args,
) -> Result<(Arrivals, Vec<String>)> {
    let destination = Destination::new(disks.clone(), server.connections());
    let mut arrivals = Arrivals::new(destination, disks.clone())?;
    let mut places = Vec::new();
    if args.read_only {
        return Ok((arrivals, places));
    }
    let default = || disks.root().map(|root| root.dir().join("migrate.sock"));
    if let Some(path) = args.migrate_socket.clone().or_else(default) {
        arrivals.listen_unix(&path)?;
        places.push(format!("containers may come to {}", path.display()));
    }
    if let Some(address) = &args.migrate_listen {
        let bound = arrivals.listen_tcp(address, tls.clone())?;
        places.extend(bound.iter().map(|a| format!("containers may come to {a}")));
    }
    arrivals.settle(server.connections(), tls, disks.leaving().clone())?;
    Ok((arrivals, places))
}

/// Opens the places for NBD clients; says which.
fn listen(server: &mut Server, args: &Args, dir: &Path) -> Result<Vec<String>> {
    let mut places = Vec::new();
    let default = (!args.activation).then(|| dir.join("nbd.sock"));
    if let Some(path) = args.socket.clone().or(default) {
        server.listen_unix(&path)?;
        places.push(format!("listening on {}", path.display()));
    }
    if let Some(address) = &args.listen {
        let bound = server.listen_tcp(address, args.insecure_listen)?;
        places.extend(bound.iter().map(|a| format!("listening on {a}")));
    }
    if args.activation && server.listen_activated(args.insecure_listen)? == 0 {
        let what = "--activation: systemd passed no sockets (LISTEN_FDS)";
        return Err(Error::invalid(what));
    }
    Ok(places)
}

/// Prints where the service is, once it is there and a signal ends it in order.
fn announce(places: &[String]) -> Result<()> {
    let mut out = io::stdout().lock();
    let printed = places.iter().try_for_each(|p| writeln!(out, "{p}"));
    printed
        .and_then(|()| out.flush())
        .map_err(|e| Error::io("write", "standard output", e))
}

/// The limit of open files, raised as far as it goes.
fn open_files(max_connections: u32) -> u64 {
    let allowed = raise_file_limit();
    tracing::info!(open_files = allowed, max_connections, "limits");
    if allowed < u64::from(max_connections).saturating_mul(2) {
        tracing::warn!(
            open_files = allowed,
            max_connections,
            "too few open files for as many connections: raise LimitNOFILE, or lower \
             --max-connections"
        );
    }
    allowed
}
