//! `kmorphctl daemon`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::values;

#[derive(Debug, Subcommand)]
pub(crate) enum DaemonCommand {
    /// Start kmorphd in the background and wait until it answers
    Start(StartArgs),
    /// Stop kmorphd and wait until it has exited; instances keep running
    Stop(StopArgs),
    /// Show the status of kmorphd
    Status,
    /// Make kmorphd reread its configuration
    Reload,
}

#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// Configuration file of kmorphd (default: the one in the default place, if it exists)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Run in the foreground: this process becomes kmorphd
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Log file of kmorphd (default: kmorphd.log in the default state directory)
    #[arg(long, value_name = "FILE", conflicts_with = "foreground")]
    pub(crate) log_file: Option<PathBuf>,
    /// Time to wait for kmorphd to answer; when it runs out, kmorphd is stopped again
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = values::wait_seconds)]
    pub(crate) wait_timeout: f64,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Wait for running operations to finish; new ones are refused meanwhile
    #[arg(long)]
    pub(crate) graceful: bool,
    /// Stop waiting after this time (exit code 10)
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = values::wait_seconds)]
    pub(crate) wait_timeout: f64,
}
