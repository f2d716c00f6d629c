//! `kmorphctl operation`, and the commands that are not built yet.

use std::path::PathBuf;

use clap::Subcommand;

use super::values;

#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List operations
    List,
    /// Show one operation
    Show {
        /// Its id, as op-12
        id: String,
    },
    /// Follow one operation until it is over, and end as the command that began it would
    Watch {
        /// Its id, as op-12
        id: String,
        /// Stop waiting after this time (exit code 10); the operation goes on
        #[arg(long, value_name = "SECONDS", value_parser = values::wait_seconds)]
        wait_timeout: Option<f64>,
    },
    /// Ask for an operation to be undone
    Cancel {
        /// Its id, as op-12
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmcoreCommand {
    /// Capture the memory of a failed instance (not built yet)
    Capture {
        /// The instance
        name: String,
        /// The file to write
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Say what is in a vmcore (not built yet)
    Analyze {
        /// The vmcore
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DebugCommand {
    /// Live view of the daemon's actors (not built yet)
    Console,
}
