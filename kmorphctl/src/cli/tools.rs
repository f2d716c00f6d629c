//! `kmorphctl operation`, `vmcore`, and the commands that are not built yet.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{WaitArgs, values};

#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List operations
    List,
    /// Show one operation
    Show {
        /// Operation id, such as op-12
        id: String,
    },
    /// Follow an operation to its end and exit as the command that started it would
    Watch {
        /// Operation id, such as op-12
        id: String,
        /// Stop waiting after this time (exit code 10); the operation continues
        #[arg(long, value_name = "SECONDS", value_parser = values::wait_seconds)]
        wait_timeout: Option<f64>,
    },
    /// Request that an operation be undone
    Cancel {
        /// Operation id, such as op-12
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmcoreCommand {
    /// Capture the memory of an instance; a live instance is frozen while its memory is read
    Capture(CaptureArgs),
    /// Analyse a vmcore: why the kernel died, its log, its CPUs, its memory
    Analyze(AnalyzeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CaptureArgs {
    /// Name of the instance
    pub(crate) name: String,
    /// Output file, written by the daemon; must not exist
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Kernel image to test with (default: that of an instance, else the host's own)
    #[arg(long, value_name = "FILE", conflicts_with = "last")]
    pub(crate) kernel: Option<PathBuf>,
    /// Run no test; show the result of the last one
    #[arg(long, conflicts_with_all = ["no_wait", "wait_timeout"])]
    pub(crate) last: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ImportUpstreamArgs {
    /// Configuration file of multikernel/kmorph, usually /etc/kmorph/kmorph.conf; - is standard input
    pub(crate) file: PathBuf,
    /// Output file; must not exist (default: standard output)
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct AnalyzeArgs {
    /// A vmcore written by kmorph, makedumpfile or QEMU, or /proc/vmcore
    pub(crate) file: PathBuf,
    /// Print only the kernel log, in the format of `makedumpfile --dump-dmesg`
    #[arg(long, conflicts_with_all = ["scan", "vmlinux"])]
    pub(crate) log: bool,
    /// Also read every page: count zero pages and find damaged ones
    #[arg(long)]
    pub(crate) scan: bool,
    /// vmlinux with debug information; adds tasks and their stacks, using drgn
    #[arg(long, value_name = "FILE")]
    pub(crate) vmlinux: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DebugCommand {
    /// Live view of the daemon's actors (not built yet)
    Console,
}
