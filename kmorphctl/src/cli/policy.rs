//! `kmorphctl policy`.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use kmorph_control_api::{StuckCpuPolicy, VmcorePolicy};

use super::values;

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Show the policies in force
    Show {
        /// Show only the policy of this instance
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
    },
    /// Change one value of an instance's policy
    #[command(subcommand)]
    Set(PolicySetting),
    /// Export all policies as a TOML file that `import` reads
    Export {
        /// Output file; an existing file is replaced atomically (default: standard output)
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Apply a policy file: all of it or nothing
    Import {
        /// Policy file; - is standard input
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicySetting {
    /// Set the silence after which an instance is declared failed: 0.1 to 3600 seconds
    HeartbeatTimeout {
        /// Name of the instance
        name: String,
        /// Seconds; fractions are allowed
        #[arg(value_parser = values::heartbeat_timeout)]
        seconds: f64,
    },
    /// Set whether a failed instance is recovered automatically
    AutoHeal {
        /// Name of the instance
        name: String,
        /// Enabled or disabled
        #[arg(value_enum)]
        state: AutoHeal,
    },
    /// Set the time limit for each phase of a morph: 1 to 3600 seconds
    MorphTimeout {
        /// Name of the instance
        name: String,
        /// Seconds; fractions are allowed
        #[arg(value_parser = values::morph_timeout)]
        seconds: f64,
    },
    /// Set whether the memory of a failed instance is captured before it is released
    Vmcore {
        /// Name of the instance
        name: String,
        /// Off, on, or required
        #[arg(value_enum)]
        state: Vmcore,
    },
    /// Set how an instance is treated when one of its CPUs executes nothing for the heartbeat timeout
    StuckCpu {
        /// Name of the instance
        name: String,
        /// Degraded or failed
        #[arg(value_enum)]
        state: StuckCpu,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StuckCpu {
    /// Report the instance as degraded, with the CPU number
    Degraded,
    /// Treat the instance as failed and recover it
    Failed,
}

impl From<StuckCpu> for StuckCpuPolicy {
    fn from(state: StuckCpu) -> Self {
        match state {
            StuckCpu::Degraded => Self::Degraded,
            StuckCpu::Failed => Self::Failed,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Vmcore {
    /// Do not capture
    Off,
    /// Capture; if the capture fails, recover without a vmcore
    On,
    /// Capture; if the capture fails, keep the memory until an operator decides
    Required,
}

impl From<Vmcore> for VmcorePolicy {
    fn from(state: Vmcore) -> Self {
        match state {
            Vmcore::Off => Self::Off,
            Vmcore::On => Self::On,
            Vmcore::Required => Self::Required,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AutoHeal {
    /// Recover the instance automatically
    Enabled,
    /// Leave the instance failed until `recover`
    Disabled,
}
