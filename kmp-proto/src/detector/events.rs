//! Events and findings of the detector.

use std::time::Duration;

use super::{Config, Sample};
use crate::message::{CpuStall, Health};

/// The events of the detector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The heartbeat channel is up: HELLO was exchanged, the agent is alive.
    ChannelUp,
    /// The heartbeat channel was lost. Outstanding heartbeats on it can no longer be answered.
    ChannelLost,
    /// Connecting was refused: the kernel is alive, but its agent does not listen.
    KernelAnswered,
    /// A probe was answered.
    Answer {
        /// The probe.
        probe: u32,
        /// The health that the agent reports.
        health: Health,
    },
    /// The probe could not be sent: the daemon's own queue is full.
    SendRefused {
        /// The probe.
        probe: u32,
    },
    /// The backend observed the end or the panic of the instance.
    Ended(String),
    /// The backend's observation of the instance.
    Observed {
        /// Whether the instance is stopped and executes nothing.
        stopped: bool,
    },
    /// The delay of the daemon itself.
    SelfLag(Duration),
    /// A changed policy.
    Reconfigure(Config),
    /// The instance's load, as reported in the answer.
    Sample(Sample),
    /// The CPUs that execute nothing, as reported in the answer.
    Stall(Option<CpuStall>),
    /// Time has passed.
    Tick,
}

impl Event {
    /// Returns the name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::ChannelUp => "ChannelUp",
            Self::ChannelLost => "ChannelLost",
            Self::KernelAnswered => "KernelAnswered",
            Self::Answer { .. } => "Answer",
            Self::SendRefused { .. } => "SendRefused",
            Self::Ended(_) => "Ended",
            Self::Observed { .. } => "Observed",
            Self::SelfLag(_) => "SelfLag",
            Self::Reconfigure(_) => "Reconfigure",
            Self::Sample(_) => "Sample",
            Self::Stall(_) => "Stall",
            Self::Tick => "Tick",
        }
    }
}

/// Actions for the caller, and findings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this probe.
    SendProbe {
        /// Its number.
        probe: u32,
    },
    /// Check whether its kernel answers, and whether it executes at all.
    LookCloser,
    /// The first healthy answer.
    Healthy,
    /// The instance has been silent for a while.
    Suspect {
        /// Duration of the silence.
        silence: Duration,
    },
    /// The instance answered again.
    Relieved {
        /// Duration of the silence.
        silence: Duration,
    },
    /// The channel has not taken probes for a whole timeout; the instance is not to blame.
    TransportCongested,
    /// The instance has failed.
    Failed(Verdict),
}

impl Action {
    /// Returns the name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::SendProbe { .. } => "SendProbe",
            Self::LookCloser => "LookCloser",
            Self::Healthy => "Healthy",
            Self::Suspect { .. } => "Suspect",
            Self::Relieved { .. } => "Relieved",
            Self::TransportCongested => "TransportCongested",
            Self::Failed(_) => "Failed",
        }
    }
}

/// The level at which an instance failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Its kernel has ended, panicked, or answers at no level.
    KernelDead,
    /// Its kernel answers, its agent does not.
    AgentDead,
    /// Its agent answers that the workload does not run.
    WorkloadFailed,
}

impl Level {
    /// Returns the name in journal, API and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::KernelDead => "kernel_dead",
            Self::AgentDead => "agent_dead",
            Self::WorkloadFailed => "workload_failed",
        }
    }
}

/// A verdict with its evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The level.
    pub level: Level,
    /// Duration of the silence; zero for an exit event.
    pub evidence: Vec<String>,
    /// How long it had been silent; zero for an exit event.
    pub silence: Duration,
    /// The machine reported the end of the instance: nothing of it runs.
    pub ended: bool,
}
