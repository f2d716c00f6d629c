//! The desired state of an instance.

/// The desired state of an instance. Only this survives a restart of the daemon: the state is observed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired {
    /// It shall run.
    Running,
    /// An operator asked for a recovery, and no successor is intended yet: whatever the policy says, and whether or
    /// not it runs, the failed generation is fenced and replaced.
    Recover,
    /// It failed while auto-heal was off: it stays as it is until an operator has it recovered.
    Unhealed,
    /// It failed too often: it is fenced, and rests until an operator has it recovered.
    Resting,
    /// A fence could not be confirmed, or a vmcore that policy requires not be captured.
    OperatorAction,
    /// It is being ended.
    Terminating,
}

impl Desired {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Running,
        Self::Recover,
        Self::Unhealed,
        Self::Resting,
        Self::OperatorAction,
        Self::Terminating,
    ];

    /// The name in the journal.
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

    /// By its name in the journal.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == name)
    }
}
