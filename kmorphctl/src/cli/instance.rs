//! Arguments of the commands that act on one instance.

use std::path::PathBuf;

use clap::{ArgAction, ArgGroup, Args, ValueEnum};
use kmorph_control_api::PublishRequest;

use super::{WaitArgs, values};

#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("program").args(["workload", "command"]).multiple(true),
    override_usage = "kmorphctl spawn [OPTIONS] --kernel <FILE> <NAME> [-- <PROGRAM> [ARGUMENT]...]\n       kmorphctl spawn [OPTIONS] --kernel <FILE> --workload <PROGRAM> <NAME> [-- <ARGUMENT>...]"
)]
pub(crate) struct SpawnArgs {
    /// Name of the instance: 1 to 63 characters of a-z 0-9 . _ -
    pub(crate) name: String,
    /// Kernel image on this machine
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Text to append to the kernel command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub(crate) kernel_cmdline: String,
    /// Initramfs to boot instead of the one kmorph builds
    #[arg(long, value_name = "FILE")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Monitor the instance with heartbeats
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        default_value = "true",
        default_missing_value = "true",
        num_args = 0..=1,
        require_equals = true
    )]
    pub(crate) monitor: bool,
    /// Heartbeat timeout, 0.1 to 3600: silence after which the instance is declared failed (default: from the
    /// configuration)
    #[arg(long, value_name = "SECONDS", value_parser = values::heartbeat_timeout)]
    pub(crate) heartbeat_timeout: Option<f64>,
    /// Number of CPUs
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) cpus: u16,
    /// Memory size: 256M, 16GB or a number of bytes (default: from the configuration)
    #[arg(long, value_name = "SIZE", value_parser = values::memory)]
    pub(crate) memory: Option<u64>,
    /// Program to run in the instance; `kmorph-kv` is the reference server
    #[arg(long, value_name = "PROGRAM")]
    workload: Option<String>,
    /// Argument for the program; repeatable
    #[arg(
        long,
        value_name = "ARGUMENT",
        requires = "workload",
        allow_hyphen_values = true
    )]
    workload_arg: Vec<String>,
    /// Environment variable for the program; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = values::environment, requires = "program")]
    pub(crate) env: Vec<(String, String)>,
    /// File with environment variables for secrets, one NAME=VALUE per line. The daemon reads the file at each start
    /// of the instance and does not store its contents. The file must belong to root or the daemon's user and must
    /// not be accessible to anyone else
    #[arg(long, value_name = "FILE", requires = "program")]
    pub(crate) env_file: Option<PathBuf>,
    /// Publish a port of the program on this machine; repeatable (default address: 127.0.0.1). With host port 0 the
    /// system chooses a free port
    #[arg(long, value_name = "[ADDRESS:]HOST_PORT:PORT", value_parser = values::publish)]
    pub(crate) publish: Vec<PublishRequest>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
    /// Arguments of the program given by --workload; without --workload, the program and its arguments
    #[arg(last = true, value_name = "PROGRAM")]
    command: Vec<String>,
}

impl SpawnArgs {
    /// The program to run and its arguments.
    pub(crate) fn program(&self) -> Option<(String, Vec<String>)> {
        let mut words = self
            .workload
            .iter()
            .chain(&self.workload_arg)
            .chain(&self.command);
        let program = words.next()?.clone();
        Some((program, words.cloned().collect()))
    }
}

#[derive(Debug, Args)]
pub(crate) struct TerminateArgs {
    /// Name of the instance
    pub(crate) name: String,
    /// Kill the instance at once instead of asking it to shut down
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// A group of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MetricGroup {
    /// CPU
    Cpu,
    /// Memory
    Memory,
    /// I/O
    Io,
}

impl MetricGroup {
    /// Prefix of the group's metric names in the API.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Cpu => "cpu_",
            Self::Memory => "memory_",
            Self::Io => "io_",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct HealthArgs {
    /// Name of the instance
    pub(crate) name: String,
    /// Groups of metrics to show
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "GROUP",
        default_values = ["cpu", "memory", "io"]
    )]
    pub(crate) metrics: Vec<MetricGroup>,
}

#[derive(Debug, Args)]
pub(crate) struct PingArgs {
    /// Name of the instance
    pub(crate) name: String,
    /// Number of heartbeats to send
    #[arg(long, short, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) count: u32,
    /// Time between two heartbeats
    #[arg(long, short, value_name = "SECONDS", default_value = "1", value_parser = values::interval)]
    pub(crate) interval: f64,
}
