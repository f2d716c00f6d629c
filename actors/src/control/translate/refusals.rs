//! Refusals and failures, and what to do about them with `kmorphctl`.

use kmorph_control_api::{ApiError, ErrorCode};

use crate::model::{Command, Failure, FailureKind, NextStep};

impl From<FailureKind> for ErrorCode {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::InvalidRequest => Self::InvalidRequest,
            FailureKind::NotFound => Self::NotFound,
            FailureKind::BadKernelImage => Self::BadKernelImage,
            FailureKind::KernelUnreadable => Self::KernelUnreadable,
            FailureKind::KernelChanged => Self::KernelChanged,
            FailureKind::StartFailed => Self::StartFailed,
            FailureKind::AlreadyExists => Self::AlreadyExists,
            FailureKind::WrongState => Self::WrongState,
            FailureKind::Incompatible => Self::Incompatible,
            FailureKind::OverBudget => Self::OverBudget,
            FailureKind::InsufficientResources => Self::InsufficientResources,
            FailureKind::Busy => Self::Busy,
            FailureKind::Timeout => Self::Timeout,
            FailureKind::Unavailable => Self::Unavailable,
            FailureKind::JournalUnavailable => Self::JournalUnavailable,
            FailureKind::OperatorActionNeeded => Self::OperatorActionNeeded,
            FailureKind::NotImplemented => Self::NotImplemented,
            FailureKind::Internal => Self::Internal,
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        Self {
            code: failure.kind.into(),
            message: failure.message,
            next_step: failure.next_step.map(said),
        }
    }
}

/// What to do, for somebody who has `kmorphctl`.
fn said(step: NextStep) -> String {
    let text = match step {
        NextStep::Text(text) => return text,
        NextStep::Command(command) => match command {
            Command::ListInstances => "`kmorphctl list` shows all",
            Command::ListOperations => "`kmorphctl operation list` shows those that are kept",
            Command::WaitForStatus => "wait until it is over; `kmorphctl status` shows it",
            Command::SeeWhyNotRunning { wanted } => {
                return format!(
                    "an instance must run to be {wanted}; `kmorphctl status` shows why it does not"
                );
            }
            Command::SeeHealing => "it is healed as one that hangs; `kmorphctl status` shows it",
            Command::SeeKept { retry_s } => {
                return format!(
                    "it is tried again every {retry_s} s, also after a restart; `kmorphctl daemon status` shows whether \
                     it still has them"
                );
            }
            Command::SeeSelfTest => {
                "`kmorphctl recovery-log kmorph-doctor` and the daemon's log have the steps"
            }
            Command::WaitForSelfTest { instance } => {
                return format!("wait for it, or `kmorphctl terminate {instance}`");
            }
            Command::RecoverAfterEnd => "see that it ends, then `kmorphctl recover`",
            Command::RecoverAfterProcesses => {
                "see that the processes named end, then `kmorphctl recover`"
            }
            Command::Terminate => "`kmorphctl terminate` ends the instance",
            Command::PrepareMorph => "begin one with `kmorphctl morph prepare`",
            Command::SeeMorph => "`kmorphctl morph status` shows where it is",
            Command::FinishMorph => {
                "finish it with `kmorphctl morph commit`, or undo it with `kmorphctl morph rollback`"
            }
            Command::CommitOverBudget => {
                "`kmorphctl morph commit` takes another --downtime-budget-ms, or --force for any downtime; the \
                 morph stays validated until it expires"
            }
            Command::RollBackMorph => {
                "`kmorphctl morph rollback` undoes the morph, before its commit point"
            }
            Command::WaitOrCancel => {
                "wait until it is over, or end it with `kmorphctl operation cancel`"
            }
            Command::WatchOperation => "`kmorphctl operation watch` waits for its end",
        },
    };
    text.to_owned()
}
