//! Refusals and failures, with the next step for users of `kmorphctl`.

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

/// Returns the next step as text, for users of `kmorphctl`.
fn said(step: NextStep) -> String {
    match step {
        NextStep::Text(text) => text,
        NextStep::Command(command) => command_said(command),
    }
}

/// Replaces a name or an id that an older daemon did not record.
fn named(name: String) -> String {
    match name.is_empty() {
        true => "NAME".to_owned(),
        false => name,
    }
}

fn command_said(command: Command) -> String {
    match command {
        Command::ListInstances => "`kmorphctl list` shows all".to_owned(),
        Command::ListOperations => {
            "`kmorphctl operation list` shows those that are kept".to_owned()
        }
        Command::WaitForStatus { instance } => {
            let name = named(instance);
            format!("wait until it is over; `kmorphctl status {name}` shows it")
        }
        Command::SeeWhyNotRunning { wanted, instance } => {
            let name = named(instance);
            format!(
                "an instance must run to be {wanted}; `kmorphctl status {name}` shows why it does not"
            )
        }
        Command::SeeHealing { instance } => {
            let name = named(instance);
            format!("kmorphd recovers it as one that hangs; `kmorphctl status {name}` shows it")
        }
        Command::SeeKept { retry_s } => format!(
            "it is tried again every {retry_s} s, also after a restart; `kmorphctl daemon status` shows whether \
             it still has them"
        ),
        Command::SeeSelfTest { instance } => {
            let name = named(instance);
            format!(
                "`kmorphctl recovery-log --instance={name}` and the daemon's log have the steps"
            )
        }
        Command::WaitForSelfTest { instance } => {
            format!("wait for it, or `kmorphctl terminate {}`", named(instance))
        }
        Command::RecoverAfterEnd { instance } => {
            format!(
                "make sure that it ends, then `kmorphctl recover {}`",
                named(instance)
            )
        }
        Command::RecoverAfterProcesses { instance } => format!(
            "make sure that the processes named end, then `kmorphctl recover {}`",
            named(instance)
        ),
        Command::Terminate { instance } => {
            format!(
                "`kmorphctl terminate {}` ends the instance",
                named(instance)
            )
        }
        Command::PrepareMorph { instance } => {
            let name = named(instance);
            format!("begin one with `kmorphctl morph prepare {name} --kernel=FILE`")
        }
        Command::SeeMorph { instance } => {
            format!(
                "`kmorphctl morph status {}` shows where it is",
                named(instance)
            )
        }
        Command::FinishMorph { instance } => {
            let name = named(instance);
            format!(
                "finish it with `kmorphctl morph commit {name}`, or undo it with `kmorphctl morph rollback {name}`"
            )
        }
        Command::CommitOverBudget { instance } => {
            let name = named(instance);
            format!(
                "`kmorphctl morph commit {name}` takes another --downtime-budget-ms, or --force for any downtime; \
                 the morph stays validated until it expires"
            )
        }
        Command::RollBackMorph { instance } => {
            let name = named(instance);
            format!("`kmorphctl morph rollback {name}` undoes the morph, before its commit point")
        }
        Command::WaitOrCancel => {
            "wait until it is over, or cancel it: `kmorphctl operation list` shows its id"
                .to_owned()
        }
        Command::WatchOperation { operation } => {
            let id = named(operation);
            format!("`kmorphctl operation watch {id}` waits for its end")
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    /// Returns one of each command. A new command must be added here, or this code does not compile.
    fn all() -> Vec<Command> {
        let instance = || "web".to_owned();
        let wanted = "morphed".to_owned();
        let all = vec![
            Command::ListInstances,
            Command::ListOperations,
            Command::WaitForStatus {
                instance: instance(),
            },
            Command::SeeWhyNotRunning {
                wanted,
                instance: instance(),
            },
            Command::SeeHealing {
                instance: instance(),
            },
            Command::SeeKept { retry_s: 2 },
            Command::SeeSelfTest {
                instance: instance(),
            },
            Command::WaitForSelfTest {
                instance: instance(),
            },
            Command::RecoverAfterEnd {
                instance: instance(),
            },
            Command::RecoverAfterProcesses {
                instance: instance(),
            },
            Command::Terminate {
                instance: instance(),
            },
            Command::PrepareMorph {
                instance: instance(),
            },
            Command::SeeMorph {
                instance: instance(),
            },
            Command::FinishMorph {
                instance: instance(),
            },
            Command::CommitOverBudget {
                instance: instance(),
            },
            Command::RollBackMorph {
                instance: instance(),
            },
            Command::WaitOrCancel,
            Command::WatchOperation {
                operation: "op-7".to_owned(),
            },
        ];
        for command in &all {
            match command {
                Command::ListInstances
                | Command::ListOperations
                | Command::WaitForStatus { .. }
                | Command::SeeWhyNotRunning { .. }
                | Command::SeeHealing { .. }
                | Command::SeeKept { .. }
                | Command::SeeSelfTest { .. }
                | Command::WaitForSelfTest { .. }
                | Command::RecoverAfterEnd { .. }
                | Command::RecoverAfterProcesses { .. }
                | Command::Terminate { .. }
                | Command::PrepareMorph { .. }
                | Command::SeeMorph { .. }
                | Command::FinishMorph { .. }
                | Command::CommitOverBudget { .. }
                | Command::RollBackMorph { .. }
                | Command::WaitOrCancel
                | Command::WatchOperation { .. } => {}
            }
        }
        all
    }

    /// Returns the command lines that a hint quotes.
    fn quoted(hint: &str) -> Vec<String> {
        let quoted = hint.split('`').skip(1).step_by(2).map(str::to_owned);
        quoted.collect()
    }

    #[test]
    fn every_command_line_in_a_hint_is_one_that_kmorphctl_takes() {
        for command in all() {
            // Older daemons wrote only the command's name.
            let name = serde_json::to_value(&command).unwrap()["command"].clone();
            let mut steps = vec![NextStep::from(command)];
            let alone = serde_json::json!({ "command": name });
            if let Ok(step) = serde_json::from_value(alone) {
                steps.push(step);
            }
            for step in steps {
                let hint = said(step);
                let lines = quoted(&hint);
                assert!(!lines.is_empty(), "{hint}");
                for line in lines {
                    let words = line.split(' ');
                    let parsed = kmorphctl::cli::Cli::try_parse_from(words);
                    assert!(parsed.is_ok(), "{hint}: {}", parsed.unwrap_err());
                }
            }
        }
    }
}
