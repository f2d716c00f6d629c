//! What can be typed. One type per command; values are parsed here, once.

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

/// Runs and upgrades the kernels of a machine: asks kmorphd, shows the answer.
#[derive(Debug, Parser)]
#[command(
    name = "kmorphctl",
    version,
    max_term_width = 100,
    after_help = "Exit codes and examples: kmorphctl --help, or docs/cli.md.",
    after_long_help = crate::exit::help_text()
)]
pub struct Cli {
    /// The daemon's socket. Unless told: $KMORPH_SOCKET, else what the configuration file says,
    /// else /run/kmorph/kmorphd.sock for root and $XDG_RUNTIME_DIR/kmorph/kmorphd.sock or
    /// /tmp/kmorph-UID/kmorphd.sock for others
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Longest time for one answer of the daemon (exit code 10)
    #[arg(
        long,
        global = true, help_heading = EVERYWHERE,
        value_name = "SECONDS",
        default_value = "30",
        value_parser = values::answer_timeout
    )]
    pub(crate) timeout: f64,

    /// Tables for people or JSON for programs
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

/// How answers are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// Tables and sentences
    Table,
    /// The daemon's JSON; errors too, on standard error
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start, stop, ask or reload the daemon
    #[command(subcommand)]
    Daemon(DaemonCommand),
    /// Start a new instance and wait until it is healthy
    Spawn(Box<SpawnArgs>),
    /// List the instances
    List {
        /// More columns
        #[arg(long, short)]
        verbose: bool,
    },
    /// Show one instance
    Status(NameArgs),
    /// End an instance
    Terminate(TerminateArgs),
    /// Show an instance's heartbeats
    Heartbeat(NameArgs),
    /// Show an instance's health and metrics
    Health(HealthArgs),
    /// Send an instance heartbeats now and measure the round trip
    Ping(PingArgs),
    /// Heal an instance now, or start a quarantined one again
    Recover {
        /// The instance
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Show past recoveries, newest last
    RecoveryLog {
        /// Only of this instance
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
        /// Only since then: an RFC 3339 time, or an age such as 10m, 2h, 3d
        #[arg(long, value_parser = values::since, value_name = "TIME")]
        since: Option<String>,
    },
    /// Move an instance's workload to another kernel
    Morph(Box<MorphArgs>),
    /// Show, change, save and load how instances are watched and healed
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// List, show, watch and cancel long work
    #[command(subcommand, alias = "operations")]
    Operation(OperationCommand),
    /// Show what happened, and follow what happens
    Events {
        /// Only of this instance
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
        /// Go on with what happens from now on
        #[arg(long, short)]
        follow: bool,
        /// Start after this event
        #[arg(long, value_name = "ID")]
        since_id: Option<u64>,
        /// At most this many: the newest; with --since-id or --follow the first
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Print the completion script of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages
    Man {
        /// The directory, made if it is missing
        dir: PathBuf,
    },
    /// Read kmorph.conf of the C project multikernel/kmorph, and write kmorphd's configuration
    ImportUpstreamConfig(ImportUpstreamArgs),
    /// Live dashboard (not built yet)
    Monitor {
        /// Only this instance
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
    },
    /// Test that a failed instance would be captured: one that is thrown away panics
    Doctor(DoctorArgs),
    /// Capture an instance's memory, and say what is in a vmcore
    #[command(subcommand)]
    Vmcore(VmcoreCommand),
    /// Look into the daemon while it runs (not built yet)
    #[command(subcommand)]
    Debug(DebugCommand),
}

/// The name of an instance, alone.
#[derive(Debug, Args)]
pub(crate) struct NameArgs {
    /// The instance
    pub(crate) name: String,
}

/// How long to wait for an operation.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct WaitArgs {
    /// Print the operation and return at once
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Stop waiting after this time (exit code 10); the operation goes on
    #[arg(long, value_name = "SECONDS", value_parser = values::wait_seconds, conflicts_with = "no_wait")]
    pub(crate) wait_timeout: Option<f64>,
}
