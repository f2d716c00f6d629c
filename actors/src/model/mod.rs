//! The daemon's data model, as plain types. It contains no actor, no I/O and nothing of the control API: the API's
//! edge ([`crate::control`]) translates, so that either can change without the other.

pub mod capability;
mod capture;
mod doctor;
mod event;
mod failure;
pub mod generation;
pub(crate) mod guest_text;
mod morph;
mod next_step;
mod operation;
mod policy;
mod recovery;
pub(crate) mod repeated;
pub mod requests;
pub mod rows;
pub mod settings;
pub mod shown;
mod workload;

pub use capture::CaptureReport;
pub use doctor::DoctorReport;
pub use event::{Event, EventKind};
pub use failure::{Failure, FailureKind};
pub use morph::{Check, DowntimeSteps, MorphPhase, MorphRecord, OtherProvider};
pub use next_step::{Command, NextStep};
pub use operation::{Operation, OperationKind, OperationResult, OperationState, Progress};
pub use policy::{
    POLICY_MAX_TIMEOUT_S, POLICY_MIN_HEARTBEAT_S, Policy, PolicyPatch, StuckCpuPolicy, VmcorePolicy,
};
pub use recovery::{RecoveryOutcome, RecoveryRecord, VmcoreRecord};
pub use workload::Workload;
