//! `kmorphctl morph`: the steps as subcommands, and the whole morph as `morph <name> --kernel=…`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{NameArgs, WaitArgs, values};

/// Either a subcommand or a whole morph. Without a subcommand the arguments of the whole morph are
/// required; with one they must be absent (checked by the command, because clap's own rule for it
/// would also refuse `morph --output-format=json status web`).
#[derive(Debug, Args)]
#[command(
    subcommand_negates_reqs = true,
    override_usage = "kmorphctl morph [OPTIONS] --kernel <FILE> <NAME>\n       kmorphctl morph <COMMAND>",
    after_help = "An instance named like one of the commands is morphed by `kmorphctl morph run <NAME>`."
)]
pub(crate) struct MorphArgs {
    #[command(subcommand)]
    pub(crate) form: Option<MorphForm>,
    #[command(flatten)]
    pub(crate) whole: Option<MorphWholeArgs>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MorphForm {
    /// Start the target kernel and move the state; the source keeps serving
    Prepare(MorphPrepareArgs),
    /// Let the target kernel check what it has
    Validate {
        /// The instance
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Switch to the target kernel
    Commit {
        /// The instance
        name: String,
        /// Also when the estimated downtime is above the budget
        #[arg(long, conflicts_with = "downtime_budget_ms")]
        force: bool,
        /// Longest downtime allowed, in milliseconds (default: what the morph was begun with)
        #[arg(long, value_name = "MS", value_parser = values::budget_us)]
        downtime_budget_ms: Option<u32>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Go back to the source kernel
    Rollback {
        /// The instance
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Show where a morph is
    Status(NameArgs),
    /// The whole morph, for any name
    Run(MorphWholeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct MorphPrepareArgs {
    /// The instance
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) target: MorphTarget,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// Where a morph goes.
#[derive(Debug, Args)]
pub(crate) struct MorphTarget {
    /// Image of the target kernel on this machine
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Command line of the target kernel; the source kernel's by default
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) kernel_cmdline: Option<String>,
    /// Initramfs of the target kernel, instead of the one kmorph builds
    #[arg(long, value_name = "FILE")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Longest downtime allowed, in milliseconds (default: the configuration's, 10 or, with qemu, 100)
    #[arg(long, value_name = "MS", value_parser = values::budget_us)]
    pub(crate) downtime_budget_ms: Option<u32>,
}

/// A whole morph. Its arguments are written out here instead of being flattened in: clap finds an
/// optional flattened struct only by arguments that are directly in it.
#[derive(Debug, Args)]
pub(crate) struct MorphWholeArgs {
    /// The instance
    pub(crate) name: String,
    /// Image of the target kernel on this machine
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Command line of the target kernel; the source kernel's by default
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    kernel_cmdline: Option<String>,
    /// Initramfs of the target kernel, instead of the one kmorph builds
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Longest downtime allowed, in milliseconds (default: the configuration's, 10 or, with qemu, 100)
    #[arg(long, value_name = "MS", value_parser = values::budget_us)]
    downtime_budget_ms: Option<u32>,
    /// Commit once validated; otherwise it stops there and says how to go on
    #[arg(long)]
    pub(crate) auto_commit: bool,
    /// Commit also when the estimated downtime is above the budget
    #[arg(long, requires = "auto_commit")]
    pub(crate) force: bool,
    /// Print the operation and return at once
    #[arg(long)]
    no_wait: bool,
    /// Stop waiting after this time (exit code 10); the operation goes on
    #[arg(long, value_name = "SECONDS", value_parser = values::wait_seconds, conflicts_with = "no_wait")]
    wait_timeout: Option<f64>,
}

impl MorphWholeArgs {
    /// Where it goes.
    pub(crate) fn target(&self) -> MorphTarget {
        MorphTarget {
            kernel: self.kernel.clone(),
            kernel_cmdline: self.kernel_cmdline.clone(),
            initramfs: self.initramfs.clone(),
            downtime_budget_ms: self.downtime_budget_ms,
        }
    }

    /// How long to wait.
    pub(crate) fn wait(&self) -> WaitArgs {
        WaitArgs {
            no_wait: self.no_wait,
            wait_timeout: self.wait_timeout,
        }
    }
}
