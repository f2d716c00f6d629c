//! The command line: one type per command. Each value is parsed once, here.

mod daemon;
mod instance;
mod morph;
mod policy;
#[cfg(test)]
mod tests;
mod tools;
pub(crate) mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use daemon::{DaemonCommand, StartArgs, StopArgs};
pub(crate) use instance::{HealthArgs, MetricGroup, PingArgs, SpawnArgs, TerminateArgs};
pub(crate) use morph::{MorphArgs, MorphForm, MorphTarget, MorphWholeArgs};
pub(crate) use policy::{AutoHeal, PolicyCommand, PolicySetting};
pub(crate) use tools::{
    AnalyzeArgs, CaptureArgs, DebugCommand, DoctorArgs, ImportUpstreamArgs, OperationCommand,
    VmcoreCommand,
};

/// Heading of the options that every command has.
const EVERYWHERE: &str = "Options of every command";

/// Run and upgrade the kernels of a machine. kmorphctl sends requests to kmorphd and prints the answers.
#[derive(Debug, Parser)]
#[command(
    name = "kmorphctl",
    version,
    max_term_width = 100,
    after_help = "Exit codes and examples: kmorphctl --help, or docs/cli.md.",
    after_long_help = crate::exit::help_text()
)]
pub struct Cli {
    /// Control socket of the daemon (default: $KMORPH_SOCKET; else the path in the configuration file; else
    /// /run/kmorph/kmorphd.sock for root, and $XDG_RUNTIME_DIR/kmorph/kmorphd.sock or /tmp/kmorph-UID/kmorphd.sock
    /// for other users)
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Time to wait for each answer of the daemon (exit code 10 when it runs out)
    #[arg(
        long,
        global = true, help_heading = EVERYWHERE,
        value_name = "SECONDS",
        default_value = "30",
        value_parser = values::answer_timeout
    )]
    pub(crate) timeout: f64,

    /// Output format: tables for people or JSON for programs
    #[arg(
        long,
        global = true, help_heading = EVERYWHERE,
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub(crate) output_format: OutputFormat,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Output format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// Tables and sentences
    Table,
    /// The daemon's JSON answers; errors are JSON too, on standard error
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start, stop, query or reload the daemon
    #[command(subcommand)]
    Daemon(DaemonCommand),
    /// Start a new instance and wait until it is healthy
    Spawn(Box<SpawnArgs>),
    /// List the instances
    List {
        /// Show more columns
        #[arg(long, short)]
        verbose: bool,
    },
    /// Show one instance
    Status(NameArgs),
    /// Terminate an instance
    Terminate(TerminateArgs),
    /// Show the heartbeats of an instance
    Heartbeat(NameArgs),
    /// Show the health and metrics of an instance
    Health(HealthArgs),
    /// Send heartbeats to an instance now and measure the round trip
    Ping(PingArgs),
    /// Recover an instance now, or restart a quarantined one
    Recover {
        /// Name of the instance
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Show past recoveries, newest last
    RecoveryLog {
        /// Show only recoveries of this instance
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
        /// Show only recoveries since this RFC 3339 time, or within an age such as 10m, 2h, 3d
        #[arg(long, value_parser = values::since, value_name = "TIME")]
        since: Option<String>,
    },
    /// Move an instance's workload to another kernel
    Morph(Box<MorphArgs>),
    /// Show, change, export and import the policies that control health checks and recovery
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// List, show, watch and cancel operations
    #[command(subcommand, alias = "operations")]
    Operation(OperationCommand),
    /// Show past events and follow new ones
    Events {
        /// Show only events of this instance
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
        /// Keep running and print new events as they happen
        #[arg(long, short)]
        follow: bool,
        /// Show only events after this id
        #[arg(long, value_name = "ID")]
        since_id: Option<u64>,
        /// Maximum number of events: the newest ones, or the first ones with --since-id or --follow
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Print a shell completion script
    Completions {
        /// Shell to complete for
        shell: clap_complete::Shell,
    },
    /// Write the man pages to a directory
    Man {
        /// Target directory; created if missing
        dir: PathBuf,
    },
    /// Convert kmorph.conf of the C project multikernel/kmorph to a kmorphd configuration
    ImportUpstreamConfig(ImportUpstreamArgs),
    /// Live dashboard (not built yet)
    Monitor {
        /// Show only this instance
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
    },
    /// Test failure capture: panic a throwaway instance and check that its vmcore is captured
    Doctor(DoctorArgs),
    /// Capture the memory of an instance, or analyse a vmcore
    #[command(subcommand)]
    Vmcore(VmcoreCommand),
    /// Inspect the running daemon (not built yet)
    #[command(subcommand)]
    Debug(DebugCommand),
}

/// Arguments of commands that take only an instance name.
#[derive(Debug, Args)]
pub(crate) struct NameArgs {
    /// Name of the instance
    pub(crate) name: String,
}

/// How long to wait for an operation.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct WaitArgs {
    /// Print the operation id and return immediately
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Stop waiting after this time (exit code 10); the operation continues
    #[arg(long, value_name = "SECONDS", value_parser = values::wait_seconds, conflicts_with = "no_wait")]
    pub(crate) wait_timeout: Option<f64>,
}
