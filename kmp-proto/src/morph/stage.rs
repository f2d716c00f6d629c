//! The progress of a morph.

/// The phase of a morph, as named in journal, API and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The target kernel boots; both sides acknowledge.
    Preparing,
    /// Both sides state their capabilities.
    Negotiating,
    /// State moves while the source serves.
    Transferring,
    /// The target checks its state.
    Validating,
    /// Validated; the morph waits for the commit.
    Committable,
    /// From the freeze to the fence of the source.
    Committing,
    /// From the decision to roll back to the source's answer that its workload serves.
    RollingBack,
    /// Over.
    Done,
}

impl Phase {
    /// Returns the name in journal, API and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Negotiating => "negotiating",
            Self::Transferring => "transferring",
            Self::Validating => "validating",
            Self::Committable => "committable",
            Self::Committing => "committing",
            Self::RollingBack => "rolling_back",
            Self::Done => "done",
        }
    }
}

/// A state of the transition table: the phase, or a step of the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// [`Phase::Preparing`].
    Preparing,
    /// [`Phase::Negotiating`].
    Negotiating,
    /// A round is under way.
    Transferring,
    /// The first round is applied, and the validation has not been requested yet.
    Held,
    /// [`Phase::Validating`].
    Validating,
    /// [`Phase::Committable`].
    Committable,
    /// The source is asked to freeze.
    Freezing,
    /// The last round is under way.
    LastRound,
    /// The target is asked to take over.
    Activating,
    /// The journal writes the commit record.
    Recording,
    /// The target is asked to serve.
    Serving,
    /// The source is asked to end its workload.
    Retiring,
    /// The source is fenced.
    FencingSource,
    /// The target is fenced for the rollback.
    FencingTarget,
    /// The source is asked to serve again.
    Resuming,
    /// [`Phase::Done`].
    Done,
}

impl Stage {
    /// Returns the name in the transition table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Held => "transferring.held",
            Self::Freezing => "committing.freezing",
            Self::LastRound => "committing.last_round",
            Self::Activating => "committing.activating",
            Self::Recording => "committing.recording",
            Self::Serving => "committed.serving",
            Self::Retiring => "committed.retiring",
            Self::FencingSource => "committed.fencing_source",
            Self::FencingTarget => "rolling_back.fencing_target",
            Self::Resuming => "rolling_back.resuming_source",
            Self::Preparing
            | Self::Negotiating
            | Self::Transferring
            | Self::Validating
            | Self::Committable
            | Self::Done => self.phase().as_str(),
        }
    }

    /// Returns the phase of this state.
    pub const fn phase(self) -> Phase {
        match self {
            Self::Preparing => Phase::Preparing,
            Self::Negotiating => Phase::Negotiating,
            Self::Transferring | Self::Held => Phase::Transferring,
            Self::Validating => Phase::Validating,
            Self::Committable => Phase::Committable,
            Self::Freezing
            | Self::LastRound
            | Self::Activating
            | Self::Recording
            | Self::Serving
            | Self::Retiring
            | Self::FencingSource => Phase::Committing,
            Self::FencingTarget | Self::Resuming => Phase::RollingBack,
            Self::Done => Phase::Done,
        }
    }
}
