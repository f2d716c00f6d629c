//! The desired state of an instance.

/// The desired state of an instance. Only this survives a restart of the daemon, which determines the actual state by
/// observation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired {
    /// The instance is to run.
    Running,
    /// An operator has requested a recovery, and no successor is intended yet. The generation is fenced and
    /// replaced, whatever the policy says and whether or not the generation runs.
    Recover,
    /// The instance failed while auto-heal was off: its state does not change until an operator requests a recovery.
    Unhealed,
    /// The instance failed too often: it is fenced, and rests until an operator requests a recovery.
    Resting,
    /// A fence could not be confirmed, or a vmcore that the policy requires could not be captured.
    OperatorAction,
    /// The instance is being terminated.
    Terminating,
}

impl Desired {
    /// All states.
    pub const ALL: [Self; 6] = [
        Self::Running,
        Self::Recover,
        Self::Unhealed,
        Self::Resting,
        Self::OperatorAction,
        Self::Terminating,
    ];

    /// Returns the name in the journal.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Recover => "recover",
            Self::Unhealed => "unhealed",
            Self::Resting => "resting",
            Self::OperatorAction => "operator_action",
            Self::Terminating => "terminating",
        }
    }

    /// Returns the state with this name in the journal.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == name)
    }
}
