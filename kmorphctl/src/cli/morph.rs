//! `kmorphctl morph`: each step as a subcommand, and the whole morph as `morph <name> --kernel=…`.

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
    after_help = "To morph an instance whose name is one of the commands, use `kmorphctl morph run <NAME>`."
)]
pub(crate) struct MorphArgs {
    #[command(subcommand)]
    pub(crate) form: Option<MorphForm>,
    #[command(flatten)]
    pub(crate) whole: Option<MorphWholeArgs>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MorphForm {
    /// Boot the target kernel and transfer the state; the source keeps serving
    Prepare(MorphPrepareArgs),
    /// Let the target kernel validate the state it received
    Validate {
        /// Name of the instance
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Switch to the target kernel
    Commit {
        /// Name of the instance
        name: String,
        /// Commit even if the estimated downtime exceeds the budget
        #[arg(long, conflicts_with = "downtime_budget_ms")]
        force: bool,
        /// Maximum downtime in milliseconds (default: the budget given when the morph was started)
        #[arg(long, value_name = "MS", value_parser = values::budget_us)]
        downtime_budget_ms: Option<u32>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Return to the source kernel
    Rollback {
        /// Name of the instance
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Show the progress of a morph
    Status(NameArgs),
    /// Run the whole morph; works for any instance name
    Run(MorphWholeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct MorphPrepareArgs {
    /// Name of the instance
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) target: MorphTarget,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// The target of a morph.
#[derive(Debug, Args)]
pub(crate) struct MorphTarget {
    /// Image of the target kernel on this machine
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Command line of the target kernel (default: that of the source kernel)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) kernel_cmdline: Option<String>,
    /// Initramfs of the target kernel, instead of the one kmorph builds
    #[arg(long, value_name = "FILE")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Maximum downtime in milliseconds (default: from the configuration; 10, or 100 with qemu)
    #[arg(long, value_name = "MS", value_parser = values::budget_us)]
    pub(crate) downtime_budget_ms: Option<u32>,
}

/// A whole morph. Its arguments are written out here instead of being flattened in: clap finds an
/// optional flattened struct only by arguments that are directly in it.
#[derive(Debug, Args)]
pub(crate) struct MorphWholeArgs {
    /// Name of the instance
    pub(crate) name: String,
    /// Image of the target kernel on this machine
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Command line of the target kernel (default: that of the source kernel)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    kernel_cmdline: Option<String>,
    /// Initramfs of the target kernel, instead of the one kmorph builds
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Maximum downtime in milliseconds (default: from the configuration; 10, or 100 with qemu)
    #[arg(long, value_name = "MS", value_parser = values::budget_us)]
    downtime_budget_ms: Option<u32>,
    /// Commit once the target is validated; without this option the command stops there and prints the next step
    #[arg(long)]
    pub(crate) auto_commit: bool,
    /// Commit even if the estimated downtime exceeds the budget
    #[arg(long, requires = "auto_commit")]
    pub(crate) force: bool,
    /// Print the operation id and return immediately
    #[arg(long)]
    no_wait: bool,
    /// Stop waiting after this time (exit code 10); the operation continues
    #[arg(long, value_name = "SECONDS", value_parser = values::wait_seconds, conflicts_with = "no_wait")]
    wait_timeout: Option<f64>,
}

impl MorphWholeArgs {
    /// The target kernel and its options.
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
