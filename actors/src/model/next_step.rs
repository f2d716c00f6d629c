//! What a person can do about a failure. Which tool does this, and how it is called, is said at the API's edge.

use serde::{Deserialize, Serialize};

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum NextStep {
    /// Something to ask of the daemon.
    Command(Command),
    /// In words.
    Text(String),
}

/// Something to ask of the daemon. Names and ids are empty in what older daemons wrote down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// List the instances.
    ListInstances,
    /// List the operations that are kept.
    ListOperations,
    /// Look at the status: it shows when what is under way is over.
    WaitForStatus {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Look at the status: it shows why the instance does not run, as it must to be `wanted`.
    SeeWhyNotRunning {
        /// What it must run for: `morphed`, `captured`, …
        wanted: String,
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Look at the status of an instance that is healed as one that hangs.
    SeeHealing {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Look at the daemon's status: it shows what ended generations still hold. Releases are tried again.
    SeeKept {
        /// Pause between two tries, seconds.
        retry_s: u64,
    },
    /// Look at the steps of the self-test's recovery, which is one of its instance.
    SeeSelfTest {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Wait for the self-test, or terminate its instance.
    WaitForSelfTest {
        /// The name of its instance.
        instance: String,
    },
    /// See that what may still run ends, then recover the instance.
    RecoverAfterEnd {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// See that the processes named end, then recover the instance.
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
    /// Look at where the morph is.
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
    /// Commit the morph with another budget or with any downtime, or roll it back.
    CommitOverBudget {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Roll the morph back, which is possible before its commit point.
    RollBackMorph {
        /// The instance.
        #[serde(default)]
        instance: String,
    },
    /// Wait for the end of what is under way, or cancel it.
    WaitOrCancel,
    /// Wait for the end of the operation.
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
