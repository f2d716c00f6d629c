//! The kmorph command line: sends requests to kmorphd over its control API and prints the answers.
//!
//! This crate may speak HTTP to the daemon's Unix socket, read and write files named by its user (vmcores through
//! `kmorph-vmcore`), and start the daemon. It must not access instances, the journal or a backend in any other way,
//! and it keeps no state.
//!
//! `cli` defines the command line, `commands` executes it, `client` talks to the daemon, `operation_wait` follows
//! operations, `output` prints, and `exit` defines the exit codes. `upstream` converts the configuration of the C
//! project of the same name.

pub mod cli;
mod client;
mod commands;
mod exit;
mod failure;
mod figures;
#[cfg(fuzzing)]
pub mod fuzzing;
mod operation_wait;
mod output;
mod places;
mod policy_file;
mod upstream;

pub use exit::{EXIT_CODES, Exit, ExitCodeRow};

use std::process::ExitCode;

use clap::Parser;

use crate::failure::Failure;
use crate::output::Output;

/// Runs the command line of this process and returns its exit code.
pub fn run() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => return say(&answer).into(),
    };
    let mut out = Output::new(cli.output_format);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(commands::run(cli, &mut out));
            // A thread that still reads a file or a terminal must not delay the exit.
            runtime.shutdown_background();
            ended
        }
        Err(error) => Err(Failure::internal(format!(
            "cannot start the asynchronous runtime: {error}"
        ))),
    };
    match ended.and_then(|exit| out.flush().map(|()| exit)) {
        Ok(exit) => exit.into(),
        Err(failure) => out.failure(&failure).into(),
    }
}

/// Prints clap's own output: help, the version, or the error in the command line.
fn say(answer: &clap::Error) -> Exit {
    match answer.print() {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Exit::Internal,
        _ if answer.use_stderr() => Exit::Usage,
        _ => Exit::Ok,
    }
}
