//! `kmorphctl policy`.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use kmorph_control_api::{StuckCpuPolicy, VmcorePolicy};

use super::values;

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Show the policies in force
    Show {
        /// Only of this instance
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
    },
    /// Change one value of one policy
    #[command(subcommand)]
    Set(PolicySetting),
    /// Write all policies as a TOML file that `import` reads
    Export {
        /// The file, replaced whole (default: standard output)
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Apply a policy file, whole or not at all
    Import {
        /// The file; - is standard input
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicySetting {
    /// Silence after which an instance has failed: 0.1 to 3600 seconds
    HeartbeatTimeout {
        /// The instance
        name: String,
        /// Seconds; may have a fraction
        #[arg(value_parser = values::heartbeat_timeout)]
        seconds: f64,
    },
    /// Whether a failed instance is healed without being asked
    AutoHeal {
        /// The instance
        name: String,
        /// Yes or no
        #[arg(value_enum)]
        state: AutoHeal,
    },
    /// Longest time for one phase of a morph: 1 to 3600 seconds
    MorphTimeout {
        /// The instance
        name: String,
        /// Seconds; may have a fraction
        #[arg(value_parser = values::morph_timeout)]
        seconds: f64,
    },
    /// Whether the memory of a failed instance is captured before it is given back
    Vmcore {
        /// The instance
        name: String,
        /// Off, on, or required
        #[arg(value_enum)]
        state: Vmcore,
    },
    /// What an instance is when one of its CPUs runs nothing for the heartbeat timeout
    StuckCpu {
        /// The instance
        name: String,
        /// Degraded or failed
        #[arg(value_enum)]
        state: StuckCpu,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StuckCpu {
    /// Shown as degraded, with the CPU's number
    Degraded,
    /// Healed as one that failed
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
    /// Not captured
    Off,
    /// Captured; healed without when that fails
    On,
    /// Captured; when that fails the memory is kept, and an operator decides
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
    /// Healed by itself
    Enabled,
    /// Left as it is until `recover`
    Disabled,
}
