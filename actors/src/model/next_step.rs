//! Next steps: how a person can act on a failure. The API's edge adds the tool and its syntax.

use serde::{Deserialize, Serialize};

/// The next step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum NextStep {
    /// A command for the daemon.
    Command(Command),
    /// Free text.
    Text(String),
}

/// A command for the daemon. Names and ids are empty in records of older daemons.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// List the instances.
    ListInstances,
    /// List the operations that the daemon keeps.
    ListOperations,
    /// Check the status: it shows when the current work is over.
    WaitForStatus {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Check the status: it shows why the instance does not run. It must run before it can be `wanted`.
    SeeWhyNotRunning {
        /// The refused action: `morphed`, `captured`, …
        wanted: String,
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Check the status of an instance that is healed as hung.
    SeeHealing {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Check the daemon's status: it shows which resources ended generations still hold. The daemon retries the
    /// release.
    SeeKept {
        /// Pause between two retries, seconds.
        retry_s: u64,
    },
    /// Check the recovery log of the self-test's instance.
    SeeSelfTest {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Wait for the self-test, or terminate its instance.
    WaitForSelfTest {
        /// The name of the self-test's instance.
        instance: String,
    },
    /// Make sure that the remaining processes end, then recover the instance.
    RecoverAfterEnd {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Make sure that the named processes end, then recover the instance.
    RecoverAfterProcesses {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Terminate the instance.
    Terminate {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Prepare a morph.
    PrepareMorph {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Check the phase of the morph.
    SeeMorph {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Commit the morph, or roll it back.
    FinishMorph {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Commit the morph with a larger budget or with any downtime, or roll it back.
    CommitOverBudget {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Roll the morph back; this is possible before its commit point.
    RollBackMorph {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Wait for the operation under way to end, or cancel it.
    WaitOrCancel,
    /// Wait for the operation to end.
    WatchOperation {
        /// Its id.
        #[serde(default)]
        operation: String,
    },
}

impl From<Command> for NextStep {
    fn from(command: Command) -> Self {
        Self::Command(command)
    }
}

impl From<String> for NextStep {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for NextStep {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}
