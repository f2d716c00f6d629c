//! `kmorphctl daemon`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::values;

#[derive(Debug, Subcommand)]
pub(crate) enum DaemonCommand {
    /// Start kmorphd in the background and wait until it answers
    Start(StartArgs),
    /// Stop kmorphd and wait until it is gone; instances keep running
    Stop(StopArgs),
    /// Show what kmorphd says of itself
    Status,
    /// Make kmorphd read its configuration again
    Reload,
}

#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// Its configuration file (default: the one in the default place, if it exists)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Stay in the foreground: this process becomes kmorphd
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Where its log goes (default: kmorphd.log in the default state directory)
    #[arg(long, value_name = "FILE", conflicts_with = "foreground")]
    pub(crate) log_file: Option<PathBuf>,
    /// Give up, and end it again, when it does not answer by then
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = values::wait_seconds)]
    pub(crate) wait_timeout: f64,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Let operations under way end first; new ones are refused meanwhile
    #[arg(long)]
    pub(crate) graceful: bool,
    /// Stop waiting after this time (exit code 10)
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = values::wait_seconds)]
    pub(crate) wait_timeout: f64,
}
