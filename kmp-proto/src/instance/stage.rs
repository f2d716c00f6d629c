//! States of an instance, for the engine and for people.

/// A state of the transition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A generation was started or adopted, and has not given a healthy answer yet.
    Starting,
    /// The generation was healthy, and no work is under way.
    Serving,
    /// No work is under way, and none begins until an operator acts.
    Resting,
    /// The wish for a recovery is being written.
    Asked,
    /// The instance failed while the wish for its termination is being written: no other work begins.
    Failed,
    /// The recovery waits for the back-off.
    BackingOff,
    /// The recovery waits for admission.
    Queued,
    /// The recovery is under way.
    Recovering,
    /// The morph is under way.
    Morphing,
    /// A requested capture of the memory is under way.
    Capturing,
    /// The termination is under way.
    Ending,
    /// The instance is forgotten.
    Gone,
}

impl Stage {
    /// Returns the name in the transition table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Resting => "resting",
            Self::Asked => "asked",
            Self::Failed => "failed",
            Self::BackingOff => "backing_off",
            Self::Queued => "queued",
            Self::Recovering => "recovering",
            Self::Morphing => "morphing",
            Self::Capturing => "capturing",
            Self::Ending => "ending",
            Self::Gone => "gone",
        }
    }
}

/// The condition of an instance that users see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// No healthy answer yet.
    Starting,
    /// The instance answers and reports no fault.
    Running,
    /// The instance answers, but its agent or its load shows a problem.
    Degraded,
    /// The instance is silent without a verdict yet, or frozen for a capture.
    Unresponsive,
    /// The instance failed.
    Failed,
    /// A recovery is under way.
    Recovering,
    /// A morph is under way.
    Morphing,
    /// A termination is under way.
    Terminating,
    /// The instance failed too often and is fenced.
    Quarantined,
    /// An operator has to act.
    OperatorActionNeeded,
}

impl Condition {
    /// Returns the name in events and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Degraded => "degraded",
            Self::Unresponsive => "unresponsive",
            Self::Failed => "failed",
            Self::Recovering => "recovering",
            Self::Morphing => "morphing",
            Self::Terminating => "terminating",
            Self::Quarantined => "quarantined",
            Self::OperatorActionNeeded => "operator action needed",
        }
    }
}
