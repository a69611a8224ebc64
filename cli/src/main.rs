//! The `ploop` command: parse, call one function, print. No logic worth a test of its own.

mod args;
mod cmd;
mod output;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if e.use_stderr() && cmd::speaks_openvz() => {
            // If nobody reads it, the code says enough.
            drop(e.print());
            return ExitCode::from(cmd::OPENVZ_USAGE);
        }
        Err(e) => e.exit(),
    };
    output::log_to_stderr(cli.verbose.saturating_add(cli.v));
    match cmd::run(&cli) {
        Ok(code) => code,
        Err(e) => output::report(e, cli.command.wants_json()),
    }
}
