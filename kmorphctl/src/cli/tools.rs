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
    /// Capture the memory of an instance: one that lives is frozen while it is read
    Capture(CaptureArgs),
    /// Say what is in a vmcore: why the kernel died, its log, its CPUs, its memory
    Analyze(AnalyzeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CaptureArgs {
    /// The instance
    pub(crate) name: String,
    /// The file to write, which must not exist; the daemon writes it
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// The kernel image to test with; otherwise that of an instance, or the host's own
    #[arg(long, value_name = "FILE", conflicts_with = "last")]
    pub(crate) kernel: Option<PathBuf>,
    /// Test nothing; say how the last test ended
    #[arg(long, conflicts_with_all = ["no_wait", "wait_timeout"])]
    pub(crate) last: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ImportUpstreamArgs {
    /// The file of multikernel/kmorph, mostly /etc/kmorph/kmorph.conf; - is standard input
    pub(crate) file: PathBuf,
    /// The file to write, which must not exist; standard output by default
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct AnalyzeArgs {
    /// The vmcore: kmorph's, makedumpfile's, QEMU's, or /proc/vmcore
    pub(crate) file: PathBuf,
    /// Print the kernel's log and nothing else, as `makedumpfile --dump-dmesg` writes it
    #[arg(long, conflicts_with_all = ["scan", "vmlinux"])]
    pub(crate) log: bool,
    /// Read every page as well: counts pages of zeros and finds damaged ones
    #[arg(long)]
    pub(crate) scan: bool,
    /// The kernel's image with debug information: adds tasks and their stacks, by way of drgn
    #[arg(long, value_name = "FILE")]
    pub(crate) vmlinux: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DebugCommand {
    /// Live view of the daemon's actors (not built yet)
    Console,
}
